// Weights on their way through shared memory. One warp reads them, slab after slab in the order in which the others
// multiply them, into a ring of slots, as far ahead as there are slots: while blocks meet, and into the next layer.

#pragma once

#include "decoder.cuh"

struct Ring {
    u8* slots;
    Shared& shared;
    int slot = 0, parity = 0;

    __device__ __forceinline__ Ring(u8* slots, Shared& shared) : slots(slots), shared(shared) {}

    __device__ __forceinline__ void advance() {
        if (++slot == SLOTS) slot = 0, parity ^= 1;
    }

    // The next slab, for a warp that multiplies it and gives it back.
    __device__ __forceinline__ const uint4* take() {
        wait(shared.full + slot, parity);
        return (const uint4*)(slots + slot * SLOT_BYTES);
    }

    // compute-sanitizer's racecheck sees only the lane that arrives, and reports a race with what the others have read;
    // where all 32 arrive, it reports none.
    __device__ __forceinline__ void give_back() {
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(shared.empty + slot);
        advance();
    }

    // The next slot, for the warp that reads; `fill` has each lane copy what it is to, `bytes` in all.
    template <typename Fill> __device__ __forceinline__ void read(int bytes, Fill fill) {
        wait(shared.empty + slot, parity ^ 1);
        if (threadIdx.x % 32 == 0) arrive_expecting(shared.full + slot, bytes);
        __syncwarp();
        fill(slots + slot * SLOT_BYTES, shared.full + slot);
        advance();
    }
};

// How a matrix that is multiplied row by row comes: COUNT rows for each warp, of which it has every 16th.
template <int COLUMNS> struct RowSlab {
    static constexpr int ROW_BYTES = COLUMNS / 4, FIT = SLOT_BYTES / ROW_BYTES / WARPS;
    static constexpr int COUNT = FIT > 8 ? 8 : FIT / 2 * 2, ROWS = COUNT * WARPS;
    static_assert(COUNT >= 2, "a pair of rows for each warp");
};

// How one comes whose rows all warps share: ABREAST rows, CHUNKS of each, in a stride that keeps banks apart.
struct ColumnSlab {
    static constexpr int STEP = ASIDE * WARPS;  // chunks that the warps have a turn
    static constexpr int CHUNKS = (SLOT_BYTES / ABREAST / 16 - 1) / STEP * STEP, STRIDE = CHUNKS + 1;  // of 16 bytes
    static_assert(CHUNKS >= STEP, "a chunk for each thread");
};

// The matrix of a row of [q; k; v], and its place there.
__device__ __forceinline__ const Matrix& matrix_of(const Layer& layer, int& row) {
    if (row < QUERIES) return layer.q;
    row -= QUERIES;
    if (row < KEYS) return layer.k;
    row -= KEYS;
    return layer.v;
}

// What the reading warp does from the first layer to the last.
struct Reader {
    Ring ring;
    int lane;

    __device__ __forceinline__ void read_rows_of_qkv(const Layer& layer, const Span& span) {
        using Slab = RowSlab<HIDDEN>;
#pragma unroll 1
        for (int first = span.first; first < span.end; first += Slab::ROWS) {
            int rows = min(Slab::ROWS, span.end - first);
            ring.read(rows * Slab::ROW_BYTES, [&](u8* to, u64* barrier) {
                int begin = lane == 0 ? 0 : lane == 1 ? QUERIES : QUERIES + KEYS;
                int from = max(first, begin), end = min(first + rows, begin + (lane == 0 ? QUERIES : KEYS));
                if (lane > 2 || from >= end) return;
                const Matrix& matrix = lane == 0 ? layer.q : lane == 1 ? layer.k : layer.v;
                const u8* weight = (const u8*)matrix.weight + (size_t)(from - begin) * Slab::ROW_BYTES;
                copy(to + (from - first) * Slab::ROW_BYTES, weight, (end - from) * Slab::ROW_BYTES, barrier);
            });
        }
    }

    __device__ __forceinline__ void read_pairs(const Layer& layer, const Span& span) {
        using Slab = RowSlab<HIDDEN>;
#pragma unroll 1
        for (int first = span.first; first < span.end; first += Slab::ROWS / 2) {
            int bytes = min(Slab::ROWS / 2, span.end - first) * Slab::ROW_BYTES;
            ring.read(2 * bytes, [&](u8* to, u64* barrier) {
                if (lane > 1) return;
                const Matrix& matrix = lane ? layer.up : layer.gate;
                const u8* weight = (const u8*)matrix.weight + (size_t)first * Slab::ROW_BYTES;
                copy(to + lane * (Slab::ROWS / 2 * Slab::ROW_BYTES), weight, bytes, barrier);
            });
        }
    }

    template <int COLUMNS> __device__ __forceinline__ void read_columns(const Matrix& matrix, const Span& span) {
#pragma unroll 1
        for (int first = span.first; first < span.end; first += ABREAST)
#pragma unroll 1
            for (int chunk = 0; chunk < COLUMNS / CHUNK; chunk += ColumnSlab::CHUNKS) {
                int rows = min(ABREAST, span.end - first), chunks = min(ColumnSlab::CHUNKS, COLUMNS / CHUNK - chunk);
                ring.read(rows * chunks * 16, [&](u8* to, u64* barrier) {
                    if (lane >= rows) return;
                    const uint4* weight = matrix.weight + (size_t)(first + lane) * (COLUMNS / CHUNK) + chunk;
                    copy((uint4*)to + lane * ColumnSlab::STRIDE, weight, chunks * 16, barrier);
                });
            }
    }

    __device__ __forceinline__ void read(const Layer* layers, int count) {
        Span of_qkv(QUERIES + 2 * KEYS), of_hidden(HIDDEN), of_ffn(FFN);
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
            read_rows_of_qkv(layers[i], of_qkv);
            read_columns<QUERIES>(layers[i].o, of_hidden);
            read_pairs(layers[i], of_ffn);
            read_columns<FFN>(layers[i].down, of_hidden);
        }
    }
};
