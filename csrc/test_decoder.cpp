// The decoder on random small models, without Python, under sanitizers: a text in one piece, cut anywhere and beside
// others gives the same logits bit for bit, and those of all instruction sets are close. Memory ends where data ends.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "decoder.hpp"
#include "sampling.hpp"

using namespace sparse_bitnet;

namespace {

std::mt19937 generator(0);

float random_float() { return static_cast<float>(generator() % 2001) / 1000.0f - 1.0f; }

struct Shape {
    std::size_t hidden, ffn, heads, kv_heads, head, vocabulary;
    Dtype dtype;
    bool head_norms, biased, int8_head;
};

// A model and the memory that it points to.
struct Whole {
    Model model;
    std::vector<std::unique_ptr<float[]>> floats;
    std::vector<std::unique_ptr<std::uint8_t[]>> bytes;

    const float* some(std::size_t count, float offset = 0) {
        floats.emplace_back(new float[count]);
        std::generate_n(floats.back().get(), count, [offset] { return offset + random_float(); });
        return floats.back().get();
    }

    Projection projection(std::size_t rows, std::size_t in_features, bool biased) {
        const std::size_t row_bytes = (in_features + 3) / 4;
        bytes.emplace_back(new std::uint8_t[rows * row_bytes]);
        std::generate_n(bytes.back().get(), rows * row_bytes, [] {
            return static_cast<std::uint8_t>(generator() % 3 | generator() % 3 << 2 | generator() % 3 << 4 |
                                             generator() % 3 << 6);
        });
        return {{bytes.back().get(), rows, in_features, row_bytes, Format::i2}, some(1, 1.5f),
                biased ? some(rows) : nullptr};
    }

