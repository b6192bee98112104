// The token, eight neighbouring numbers a thread at a time: read, normalised, quantised. Every block does all of it.

#pragma once

#include "decoder.cuh"

template <int COLUMNS> struct Numbers {
    static constexpr int EIGHTS = COLUMNS / 8, EACH = ceiling(EIGHTS, THREADS);
    uint4 words[EACH];

    __device__ __forceinline__ void read(const u16* from) {  // past the cache of this block, as others write them
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            int place = i * THREADS + threadIdx.x;
            words[i] = place < EIGHTS ? __ldcg((const uint4*)from + place) : make_uint4(0, 0, 0, 0);
        }
    }
};

template <int COLUMNS> struct Token {
    static constexpr int EIGHTS = Numbers<COLUMNS>::EIGHTS, EACH = Numbers<COLUMNS>::EACH;
    float value[EACH][8];

    __device__ __forceinline__ Token(const u16* from) {
        Numbers<COLUMNS> numbers;
        numbers.read(from);
#pragma unroll
        for (int i = 0; i < EACH; ++i) unpack(numbers.words[i], value[i]);
    }

    __device__ __forceinline__ void normalize(const Numbers<COLUMNS>& norm, Shared& shared) {
        float squares = 0;
#pragma unroll
        for (int i = 0; i < EACH; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j) squares += value[i][j] * value[i][j];
        squares = warp_sum(squares);
        if (threadIdx.x % 32 == 0) shared.squares[threadIdx.x / 32] = squares;
        meet_workers();
        squares = 0;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) squares += shared.squares[i];
        float factor = rsqrtf(squares / COLUMNS + EPSILON);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            float weight[8];
            unpack(norm.words[i], weight);
#pragma unroll
            for (int j = 0; j < 8; ++j) value[i][j] = rounded(weight[j] * rounded(value[i][j] * factor));
        }
    }

    // Its codes, column 4 b + p at byte b of plane p; their scale, which is 0 where a number is none.
    __device__ __forceinline__ float quantize(u8* planes, Shared& shared) const {
        u32 magnitude = 0;  // as bits, which order like the floats do, with NaN above infinity
#pragma unroll
        for (int i = 0; i < EACH; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j) magnitude = max(magnitude, __float_as_uint(value[i][j]) & 0x7FFFFFFF);
        magnitude = __reduce_max_sync(ALL, magnitude);
        if (threadIdx.x % 32 == 0) shared.largest[threadIdx.x / 32] = magnitude;
        meet_workers();
#pragma unroll
        for (int i = 0; i < WARPS; ++i) magnitude = max(magnitude, shared.largest[i]);
        float scale = __fdiv_rn(127.0f, fmaxf(__uint_as_float(min(magnitude, 0x7F800000u)), SMALLEST));
        float highest = scale > 0 ? 127.0f : 0.0f, lowest = scale > 0 ? -128.0f : 0.0f;
        int sum = 0;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            int place = i * THREADS + threadIdx.x, codes[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                codes[j] = __float2int_rn(fminf(fmaxf(__fmul_rn(value[i][j], scale), lowest), highest));
                sum += codes[j];
            }
            if (place < EIGHTS)
#pragma unroll
                for (int plane = 0; plane < 4; ++plane)
                    ((u16*)planes)[plane * EIGHTS + place] = __byte_perm(codes[plane], codes[4 + plane], 0x0040);
        }
        sum = __reduce_add_sync(ALL, sum);
        if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32] = sum;
        meet_workers();
        return scale;
    }
};
