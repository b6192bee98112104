// The sparse product on Hopper's tensor cores. Compiled at run time by NVRTC, which defines RESULT (bf16 or f16), PER_ROW
// (whether each row has a scale and a bias of its own, or all have one scale and none a bias), ADDS (whether there is a
// residual), and what tiling.py tells: TOKENS of a tile (64, 128 or 256), SPLITS of the lifted columns, WARPGROUPS of a
// block, STAGES in flight, how many of them a warpgroup multiplies TOGETHER, and the BLOCKS_AT_ONCE of a multiprocessor.
//
// y[t, o] = (sum over k of q[t, k] * codes[o, k]) * row_scale[o] / token_scale[t] + bias[o] + residual[t, o]
//
// q [T, K] int8 are lifted activations, codes [O, K] are ternary and 2:4 along K (see formats/windows.py). The weight
// is operand A of wgmma.sp, m64nTOKENSk64, and comes as fragments of 2 bits a weight (see formats/fragments.py), which
// the threads unpack in registers. What bounds a sparse product is shared memory: the tensor cores read 128 bytes of
// activations a cycle, all that it gives, and whatever is written there comes on top. Hence the large tile of 256 tokens
// wherever it leaves no multiprocessor idle, which two warpgroups multiply with 64 rows each, and the fragments, which
// are an eighth of its activations. Another role, one warp, loads: ROW_BLOCKS blocks share their tokens, each loading
// its part of them for all.
//
// Few tokens are bound by memory instead, and by what it takes to begin: a small tile leaves room for many stages in
// flight, whose weights are asked for before the launch that writes the activations has ended.
//
// Where few tiles would leave multiprocessors idle, SPLITS such pairs of blocks share a tile: each sums a part of the lifted
// columns, hands its sums to the others through distributed shared memory, and finishes its part of the tokens. Integers
// add up to the same in any order, and nothing but shared memory is used.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int ROW_BLOCKS = 2;  // that share tokens
constexpr int CLUSTER = ROW_BLOCKS * SPLITS;  // blocks
constexpr int ROWS = 64;       // of the weight, a warpgroup
constexpr int DEPTH = 128;     // lifted columns a stage, two instructions
constexpr int BAND = 8;        // tiles of a cluster's rows that are multiplied with all tokens before the next ones
constexpr int SUMS = TOKENS / 2;  // a thread
constexpr int SCALES = (TOKENS + 127) / 128;  // of tokens, that a thread reads
constexpr int OWN_TOKENS = TOKENS / SPLITS, OWN_SUMS = SUMS / SPLITS;  // that a block finishes
constexpr int FRAGMENT_BYTES = ROWS * DEPTH / 4;  // of a warpgroup
constexpr int STAGE_BYTES = TOKENS * DEPTH + WARPGROUPS * FRAGMENT_BYTES;
constexpr int RESULT_BYTES = OWN_TOKENS * ROWS * 2;  // of a warpgroup
constexpr int BARRIERS = 0, RESIDUAL_BARRIERS = 512, ROW_FACTORS = 1024;  // scales of rows, then their biases
constexpr int FACTORS = ROW_FACTORS + WARPGROUPS * ROWS * 8;
constexpr int RESULTS = (FACTORS + WARPGROUPS * TOKENS * 8 + 1023) / 1024 * 1024;  // as the 128-byte swizzle needs
constexpr int RING = RESULTS + WARPGROUPS * RESULT_BYTES;  // of stages: activations, then fragments; at last, sums of others
constexpr int MAGIC_BITS = 0x4B400000;  // of MAGIC; plus an integer below 2^22, the bits of MAGIC plus it
constexpr float MAGIC = 12582912.0f;

struct alignas(64) TensorMap { u64 words[16]; };

__device__ __forceinline__ void initialise(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ u32 place_in(u32 address, u32 block) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    return there;
}

__device__ __forceinline__ void arrive_at(u32 barrier, u32 block) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(place_in(barrier, block)) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 phase) {
    asm volatile(
        "{\n .reg .pred done;\n again:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        " @!done bra again;\n}" ::"r"(barrier), "r"(phase) : "memory");
}

