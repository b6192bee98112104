// A packed Qwen2, Qwen3 or Llama model, decoded: embedding, layers of attention and SwiGLU, head.
//
// Shapes: T tokens, of any number of sequences, H hidden_size, F intermediate_size, D head_dim, V vocabulary.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "packed_linear.hpp"

namespace sparse_bitnet {

struct Projection {
    Weight weight;
    const float* scale;
    const float* bias;  // or null
};

struct Layer {
    Projection query, key, value, output, gate, up, down;
    const float *attention_norm, *mlp_norm;
    const float *query_norm, *key_norm;  // [D], of Qwen3, else null
};

// All memory that it points to is the caller's, who has seen that it fits: the weights stay in the file that is mapped.
struct Model {
    std::size_t vocabulary, hidden, ffn, heads, kv_heads, head;
    float epsilon;
    bool int4;
    std::vector<float> frequencies;  // [D / 2] of the rotary embedding, and what its sines are multiplied by
    float rotary_scale;
    const void* embedding;  // [V, H]
    Dtype embedding_dtype;
    const float* final_norm;
    Head output;
    std::vector<Layer> layers;
};

// Keys and values of one sequence, in floats: 4 bytes a number, of which int8 activations leave no rounding to be seen.
class Cache {
  public:
    Cache(const Model&, std::size_t capacity);

    std::size_t length() const { return length_; }
    std::size_t bytes() const { return layer_floats_ * layers_ * sizeof(float); }

  private:
    friend class Pass;

    struct Free {
        void operator()(float* memory) const;
    };
    std::size_t capacity_, length_ = 0, padded_positions_, padded_head_, keys_floats_, layer_floats_, layers_;
    std::unique_ptr<float, Free> memory_;  // [layers, keys and values, kv_heads, ...], untouched pages take no memory
    std::atomic<bool> busy_{false};
};

// The tokens that one sequence goes on by.
struct Step {
    Cache* cache;
    const std::int32_t* tokens;
    std::size_t count;
};

// Logits of the last token of each step, or of every token, [rows, V]. Throws std::invalid_argument, and leaves the
// caches as they were, for a token that is not in the vocabulary, a full cache, one given twice or in use elsewhere.
void forward(const Model&, const Kernel&, int threads, const std::vector<Step>&, bool every, float* logits);

// Rows of floats, bf16 or fp16 -> int8 in -127..127 [rows, stride] with zeros at the end, and their scales.
void quantize_head(const void* rows, Dtype, std::size_t count, std::size_t width, std::size_t stride, int threads,
                   const Kernel&, std::int8_t* codes, float* scales);

}  // namespace sparse_bitnet
