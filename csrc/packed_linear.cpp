// The way through a call, the same for every instruction set: quantise, multiply, rescale, in tasks for threads.
#include "packed_linear.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "threads.hpp"

namespace sparse_bitnet {

namespace {

constexpr std::size_t kSlab = 1024;          // tokens that are quantised at a time, which bounds the memory they take
constexpr std::size_t kTaskRows = 96;        // rows that are unpacked at a time; a multiple of every block_rows
// Packed bytes in a task of few tokens: few tasks, since what is asked for ahead of a task's end is another thread's.
constexpr std::size_t kLeastBytes = 8192, kMostBytes = 1 << 19;
constexpr std::size_t kTasksPerThread = 3;

std::size_t task_bytes(std::size_t bytes, int threads) {
    return std::clamp(bytes / (static_cast<std::size_t>(threads) * kTasksPerThread), kLeastBytes, kMostBytes);
}
constexpr std::size_t kPadding = 64;  // between rows, whose width is often a power of 2, or they would share cache sets

template <class T>
T* scratch_of(Scratch purpose, std::size_t count) {
    return reinterpret_cast<T*>(scratch(purpose, count * sizeof(T)));
}

// The tasks of several weights one after the other, each of up to `rows` rows of one weight.
struct RowTasks {
    const Problem* problems;
    std::size_t count, rows;

    std::size_t of(const Problem& problem) const { return (problem.weight.rows + rows - 1) / rows; }

    std::size_t total() const {
        std::size_t tasks = 0;
        for (std::size_t i = 0; i < count; ++i) tasks += of(problems[i]);
        return tasks;
    }

