// Products of the token with rows of a matrix: a warp a row, a lane every 32nd chunk of its columns.

#pragma once

#include "decoder.cuh"

// Of a matrix of `rows`, how many a warp multiplies at a time: all of its own, if there are registers for them.
__host__ __device__ constexpr int at_a_time(int rows, int columns) {
    int room = 16 / ceiling(columns, 32 * CHUNK), own = ceiling(ceiling(rows, BLOCKS), WARPS);
    return room < 1 ? 1 : room < own ? room : own;
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
            int even[COUNT] = {}, odd[COUNT] = {};  // of planes 0 and 2, and of 1 and 3 four times
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                int chunk = min(i * 32 + lane, CHUNKS - 1);  // beyond the last the weights are 0
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    uint4 p = codes[2 * half * CHUNKS + chunk], q = codes[(2 * half + 1) * CHUNKS + chunk];
#pragma unroll
                    for (int r = 0; r < COUNT; ++r) {
                        uint4 w = words[r][i];
                        if (half) w.x >>= 4, w.y >>= 4, w.z >>= 4, w.w >>= 4;
                        even[r] = __dp4a((int)(w.x & 0x03030303), (int)p.x, even[r]);
                        even[r] = __dp4a((int)(w.y & 0x03030303), (int)p.y, even[r]);
                        even[r] = __dp4a((int)(w.z & 0x03030303), (int)p.z, even[r]);
                        even[r] = __dp4a((int)(w.w & 0x03030303), (int)p.w, even[r]);
                        odd[r] = __dp4a((int)(w.x & 0x0C0C0C0C), (int)q.x, odd[r]);
                        odd[r] = __dp4a((int)(w.y & 0x0C0C0C0C), (int)q.y, odd[r]);
                        odd[r] = __dp4a((int)(w.z & 0x0C0C0C0C), (int)q.z, odd[r]);
                        odd[r] = __dp4a((int)(w.w & 0x0C0C0C0C), (int)q.w, odd[r]);
                    }
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

// x += a matrix of HIDDEN rows times the token, first asked for and then multiplied.
template <int COLUMNS> struct Addition {
    const Matrix& matrix;
    u16* x;
    Span span;
    int count;
    Rows<COLUMNS, at_a_time(HIDDEN, COLUMNS)> rows;
    uint2 before;  // bias and x of this lane's row, as bits

    __device__ __forceinline__ const uint4* weight(int i) const {
        return matrix.weight + (size_t)span.row(i) * (COLUMNS / CHUNK);
    }

    __device__ __forceinline__ uint2 given(int i) const {
        return i < count ? make_uint2(bias_of(matrix, span.row(i)), __ldcg(x + span.row(i))) : make_uint2(0, 0);
    }

    __device__ __forceinline__ Addition(const Matrix& matrix, u16* x)
        : matrix(matrix), x(x), span(HIDDEN), count(span.of_warp()) {
        rows.fetch(0, count, [&](int i) { return weight(i); });
        before = given(rows.own(0, count));
    }

    __device__ __forceinline__ void multiply(const u8* planes, const Shared& shared, float scale) {
        rows.multiply(
            planes, shared, count, [&](int i) { return weight(i); }, before, [&](int i) { return given(i); },
            [&](int i, int sum, uint2 before) {
                if (i < count) x[span.row(i)] = bits_of(number(before.y) + scaled(sum, matrix.scale, scale, before.x));
            });
    }
};
