// Fragments of ternary weights for sparse tensor cores, in the layout of formats/fragments.py. Compiled at run time by
// NVRTC, which defines M (weights a group), SOURCE (an integer as wide as a weight) and IS_FLOAT.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int ROWS = 64;  // of an instruction

// One weight to pack: where it is, where its fragments go, and its part of the grid.
struct Weight {
    u64 source, target;
    int rows, blocks, stages, units_a_row, first_unit, unused;
};

constexpr int BLOCKS = 16;              // of m weights, a unit: a whole number of instructions whatever m
constexpr int WINDOWS = M / 2 - 1;      // a block
constexpr int PITCH = BLOCKS * WINDOWS + 4;

constexpr int BYTES = sizeof(SOURCE) * M, ALIGNMENT = (BYTES & -BYTES) < 16 ? BYTES & -BYTES : 16;

struct alignas(ALIGNMENT) Block { SOURCE values[M]; };

// Which of a block's weights are not 0, and which are negative, a bit each. The source is any float or int8 type whose
// sign is its highest bit, read as a signed integer: a float is 0 where all bits but that are.
__device__ __forceinline__ void read_block(const SOURCE* source, u32& present, u32& negative) {
    Block block = *(const Block*)source;
    present = negative = 0;
#pragma unroll
    for (int i = 0; i < M; ++i) {
        bool zero = IS_FLOAT ? (SOURCE)(block.values[i] << 1) == 0 : block.values[i] == 0;
        present |= (u32)!zero << i;
        negative |= (u32)(block.values[i] < 0) << i;
    }
}

// 64 rows by 16 blocks -> WINDOWS instructions' fragments: a byte a window, then each thread's two words.
extern "C" __global__ void __launch_bounds__(128) pack_fragments(const Weight* weights, const int* weight_of_unit) {
    __shared__ unsigned char windows[ROWS][PITCH];  // metadata in the low 4 bits, two values in the high 4
    Weight weight = weights[weight_of_unit[blockIdx.x]];
    int unit = blockIdx.x - weight.first_unit, group = unit / weight.units_a_row, part = unit % weight.units_a_row;
    for (int i = threadIdx.x; i < ROWS * BLOCKS; i += 128) {
        int row = i / BLOCKS, block = i % BLOCKS;
        size_t from = (size_t)(group * ROWS + row) * weight.blocks + part * BLOCKS + block;
        u32 present = 0, negative = 0;
        if (group * ROWS + row < weight.rows && part * BLOCKS + block < weight.blocks)
            read_block((const SOURCE*)weight.source + from * M, present, negative);
#pragma unroll
        for (int window = 0; window < WINDOWS; ++window) {
            u32 here = present >> 2 * window & 15, signs = negative >> 2 * window;
            u32 first = __ffs(here) - 1, rest = here & here - 1, second = __ffs(rest) - 1;  // -1 where there is none
            u32 values = 0;
            if (here) values = 1 + (signs >> first & 1), present &= ~(1u << 2 * window + first);
            if (rest) values |= 1 + (signs >> second & 1) << 2, present &= ~(1u << 2 * window + second);
            if (!here) first = 0, second = 1;
            else if (!rest) {
                second = 3;
                if (first == 3) first = 2, values <<= 2;  // the metadata must ascend
            }
            windows[row][block * WINDOWS + window] = first | second << 2 | values << 4;
        }
    }
    __syncthreads();
    int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    int row = 16 * warp + lane / 4, metadata_row = row + lane % 2 * 8, half = lane / 2 % 2, column = lane % 4 * 2;
    for (int window = 0; window < WINDOWS; ++window) {
        int instruction = part * WINDOWS + window;
        if (instruction >= 2 * weight.stages) break;
        u32 metadata = 0, values = 0;
        for (int i = 0; i < 8; ++i) metadata |= (windows[metadata_row][16 * window + 8 * half + i] & 15u) << 4 * i;
        for (int i = 0; i < 8; ++i) {  // registers 0 to 3 of operand A, two windows each: row, row + 8, half by half
            int in_register = i / 2;
            u32 both = windows[row + in_register % 2 * 8][16 * window + in_register / 2 * 8 + column + i % 2] >> 4;
            int at = in_register % 2 * 16 + in_register / 2 * 2 + i % 2 * 8;
            values |= (both & 3) << at | (both >> 2) << at + 4;
        }
        uint2* target = (uint2*)weight.target + ((size_t)(group * weight.stages + instruction / 2) * 128 + thread) * 2;
        target[instruction % 2] = make_uint2(metadata, values);
    }
}
