// What the kernels of packed_linear are given and give: y = (q . codes^T) * scale / s + bias, q the activations as int8.
//
// Shapes: T tokens, O rows of the weight, I in_features. A weight is stored as src/sparse_bitnet/formats says.
#pragma once

#include <cstddef>
#include <cstdint>

#include "float_kernel.hpp"

namespace sparse_bitnet {

enum class Format : int { i2, t5, g4, g4s2, g4s3 };

struct Weight {
    const std::uint8_t* bytes;  // [rows, row_bytes]
    std::size_t rows;
    std::size_t in_features;
    std::size_t row_bytes;
    Format format;

    [[gnu::always_inline]] const std::uint8_t* row(std::size_t index) const { return bytes + index * row_bytes; }
};

struct Problem {
    Weight weight;
    const void* x;  // [T, I], one token after the other
    Dtype dtype;    // of x and y
    std::size_t tokens;
    bool int4;  // activations of 4 bits, still one to a byte
    const float* scale;
    const float* row_scale;  // [O] where parts of the weight have scales of their own, else null: scale[0] is that of all
    const void* bias;        // [O] or null
    Dtype bias_dtype;
    void* y;  // [T, O]
};

// What one instruction set does. Activations are *arranged*: the weight's bytes are read a vector at a time and cut into
// planes of codes (every fourth code for i2), and each plane is multiplied by the activations that belong to it, which
// therefore lie plane by plane, chunk by chunk, with zeros where a chunk goes beyond I. The width of a token so arranged
// is a multiple of 4. Codes are multiplied as code + 1 = 0, 1, 2, unsigned; the sum of the activations is taken off last.
struct Kernel {
    const char* name;
    const FloatKernel* floats;  // what a decoder does besides, on the same processors
    std::size_t (*arranged_width)(const Weight&);
    // Token `token` of the problem -> arranged [arranged_width], the sum of its codes, and its scale.
    void (*quantize)(const Problem&, std::size_t token, std::int8_t* arranged, std::int32_t* sum, float* scale);
    // `rows` rows from `row` times each of `tokens` arranged tokens -> out [tokens, rows], of code + 1.
    void (*multiply_few)(const Weight&, std::size_t row, std::size_t rows, const std::int8_t* arranged,
                         std::size_t tokens, std::int32_t* out);
    // From this many tokens on it is faster to unpack rows once and use them for all tokens: many tokens lie in blocks
    // of `lanes`, side by side, and `block_rows` rows are multiplied with at most `most_blocks` of them at a time.
    std::size_t many_tokens, lanes, block_rows, most_blocks;
    // arranged [lanes, stride] -> block [width / 4, lanes, 4]
    void (*interleave)(const std::int8_t* arranged, std::size_t stride, std::size_t width, std::int8_t* block);
    // Rows as bytes 0, 1, 2 in the order of arranged activations -> out [rows, stride]
    void (*unpack)(const Weight&, std::size_t row, std::size_t rows, std::size_t stride, std::uint8_t* out);
    // unpacked [block_rows, stride] times block [blocks, width / 4, lanes, 4] -> out [blocks * lanes, out_stride]
    void (*multiply_many)(const std::uint8_t* unpacked, std::size_t stride, std::size_t width, const std::int8_t* block,
                          std::size_t blocks, std::size_t out_stride, std::int32_t* out);
    // The integers of one token for `rows` rows from `row` -> y
    void (*rescale)(const Problem&, std::size_t token, std::size_t row, std::size_t rows, const std::int32_t* out,
                    std::int32_t sum, float scale);
    // A sum over `bytes` bytes: what it takes to read them and nothing else.
    std::uint64_t (*read)(const std::uint8_t* data, std::size_t bytes);
};

// Constants: no code with the flags of an instruction set runs before the processor has been asked for it.
extern const Kernel kAvx512Vbmi, kAvx512Vnni, kAvx2, kNeon, kScalar;

// Those that this processor can run, the fastest first; null ends them.
const Kernel* const* kernels();

// Several weights for the same activations, which are quantised once: the problems agree in x, its dtype, tokens, int4,
// in_features and format.
void packed_linears(const Problem* problems, std::size_t count, const Kernel&, int threads);

// Reads `bytes` bytes at `data` as fast as this machine can, for the roof that a kernel is measured by; a sum of them.
std::uint64_t read_bytes(const std::uint8_t* data, std::size_t bytes, int threads);

// Memory of this thread for one purpose, at least `bytes`, aligned to 64; it stays until the thread ends.
enum class Scratch : int {
    decoded, unpacked, arranged, blocks, products, token_sums, token_scales,
    queries, scores, attended, seen, count
};
std::uint8_t* scratch(Scratch, std::size_t bytes);

// One row in any format -> its codes in format i2. Writes up to 7 bytes beyond them.
void decode_to_i2(const Weight&, const std::uint8_t* row, std::uint8_t* out);

// The groups of a g4 format as bytes of i2 by their number, in 64 entries: with 5 bits a number they stand there twice.
const std::uint8_t* codebook(Format);

static inline std::size_t i2_bytes(std::size_t in_features) { return (in_features + 3) / 4; }

}  // namespace sparse_bitnet
