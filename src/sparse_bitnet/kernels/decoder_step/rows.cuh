// Products of the token with rows of a matrix: a warp a row, a lane every 32nd chunk of its columns.

#pragma once

#include "decoder.cuh"

// Of a matrix of `rows`, how many a warp multiplies at a time: all of its own, if there are registers for them.
__host__ __device__ constexpr int at_a_time(int rows, int columns) {
    int room = 16 / ceiling(columns, 32 * CHUNK), own = ceiling(ceiling(rows, BLOCKS), WARPS);
    return room < 1 ? 1 : room < own ? room : own;
}

// Products of 64 codes of a weight with two planes of the token: 0 and 1, or those of the second half. Codes of the odd
// plane stay where they are in their byte, and count four times.
__device__ __forceinline__ void add_products(uint4 w, int half, uint4 p, uint4 q, int& even, int& odd) {
    if (half) w.x >>= 4, w.y >>= 4, w.z >>= 4, w.w >>= 4;
    even = __dp4a((int)(w.x & 0x03030303), (int)p.x, even);
    even = __dp4a((int)(w.y & 0x03030303), (int)p.y, even);
    even = __dp4a((int)(w.z & 0x03030303), (int)p.z, even);
    even = __dp4a((int)(w.w & 0x03030303), (int)p.w, even);
    odd = __dp4a((int)(w.x & 0x0C0C0C0C), (int)q.x, odd);
    odd = __dp4a((int)(w.y & 0x0C0C0C0C), (int)q.y, odd);
    odd = __dp4a((int)(w.z & 0x0C0C0C0C), (int)q.z, odd);
    odd = __dp4a((int)(w.w & 0x0C0C0C0C), (int)q.w, odd);
}

template <int COLUMNS, int COUNT> struct Rows {
    static constexpr int CHUNKS = COLUMNS / CHUNK, EACH = ceiling(CHUNKS, 32);
    uint4 words[COUNT][EACH];

    template <typename Weight> __device__ __forceinline__ void fetch(int first, int count, Weight weight) {
#pragma unroll
        for (int r = 0; r < COUNT; ++r)
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                int chunk = i * 32 + threadIdx.x % 32;
                bool is_there = first + r < count && chunk < CHUNKS;
                words[r][i] = is_there ? __ldg(weight(first + r) + chunk) : make_uint4(0, 0, 0, 0);
            }
    }

    // Which of the rows from `first` on this lane finishes; `count` or more where none.
    static __device__ __forceinline__ int own(int first, int count) {
        int lane = threadIdx.x % 32;
        return lane < COUNT ? first + lane : count;
    }

    // The products with rows 0 .. count - 1 of this warp, of which the first are in `words`, to `use`, which all lanes
    // call, with what `given` said of the row before; of the first rows that is `before`.
    template <typename Weight, typename Before, typename Given, typename Use>
    __device__ __forceinline__ void multiply(
        const u8* planes, const Shared& shared, int count, Weight weight, Before before, Given given, Use use) {
        const uint4* codes = (const uint4*)planes;
        int lane = threadIdx.x % 32, offset = 0;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) offset += shared.sums[i];
        for (int first = 0; first < count; first += COUNT) {
            int even[COUNT] = {}, odd[COUNT] = {};
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                int chunk = min(i * 32 + lane, CHUNKS - 1);  // beyond the last the weights are 0
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    uint4 p = codes[2 * half * CHUNKS + chunk], q = codes[(2 * half + 1) * CHUNKS + chunk];
#pragma unroll
                    for (int r = 0; r < COUNT; ++r) add_products(words[r][i], half, p, q, even[r], odd[r]);
                }
            }
            int next = first + COUNT, total = 0, mine = own(first, count);
            if (next < count) fetch(next, count, weight);
#pragma unroll
            for (int r = 0; r < COUNT; ++r) {
                int sum = __reduce_add_sync(ALL, even[r] + (odd[r] >> 2));
                if (lane == r) total = sum;
            }
            use(mine, total - offset, before);
            if (next < count) before = given(own(next, count));
        }
    }
};

__device__ __forceinline__ float scaled(int sum, float of_weight, float of_token, u32 bias) {
    return rounded(__fadd_rn(__fmul_rn((float)sum, __fdiv_rn(of_weight, of_token)), number(bias)));
}

// As bits, which nobody waits for before they are used; -0 where there is none.
__device__ __forceinline__ u32 bias_of(const Matrix& matrix, int row) {
    return matrix.bias ? __ldg(matrix.bias + row) : 0x8000;
}

// x += a matrix of HIDDEN rows times the token, first asked for and then multiplied. All warps share each row of the
// block, by columns: a code is then read from shared memory once, and not once a row.
template <int COLUMNS> struct Addition {
    static constexpr int CHUNKS = COLUMNS / CHUNK;
    static constexpr int TURNS = ADDED_ROWS / ABREAST, EACH = ceiling(CHUNKS, ASIDE * WARPS), ITEMS = TURNS * EACH;
    static constexpr int AHEAD = ceiling(ITEMS, ceiling(ITEMS, 12));  // as many as there are registers for
    const Matrix& matrix;
    u16* x;
    Span span;
    uint4 words[AHEAD];
    uint2 before;  // bias and x of this thread's row, as bits

    __device__ __forceinline__ int chunk(int item) const {
        return (item % EACH * WARPS + threadIdx.x / 32) * ASIDE + threadIdx.x % 32 / ABREAST;
    }

    __device__ __forceinline__ void fetch(int first) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            int row = span.first + (first + i) / EACH * ABREAST + threadIdx.x % ABREAST, column = chunk(first + i);
            bool is_there = first + i < ITEMS && row < span.end && column < CHUNKS;
            words[i] = is_there ? __ldg(matrix.weight + (size_t)row * CHUNKS + column) : make_uint4(0, 0, 0, 0);
        }
    }

    __device__ __forceinline__ Addition(const Matrix& matrix, u16* x) : matrix(matrix), x(x), span(HIDDEN) {
        fetch(0);
        int row = span.first + threadIdx.x;
        if (row < span.end) before = make_uint2(bias_of(matrix, row), __ldcg(x + row));
    }

    __device__ __forceinline__ void multiply(const u8* planes, Shared& shared, float scale) {
        const uint4* codes = (const uint4*)planes;
        int even[TURNS] = {}, odd[TURNS] = {}, lane = threadIdx.x % 32, row = span.first + threadIdx.x;
#pragma unroll
        for (int first = 0; first < ITEMS; first += AHEAD) {
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                if (first + i >= ITEMS) continue;
                int turn = (first + i) / EACH, column = min(chunk(first + i), CHUNKS - 1);  // beyond, weights are 0
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    add_products(words[i], half, codes[2 * half * CHUNKS + column],
                                 codes[(2 * half + 1) * CHUNKS + column], even[turn], odd[turn]);
            }
            if (first + AHEAD < ITEMS) fetch(first + AHEAD);
        }
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            int sum = even[turn] + (odd[turn] >> 2);
#pragma unroll
            for (int other = ABREAST; other < 32; other *= 2) sum += __shfl_xor_sync(ALL, sum, other);
            if (lane < ABREAST) shared.products[threadIdx.x / 32][turn * ABREAST + lane] = sum;
        }
        __syncthreads();
        if (row >= span.end) return;
        int sum = 0;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) sum += shared.products[i][threadIdx.x] - shared.sums[i];
        x[row] = bits_of(number(before.y) + scaled(sum, matrix.scale, scale, before.x));
    }
};