    explicit Whole(const Shape& shape) : model{} {
        const std::size_t query = shape.heads * shape.head, kv = shape.kv_heads * shape.head;
        model.vocabulary = shape.vocabulary, model.hidden = shape.hidden, model.ffn = shape.ffn;
        model.heads = shape.heads, model.kv_heads = shape.kv_heads, model.head = shape.head;
        model.epsilon = 1e-6f, model.rotary_scale = 1.0f;
        for (std::size_t i = 0; i < shape.head / 2; ++i)
            model.frequencies.push_back(std::pow(1e4f, -2.0f * static_cast<float>(i) / static_cast<float>(shape.head)));
        const std::size_t entries = shape.vocabulary * shape.hidden;
        const float* table = some(entries);
        model.embedding = table, model.embedding_dtype = shape.dtype;
        if (shape.dtype != Dtype::f32) {  // floats of 16 bits between 2^-7 and 2, of either sign
            bytes.emplace_back(new std::uint8_t[2 * entries]);
            auto* halves = reinterpret_cast<std::uint16_t*>(bytes.back().get());
            const unsigned least = shape.dtype == Dtype::bf16 ? 0x3c00 : 0x2000;
            std::generate_n(halves, entries, [least] {
                return static_cast<std::uint16_t>((generator() & 0x8000) | (least + generator() % 0x3ff));
            });
            model.embedding = halves;
        }
        model.final_norm = some(shape.hidden, 1.5f);
        for (int layer = 0; layer < 2; ++layer) {
            const auto make = [&](std::size_t rows, std::size_t width) { return projection(rows, width, shape.biased); };
            model.layers.push_back({make(query, shape.hidden), make(kv, shape.hidden), make(kv, shape.hidden),
                                    make(shape.hidden, query), make(shape.ffn, shape.hidden),
                                    make(shape.ffn, shape.hidden), make(shape.hidden, shape.ffn),
                                    some(shape.hidden, 1.5f), some(shape.hidden, 1.5f),
                                    shape.head_norms ? some(shape.head, 1.5f) : nullptr,
                                    shape.head_norms ? some(shape.head, 1.5f) : nullptr});
        }
        model.output = {model.embedding, nullptr, shape.dtype, shape.hidden, shape.hidden};
        if (shape.int8_head) {
            const std::size_t stride = (shape.hidden + 63) / 64 * 64;
            bytes.emplace_back(new std::uint8_t[shape.vocabulary * stride]);
            floats.emplace_back(new float[shape.vocabulary]);
            auto* codes = reinterpret_cast<std::int8_t*>(bytes.back().get());
            quantize_head(model.embedding, shape.dtype, shape.vocabulary, shape.hidden, stride, 2, *kernels()[0], codes,
                          floats.back().get());
            model.output = {codes, floats.back().get(), Dtype::f32, shape.hidden, stride};
        }
    }
};

using Tokens = std::vector<std::int32_t>;

Tokens random_tokens(std::size_t count, std::size_t vocabulary) {
    Tokens tokens(count);
    for (auto& token : tokens) token = static_cast<std::int32_t>(generator() % vocabulary);
    return tokens;
}

bool is_right(const Shape& shape, int number) {
    const Whole whole(shape);
    const Model& model = whole.model;
    const std::size_t length = 290, width = model.vocabulary;
    const Tokens tokens = random_tokens(length, width), others = random_tokens(21, width);
    std::vector<float> first_set;
    for (const Kernel* const* kernel = kernels(); *kernel != nullptr; ++kernel) {
        const int threads = 1 + number % 3;
        std::unique_ptr<float[]> all(new float[length * width]), rows(new float[(length + others.size()) * width]);
        Cache one(model, length), cut(model, length), beside(model, others.size() + 8);
        forward(model, **kernel, threads, {{&one, tokens.data(), length}}, true, all.get());
        const auto same = [&](const float* found, std::size_t position, std::size_t count, const char* how) {
            if (std::equal(found, found + count * width, all.get() + position * width)) return true;
            std::printf("%s: shape %d, position %zu differs %s\n", (*kernel)->name, number, position, how);
            return false;
        };
        forward(model, **kernel, threads, {{&cut, tokens.data(), 37}, {&beside, others.data(), others.size()}}, true,
                rows.get());
        if (!same(rows.get(), 0, 37, "beside another")) return false;
        for (std::size_t at = 37; at < 45; ++at) {
            forward(model, **kernel, threads, {{&beside, tokens.data(), 1}, {&cut, tokens.data() + at, 1}}, false,
                    rows.get());
            if (!same(rows.get() + width, at, 1, "token by token")) return false;
        }
        forward(model, **kernel, threads, {{&cut, tokens.data() + 45, length - 45}}, false, rows.get());
        if (!same(rows.get(), length - 1, 1, "at the end")) return false;
        const std::int32_t outside[] = {static_cast<std::int32_t>(width)};
        for (const Step& wrong : {Step{&one, tokens.data(), 1}, Step{&beside, outside, 1}}) {
            try {
                forward(model, **kernel, threads, {wrong}, false, rows.get());
                std::printf("%s: a step that cannot be was taken\n", (*kernel)->name);
                return false;
            } catch (const std::invalid_argument&) {
            }
        }
        if (first_set.empty()) first_set.assign(all.get(), all.get() + length * width);
        double error = 0, size = 0;
        for (std::size_t i = 0; i < length * width; ++i) {
            error += std::pow(all[i] - first_set[i], 2.0), size += std::pow(first_set[i], 2.0);
        }
        if (!(error < 1e-3 * size)) {  // a code at the edge between two integers may be either; a wrong one is near 1
            std::printf("%s: shape %d is off by %g\n", (*kernel)->name, number, std::sqrt(error / size));
            return false;
        }
        for (const Sampling& sampling : {Sampling{0, 0, 1, 1}, Sampling{0.7f, 5, 0.9f, 1.2f}, Sampling{1, 0, 0.5f, 1}}) {
            const std::int32_t token = sample(rows.get(), width, sampling, tokens, 0.999999);
            if (token < 0 || static_cast<std::size_t>(token) >= width) return false;
        }
    }
    return true;
}

}  // namespace

int main() {
    const Shape shapes[] = {
        {32, 40, 4, 2, 8, 50, Dtype::f32, false, true, true},    {36, 68, 3, 1, 10, 37, Dtype::bf16, true, false, false},
        {64, 100, 6, 1, 72, 130, Dtype::f16, false, false, false}, {20, 12, 2, 2, 16, 9, Dtype::f32, true, true, false},
        {68, 24, 2, 2, 34, 515, Dtype::bf16, true, false, true},
    };
    int number = 0;
    for (const Shape& shape : shapes)
        if (!is_right(shape, number++)) return 1;
    for (const Kernel* const* kernel = kernels(); *kernel != nullptr; ++kernel)
        std::printf("%s: %d models equal\n", (*kernel)->name, number);
    return 0;
}
