// The loops of a FloatKernel, the same for every instruction set: V has kWidth, the floats of a vector, and Codes, the
// products of the int8 head. As in kernel.hpp, all is in an anonymous namespace and compiled with flags of its own.
#pragma once

#include "float_kernel.hpp"
#include "kernel.hpp"

namespace sparse_bitnet {
namespace {

template <int kWidth>
struct VectorOf;
template <>
struct VectorOf<4> {
    typedef float F __attribute__((vector_size(16)));
    typedef uint32_t U __attribute__((vector_size(16)));
};
template <>
struct VectorOf<8> {
    typedef float F __attribute__((vector_size(32)));
    typedef uint32_t U __attribute__((vector_size(32)));
};
template <>
struct VectorOf<16> {
    typedef float F __attribute__((vector_size(64)));
    typedef uint32_t U __attribute__((vector_size(64)));
};

template <int kWidth>
struct Floats {
    using Vector = typename VectorOf<kWidth>::F;
    using Bits = typename VectorOf<kWidth>::U;

    [[gnu::always_inline]] static Vector load(const float* p) {
        Vector v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    [[gnu::always_inline]] static void store(const Vector& v, float* p) { memcpy(p, &v, sizeof v); }
    [[gnu::always_inline]] static float sum(const Vector& v) {
        float all = 0;
        for (int i = 0; i < kWidth; ++i) all += v[i];
        return all;
    }

    // e^x to 2 units in the last place: 2^n by its bits, times a polynomial between -ln(2) / 2 and ln(2) / 2.
    [[gnu::always_inline]] static Vector exp(const Vector& any) {
        const Vector least = Vector{} - 87.0f, most = Vector{} + 88.0f;
        Vector x = any < least ? least : any;
        x = x > most ? most : x;
        const Vector rounded = x * 1.44269504f + kRounder;
        const Vector n = rounded - kRounder;
        Bits exponent;
        memcpy(&exponent, &rounded, sizeof exponent);
        x = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts
        Vector y = x * 1.9875691500e-4f + 1.3981999507e-3f;
        y = y * x + 8.3334519073e-3f;
        y = y * x + 4.1665795894e-2f;
        y = y * x + 1.6666665459e-1f;
        y = y * x + 5.0000001201e-1f;
        y = y * x * x + x + 1.0f;
        Bits bits;
        memcpy(&bits, &y, sizeof bits);
        bits += (exponent - bits_of<uint32_t>(kRounder)) << 23;
        memcpy(&y, &bits, sizeof y);
        return y;
    }
};

template <class V>
struct FloatLoops {
    static constexpr int kWidth = V::kWidth;
    using F = Floats<kWidth>;
    using Vector = typename F::Vector;

    static void rms_norm(const float* x, const float* weight, float epsilon, size_t width, float* y) {
        Vector squares{};
        size_t i = 0;
        for (; i + kWidth <= width; i += kWidth) squares += F::load(x + i) * F::load(x + i);
        float sum = F::sum(squares);
        for (; i < width; ++i) sum += x[i] * x[i];
        const float factor = 1.0f / __builtin_sqrtf(sum / static_cast<float>(width) + epsilon);
        for (i = 0; i < width; ++i) y[i] = x[i] * factor * weight[i];
    }

    static void add(const float* x, size_t width, float* y) {
        for (size_t i = 0; i < width; ++i) y[i] += x[i];
    }

    static void swiglu(float* gate, const float* up, size_t width) {
        const auto combine = [](float* g, const float* u) {
            const Vector x = F::load(g);
            F::store(x / (F::exp(-x) + 1.0f) * F::load(u), g);
        };
        size_t i = 0;
        for (; i + kWidth <= width; i += kWidth) combine(gate + i, up + i);
        if (i < width) {
            float g[kWidth] = {}, u[kWidth] = {};
            memcpy(g, gate + i, 4 * (width - i));
            memcpy(u, up + i, 4 * (width - i));
            combine(g, u);
            memcpy(gate + i, g, 4 * (width - i));
        }
    }

