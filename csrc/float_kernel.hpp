// What a decoder computes in floats, and its head: the parts of a transformer that are not packed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparse_bitnet {

enum class Dtype : int { f32, bf16, f16 };

// Head dimensions and positions are rounded up to this, with zeros: every vector of floats divides it.
constexpr std::size_t kGrain = 32;

// Positions that are looked at together: what they take stays in the cache, however long the text.
constexpr std::size_t kSpan = 256;

// Queries of one head of keys and values, each over the first `seen` positions.
struct Attention {
    const float* keys;    // [positions / lanes, head, lanes]: side by side, so that no sum goes across a vector
    const float* values;  // [positions, padded head]
    std::size_t head, padded_head, rows;
    const float* queries;       // [rows, head], scaled
    const std::uint32_t* seen;  // [rows], at least 1, not falling
    float* scores;              // [rows, kSpan], to work in
    float* out;                 // [rows, padded head]
};

// The matrix that turns hidden states into logits: int8 with a scale for each row, or as it is stored.
struct Head {
    const void* rows;     // [vocabulary, stride]
    const float* scales;  // [vocabulary], null where it is not int8
    Dtype dtype;          // where it is not int8
    std::size_t width, stride;
};

// In `float_loops.hpp`; one for each set of compiler flags.
struct FloatKernel {
    std::size_t lanes;
    void (*rms_norm)(const float* x, const float* weight, float epsilon, std::size_t width, float* y);
    void (*add)(const float* x, std::size_t width, float* y);
    // silu(gate) * up -> gate
    void (*swiglu)(float* gate, const float* up, std::size_t width);
    void (*attend)(const Attention&);
    // Rows first .. first + rows of the head times `x`: codes [tokens, stride] and their scales for int8, else floats.
    void (*multiply_codes)(const Head&, std::size_t first, std::size_t rows, const std::int16_t* x, const float* scales,
                           std::size_t tokens, std::size_t out_stride, float* out);
    void (*multiply_floats)(const Head&, std::size_t first, std::size_t rows, const float* x, std::size_t tokens,
                            std::size_t out_stride, float* out);
    void (*widen)(const void* x, Dtype, std::size_t width, float* y);
};

extern const FloatKernel kFloatAvx512, kFloatAvx2, kFloatPlain;

}  // namespace sparse_bitnet
