#include "decoder.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

#include "threads.hpp"

namespace sparse_bitnet {
namespace {

constexpr std::size_t kQueryTokens = 16;   // of a task of attention, which share what they read of keys and values
constexpr std::size_t kHeadRows = 512;     // of a task of the head
constexpr std::size_t kTaskTokens = 16;    // of what is done token by token
constexpr std::size_t kWorthTasks = 1 << 15;  // products of attention below which waking others takes longer

std::size_t round_up(std::size_t value, std::size_t to) { return (value + to - 1) / to * to; }

using Buffer = std::unique_ptr<float[]>;

Buffer buffer(std::size_t rows, std::size_t width) { return Buffer(new float[rows * width]); }

}  // namespace

void Cache::Free::operator()(float* memory) const { std::free(memory); }

Cache::Cache(const Model& model, std::size_t capacity)
    : capacity_(capacity),
      padded_positions_(round_up(capacity, kGrain)),
      padded_head_(round_up(model.head, kGrain)),
      keys_floats_(padded_positions_ * model.head),
      layer_floats_(model.kv_heads * (keys_floats_ + padded_positions_ * padded_head_)),
      layers_(model.layers.size()),
      memory_(static_cast<float*>(std::calloc(std::max<std::size_t>(layer_floats_ * layers_, 1), sizeof(float)))) {
    if (!memory_) throw std::bad_alloc();
}

// One call of forward: T rows of all its steps, one after the other.
class Pass {
  public:
    Pass(const Model& model, const Kernel& kernel, int threads, const std::vector<Step>& steps)
        : model_(model), kernel_(kernel), floats_(*kernel.floats), threads_(threads), steps_(steps) {
        try {
            for (const Step& step : steps) {
                if (step.cache->busy_.exchange(true))
                    throw std::invalid_argument("a sequence is given twice or is being computed by another thread");
                ++held_;
                check(step);
                for (std::size_t i = 0; i < step.count; ++i)
                    rows_.push_back({&step, static_cast<std::uint32_t>(step.cache->length_ + i)});
            }
        } catch (...) {
            release();
            throw;
        }
    }

    ~Pass() { release(); }

    void run(bool every, float* logits) {
        const std::size_t count = rows_.size(), width = model_.head * model_.heads;
        const std::size_t kv = model_.head * model_.kv_heads;
        if (count == 0) return;
        x_ = buffer(count, model_.hidden), normed_ = buffer(count, model_.hidden), y_ = buffer(count, model_.hidden);
        query_ = buffer(count, width), key_ = buffer(count, kv), value_ = buffer(count, kv);
        attended_ = buffer(count, width), gate_ = buffer(count, model_.ffn), up_ = buffer(count, model_.ffn);
        turns_ = buffer(count, model_.head);
        by_rows([&](std::size_t row) {
            const std::size_t stored = element_bytes(model_.embedding_dtype) * model_.hidden;
            const auto* table = static_cast<const std::uint8_t*>(model_.embedding);
            floats_.widen(table + static_cast<std::size_t>(token(row)) * stored, model_.embedding_dtype, model_.hidden,
                          x_.get() + row * model_.hidden);
            set_turns(row);
        });
        for (std::size_t index = 0; index < model_.layers.size(); ++index)
            layer(index, index + 1 == model_.layers.size() && !every);
        head(logits);
        for (const Step& step : steps_) step.cache->length_ += step.count;
    }

  private:
    struct Row {
        const Step* step;
        std::uint32_t position;
    };

    static std::size_t element_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

    void check(const Step& step) const {
        if (step.count == 0) throw std::invalid_argument("a sequence has no tokens to go on by");
        if (step.count > step.cache->capacity_ - step.cache->length_)
            throw std::invalid_argument("a sequence of " + std::to_string(step.cache->length_) + " tokens and " +
                                        std::to_string(step.count) + " more exceed the " +
                                        std::to_string(step.cache->capacity_) + " that it was made for");
        for (std::size_t i = 0; i < step.count; ++i)
            if (step.tokens[i] < 0 || static_cast<std::size_t>(step.tokens[i]) >= model_.vocabulary)
                throw std::invalid_argument("token " + std::to_string(step.tokens[i]) + " is not in the vocabulary of " +
                                            std::to_string(model_.vocabulary));
    }

