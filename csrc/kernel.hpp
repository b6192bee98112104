// The part of a kernel that all instruction sets share. Each includes this in a source file of its own, compiled with
// its own flags; everything is in an anonymous namespace and calls no inline function of the standard library, or the
// linker might keep the copy of another instruction set.
//
// An instruction set is a struct V of
//     kRows, kBlocks, kLanes    what multiply_many holds in registers: rows, blocks of tokens; tokens in a block
//     I2                        the reader of format i2
//     Reader<format>            readers of other formats; I2 itself where those are decoded to i2 first
//     multiply_many
// and a reader, made of a weight, is a struct of
//     kBytes, kPlanes           codes in a plane, planes in a chunk
//     kReads, kStep             bytes that load reads, bytes by which it goes on
//     Word load(p), load_some(p, n)   a chunk of packed codes; only n < kReads bytes are there
//     Sums                      accumulators of a row, 0 at first
//     add(sums, word, x)        adds the products with the planes at x
//     finish(sums[4], out)      their four integers
//     store(word, out)          codes + 1 as bytes, plane by plane
#pragma once

#include <string.h>

#include "packed_linear.hpp"

namespace sparse_bitnet {
namespace {

constexpr float kSmallestMagnitude = 1e-5f;  // as numerics/activation.py has it
constexpr float kSquareRootOf7 = 2.6457512378692627f;
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, half to even, below 2^22
constexpr int kTogether = 4;             // rows that share a load of activations
// Weights are asked for this many bytes ahead, first into L2, which has room for more requests at a time than L1, then
// into L1. To L1 alone, the linears of a model take 17 to 33 % longer; with neither, 60 % (1 and 2 threads of a Xeon).
constexpr size_t kAheadInL2 = 6144, kAheadInL1 = 2560;

inline void prefetch(const uint8_t* data, size_t bytes) {
    for (size_t line = 0; line < bytes; line += 64) {
        __builtin_prefetch(data + line + kAheadInL2, 0, 2);
        __builtin_prefetch(data + line + kAheadInL1, 0, 3);
    }
}

template <class To, class From>
inline To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

inline uint32_t four(const void* bytes) {
    uint32_t word;
    memcpy(&word, bytes, 4);
    return word;
}

inline float float_from(float value) { return value; }

struct BF16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

inline float float_from(BF16 value) { return bits_of<float>(uint32_t{value.bits} << 16); }

inline float float_from(F16 value) {
    const uint32_t magnitude = value.bits & 0x7fffu, sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    // As an fp32 with the exponent's bits in place, 2^112 too small, subnormals included.
    const float scaled = bits_of<float>(magnitude << 13) * 0x1p112f;
    return bits_of<float>(sign | (bits_of<uint32_t>(scaled) | (magnitude >= 0x7c00 ? 0x7f800000u : 0u)));
}

// Rounded half to even, as PyTorch does.
inline void assign(float value, float& to) { to = value; }

inline void assign(float value, BF16& to) {
    const uint32_t bits = bits_of<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline void assign(float value, F16& to) {
    const uint32_t bits = bits_of<uint32_t>(value), magnitude = bits & 0x7fffffff;
    const uint32_t subnormal = bits_of<uint32_t>(bits_of<float>(magnitude) * 0x1p24f + kRounder) & 0x7ff;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
    half = magnitude >= 0x477ff000 ? 0x7c00 : half;
    half = magnitude > 0x7f800000 ? 0x7e00 : half;
    to.bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
}

template <class T>
float largest_magnitude(const T* x, size_t width) {
    uint32_t largest = 0;  // as bits: ordered as magnitudes are, NaN above infinity
    for (size_t i = 0; i < width; ++i) {
        const uint32_t magnitude = bits_of<uint32_t>(float_from(x[i])) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    return bits_of<float>(largest);
}

template <class T>
float mean_magnitude(const T* x, size_t width) {
    double sums[8] = {};
    size_t i = 0;
    for (; i + 8 <= width; i += 8)
        for (int lane = 0; lane < 8; ++lane) sums[lane] += __builtin_fabsf(float_from(x[i + lane]));
    for (; i < width; ++i) sums[0] += __builtin_fabsf(float_from(x[i]));
    const double sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    return static_cast<float>(sum / static_cast<double>(width));
}

// numerics/activation.py, bit for bit. The codes of a token that holds NaN or infinity are 0: its scale makes y NaN.
template <class R, class T>
void quantize_token(const T* x, size_t width, bool int4, int8_t* arranged, int32_t* sum, float* scale) {
    const float magnitude = int4 ? mean_magnitude(x, width) : largest_magnitude(x, width);
    const bool is_finite = magnitude < __builtin_inff();
    const float divisor = magnitude < kSmallestMagnitude ? kSmallestMagnitude : magnitude;  // NaN stays NaN
    *scale = static_cast<float>(static_cast<double>(int4 ? kSquareRootOf7 : 127.0f) / static_cast<double>(divisor));
    const float factor = is_finite ? *scale : 0.0f;
    const int32_t least = int4 ? -8 : -128, most = int4 ? 7 : 127;
    constexpr size_t kChunk = size_t{R::kPlanes} * R::kBytes;
    int32_t total = 0;
    for (size_t start = 0; start < width; start += kChunk, arranged += kChunk) {
        int8_t codes[kChunk];
        const size_t some = width - start < kChunk ? width - start : kChunk;
        if (some < kChunk || !is_finite) memset(codes, 0, sizeof codes);
        for (size_t i = 0; is_finite && i < some; ++i) {
            int32_t code = bits_of<int32_t>(float_from(x[start + i]) * factor + kRounder) - bits_of<int32_t>(kRounder);
            code = code < least ? least : code;
            code = code > most ? most : code;
            codes[i] = static_cast<int8_t>(code);
            total += code;
        }
        for (int plane = 0; plane < R::kPlanes; ++plane)
            for (int i = 0; i < R::kBytes; ++i) arranged[plane * R::kBytes + i] = codes[i * R::kPlanes + plane];
    }
    *sum = total;
}

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

template <class V, Format format>
constexpr bool kDecoded = format != Format::i2 && kSame<typename V::template Reader<format>, typename V::I2>;

// Calls `Do<V, format>::run(arguments...)` for the format of the weight.
template <template <class, Format> class Do, class V, class... Arguments>
auto by_format(const Weight& weight, Arguments... arguments) {
    switch (weight.format) {
        case Format::t5: return Do<V, Format::t5>::run(weight, arguments...);
        case Format::g4: return Do<V, Format::g4>::run(weight, arguments...);
        case Format::g4s2: return Do<V, Format::g4s2>::run(weight, arguments...);
        case Format::g4s3: return Do<V, Format::g4s3>::run(weight, arguments...);
        default: return Do<V, Format::i2>::run(weight, arguments...);
    }
}

template <class V, Format format>
struct ArrangedWidth {
    static size_t run(const Weight& weight) {
        using R = typename V::template Reader<format>;
        constexpr size_t chunk = size_t{R::kPlanes} * R::kBytes;
        return (weight.in_features + chunk - 1) / chunk * chunk;
    }
};

template <class V, Format format>
struct Quantize {
    static void run(const Weight& weight, const Problem* problem, size_t token, int8_t* arranged, int32_t* sum,
                    float* scale) {
        using R = typename V::template Reader<format>;
        const size_t width = weight.in_features;
        switch (problem->dtype) {
            case Dtype::f32:
                return quantize_token<R>(static_cast<const float*>(problem->x) + token * width, width, problem->int4,
                                         arranged, sum, scale);
            case Dtype::bf16:
                return quantize_token<R>(static_cast<const BF16*>(problem->x) + token * width, width, problem->int4,
                                         arranged, sum, scale);
            case Dtype::f16:
                return quantize_token<R>(static_cast<const F16*>(problem->x) + token * width, width, problem->int4,
                                         arranged, sum, scale);
        }
    }
};

// Rows as a reader wants them: packed, or decoded to i2 where it reads nothing else.
template <class V, Format format>
struct Rows {
    size_t bytes;
    const uint8_t* at[kTogether];

    Rows(const Weight& weight, size_t row, size_t count) {
        if constexpr (kDecoded<V, format>) {
            bytes = i2_bytes(weight.in_features);
            uint8_t* decoded = scratch(Scratch::decoded, kTogether * (bytes + 8));
            prefetch(weight.row(row), count * weight.row_bytes);
            for (size_t r = 0; r < count; ++r, decoded += bytes + 8) {
                decode_to_i2(weight, weight.row(row + r), decoded);
                at[r] = decoded;
            }
        } else {
            bytes = weight.row_bytes;
            for (size_t r = 0; r < count; ++r) at[r] = weight.row(row + r);
        }
        for (size_t r = count; r < kTogether; ++r) at[r] = at[0];
    }
};

template <class V, Format format>
struct MultiplyFew {
    static void run(const Weight& weight, size_t row, size_t rows, const int8_t* arranged, size_t tokens,
                    int32_t* out) {
        using R = typename V::template Reader<format>;
        const R reader(weight);
        const size_t width = ArrangedWidth<V, format>::run(weight);
        for (size_t first = 0; first < rows; first += kTogether) {
            const size_t count = rows - first < kTogether ? rows - first : kTogether;
            const Rows<V, format> packed(weight, row + first, count);
            for (size_t token = 0; token < tokens; ++token) {
                int32_t sums[kTogether];
                multiply(reader, packed, arranged + token * width, sums);
                for (size_t r = 0; r < count; ++r) out[token * rows + first + r] = sums[r];
            }
        }
    }

    template <class R>
    static inline void multiply(const R& reader, const Rows<V, format>& packed, const int8_t* x, int32_t* out) {
        typename R::Sums sums[kTogether] = {};
        size_t at = 0;
        for (; at + R::kReads <= packed.bytes; at += R::kStep, x += R::kPlanes * R::kBytes) {
            // The rows follow each other in memory: further on they are asked for in that order.
            if (!kDecoded<V, format>) prefetch(packed.at[0] + at * kTogether, kTogether * R::kStep);
#pragma GCC unroll 4
            for (int r = 0; r < kTogether; ++r) reader.add(sums[r], reader.load(packed.at[r] + at), x);
        }
        for (; at < packed.bytes; at += R::kStep, x += R::kPlanes * R::kBytes) {
#pragma GCC unroll 4
            for (int r = 0; r < kTogether; ++r)
                reader.add(sums[r], reader.load_some(packed.at[r] + at, packed.bytes - at), x);
        }
        reader.finish(sums, out);
    }
};

template <class V, Format format>
struct Unpack {
    static void run(const Weight& weight, size_t row, size_t rows, size_t stride, uint8_t* out) {
        using R = typename V::template Reader<format>;
        const R reader(weight);
        for (size_t r = 0; r < rows; ++r) {
            const Rows<V, format> packed(weight, row + r, 1);
            uint8_t* to = out + r * stride;
            size_t at = 0;
            for (; at + R::kReads <= packed.bytes; at += R::kStep, to += R::kPlanes * R::kBytes)
                reader.store(reader.load(packed.at[0] + at), to);
            for (; at < packed.bytes; at += R::kStep, to += R::kPlanes * R::kBytes)
                reader.store(reader.load_some(packed.at[0] + at, packed.bytes - at), to);
        }
    }
};

template <class V>
void interleave(const int8_t* arranged, size_t stride, size_t width, int8_t* block) {
    for (size_t at = 0; at < width; at += 4)
        for (int lane = 0; lane < V::kLanes; ++lane, block += 4) memcpy(block, arranged + lane * stride + at, 4);
}

// The reference's own steps, each rounded as there: a quotient, a product, a sum, the cast.
inline void rescale(const Problem& problem, size_t token, size_t row, size_t rows, const int32_t* out, int32_t sum,
                    float scale) {
    constexpr size_t kAtOnce = 64;
    float rounded_later[kAtOnce];
    for (size_t start = 0; start < rows; start += kAtOnce) {
        const size_t some = rows - start < kAtOnce ? rows - start : kAtOnce, at = row + start;
        const int32_t* from = out + start;
        // Floats go where they belong at once: compilers make of a loop that only copies a call that takes longer.
        float* values = problem.dtype == Dtype::f32
                            ? static_cast<float*>(problem.y) + token * problem.weight.rows + at
                            : rounded_later;
        if (problem.row_scale != nullptr) {
            for (size_t i = 0; i < some; ++i)
                values[i] = static_cast<float>(from[i] - sum) * (problem.row_scale[at + i] / scale);
        } else {
            const float ratio = problem.scale[0] / scale;
            for (size_t i = 0; i < some; ++i) values[i] = static_cast<float>(from[i] - sum) * ratio;
        }
        const auto add_bias = [&](const auto* bias) {
            for (size_t i = 0; i < some; ++i) values[i] += float_from(bias[at + i]);
        };
        if (problem.bias != nullptr) {
            switch (problem.bias_dtype) {
                case Dtype::f32: add_bias(static_cast<const float*>(problem.bias)); break;
                case Dtype::bf16: add_bias(static_cast<const BF16*>(problem.bias)); break;
                case Dtype::f16: add_bias(static_cast<const F16*>(problem.bias)); break;
            }
        }
        const auto write = [&](auto* y) {
            y += token * problem.weight.rows + at;
            for (size_t i = 0; i < some; ++i) assign(values[i], y[i]);
        };
        switch (problem.dtype) {
            case Dtype::f32: break;
            case Dtype::bf16: write(static_cast<BF16*>(problem.y)); break;
            case Dtype::f16: write(static_cast<F16*>(problem.y)); break;
        }
    }
}

inline uint64_t read(const uint8_t* data, size_t bytes) {
    uint64_t sums[32] = {};
    for (size_t at = 0; at + sizeof sums <= bytes; at += sizeof sums) {
        uint64_t some[32];
        prefetch(data + at, sizeof sums);
        memcpy(some, data + at, sizeof some);
        for (int i = 0; i < 32; ++i) sums[i] += some[i];
    }
    uint64_t sum = 0;
    for (const uint64_t one : sums) sum += one;
    return sum;
}

template <class V>
constexpr Kernel make_kernel(const char* name, size_t many_tokens, const FloatKernel* floats) {
    Kernel kernel{};
    kernel.name = name;
    kernel.floats = floats;
    kernel.many_tokens = many_tokens;
    kernel.lanes = V::kLanes;
    kernel.block_rows = V::kRows;
    kernel.most_blocks = V::kBlocks;
    kernel.arranged_width = [](const Weight& weight) { return by_format<ArrangedWidth, V>(weight); };
    kernel.quantize = [](const Problem& problem, size_t token, int8_t* arranged, int32_t* sum, float* scale) {
        by_format<Quantize, V>(problem.weight, &problem, token, arranged, sum, scale);
    };
    kernel.multiply_few = [](const Weight& weight, size_t row, size_t rows, const int8_t* arranged, size_t tokens,
                             int32_t* out) { by_format<MultiplyFew, V>(weight, row, rows, arranged, tokens, out); };
    kernel.interleave = interleave<V>;
    kernel.unpack = [](const Weight& weight, size_t row, size_t rows, size_t stride, uint8_t* out) {
        by_format<Unpack, V>(weight, row, rows, stride, out);
    };
    kernel.multiply_many = V::multiply_many;
    kernel.rescale = rescale;
    kernel.read = read;
    return kernel;
}

}  // namespace
}  // namespace sparse_bitnet