    // scores[r] = queries[r] . keys of `positions` positions from `from`, rounded up to kGrain
    template <int kRows>
    static void score(const Attention& a, size_t row, size_t from, size_t positions) {
        constexpr int kVectors = kGrain / kWidth > 2 ? 2 : kGrain / kWidth;
        for (size_t at = 0; at < positions; at += size_t{kWidth} * kVectors) {
            Vector sums[kRows][kVectors] = {};
            const float* keys = a.keys + (from + at) * a.head;
            for (size_t d = 0; d < a.head; ++d) {
                Vector k[kVectors];
                for (int v = 0; v < kVectors; ++v) k[v] = F::load(keys + (v * a.head + d) * kWidth);
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
                    for (int v = 0; v < kVectors; ++v) sums[r][v] += k[v] * a.queries[(row + r) * a.head + d];
            }
            for (int r = 0; r < kRows; ++r)
                for (int v = 0; v < kVectors; ++v)
                    F::store(sums[r][v], a.scores + (row + r) * kSpan + at + v * kWidth);
        }
    }

    // out[r] = out[r] * kept[r] + scores[r] . values
    template <int kRows, int kVectors>
    static void gather(const Attention& a, size_t row, size_t from, size_t positions, const float* kept) {
        for (size_t d = 0; d + kVectors * kWidth <= a.padded_head; d += kVectors * kWidth)
            gather_some<kRows, kVectors>(a, row, from, positions, kept, d);
        for (size_t d = a.padded_head / (kVectors * kWidth) * (kVectors * kWidth); d < a.padded_head; d += kWidth)
            gather_some<kRows, 1>(a, row, from, positions, kept, d);
    }

    template <int kRows, int kVectors>
    static void gather_some(const Attention& a, size_t row, size_t from, size_t positions, const float* kept,
                            size_t d) {
        Vector sums[kRows][kVectors];
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < kVectors; ++v)
                sums[r][v] = F::load(a.out + (row + r) * a.padded_head + d + v * kWidth) * kept[r];
        for (size_t t = 0; t < positions; ++t) {
            Vector values[kVectors];
            for (int v = 0; v < kVectors; ++v)
                values[v] = F::load(a.values + (from + t) * a.padded_head + d + v * kWidth);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) sums[r][v] += values[v] * a.scores[(row + r) * kSpan + t];
        }
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < kVectors; ++v)
                F::store(sums[r][v], a.out + (row + r) * a.padded_head + d + v * kWidth);
    }

    // Scores of `seen` positions -> e^(score - maximum), 0 up to `positions`; what to keep of the sums so far.
    static float weigh(float* scores, size_t seen, size_t positions, float* maximum, float* total) {
        Vector mosts = Vector{} + *maximum;
        size_t at = 0;
        for (; at + kWidth <= seen; at += kWidth) {
            const Vector some = F::load(scores + at);
            mosts = some > mosts ? some : mosts;
        }
        float most = *maximum;
        for (int i = 0; i < kWidth; ++i) most = mosts[i] > most ? mosts[i] : most;
        for (; at < seen; ++at) most = scores[at] > most ? scores[at] : most;
        Vector sums{};
        for (size_t t = 0; t < seen; t += kWidth) {
            const Vector e = F::exp(F::load(scores + t) - most);
            F::store(e, scores + t);
            if (t + kWidth <= seen) sums += e;
        }
        float sum = F::sum(sums);
        for (size_t t = seen / kWidth * kWidth; t < seen; ++t) sum += scores[t];
        for (size_t t = seen; t < positions; ++t) scores[t] = 0;
        float difference[kWidth] = {*maximum - most};
        F::store(F::exp(F::load(difference)), difference);
        *maximum = most;
        *total = *total * difference[0] + sum;
        return difference[0];
    }

    // A span of positions at a time: sums made under a smaller maximum are scaled down when a larger one comes.
    static void attend(const Attention& a) {
        constexpr size_t kMostRows = 8;
        for (size_t row = 0; row < a.rows;) {
            const size_t left = a.rows - row, some = left >= kMostRows ? kMostRows : left >= 4 ? 4 : left >= 2 ? 2 : 1;
            const size_t all = a.seen[row + some - 1];
            float maxima[kMostRows], totals[kMostRows] = {}, kept[kMostRows];
            for (size_t r = 0; r < some; ++r) maxima[r] = -__builtin_inff();
            memset(a.out + row * a.padded_head, 0, some * a.padded_head * sizeof(float));
            for (size_t from = 0; from < all; from += kSpan) {
                const size_t positions = all - from < kSpan ? all - from : kSpan;
                switch (some) {
                    case 8: score<8>(a, row, from, positions); break;
                    case 4: score<4>(a, row, from, positions); break;
                    case 2: score<2>(a, row, from, positions); break;
                    default: score<1>(a, row, from, positions); break;
                }
                for (size_t r = 0; r < some; ++r) {
                    const size_t seen = a.seen[row + r] <= from ? 0 : a.seen[row + r] - from;
                    kept[r] = weigh(a.scores + (row + r) * kSpan, seen < positions ? seen : positions, positions,
                                    maxima + r, totals + r);
                }
                switch (some) {
                    case 8:
                        gather<4, 4>(a, row, from, positions, kept);
                        gather<4, 4>(a, row + 4, from, positions, kept + 4);
                        break;
                    case 4: gather<4, 4>(a, row, from, positions, kept); break;
                    case 2: gather<2, 4>(a, row, from, positions, kept); break;
                    default: gather<1, 4>(a, row, from, positions, kept); break;
                }
            }
            for (size_t r = 0; r < some; ++r)
                for (size_t d = 0; d < a.padded_head; ++d) a.out[(row + r) * a.padded_head + d] /= totals[r];
            row += some;
        }
    }

