// CUDA C++ on a CPU, to test kernels where there is no GPU: a thread of the host a block, a fiber a thread of the device.
//
// Fibers change where threads of a GPU wait for each other and nowhere else, in an order that a seed draws, so that what
// is not waited for shows. Warps are assumed to be whole in every exchange.

#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local
#define threadIdx emulation::thread_index()
#define blockIdx emulation::block_index()
#define gridDim emulation::grid_size()

struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace emulation {

constexpr int WARP = 32;
constexpr size_t STACK = 64 << 10;

struct Index { uint32_t x; };

struct Meeting {  // of fibers that go on when the last has come
    int expected = 0;
    std::vector<int> waiting;
};

struct Warp {
    Meeting meeting;
    uint64_t values[2][WARP];  // by turns, so that none is overwritten before all have read it
    uint32_t exchanges[WARP] = {};
};

struct Block {
    uint32_t index, size;
    std::vector<ucontext_t> fibers;
    std::vector<std::vector<char>> stacks;
    std::vector<Warp> warps;
    std::vector<int> runnable;
    Meeting meeting, workers;
    std::vector<std::function<void()>> copies;  // that are on their way
    ucontext_t scheduler;
    int current = 0, alive = 0;
    std::mt19937 random;
    const std::function<void()>* kernel;
};

inline thread_local Block* block;
inline uint32_t grid;

inline Index thread_index() { return {(uint32_t)block->current}; }
inline Index block_index() { return {block->index}; }
inline Index grid_size() { return {grid}; }

inline void switch_away() { swapcontext(&block->fibers[block->current], &block->scheduler); }

inline void yield() {
    block->runnable.push_back(block->current);
    if (block->runnable.size() == 1) std::this_thread::yield();
    switch_away();
}

inline void meet(Meeting& meeting) {
    if ((int)meeting.waiting.size() + 1 < meeting.expected) {
        meeting.waiting.push_back(block->current);
        return switch_away();
    }
    block->runnable.insert(block->runnable.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
}

inline void begin_fiber() {
    (*block->kernel)();
    --block->alive;
    switch_away();
}

inline void run_block(Block& own, int threads) {
    block = &own;
    own.fibers.resize(threads), own.warps.resize(threads / WARP), own.alive = threads, own.meeting.expected = threads;
    for (Warp& warp : own.warps) warp.meeting.expected = WARP;
    for (int i = 0; i < threads; ++i) {
        own.stacks.emplace_back(STACK);
        getcontext(&own.fibers[i]);
        own.fibers[i].uc_stack.ss_sp = own.stacks[i].data(), own.fibers[i].uc_stack.ss_size = STACK;
        makecontext(&own.fibers[i], begin_fiber, 0);
        own.runnable.push_back(i);
    }
    while (own.alive) {
        if (own.runnable.empty()) std::fputs("all fibers of a block wait for each other\n", stderr), std::abort();
        size_t chosen = own.random() % own.runnable.size();
        own.current = own.runnable[chosen];
        own.runnable[chosen] = own.runnable.back(), own.runnable.pop_back();
        swapcontext(&own.scheduler, &own.fibers[own.current]);
    }
}

// `kernel`, called by every thread of every block.
inline void run(int blocks, int threads, uint32_t seed, const std::function<void()>& kernel) {
    grid = blocks;
    std::vector<Block> all(blocks);
    std::vector<std::thread> hosts;
    for (int i = 0; i < blocks; ++i) {
        all[i].index = i, all[i].random.seed(seed * 1000 + i), all[i].kernel = &kernel;
        hosts.emplace_back([&all, i, threads] { run_block(all[i], threads); });
    }
    for (std::thread& host : hosts) host.join();
}

// What the lanes of this warp gave.
template <typename T> struct Given {
    const uint64_t* values;
    T operator[](int lane) const {
        T value;
        std::memcpy(&value, values + lane, sizeof value);
        return value;
    }
};

template <typename T> Given<T> exchange(T value) {
    Warp& warp = block->warps[block->current / WARP];
    int lane = block->current % WARP;
    uint64_t* values = warp.values[warp.exchanges[lane]++ % 2];
    std::memcpy(values + lane, &value, sizeof value);
    meet(warp.meeting);
    return {values};
}

}  // namespace emulation

inline void __syncwarp() { emulation::meet(emulation::block->warps[emulation::block->current / emulation::WARP].meeting); }
inline void __trap() { std::abort(); }
inline void __syncthreads() { emulation::meet(emulation::block->meeting); }

template <typename T> T __shfl_xor_sync(uint32_t, T value, int other) {
    int lane = emulation::block->current % emulation::WARP;
    return emulation::exchange(value)[lane ^ other];
}

template <typename T> T __shfl_down_sync(uint32_t, T value, int distance) {
    int lane = emulation::block->current % emulation::WARP;
    auto given = emulation::exchange(value);
    return lane + distance < emulation::WARP ? given[lane + distance] : value;
}

template <typename T> T __reduce_add_sync(uint32_t, T value) {
    auto given = emulation::exchange(value);
    T sum = 0;
    for (int i = 0; i < emulation::WARP; ++i) sum += given[i];
    return sum;
}

template <typename T> T __reduce_max_sync(uint32_t, T value) {
    auto given = emulation::exchange(value);
    for (int i = 0; i < emulation::WARP; ++i) value = value < given[i] ? given[i] : value;
    return value;
}

template <typename T> T __ldg(const T* from) { return *from; }
template <typename T> T __ldcg(const T* from) { return *from; }
template <typename T> T min(T a, T b) { return b < a ? b : a; }
template <typename T> T max(T a, T b) { return a < b ? b : a; }

inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rn(float value) { return (int)std::nearbyintf(value); }
inline float rsqrtf(float value) { return 1 / std::sqrt(value); }

inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 32; i += 8) sum += (int8_t)(a >> i) * (int8_t)(b >> i);
    return sum;
}

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    uint64_t both = (uint64_t)b << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= (uint32_t)(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return result;
}