    void release() {
        for (std::size_t i = 0; i < held_; ++i) steps_[i].cache->busy_.store(false);
        held_ = 0;
    }

    std::int32_t token(std::size_t row) const {
        return rows_[row].step->tokens[rows_[row].position - rows_[row].step->cache->length_];
    }

    template <class Task>
    void by_rows(const Task& task) const {
        const std::size_t count = rows_.size();
        run_tasks(threads_, (count + kTaskTokens - 1) / kTaskTokens, [&](std::size_t index) {
            for (std::size_t row = index * kTaskTokens; row < std::min(count, (index + 1) * kTaskTokens); ++row)
                task(row);
        });
    }

    void multiply(const float* x, std::initializer_list<std::pair<const Projection*, float*>> projections) const {
        Problem problems[3];
        std::size_t count = 0;
        for (const auto& [projection, y] : projections)
            problems[count++] = {projection->weight, x,       Dtype::f32,       rows_.size(), model_.int4,
                                 projection->scale,  nullptr, projection->bias, Dtype::f32,   y};
        packed_linears(problems, count, kernel_, threads_);
    }

    void norm(const float* weight) const {
        by_rows([&](std::size_t row) {
            const std::size_t at = row * model_.hidden;
            floats_.rms_norm(x_.get() + at, weight, model_.epsilon, model_.hidden, normed_.get() + at);
        });
    }

    void add() const {
        by_rows([&](std::size_t row) {
            const std::size_t at = row * model_.hidden;
            floats_.add(y_.get() + at, model_.hidden, x_.get() + at);
        });
    }

    void layer(std::size_t index, bool last_rows) {
        const Layer& layer = model_.layers[index];
        norm(layer.attention_norm);
        multiply(normed_.get(),
                 {{&layer.query, query_.get()}, {&layer.key, key_.get()}, {&layer.value, value_.get()}});
        by_rows([&](std::size_t row) { remember(layer, index, row); });
        if (last_rows) keep_last_rows();
        attend(index);
        multiply(attended_.get(), {{&layer.output, y_.get()}});
        add();
        norm(layer.mlp_norm);
        multiply(normed_.get(), {{&layer.gate, gate_.get()}, {&layer.up, up_.get()}});
        by_rows([&](std::size_t row) {
            floats_.swiglu(gate_.get() + row * model_.ffn, up_.get() + row * model_.ffn, model_.ffn);
        });
        multiply(gate_.get(), {{&layer.down, y_.get()}});
        add();
    }

    // The last token of each step and no other goes on: after the keys and values of the last layer, nothing reads them.
    void keep_last_rows() {
        std::size_t kept = 0;
        const std::size_t width = model_.heads * model_.head;
        for (std::size_t row = 0; row < rows_.size(); ++row) {
            if (row + 1 < rows_.size() && rows_[row + 1].step == rows_[row].step) continue;
            std::copy_n(x_.get() + row * model_.hidden, model_.hidden, x_.get() + kept * model_.hidden);
            std::copy_n(query_.get() + row * width, width, query_.get() + kept * width);
            rows_[kept++] = rows_[row];
        }
        rows_.erase(rows_.begin() + static_cast<std::ptrdiff_t>(kept), rows_.end());
    }

    // Cosines, then sines, of a position, as transformers computes them: the angle in fp32.
    void set_turns(std::size_t row) const {
        const std::size_t half = model_.head / 2;
        float* turns = turns_.get() + row * model_.head;
        for (std::size_t i = 0; i < half; ++i) {
            const float angle = static_cast<float>(rows_[row].position) * model_.frequencies[i];
            turns[i] = std::cos(angle) * model_.rotary_scale;
            turns[half + i] = std::sin(angle) * model_.rotary_scale;
        }
    }

