// What the stages of gpu_cuda.cu share: the shape of the decoder, its layers, and where blocks meet.

#pragma once

#include "ptx.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int GROUP = HEADS / KV_HEADS, PARTS = (GROUP + PART - 1) / PART;  // heads that share keys, blocks for them
constexpr int QUERIES = HEADS * HEAD, KEYS = KV_HEADS * HEAD;
constexpr int CHUNK = 64;         // columns whose codes a thread reads at once, 16 bytes
constexpr int MOST_ROWS = (HIDDEN + BLOCKS - 1) / BLOCKS;                 // of a block, of a matrix of HIDDEN rows
__host__ __device__ constexpr bool fills(int abreast) {
    return (MOST_ROWS + abreast - 1) / abreast * abreast * 4 <= MOST_ROWS * 5;
}
constexpr int ABREAST = fills(16) ? 16 : fills(8) ? 8 : 4;                // of them, that a warp has a part of at once
constexpr int ASIDE = 32 / ABREAST;                                       // chunks of each
constexpr int ADDED_ROWS = (MOST_ROWS + ABREAST - 1) / ABREAST * ABREAST;
constexpr int TEAM = 8;           // threads that attend to a position together
constexpr int TILE = THREADS / TEAM;
constexpr int PIECES = HEAD / 64; // of a head, eight numbers from each of which a thread of a team has
constexpr int COUNTERS = 32;      // where those of splits begin, behind that of the blocks
constexpr u32 ALL = 0xFFFFFFFF;
constexpr float LOWEST = -3.4e38f;  // score, of a place that is none

static_assert(HEADS % KV_HEADS == 0 && HEAD % 64 == 0, "whole groups, and whole pieces of heads");

struct Matrix {
    const uint4* weight;  // the format i2: bits 2p and 2p + 1 of byte b of a row are the code of column 4 b + p, plus 1
    const u16* bias;      // or none
    float scale, unused;
};

struct Layer {
    Matrix q, k, v, o, gate, up, down;
    const u16 *input_norm, *ffn_norm, *query_norm, *key_norm;  // the last two, or none
    u16 *keys, *values;                                        // [KV_HEADS, places, HEAD]
};

static_assert((u64)BLOCKS * (FFN + QUERIES + 2 * KEYS) < 1ull << 32, "spans are counted in 32 bits");
static_assert(sizeof(Layer) == LAYER_BYTES, "the table that the host writes");

struct Shared {
    alignas(16) float squares[WARPS];
    alignas(16) u32 largest[WARPS];
    alignas(16) int sums[WARPS];
    int products[WARPS][ADDED_ROWS];
    float cosines[HEAD / 2], sines[HEAD / 2];  // of the token's position
    bool is_last;
    u64 full[SLOTS], empty[SLOTS];  // barriers of the ring, see stream.cuh
};
static_assert(sizeof(Shared) <= SHARED_STRUCT_BYTES, "the room that the host reckons with");

__device__ __forceinline__ float number(u32 bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ float rounded(float value) { return number(bits_of(value)); }

__device__ __forceinline__ void unpack(uint4 words, float (&eight)[8]) {
    eight[0] = number(words.x & 0xFFFF), eight[1] = __uint_as_float(words.x & 0xFFFF0000);
    eight[2] = number(words.y & 0xFFFF), eight[3] = __uint_as_float(words.y & 0xFFFF0000);
    eight[4] = number(words.z & 0xFFFF), eight[5] = __uint_as_float(words.z & 0xFFFF0000);
    eight[6] = number(words.w & 0xFFFF), eight[7] = __uint_as_float(words.w & 0xFFFF0000);
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int other = 16; other; other /= 2) value += __shfl_xor_sync(ALL, value, other);
    return value;
}

// Of this lane's numbers and another's: the sum of the lower ones in the first of the two lanes, of the upper ones in
// the second.
__device__ __forceinline__ float sum_of_two(float lower, float upper, int other) {
    bool is_second = threadIdx.x & other;
    return (is_second ? upper : lower) + __shfl_xor_sync(ALL, is_second ? lower : upper, other);
}

// Where all blocks meet: what each has written before it arrives is there for all behind `wait`. Between the two a
// block may ask for what no other writes.
struct Meeting {
    u32 *arrived, phase;  // its highest bit turns, and the others are 0, when the first block and all others have come

    // Before this block has arrived for the first time, the bit cannot turn.
    __device__ __forceinline__ Meeting(u32* arrived) : arrived(arrived), phase(acquire(arrived) >> 31) {}

    __device__ __forceinline__ void arrive() {
        meet_workers();
        if (threadIdx.x == 0) release_add(arrived, blockIdx.x ? 1 : (1u << 31) - (BLOCKS - 1));
        phase ^= 1;
    }

    __device__ __forceinline__ void wait() {
        if (threadIdx.x == 0)
            while (acquire(arrived) >> 31 != phase) {}
        meet_workers();
    }
};

// The rows of a matrix of `rows` that fall to this block.
struct Span {
    int first, end;
    __device__ Span(int rows) : first(begin(blockIdx.x, rows)), end(begin(blockIdx.x + 1, rows)) {}
    static __device__ int begin(u32 block, u32 rows) { return block * rows / BLOCKS; }
    __device__ int count() const { return end - first; }
};

__host__ __device__ constexpr int ceiling(int a, int b) { return (a + b - 1) / b; }
