// The choice of the next token from its logits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sparse_bitnet {

struct Sampling {
    float temperature;         // 0 takes the likeliest, of equals the first
    std::size_t top_k;         // the likeliest so many, 0 is no limit
    float top_p;               // the likeliest that together have this probability, 1 is no limit
    float repetition_penalty;  // logits of tokens that were there are divided by it, or multiplied where negative
};

// `logits` [vocabulary] are worked in; `uniform` is a random number in [0, 1). Throws std::domain_error for NaN.
std::int32_t sample(float* logits, std::size_t vocabulary, const Sampling&, const std::vector<std::int32_t>& seen,
                    double uniform);

}  // namespace sparse_bitnet