    void turn(float* x, const float* norm_weight, const float* turns) const {
        const std::size_t half = model_.head / 2;
        if (norm_weight != nullptr) floats_.rms_norm(x, norm_weight, model_.epsilon, model_.head, x);
        for (std::size_t i = 0; i < half; ++i) {
            const float first = x[i], second = x[half + i], cosine = turns[i], sine = turns[half + i];
            x[i] = first * cosine - second * sine;
            x[half + i] = second * cosine + first * sine;
        }
    }

    float* keys(const Cache& cache, std::size_t index, std::size_t kv_head) const {
        return cache.memory_.get() + index * cache.layer_floats_ + kv_head * cache.keys_floats_;
    }

    float* values(const Cache& cache, std::size_t index, std::size_t kv_head) const {
        return keys(cache, index, model_.kv_heads) + kv_head * cache.padded_positions_ * cache.padded_head_;
    }

    // Turns the queries, and turns the keys and puts them and the values where attention reads them.
    void remember(const Layer& layer, std::size_t index, std::size_t row) const {
        const Cache& cache = *rows_[row].step->cache;
        const std::size_t position = rows_[row].position, lanes = floats_.lanes, head = model_.head;
        const float* turns = turns_.get() + row * head;
        const float factor = 1.0f / std::sqrt(static_cast<float>(head));
        for (std::size_t h = 0; h < model_.heads; ++h) {
            float* query = query_.get() + (row * model_.heads + h) * head;
            turn(query, layer.query_norm, turns);
            for (std::size_t d = 0; d < head; ++d) query[d] *= factor;
        }
        for (std::size_t h = 0; h < model_.kv_heads; ++h) {
            float* key = key_.get() + (row * model_.kv_heads + h) * head;
            turn(key, layer.key_norm, turns);
            float* to = keys(cache, index, h) + position / lanes * lanes * head + position % lanes;
            for (std::size_t d = 0; d < head; ++d) to[d * lanes] = key[d];
            std::copy_n(value_.get() + (row * model_.kv_heads + h) * head, head,
                        values(cache, index, h) + position * cache.padded_head_);
        }
    }

    // A task is one head of keys and values and up to kQueryTokens tokens of one step.
    void attend(std::size_t index) const {
        struct Task {
            std::size_t row, count, kv_head;
        };
        std::vector<Task> tasks;
        std::size_t products = 0;
        for (std::size_t row = 0; row < rows_.size();) {
            std::size_t count = 1;
            while (count < kQueryTokens && row + count < rows_.size() && rows_[row + count].step == rows_[row].step)
                ++count;
            for (std::size_t h = 0; h < model_.kv_heads; ++h) tasks.push_back({row, count, h});
            products += count * (rows_[row].position + count) * model_.heads * model_.head;
            row += count;
        }
        run_tasks(products < kWorthTasks ? 1 : threads_, tasks.size(), [&](std::size_t task) {
            attend_some(index, tasks[task].row, tasks[task].count, tasks[task].kv_head);
        });
    }

    void attend_some(std::size_t index, std::size_t row, std::size_t count, std::size_t kv_head) const {
        const Cache& cache = *rows_[row].step->cache;
        const std::size_t group = model_.heads / model_.kv_heads, queries = count * group, head = model_.head;
        const auto floats = [](Scratch purpose, std::size_t number) {
            return reinterpret_cast<float*>(scratch(purpose, number * sizeof(float)));
        };
        float* gathered = floats(Scratch::queries, queries * head);
        float* out = floats(Scratch::attended, queries * cache.padded_head_);
        auto* seen = reinterpret_cast<std::uint32_t*>(scratch(Scratch::seen, queries * sizeof(std::uint32_t)));
        const auto of = [&](std::size_t query) {
            return ((row + query / group) * model_.heads + kv_head * group + query % group) * head;
        };
        for (std::size_t query = 0; query < queries; ++query) {
            std::copy_n(query_.get() + of(query), head, gathered + query * head);
            seen[query] = rows_[row + query / group].position + 1;
        }
        floats_.attend({keys(cache, index, kv_head), values(cache, index, kv_head), head, cache.padded_head_, queries,
                        gathered, seen, floats(Scratch::scores, queries * kSpan), out});
        for (std::size_t query = 0; query < queries; ++query)
            std::copy_n(out + query * cache.padded_head_, head, attended_.get() + of(query));
    }