    static void multiply_codes(const Head& head, size_t first, size_t rows, const int16_t* x, const float* scales,
                               size_t tokens, size_t out_stride, float* out) {
        for (size_t row = first; row < first + rows; row += kTogether) {
            const size_t count = first + rows - row < kTogether ? first + rows - row : kTogether;
            const int8_t* codes[kTogether];
            for (size_t r = 0; r < kTogether; ++r)
                codes[r] = static_cast<const int8_t*>(head.rows) + (row + (r < count ? r : 0)) * head.stride;
            for (size_t token = 0; token < tokens; ++token) {
                int32_t sums[kTogether];
                V::Codes::multiply(codes, x + token * head.stride, head.stride, sums);
                for (size_t r = 0; r < count; ++r)
                    out[token * out_stride + row + r] =
                        static_cast<float>(sums[r]) * (head.scales[row + r] / scales[token]);
            }
        }
    }

    template <class T>
    static void multiply_rows(const Head& head, size_t first, size_t rows, const float* x, size_t tokens,
                              size_t out_stride, float* out) {
        for (size_t row = first; row < first + rows; ++row) {
            const T* weight = static_cast<const T*>(head.rows) + row * head.stride;
            for (size_t token = 0; token < tokens; ++token) {
                const float* from = x + token * head.width;
                Vector sums[4] = {};
                size_t i = 0;
                for (; i + 4 * kWidth <= head.width; i += 4 * kWidth) {
                    float wide[4 * kWidth];
                    for (int j = 0; j < 4 * kWidth; ++j) wide[j] = float_from(weight[i + j]);
                    for (int v = 0; v < 4; ++v) sums[v] += F::load(wide + v * kWidth) * F::load(from + i + v * kWidth);
                }
                float sum = F::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
                for (; i < head.width; ++i) sum += float_from(weight[i]) * from[i];
                out[token * out_stride + row] = sum;
            }
        }
    }

    static void multiply_floats(const Head& head, size_t first, size_t rows, const float* x, size_t tokens,
                                size_t out_stride, float* out) {
        switch (head.dtype) {
            case Dtype::f32: return multiply_rows<float>(head, first, rows, x, tokens, out_stride, out);
            case Dtype::bf16: return multiply_rows<BF16>(head, first, rows, x, tokens, out_stride, out);
            case Dtype::f16: return multiply_rows<F16>(head, first, rows, x, tokens, out_stride, out);
        }
    }

    static void widen(const void* x, Dtype dtype, size_t width, float* y) {
        const auto each = [&](const auto* from) {
            for (size_t i = 0; i < width; ++i) y[i] = float_from(from[i]);
        };
        switch (dtype) {
            case Dtype::f32: return each(static_cast<const float*>(x));
            case Dtype::bf16: return each(static_cast<const BF16*>(x));
            case Dtype::f16: return each(static_cast<const F16*>(x));
        }
    }
};

template <class V>
constexpr FloatKernel make_float_kernel() {
    using L = FloatLoops<V>;
    return {V::kWidth, L::rms_norm, L::add, L::swiglu, L::attend, L::multiply_codes, L::multiply_floats, L::widen};
}

// Products of int8 and int16 in loops that a compiler turns into vectors.
struct PlainCodes {
    static void multiply(const int8_t* const* codes, const int16_t* x, size_t width, int32_t* out) {
        for (int r = 0; r < kTogether; ++r) {
            int32_t sum = 0;
            for (size_t i = 0; i < width; ++i) sum += int32_t{codes[r][i]} * int32_t{x[i]};
            out[r] = sum;
        }
    }
};

}  // namespace
}  // namespace sparse_bitnet
