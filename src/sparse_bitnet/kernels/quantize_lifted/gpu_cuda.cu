// Lifted integer activations at the speed of memory: a block holds a token in registers from the search for its scale to
// its codes, so that it is read once. Compiled at run time by NVRTC, which defines M (columns a group), KIND (0, 1, 2 for
// fp32, bf16, fp16), GATED (whether a token is silu(gate) * up, of which x has one beside the other), NORMED (whether its
// RMS norm is taken, with EPSILON), PLANES (with M = 4: whether codes are written as four planes of every fourth column,
// and their total), THREADS (a block), HELD (groups of eight columns that a thread holds) and SMALLEST.

typedef unsigned int u32;
typedef unsigned short u16;

constexpr int EIGHT = 8;               // columns that a thread reads at once
constexpr int WINDOWS = M / 2 - 1;     // a group of M columns
constexpr int WORDS = KIND ? 4 : 8;    // of the eight
constexpr float MAGIC = 12582912.0f;   // plus an integer below 2^22: its lowest byte is that of the integer

#if KIND == 1
#define HALF "bf16"
#else
#define HALF "f16"
#endif

__device__ __forceinline__ float number(u32 bits) {  // of the dtype; above them may be others
    float value;
    if (KIND == 0) value = __uint_as_float(bits);
    if (KIND == 1) value = __uint_as_float(bits << 16);
    if (KIND == 2) asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)bits));
    return value;
}

__device__ __forceinline__ float value_of(const u32 (&words)[WORDS], int i) {
    if (KIND == 1 && i % 2) return __uint_as_float(words[i / 2] & 0xFFFF0000);
    return number(KIND ? words[i / 2] >> 16 * (i % 2) : words[i % WORDS]);
}

__device__ __forceinline__ void read(const uint4* from, bool is_there, u32 (&words)[WORDS]) {
#pragma unroll
    for (int i = 0; i < WORDS / 4; ++i) {
        uint4 four = is_there ? from[i] : make_uint4(0, 0, 0, 0);
        words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
    }
}

// function(value), rounded to the dtype, in place of each.
template <typename Function>
__device__ __forceinline__ void change(u32 (&words)[WORDS], Function function) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        if (KIND == 0) words[i] = __float_as_uint(function(number(words[i])));
        else {
            float low = function(value_of(words, 2 * i % EIGHT)), high = function(value_of(words, (2 * i + 1) % EIGHT));
            asm("cvt.rn." HALF "x2.f32 %0, %1, %2;" : "=r"(words[i]) : "f"(high), "f"(low));
        }
    }
}

// Products in the dtype, rounded once.
__device__ __forceinline__ void multiply(u32 (&words)[WORDS], const u32 (&factors)[WORDS]) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        if (KIND == 0) words[i] = __float_as_uint(__fmul_rn(number(words[i]), number(factors[i])));
        else asm("mul.rn." HALF "x2 %0, %0, %1;" : "+r"(words[i]) : "r"(factors[i]));
    }
}

// The largest magnitude so far, as bits, which order like the numbers do, with NaN above infinity; two in 16 bits each.
__device__ __forceinline__ u32 larger(u32 magnitude, u32 word) {
    if (KIND == 0) return max(magnitude, word & 0x7FFFFFFF);
    asm("max.u16x2 %0, %0, %1;" : "+r"(magnitude) : "r"(word & 0x7FFF7FFF));
    return magnitude;
}

// In 16 bits by the exponential and the reciprocal of the hardware, right to 2^-17, and to 2^-20 from -8 on, before the
// result is rounded: gates took more time by the exact ones than their bytes. Below -87 it is 0 where that would be a
// number near 1e-36.
__device__ __forceinline__ float silu(float value) {
    if (KIND == 0) return __fdiv_rn(value, __fadd_rn(1.0f, expf(-value)));
    float power, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value * -1.44269504f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
    return value * inverse;
}