__device__ __forceinline__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Ahead of all that is read or written but weights. The launch after may begin then, and take for granted that what lies
// before this one has ended.
__device__ __forceinline__ void wait_for_launch_before() {
    asm volatile("griddepcontrol.wait;\n griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ __forceinline__ void meet_warpgroup(int warpgroup) {
    asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

// d += a * b for 64 rows and TOKENS tokens over 64 lifted columns; d = a * b where `adds` is 0.
#define FOUR(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define THIRTY_TWO(i) \
    FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12), FOUR(i + 16), FOUR(i + 20), FOUR(i + 24), FOUR(i + 28)
#define NAMES_0 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23," \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_32 \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53," \
    "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_64 \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85," \
    "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_96 \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114," \
    "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MULTIPLY(width, names, a0, a1, a2, a3, tokens, metadata, adds) \
    "{\n .reg .pred adds;\n setp.ne.b32 adds, " adds ", 0;\n" \
    "wgmma.mma_async.sp.sync.aligned.m64n" width "k64.s32.s8.s8 {" names "}," \
    "{" a0 ", " a1 ", " a2 ", " a3 "}, " tokens ", " metadata ", 0, adds;\n}"
__device__ __forceinline__ void multiply(int (&d)[SUMS], const u32 (&a)[4], u64 tokens, u32 metadata, int adds) {
#if TOKENS == 256
    asm volatile(MULTIPLY("256", NAMES_0 "," NAMES_32 "," NAMES_64 "," NAMES_96,
                          "%128", "%129", "%130", "%131", "%132", "%133", "%134")
                 : THIRTY_TWO(0), THIRTY_TWO(32), THIRTY_TWO(64), THIRTY_TWO(96)
#elif TOKENS == 128
    asm volatile(MULTIPLY("128", NAMES_0 "," NAMES_32, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
                 : THIRTY_TWO(0), THIRTY_TWO(32)
#else
    asm volatile(MULTIPLY("64", NAMES_0, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
                 : THIRTY_TWO(0)
#endif
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tokens), "r"(metadata), "r"(adds));
}

// Tokens in shared memory, rows of 128 bytes in the 128-byte swizzle, eight rows a repeat.
__device__ __forceinline__ u64 describe(u32 address) {
    return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

// 16 values of 2 bits, 0, 1 and 2 for 0, +1 and -1, to the bytes of operand A: a table look-up by byte permutation.
__device__ __forceinline__ void decode(u32 values, u32 (&a)[4]) {
    constexpr u32 TABLE = 0x00FF0100;
    u32 even = values & 0x33333333, odd = (values >> 2) & 0x33333333;
    a[0] = __byte_perm(TABLE, 0, even);
    a[1] = __byte_perm(TABLE, 0, even >> 16);
    a[2] = __byte_perm(TABLE, 0, odd);
    a[3] = __byte_perm(TABLE, 0, odd >> 16);
}

// The factors of two tokens. In order with the stores around it, so that it can be told to come early.
__device__ __forceinline__ float4 load_two(u32 address) {
    float4 two;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(two.x), "=f"(two.y), "=f"(two.z), "=f"(two.w)
                 : "r"(address));
    return two;
}

// Of 22 bits, so that MAGIC times it is exact. What is no number stays none: rounded it would be a zero.
__device__ __forceinline__ float round_factor(float factor) {
    return factor == factor ? __int_as_float(__float_as_int(factor) + 2 & ~3) : factor;
}

__device__ __forceinline__ u32 pair(float low, float high) {
    u32 both;
    asm("cvt.rn." RESULT "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

__device__ __forceinline__ float2 unpair(u32 both) {
    float2 two;
    asm("{\n .reg .b16 low, high;\n mov.b32 {low, high}, %2;\n cvt.f32." RESULT " %0, low;\n"
        " cvt.f32." RESULT " %1, high;\n}" : "=f"(two.x), "=f"(two.y) : "r"(both));
    return two;
}

// Four matrices of 8 rows and 8 tokens, as they are stored at the end.
__device__ __forceinline__ void load_four(u32 (&pairs)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                 : "r"(address));
}

// To add sums of other blocks to those of this one: d[i] of a tile's part of tokens comes to be d[i % OWN_SUMS] of the
// block whose part it is, whole. A thread hands to the threads of its number, four sums at once, a warp 512 bytes.
__device__ __forceinline__ void add_up(int (&d)[SUMS], u32 ring, int split, u32 row_block, int warpgroup, int thread) {
    constexpr u32 FOURS = 128 * 16, PART = OWN_SUMS / 4 * FOURS;
    u32 here = ring + warpgroup * PART + thread * 16;
    meet_cluster();  // all products are done, and the ring is free
#pragma unroll
    for (int other = 0; other < SPLITS; ++other) {
        if (other == split) continue;
        u32 there = place_in(here + split * WARPGROUPS * PART, other * ROW_BLOCKS + row_block);
#pragma unroll
        for (int i = 0; i < OWN_SUMS; i += 4) {
            const int* four = d + other * OWN_SUMS + i;
            asm volatile("st.shared::cluster.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(there + i / 4 * FOURS), "r"(four[0]),
                         "r"(four[1]), "r"(four[2]), "r"(four[3])
                         : "memory");
        }
    }
    meet_cluster();
#pragma unroll
    for (int part = 1; part < SPLITS; ++part)
#pragma unroll
        for (int i = 0; i < OWN_SUMS; ++i) d[i] = part == split ? d[part * OWN_SUMS + i] : d[i];
#pragma unroll
    for (int other = 0; other < SPLITS; ++other) {
        if (other == split) continue;
#pragma unroll
        for (int i = 0; i < OWN_SUMS; i += 4) {
            int four[4];
            asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(four[0]), "=r"(four[1]), "=r"(four[2]), "=r"(four[3])
                         : "r"(here + other * WARPGROUPS * PART + i / 4 * FOURS)
                         : "memory");
#pragma unroll
            for (int k = 0; k < 4; ++k) d[i + k] += four[k];
        }
    }
}

// Where a tile lies: its rows, counted in clusters' heights, and its tokens, in tiles. Rows are taken in bands, whose
// fragments stay in the cache while all tokens go by, and in a band rows before tokens: blocks at work at a time share.
struct Place {
    int row_tile, token_tile;
};

__device__ __forceinline__ Place place_of(int tile, int row_tiles, int token_tiles) {
    int band = tile / (BAND * token_tiles), inside = tile - band * BAND * token_tiles;
    int height = min(BAND, row_tiles - band * BAND);
    return {band * BAND + inside % height, inside / height};
}

extern "C" __global__ void __launch_bounds__(128 * WARPGROUPS + 32, BLOCKS_AT_ONCE)
__cluster_dims__(CLUSTER, 1, 1) sparse_product(
    const __grid_constant__ TensorMap activations, const __grid_constant__ TensorMap result,
    const __grid_constant__ TensorMap residual, const uint4* fragments, const float* token_scale, const float* row_scale,
    const float* bias, int row_scales, int tokens, int out_features, int groups, int stages, int row_tiles,
    int token_tiles) {
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 shared = (u32)__cvta_generic_to_shared(memory);
    u32 full = shared + BARRIERS, empty = full + 8 * STAGES;
    int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    u32 block = rank % ROW_BLOCKS;
    int split = rank / ROW_BLOCKS;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            initialise(full + 8 * stage, 1);
            initialise(empty + 8 * stage, 4 * WARPGROUPS * ROW_BLOCKS);  // a warp each
        }
        for (int i = 0; i < WARPGROUPS; ++i) initialise(shared + RESIDUAL_BARRIERS + 8 * i, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    meet_cluster();
    // A cluster takes every so manyth tile; one that splits columns, a single one.
    int begin = stages * split / SPLITS, end = stages * (split + 1) / SPLITS;
    int first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER, all_tiles = row_tiles * token_tiles;
    int slot = 0;
    u32 phase = 0;

    if (warpgroup == WARPGROUPS) {
        if (thread == 0) {
            constexpr int PART = TOKENS / ROW_BLOCKS;
            auto load_fragments = [&](Place place, int stage, int slot) {
                u32 target = shared + RING + slot * STAGE_BYTES + TOKENS * DEPTH, ready = full + 8 * slot;
                int group = (place.row_tile * ROW_BLOCKS + block) * WARPGROUPS;
                expect(ready, STAGE_BYTES);
#pragma unroll
                for (int i = 0; i < WARPGROUPS; ++i) {
                    const uint4* source = fragments + ((size_t)min(group + i, groups - 1) * stages + stage) * 128;
                    asm volatile(
                        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
                            "r"(target + i * FRAGMENT_BYTES), "l"(source), "n"(FRAGMENT_BYTES), "r"(ready)
                        : "memory");
                }
            };
            int early = min(STAGES, end - begin);  // stages whose weights come while the launch before ends
            for (int i = 0; i < early; ++i) load_fragments(place_of(first, row_tiles, token_tiles), begin + i, i);
            wait_for_launch_before();
            for (int tile = first; tile < all_tiles; tile += step) {
                Place place = place_of(tile, row_tiles, token_tiles);
                int token = place.token_tile * TOKENS + block * PART;
                for (int stage = begin; stage < end; ++stage) {
                    u32 target = shared + RING + slot * STAGE_BYTES, ready = full + 8 * slot;
                    if (--early < 0) {
                        wait(empty + 8 * slot, phase ^ 1);
                        load_fragments(place, stage, slot);
                    }
                    asm volatile(
                        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                        ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(target + block * PART * DEPTH),
                        "l"(&activations), "r"(ready), "r"(stage * DEPTH), "r"(token),
                        "h"((unsigned short)(((1 << ROW_BLOCKS) - 1) << split * ROW_BLOCKS))
                        : "memory");
                    if (++slot == STAGES) slot = 0, phase ^= 1;
                }
            }
        }
        if (SPLITS > 1) {  // as in add_up
            __syncwarp();
            meet_cluster();
            meet_cluster();
        }
    } else {
        int warp = thread / 32, lane = thread % 32;
        u32 results = shared + RESULTS + warpgroup * RESULT_BYTES;
        u32 residual_ready = shared + RESIDUAL_BARRIERS + 8 * warpgroup;
        float2* factors = (float2*)(memory + FACTORS) + warpgroup * TOKENS;
        float* row_factors = (float*)(memory + ROW_FACTORS) + warpgroup * 2 * ROWS;
        int d[SUMS];
        wait_for_launch_before();
        for (int tile = first; tile < all_tiles; tile += step) {
            Place place = place_of(tile, row_tiles, token_tiles);
            int token = place.token_tile * TOKENS;
            int row = ((place.row_tile * ROW_BLOCKS + block) * WARPGROUPS + warpgroup) * ROWS;
            float scale = PER_ROW ? 1.0f : row_scale[0];
            float scale_of_token[SCALES];
            for (int i = 0; i < SCALES; ++i)
                scale_of_token[i] = token_scale[min(token + 128 * i + thread, tokens - 1)];
            float row_factor = 0;
            if (PER_ROW) {
                int here = row + thread % ROWS;
                bool is_there = here < out_features;
                if (thread < ROWS) row_factor = row_scale[row_scales > 1 && is_there ? here : 0];
                else if (bias && is_there) row_factor = bias[here];
            }
            for (int stage = begin; stage < end; stage += TOGETHER) {
                u32 a[TOGETHER][4], b[TOGETHER][4], metadata[TOGETHER][2], places[TOGETHER];
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i) {
                    bool is_there = i == 0 || stage + i < end;  // else the stage before is taken again, times 0
                    int here = is_there ? slot : slot ? slot - 1 : STAGES - 1;
                    places[i] = here;
                    wait(full + 8 * here, is_there || slot ? phase : phase ^ 1);
                    const unsigned char* stored = memory + RING + here * STAGE_BYTES + TOKENS * DEPTH;
                    uint4 words = ((const uint4*)(stored + warpgroup * FRAGMENT_BYTES))[thread];
                    decode(is_there ? words.y : 0, a[i]);
                    decode(is_there ? words.w : 0, b[i]);
                    metadata[i][0] = words.x, metadata[i][1] = words.z;
                    slot += is_there;
                    if (slot == STAGES) slot = 0, phase ^= 1;
                }
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i) {
                    u64 these = describe(shared + RING + places[i] * STAGE_BYTES);
                    multiply(d, a[i], these, metadata[i][0], i + stage - begin);
                    multiply(d, b[i], these + (DEPTH / 2 >> 4), metadata[i][1], 1);
                }
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                if (stage <= begin + 2 && (stage + TOGETHER > begin + 2 || stage + TOGETHER >= end)) {
                    // in the shadow of the product, and when the scales have arrived
                    if (PER_ROW) row_factors[thread] = row_factor;
#pragma unroll
                    for (int i = 0; i < SCALES; ++i) {
                        // (MAGIC + sum) * factor - MAGIC * factor rounds once
                        float factor = round_factor(scale / scale_of_token[i]);
                        if (TOKENS >= 128 || thread < TOKENS)
                            factors[128 * i + thread] = make_float2(factor, -MAGIC * factor);
                    }
                    if (ADDS && thread == 0) {  // to where the result will be, once that of the tile before has left
                        asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
                        expect(residual_ready, RESULT_BYTES);
                        asm volatile(
                            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                            " [%0], [%1, {%3, %4}], [%2];" ::"r"(results), "l"(&residual), "r"(residual_ready), "r"(row),
                            "r"(token + split * OWN_TOKENS)
                            : "memory");
                    }
                    __syncwarp();
                }
                asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
                __syncwarp();  // every lane has read its fragments; racecheck sees only those that arrive, and reports a race
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i)
                    if (lane < ROW_BLOCKS && (i == 0 || stage + i < end))
                        arrive_at(empty + 8 * places[i], split * ROW_BLOCKS + lane);
            }
            for (int i = 0; i < SUMS; ++i) asm volatile("" : "+r"(d[i])::"memory");  // read after the wait, not before
            if (SPLITS > 1) {
                add_up(d, shared + RING, split, block, warpgroup, thread);
                token += split * OWN_TOKENS;
            }
            // d[4j .. 4j + 3]: a warp's rows r, r, r + 8, r + 8 and tokens 8j + 2q, + 1, + 0, + 1; r = lane / 4, q = lane % 4
            if (ADDS) wait(residual_ready, (tile - first) / step & 1);  // a phase that is kept would be spilt
            else if (thread == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");  // of the tile before
            meet_warpgroup(warpgroup);
            int one = 16 * warp + lane / 4, other = one + 8;
            float scale_one = row_factors[one], scale_other = row_factors[other];
            float bias_one = row_factors[ROWS + one], bias_other = row_factors[ROWS + other];
            u32 chunk = 2 * warp + lane / 8 % 2;  // of 8 rows, 16 bytes
            u32 line = results + (8 * (lane / 16) + lane % 8) * 128 + ((chunk ^ (lane % 8)) << 4);
            u32 factor = shared + FACTORS + (warpgroup * TOKENS + split * OWN_TOKENS + 2 * (lane % 4)) * 8;
            float4 now[2] = {load_two(factor), load_two(factor + 64)}, next[2];
            u32 added[4];
#pragma unroll
            for (int j = 0; j < OWN_TOKENS / 8; j += 2) {
                u32 pairs[4];
                if (ADDS) load_four(added, line + j * 8 * 128);
                if (j + 2 < OWN_TOKENS / 8) {
                    next[0] = load_two(factor + 64 * (j + 2));
                    next[1] = load_two(factor + 64 * (j + 3));
                }
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    float sums[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float sum = __int_as_float(d[4 * (j + k) + i] + MAGIC_BITS);
                        sums[i] = fmaf(sum, i % 2 ? now[k].z : now[k].x, i % 2 ? now[k].w : now[k].y);
                        float scale_here = i < 2 ? scale_one : scale_other, bias_here = i < 2 ? bias_one : bias_other;
                        if (PER_ROW) sums[i] = fmaf(sums[i], scale_here, bias_here);
                    }
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        if (ADDS) {
                            float2 two = unpair(added[2 * k + i]);
                            sums[2 * i] += two.x, sums[2 * i + 1] += two.y;
                        }
                        pairs[2 * k + i] = pair(sums[2 * i], sums[2 * i + 1]);
                    }
                    now[k] = next[k];
                }
                asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                                 line + j * 8 * 128),
                             "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3]));
            }
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            meet_warpgroup(warpgroup);
            if (thread == 0 && row < out_features && token < tokens) {
                asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::
                                 "l"(&result), "r"(results), "r"(row), "r"(token)
                             : "memory");
                asm volatile("cp.async.bulk.commit_group;" ::: "memory");
            }
        }
        if (thread == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
    if (SPLITS == 1) meet_cluster();  // no block leaves while another may still signal it
}
