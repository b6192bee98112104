// Lifted integer activations at the speed of memory: a block holds a token in registers from the search for its scale to
// its codes, so that it is read once. Compiled at run time by NVRTC, which defines M (columns a group), KIND (0, 1, 2 for
// fp32, bf16, fp16), THREADS (a block), HELD (groups of eight columns that a thread holds) and SMALLEST.

typedef unsigned int u32;
typedef unsigned short u16;

constexpr int EIGHT = 8;               // columns that a thread reads at once
constexpr int WINDOWS = M / 2 - 1;     // a group of M columns
constexpr int WORDS = KIND ? 4 : 8;    // of the eight
constexpr float MAGIC = 12582912.0f;   // plus an integer below 2^22: its lowest byte is that of the integer

__device__ __forceinline__ float value_of(const u32 (&words)[WORDS], int i) {
    float value;
    if (KIND == 0) value = __int_as_float(words[i % WORDS]);
    if (KIND == 1) value = __int_as_float(i % 2 ? words[i / 2] & 0xFFFF0000 : words[i / 2] << 16);
    if (KIND == 2) asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)(words[i / 2] >> 16 * (i % 2))));
    return value;
}

extern "C" __global__ void __launch_bounds__(THREADS) quantize_lifted(
    const uint4* x, uint4* lifted, uint2* codes, float* scales, int eights, int chunks) {
    extern __shared__ __align__(16) unsigned char row[];  // the token's codes before the lift
    __shared__ u32 largest[THREADS / 32];
    asm volatile("griddepcontrol.wait;\n griddepcontrol.launch_dependents;" ::: "memory");
    u32 held[HELD][WORDS];
    const uint4* token = x + (size_t)blockIdx.x * eights * (WORDS / 4);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        int place = i * THREADS + threadIdx.x;
#pragma unroll
        for (int half = 0; half < WORDS / 4; ++half) {
            uint4 four = place < eights ? token[place * (WORDS / 4) + half] : make_uint4(0, 0, 0, 0);
            held[i][4 * half] = four.x, held[i][4 * half + 1] = four.y;
            held[i][4 * half + 2] = four.z, held[i][4 * half + 3] = four.w;
        }
    }
    u32 magnitude = 0;  // as bits, which order like the floats do, with NaN above infinity
#pragma unroll
    for (int i = 0; i < HELD; ++i)
#pragma unroll
        for (int j = 0; j < EIGHT; ++j)
            magnitude = max(magnitude, __float_as_uint(value_of(held[i], j)) & 0x7FFFFFFF);
    magnitude = __reduce_max_sync(0xFFFFFFFF, magnitude);
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = magnitude;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < THREADS / 32; ++i) magnitude = max(magnitude, largest[i]);
    float scale = __fdiv_rn(127.0f, fmaxf(__uint_as_float(min(magnitude, 0x7F800000u)), SMALLEST));
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
    float highest = scale > 0 ? 127.0f : 0.0f, lowest = scale > 0 ? -128.0f : 0.0f;  // a token with NaN has no codes
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        int place = i * THREADS + threadIdx.x;
        u32 bytes[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 sums[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float product = __fmul_rn(value_of(held[i], 4 * half + j), scale);
                sums[j] = __float_as_uint(__fadd_rn(fminf(fmaxf(product, lowest), highest), MAGIC));
            }
            bytes[half] = __byte_perm(__byte_perm(sums[0], sums[1], 0x0040), __byte_perm(sums[2], sums[3], 0x0040), 0x5410);
        }
        if (place < eights) {
            uint2 both = make_uint2(bytes[0], bytes[1]);
            if (M == 4) ((uint2*)lifted)[(size_t)blockIdx.x * eights + place] = both;
            else ((uint2*)row)[place] = both;
            if (M != 4 && codes) codes[(size_t)blockIdx.x * eights + place] = both;
        }
    }
    if (M == 4) return;
    __syncthreads();
    for (int chunk = threadIdx.x; chunk < chunks; chunk += THREADS) {  // four windows
        u32 windows[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int window = 4 * chunk + i;
            const u16* pairs = (const u16*)(row + window / WINDOWS * M + window % WINDOWS * 2);
            windows[i] = pairs[0] | (u32)pairs[1] << 16;
        }
        lifted[(size_t)blockIdx.x * chunks + chunk] = make_uint4(windows[0], windows[1], windows[2], windows[3]);
    }
}