// Left to itself, the compiler would rather spill than have a multiprocessor run one block. And for gates it would take
// so many registers that a multiprocessor is not full of threads, whose exponentials hide each other's loads.
constexpr int BLOCKS_AT_ONCE = HELD > 5 ? 1 : GATED && KIND && HELD <= 3 ? 2048 / THREADS : 0;
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE) quantize_lifted(
    const uint4* x, const uint4* norm_weight, uint4* lifted, uint2* codes, float* scales, int* totals,
    int eights, int chunks) {
    extern __shared__ __align__(16) unsigned char row[];  // the token's codes before the lift, with M = 8 after it
    __shared__ u32 largest[THREADS / 32];
    asm volatile("griddepcontrol.wait;\n griddepcontrol.launch_dependents;" ::: "memory");
    u32 held[HELD][WORDS];
    const uint4* token = x + (size_t)blockIdx.x * (1 + GATED) * eights * (WORDS / 4);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        int place = i * THREADS + threadIdx.x;
        read(token + place * (WORDS / 4), place < eights, held[i]);
        if (GATED) {
            u32 up[WORDS];
            read(token + (eights + place) * (WORDS / 4), place < eights, up);
            change(held[i], silu);
            multiply(held[i], up);
        }
    }
    if (NORMED) {  // weight * (x / its root mean square), rounded twice, as transformers rounds them
        __shared__ float squares[THREADS / 32];
        u32 weight[HELD][WORDS];
        float sum = 0;
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            int place = i * THREADS + threadIdx.x;
            read(norm_weight + place * (WORDS / 4), place < eights, weight[i]);
#pragma unroll
            for (int j = 0; j < EIGHT; ++j) sum = __fmaf_rn(value_of(held[i], j), value_of(held[i], j), sum);
        }
#pragma unroll
        for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, distance);
        if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
        __syncthreads();
        sum = 0;
#pragma unroll
        for (int i = 0; i < THREADS / 32; ++i) sum += squares[i];
        float factor = rsqrtf(__fadd_rn(__fdiv_rn(sum, (float)(eights * EIGHT)), EPSILON));
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            change(held[i], [&](float value) { return __fmul_rn(value, factor); });
            multiply(held[i], weight[i]);
        }
    }
    u32 magnitude = 0;
#pragma unroll
    for (int i = 0; i < HELD; ++i)
#pragma unroll
        for (int j = 0; j < WORDS; ++j) magnitude = larger(magnitude, held[i][j]);
    if (KIND) magnitude = __float_as_uint(number(max(magnitude & 0xFFFF, magnitude >> 16)));
    magnitude = __reduce_max_sync(0xFFFFFFFF, magnitude);
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = magnitude;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < THREADS / 32; ++i) magnitude = max(magnitude, largest[i]);
    float scale = __fdiv_rn(127.0f, fmaxf(__uint_as_float(min(magnitude, 0x7F800000u)), SMALLEST));
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
    u32 kept = scale > 0 ? 0xFFFFFFFF : 0;  // a token with NaN or infinities has no codes
    int total = 0;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        int place = i * THREADS + threadIdx.x;
        u32 bytes[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 sums[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float product = __fmul_rn(value_of(held[i], 4 * half + j), scale);  // at most 127, and that to 2^-23
                sums[j] = __float_as_uint(__fadd_rn(product, MAGIC));
            }
            bytes[half] = __byte_perm(__byte_perm(sums[0], sums[1], 0x0040), __byte_perm(sums[2], sums[3], 0x0040), 0x5410);
            bytes[half] &= kept;
        }
        if (place < eights) {
            uint2 both = make_uint2(bytes[0], bytes[1]);
            if (PLANES) {
                u16* planes = (u16*)lifted + (size_t)blockIdx.x * 4 * eights + place;
#pragma unroll
                for (int j = 0; j < 4; ++j) planes[j * eights] = __byte_perm(bytes[0], bytes[1], j | (j + 4) << 4);
                total = __dp4a((int)bytes[0], 0x01010101, __dp4a((int)bytes[1], 0x01010101, total));
            } else if (M == 4) ((uint2*)lifted)[(size_t)blockIdx.x * eights + place] = both;
            else if (M == 8) {  // the thread has a group
                u32* windows = (u32*)row + WINDOWS * place;
                windows[0] = bytes[0], windows[1] = __byte_perm(bytes[0], bytes[1], 0x5432), windows[2] = bytes[1];
            } else ((uint2*)row)[place] = both;
            if (M != 4 && codes) codes[(size_t)blockIdx.x * eights + place] = both;
        }
    }
    if (PLANES) {
        __shared__ int of_warp[THREADS / 32];
        total = __reduce_add_sync(0xFFFFFFFF, total);
        if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = total;
        __syncthreads();
        if (threadIdx.x) return;
        for (int i = 1; i < THREADS / 32; ++i) total += of_warp[i];
        totals[blockIdx.x] = total;
    }
    if (M == 4) return;
    __syncthreads();
#pragma unroll 1
    for (int chunk = threadIdx.x; chunk < chunks; chunk += THREADS) {  // four windows
        uint4 windows;
        if (M == 8) windows = ((const uint4*)row)[chunk];
        else {
            u32 each[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int window = 4 * chunk + i;
                const u16* pairs = (const u16*)(row + window / WINDOWS * M + window % WINDOWS * 2);
                each[i] = pairs[0] | (u32)pairs[1] << 16;
            }
            windows = make_uint4(each[0], each[1], each[2], each[3]);
        }
        lifted[(size_t)blockIdx.x * chunks + chunk] = windows;
    }
}
