// Fragments (formats/fragments.py) back to the effective weight. Compiled at run time by NVRTC, which defines M (weights
// a group) and RESULT (bf16 or f16).

typedef unsigned int u32;
typedef unsigned short u16;

constexpr int ROWS = 64;            // of an instruction
constexpr int BLOCKS = 16;          // of m weights, a unit: a whole number of instructions whatever m
constexpr int WINDOWS = M / 2 - 1;  // a block
constexpr int PITCH = BLOCKS * WINDOWS + 4;
constexpr int BYTES = 2 * M, ALIGNMENT = (BYTES & -BYTES) < 16 ? BYTES & -BYTES : 16;

struct alignas(ALIGNMENT) Block { u32 pairs[M / 2]; };

// A unit, 64 rows by 16 blocks: the words of its WINDOWS instructions to a byte a window, then a block a thread.
extern "C" __global__ void __launch_bounds__(128) dequantize_fragments(
    const uint2* fragments, const float* row_scale, Block* out, int row_scales, int rows, int blocks, int stages,
    int parts) {
    __shared__ unsigned char metadata[ROWS][PITCH], values[ROWS][PITCH];
    int part = blockIdx.x % parts, group = blockIdx.x / parts;
    int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    int row = 16 * warp + lane / 4, metadata_row = row + lane % 2 * 8, half = lane / 2 % 2, column = lane % 4 * 2;
#pragma unroll
    for (int window = 0; window < WINDOWS; ++window) {
        int instruction = part * WINDOWS + window;
        if (instruction >= 2 * stages) break;
        uint2 words = fragments[((size_t)(group * stages + instruction / 2) * 128 + thread) * 2 + instruction % 2];
#pragma unroll
        for (int i = 0; i < 8; ++i) metadata[metadata_row][16 * window + 8 * half + i] = words.x >> 4 * i & 15;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            int in_register = i / 2, at = in_register % 2 * 16 + in_register / 2 * 2 + i % 2 * 8;
            values[row + in_register % 2 * 8][16 * window + in_register / 2 * 8 + column + i % 2] =
                words.y >> at & 3 | (words.y >> at + 4 & 3) << 2;
        }
    }
    __syncthreads();
    for (int i = thread; i < ROWS * BLOCKS; i += 128) {
        int row = i / BLOCKS, block = i % BLOCKS, height = group * ROWS + row;
        if (height >= rows || part * BLOCKS + block >= blocks) continue;
        u32 present = 0, negative = 0;
#pragma unroll
        for (int window = 0; window < WINDOWS; ++window) {
            u32 columns = metadata[row][block * WINDOWS + window], codes = values[row][block * WINDOWS + window];
            u32 first = 2 * window + (columns & 3), second = 2 * window + (columns >> 2);
            present |= (u32)((codes & 3) != 0) << first | (u32)(codes >> 2 != 0) << second;
            negative |= (codes >> 1 & 1) << first | codes >> 3 << second;
        }
        u16 scale;
        asm("cvt.rn." RESULT ".f32 %0, %1;" : "=h"(scale) : "f"(row_scale[row_scales > 1 ? height : 0]));
        Block weights;
#pragma unroll
        for (int j = 0; j < M; ++j) {
            u32 weight = (present >> j & 1 ? scale : 0) | (negative >> j & 1) << 15;
            weights.pairs[j / 2] = j % 2 ? weights.pairs[j / 2] | weight << 16 : weight;
        }
        out[(size_t)height * blocks + part * BLOCKS + block] = weights;
    }
}
