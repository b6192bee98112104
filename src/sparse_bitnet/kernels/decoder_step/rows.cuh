// Products of the token with rows of a matrix.

#pragma once

#include "stream.cuh"

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

__device__ __forceinline__ float scaled(int sum, float of_weight, float of_token, u32 bias) {
    return rounded(__fadd_rn(__fmul_rn((float)sum, __fdiv_rn(of_weight, of_token)), number(bias)));
}

// As bits, which nobody waits for before they are used; -0 where there is none.
__device__ __forceinline__ u32 bias_of(const Matrix& matrix, int row) {
    return matrix.bias ? __ldg(matrix.bias + row) : 0x8000;
}

// A warp a row, a lane every 32nd chunk of its columns.
template <int COLUMNS> struct Rows {
    using Slab = RowSlab<COLUMNS>;
    static constexpr int CHUNKS = COLUMNS / CHUNK, EACH = ceiling(CHUNKS, 32), COUNT = Slab::COUNT;

    // Which slab and row of it this lane finishes.
    static __device__ __forceinline__ int own_slab() { return threadIdx.x % 32 / COUNT; }
    static __device__ __forceinline__ int own_row() { return threadIdx.x % 32 % COUNT; }

    // The products with each slab's rows of this warp, 32 at most: that of each lane's own row, of which some are
    // beyond the last. `place(r)` is where the r-th row lies in a slab.
    template <typename Where>
    static __device__ __forceinline__ int multiply(
        Ring& ring, const u8* planes, const Shared& shared, int slabs, Where place) {
        const uint4* codes = (const uint4*)planes;
        int lane = threadIdx.x % 32, own = 0;
        uint4 held[EACH][4];
#pragma unroll
        for (int i = 0; i < WARPS; ++i) own -= shared.sums[i];
#pragma unroll
        for (int i = 0; i < EACH; ++i)
#pragma unroll
            for (int plane = 0; plane < 4; ++plane)
                held[i][plane] = codes[plane * CHUNKS + min(i * 32 + lane, CHUNKS - 1)];
#pragma unroll 1
        for (int slab = 0; slab < slabs; ++slab) {
            const uint4* weights = ring.take();
            int even[COUNT] = {}, odd[COUNT] = {};
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                int chunk = i * 32 + lane;
#pragma unroll
                for (int r = 0; r < COUNT; ++r) {
                    uint4 w = make_uint4(0, 0, 0, 0);
                    if (chunk < CHUNKS) w = weights[place(r) * CHUNKS + chunk];
                    add_products(w, 0, held[i][0], held[i][1], even[r], odd[r]);
                    add_products(w, 1, held[i][2], held[i][3], even[r], odd[r]);
                }
            }
            ring.give_back();
#pragma unroll
            for (int r = 0; r < COUNT; ++r) {
                int sum = __reduce_add_sync(ALL, even[r] + (odd[r] >> 2));
                if (lane == slab * COUNT + r) own += sum;
            }
        }
        return own;
    }
};

// x += a matrix of HIDDEN rows times the token. All warps share each row of the block, by columns: a code is then read
// from shared memory once, and not once a row.
template <int COLUMNS> struct Addition {
    static constexpr int CHUNKS = COLUMNS / CHUNK, TURNS = ADDED_ROWS / ABREAST;
    const Matrix& matrix;
    u16* x;
    Span span;
    uint2 before;  // bias and x of this thread's row, as bits

    __device__ __forceinline__ Addition(const Matrix& matrix, u16* x) : matrix(matrix), x(x), span(HIDDEN) {
        int row = span.first + threadIdx.x;
        if (row < span.end) before = make_uint2(bias_of(matrix, row), __ldcg(x + row));
    }

    __device__ __forceinline__ void multiply(Ring& ring, const u8* planes, Shared& shared, float scale) {
        const uint4* codes = (const uint4*)planes;
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = span.first + threadIdx.x;
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            if (span.first + turn * ABREAST >= span.end) break;
            int even = 0, odd = 0;
            for (int first = 0; first < CHUNKS; first += ColumnSlab::CHUNKS) {
                const uint4* weights = ring.take() + lane % ABREAST * ColumnSlab::STRIDE;
#pragma unroll
                for (int i = 0; i < ColumnSlab::CHUNKS; i += ColumnSlab::STEP) {
                    int chunk = i + warp * ASIDE + lane / ABREAST;
                    if (first + chunk >= CHUNKS) continue;
                    const uint4* code = codes + first + chunk;
                    add_products(weights[chunk], 0, code[0], code[CHUNKS], even, odd);
                    add_products(weights[chunk], 1, code[2 * CHUNKS], code[3 * CHUNKS], even, odd);
                }
                ring.give_back();
            }
            int sum = even + (odd >> 2);
#pragma unroll
            for (int other = ABREAST; other < 32; other *= 2) sum += __shfl_xor_sync(ALL, sum, other);
            if (lane < ABREAST) shared.products[warp][turn * ABREAST + lane] = sum;
        }
        meet_workers();
        if (row >= span.end) return;
        int sum = 0;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) sum += shared.products[i][threadIdx.x] - shared.sums[i];
        x[row] = bits_of(number(before.y) + scaled(sum, matrix.scale, scale, before.x));
    }
};