    void head(float* logits) const {
        const Head& head = model_.output;
        const std::size_t count = rows_.size();
        norm(model_.final_norm);
        std::vector<std::int16_t> codes;
        std::vector<float> scales;
        if (head.scales != nullptr) {
            codes.resize(count * head.stride), scales.resize(count);
            for (std::size_t i = 0; i < count; ++i) scales[i] = quantize(i, codes.data() + i * head.stride);
        }
        const std::size_t tasks = (model_.vocabulary + kHeadRows - 1) / kHeadRows;
        run_tasks(threads_, tasks, [&](std::size_t task) {
            const std::size_t first = task * kHeadRows, some = std::min(kHeadRows, model_.vocabulary - first);
            if (head.scales != nullptr)
                floats_.multiply_codes(head, first, some, codes.data(), scales.data(), count, model_.vocabulary, logits);
            else
                floats_.multiply_floats(head, first, some, normed_.get(), count, model_.vocabulary, logits);
        });
    }

    // A hidden state as integers, as many as keep every sum of the head within int32: the head waits for memory, so
    // that products of int16 take no longer than those of int8, and only its weights are rounded to 8 bits.
    float quantize(std::size_t row, std::int16_t* codes) const {
        const float* x = normed_.get() + row * model_.hidden;
        const auto largest = static_cast<float>(
            std::min<std::size_t>(32767, std::numeric_limits<std::int32_t>::max() / (127 * model_.hidden)));
        float magnitude = 0;
        for (std::size_t i = 0; i < model_.hidden; ++i) magnitude = std::max(magnitude, std::fabs(x[i]));
        for (std::size_t i = 0; i < model_.hidden; ++i)
            if (!std::isfinite(x[i])) return std::numeric_limits<float>::quiet_NaN();
        const float scale = largest / std::max(magnitude, std::numeric_limits<float>::min());
        if (!std::isfinite(scale)) return 1.0f;  // all zeros, as the codes are
        for (std::size_t i = 0; i < model_.hidden; ++i) codes[i] = static_cast<std::int16_t>(std::lrintf(x[i] * scale));
        return scale;
    }

    const Model& model_;
    const Kernel& kernel_;
    const FloatKernel& floats_;
    const int threads_;
    const std::vector<Step>& steps_;
    std::size_t held_ = 0;
    std::vector<Row> rows_;
    Buffer x_, normed_, y_, query_, key_, value_, attended_, gate_, up_, turns_;
};

void forward(const Model& model, const Kernel& kernel, int threads, const std::vector<Step>& steps, bool every,
             float* logits) {
    Pass(model, kernel, threads, steps).run(every, logits);
}

void quantize_head(const void* rows, Dtype dtype, std::size_t count, std::size_t width, std::size_t stride,
                   int threads, const Kernel& kernel, std::int8_t* codes, float* scales) {
    const std::size_t row_bytes = width * (dtype == Dtype::f32 ? 4 : 2);
    run_tasks(threads, (count + kHeadRows - 1) / kHeadRows, [&](std::size_t task) {
        std::vector<float> wide(width);
        for (std::size_t row = task * kHeadRows; row < std::min(count, (task + 1) * kHeadRows); ++row) {
            kernel.floats->widen(static_cast<const std::uint8_t*>(rows) + row * row_bytes, dtype, width, wide.data());
            float magnitude = 0;
            bool is_number = true;
            for (const float value : wide) magnitude = std::max(magnitude, std::fabs(value)), is_number &= !std::isnan(value);
            const float smallest = std::numeric_limits<float>::min(), none = std::numeric_limits<float>::quiet_NaN();
            const float scale = is_number ? std::max(magnitude, smallest) / 127.0f : none;
            for (std::size_t i = 0; i < width; ++i)
                codes[row * stride + i] = static_cast<std::int8_t>(
                    std::isfinite(scale) ? std::lrintf(std::clamp(wide[i] / scale, -127.0f, 127.0f)) : 0);
            std::fill_n(codes + row * stride + width, stride - width, std::int8_t{0});
            scales[row] = scale;
        }
    });
}

}  // namespace sparse_bitnet