    // run(problem, its first row, rows)
    template <class Run>
    void call(std::size_t index, const Run& run) const {
        const Problem* problem = problems;
        for (; index >= of(*problem); ++problem) index -= of(*problem);
        const std::size_t row = index * rows;
        run(*problem, row, std::min(rows, problem->weight.rows - row));
    }
};

std::size_t ceil_div(std::size_t value, std::size_t by) { return (value + by - 1) / by; }

// Weights are read once, straight from where they are, a few rows at a time for all tokens.
void multiply_few(const Problem* problems, std::size_t count, const Kernel& kernel, int threads, std::size_t first,
                  std::size_t tokens) {
    const Weight& weight = problems->weight;
    const std::size_t width = kernel.arranged_width(weight);
    auto* arranged = scratch_of<std::int8_t>(Scratch::arranged, tokens * width);
    auto* sums = scratch_of<std::int32_t>(Scratch::token_sums, tokens);
    auto* scales = scratch_of<float>(Scratch::token_scales, tokens);
    for (std::size_t token = 0; token < tokens; ++token)
        kernel.quantize(*problems, first + token, arranged + token * width, sums + token, scales + token);

    std::size_t all_rows = 0;
    for (std::size_t i = 0; i < count; ++i) all_rows += problems[i].weight.rows;
    const std::size_t bytes = task_bytes(all_rows * weight.row_bytes, threads);
    const RowTasks tasks{problems, count, ceil_div(ceil_div(bytes, weight.row_bytes), 4) * 4};
    const auto multiply = [&](const Problem& problem, std::size_t row, std::size_t some) {
        auto* products = scratch_of<std::int32_t>(Scratch::products, tokens * some);
        kernel.multiply_few(problem.weight, row, some, arranged, tokens, products);
        for (std::size_t token = 0; token < tokens; ++token)
            kernel.rescale(problem, first + token, row, some, products + token * some, sums[token], scales[token]);
    };
    run_tasks(threads, tasks.total(), [&](std::size_t index) { tasks.call(index, multiply); });
}

// Weights are unpacked once, to a tile that stays in the cache while all tokens go by in blocks.
void multiply_many(const Problem* problems, std::size_t count, const Kernel& kernel, int threads, std::size_t first,
                   std::size_t tokens) {
    const std::size_t width = kernel.arranged_width(problems->weight), stride = width + kPadding, lanes = kernel.lanes;
    const std::size_t blocks = ceil_div(tokens, lanes);
    auto* interleaved = scratch_of<std::int8_t>(Scratch::blocks, blocks * lanes * width);
    auto* sums = scratch_of<std::int32_t>(Scratch::token_sums, blocks * lanes);
    auto* scales = scratch_of<float>(Scratch::token_scales, blocks * lanes);
    const auto quantize = [&](std::size_t block) {
        auto* arranged = scratch_of<std::int8_t>(Scratch::arranged, lanes * stride);
        for (std::size_t lane = 0; lane < lanes; ++lane) {
            const std::size_t token = block * lanes + lane;
            if (token < tokens)
                kernel.quantize(*problems, first + token, arranged + lane * stride, sums + token, scales + token);
            else
                std::fill_n(arranged + lane * stride, width, std::int8_t{0});
        }
        kernel.interleave(arranged, stride, width, interleaved + block * lanes * width);
    };
    run_tasks(threads, blocks, quantize);

    const auto multiply = [&](const Problem& problem, std::size_t row, std::size_t rows) {
        auto* unpacked = scratch_of<std::uint8_t>(Scratch::unpacked, kTaskRows * stride);
        kernel.unpack(problem.weight, row, rows, stride, unpacked);
        auto* products = scratch_of<std::int32_t>(Scratch::products, kTaskRows * kernel.most_blocks * lanes);
        for (std::size_t block = 0; block < blocks; block += kernel.most_blocks) {
            const std::size_t some = std::min(kernel.most_blocks, blocks - block);
            for (std::size_t r = 0; r < rows; r += kernel.block_rows)
                kernel.multiply_many(unpacked + r * stride, stride, width, interleaved + block * lanes * width, some,
                                     kTaskRows, products + r);
            for (std::size_t lane = 0; lane < some * lanes; ++lane) {
                const std::size_t token = block * lanes + lane;
                if (token < tokens)
                    kernel.rescale(problem, first + token, row, rows, products + lane * kTaskRows, sums[token],
                                   scales[token]);
            }
        }
    };
    const RowTasks tasks{problems, count, kTaskRows};
    run_tasks(threads, tasks.total(), [&](std::size_t index) { tasks.call(index, multiply); });
}

}  // namespace

void packed_linears(const Problem* problems, std::size_t count, const Kernel& kernel, int threads) {
    for (std::size_t first = 0; first < problems->tokens; first += kSlab) {
        const std::size_t tokens = std::min(kSlab, problems->tokens - first);
        (tokens < kernel.many_tokens ? multiply_few : multiply_many)(problems, count, kernel, threads, first, tokens);
    }
}

std::uint64_t read_bytes(const std::uint8_t* data, std::size_t bytes, int threads) {
    const std::size_t share = ceil_div(task_bytes(bytes, threads), 256) * 256;
    std::atomic<std::uint64_t> sum{0};
    const auto task = [&](std::size_t index) {
        const std::size_t start = index * share;
        sum.fetch_add(kernels()[0]->read(data + start, std::min(share, bytes - start)), std::memory_order_relaxed);
    };
    run_tasks(threads, ceil_div(bytes, share), task);
    return sum;
}

std::uint8_t* scratch(Scratch purpose, std::size_t bytes) {
    struct Free {
        void operator()(std::uint8_t* memory) const { std::free(memory); }
    };
    thread_local struct {
        std::unique_ptr<std::uint8_t, Free> memory;
        std::size_t bytes = 0;
    } all[static_cast<int>(Scratch::count)];
    auto& one = all[static_cast<int>(purpose)];
    if (one.bytes < bytes) {
        one.bytes = 0;
        one.memory.reset();
        const std::size_t rounded = ceil_div(bytes, 64) * 64;
        one.memory.reset(static_cast<std::uint8_t*>(std::aligned_alloc(64, rounded)));
        if (!one.memory) throw std::bad_alloc();
        std::fill_n(one.memory.get(), rounded, std::uint8_t{0});
        one.bytes = rounded;
    }
    return one.memory.get();
}

}  // namespace sparse_bitnet
