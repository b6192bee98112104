// In the order of transformers: penalty, temperature, top-k, top-p.
#include "sampling.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace sparse_bitnet {

constexpr std::size_t kSorted = 256, kMore = 8;  // at first, then so many times as many

std::int32_t sample(float* logits, std::size_t vocabulary, const Sampling& sampling,
                    const std::vector<std::int32_t>& seen, double uniform) {
    if (sampling.repetition_penalty != 1.0f) {
        std::vector<std::int32_t> once(seen);
        std::sort(once.begin(), once.end());
        once.erase(std::unique(once.begin(), once.end()), once.end());
        for (const std::int32_t token : once) {
            float& logit = logits[token];
            logit = logit < 0 ? logit * sampling.repetition_penalty : logit / sampling.repetition_penalty;
        }
    }
    std::size_t likeliest = 0;
    bool is_number = true;
    for (std::size_t token = 0; token < vocabulary; ++token) {
        is_number &= !std::isnan(logits[token]);
        if (logits[token] > logits[likeliest]) likeliest = token;
    }
    if (!is_number || std::isinf(logits[likeliest])) throw std::domain_error("the logits are not numbers");
    if (sampling.temperature == 0) return static_cast<std::int32_t>(likeliest);

    std::vector<std::int32_t> tokens(vocabulary);
    std::iota(tokens.begin(), tokens.end(), 0);
    const auto likelier = [logits](std::int32_t one, std::int32_t other) {
        return logits[one] != logits[other] ? logits[one] > logits[other] : one < other;
    };
    if (sampling.top_k != 0 && sampling.top_k < vocabulary) {
        const auto end = tokens.begin() + static_cast<std::ptrdiff_t>(sampling.top_k);
        std::nth_element(tokens.begin(), end, tokens.end(), likelier);
        tokens.erase(end, tokens.end());
    }
    const double largest = logits[likeliest];
    const auto weight = [&](std::int32_t token) { return std::exp((logits[token] - largest) / sampling.temperature); };
    double total = 0;
    if (sampling.top_p < 1) {
        double all = 0, some = 0;
        for (const std::int32_t token : tokens) all += weight(token);
        std::size_t count = 0, sorted = 0;  // few are needed as a rule: no more are sorted
        while (count < tokens.size() && (count == 0 || some < sampling.top_p * all)) {
            if (count == sorted) {
                const auto first = tokens.begin() + static_cast<std::ptrdiff_t>(count);
                sorted = std::min(tokens.size(), std::max(kSorted, kMore * sorted));
                const auto last = tokens.begin() + static_cast<std::ptrdiff_t>(sorted);
                std::nth_element(first, last, tokens.end(), likelier);
                std::sort(first, last, likelier);
            }
            some += weight(tokens[count++]);
        }
        tokens.resize(count);
        total = some;
    } else {
        for (const std::int32_t token : tokens) total += weight(token);
    }
    double left = uniform * total;
    for (const std::int32_t token : tokens)
        if ((left -= weight(token)) < 0) return token;
    return static_cast<std::int32_t>(likeliest);  // where rounding left something over
}

}  // namespace sparse_bitnet
