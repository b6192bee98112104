// Attention of one token to a text. A block has PART heads of a group and one split of the text, a team of eight
// threads a position at a time, and each team its own running maximum and sums; they are joined at the end.

#pragma once

#include "decoder.cuh"

struct Attention {
    u16 queries[PART][HEAD], key[HEAD], value[HEAD];  // of the token
    float2 totals[WARPS][PART];
    float sums[WARPS][PART][HEAD];
};

constexpr int HALF = HEAD / 2;

struct HeadNorm {
    u16 low[HALF / 32], high[HALF / 32];

    __device__ __forceinline__ void fetch(const u16* norm) {
#pragma unroll
        for (int i = 0; i < HALF / 32; ++i) {
            int column = i * 32 + threadIdx.x % 32;
            low[i] = __ldg(norm + column), high[i] = __ldg(norm + HALF + column);
        }
    }
};

// A head of queries or keys, normalised if there is a norm, and turned to its position; by a warp.
template <typename Store>
__device__ __forceinline__ void turn(
    const u16* from, bool has_norm, const HeadNorm& norm, const Shared& shared, Store store) {
    float low[HALF / 32], high[HALF / 32], squares = 0;
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < HALF / 32; ++i) {
        low[i] = number(__ldcg(from + i * 32 + lane)), high[i] = number(__ldcg(from + HALF + i * 32 + lane));
        squares += low[i] * low[i] + high[i] * high[i];
    }
    float factor = has_norm ? rsqrtf(warp_sum(squares) / HEAD + EPSILON) : 1;
#pragma unroll
    for (int i = 0; i < HALF / 32; ++i) {
        int column = i * 32 + lane;
        if (has_norm) {
            low[i] = rounded(number(norm.low[i]) * rounded(low[i] * factor));
            high[i] = rounded(number(norm.high[i]) * rounded(high[i] * factor));
        }
        float cosine = shared.cosines[column], sine = shared.sines[column];
        store(column, rounded(rounded(low[i] * cosine) + rounded(-high[i] * sine)));
        store(HALF + column, rounded(rounded(high[i] * cosine) + rounded(low[i] * sine)));
    }
}

constexpr int MOST_PREFETCHED = (32 << 10) / HEAD;  // positions of a block: a few MiB of all, which the L2 cache keeps

struct Partial {  // of the attention of PART heads over one split of the text
    float sums[PART][HEAD];
    float2 totals[PART];  // the largest score, and the sum of exp(score - largest)
};

static_assert(sizeof(Attention) == ATTENTION_BYTES && sizeof(Partial) == PARTIAL_BYTES, "the room that the host makes");

struct Place {
    int position, places;  // of the token, and how many the caches have
};

// PART heads of one group over one split of the text, first asked for and then attended to.
struct Attending {
    Place here;
    int split, splits, part, kv, first_head, first, end;  // heads of queries are counted within the group
    u16 *keys, *values;
    uint4 key[PIECES], value[PIECES];  // eight numbers of each piece of a head, at the place of this team
    HeadNorm norm;                     // of what this warp turns

    __device__ __forceinline__ Attending(const Layer& layer, const Place& here) : here(here) {
        int width = ceiling(ceiling(here.position + 1, SPLITS), TILE) * TILE;
        splits = here.position / width + 1;
        part = blockIdx.x % (KV_HEADS * PARTS), split = blockIdx.x / (KV_HEADS * PARTS);
        kv = part / PARTS, first_head = part % PARTS * PART;
        first = split * width, end = min(first + width, here.position + 1);
        keys = layer.keys + (size_t)kv * here.places * HEAD;
        values = layer.values + (size_t)kv * here.places * HEAD;
        fetch(first);
        if (layer.key_norm) norm.fetch(threadIdx.x / 32 == PART ? layer.key_norm : layer.query_norm);
    }

    __device__ __forceinline__ void fetch(int tile) {
        int place = tile + threadIdx.x / TEAM;
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            size_t at = (size_t)place * (HEAD / 8) + i * TEAM + threadIdx.x % TEAM;
            key[i] = place < end ? ((const uint4*)keys)[at] : make_uint4(0, 0, 0, 0);
            value[i] = place < end ? ((const uint4*)values)[at] : make_uint4(0, 0, 0, 0);
        }
    }

    // Has the L2 cache read what the next layer attends to.
    __device__ __forceinline__ void prefetch(const Layer& next) const {
        if (split >= splits || first_head || threadIdx.x % 32 || threadIdx.x / 32 > 1) return;
        const u16* from = (threadIdx.x ? next.values : next.keys) + ((size_t)kv * here.places + first) * HEAD;
        prefetch_bytes(from, min(end - first, MOST_PREFETCHED) * HEAD * 2);
    }

    // The queries, and where the token is in this split its key and value, which go into the caches too.
    __device__ __forceinline__ void turn_token(
        Attention& room, const Shared& shared, const Layer& layer, const u16* qkv) {
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = first_head + warp;
        if (warp < PART && head < GROUP) {
            turn(qkv + (kv * GROUP + head) * HEAD, layer.query_norm, norm, shared,
                 [&](int column, float number) { room.queries[warp][column] = bits_of(number); });
        } else if (end > here.position && (warp == PART || warp == PART + 1)) {
            size_t place = (size_t)here.position * HEAD;
            const u16* from = qkv + QUERIES + kv * HEAD;
            if (warp == PART)
                turn(from, layer.key_norm, norm, shared, [&](int column, float number) {
                    room.key[column] = bits_of(number);
                    if (first_head == 0) keys[place + column] = bits_of(number);
                });
            else
                for (int column = lane; column < HEAD; column += 32) {
                    room.value[column] = __ldcg(from + KEYS + column);
                    if (first_head == 0) values[place + column] = room.value[column];
                }
        }
        meet_workers();
    }

    __device__ __forceinline__ void run(
        Attention& room, Shared& shared, const Layer& layer, const u16* qkv, Partial* partials, u32* arrived,
        u16* output) {
        if (split >= splits) return;
        turn_token(room, shared, layer, qkv);
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32, member = threadIdx.x % TEAM;
        uint4 query[PART][PIECES];
        float sums[PART][PIECES][8] = {}, largest[PART], total[PART] = {};
#pragma unroll
        for (int r = 0; r < PART; ++r) {
            largest[r] = LOWEST;
#pragma unroll
            for (int i = 0; i < PIECES; ++i) query[r][i] = ((const uint4*)room.queries[r])[i * TEAM + member];
        }
        for (int tile = first; tile < end; tile += TILE) {
            int place = tile + threadIdx.x / TEAM;
            float scores[PART] = {}, number[8];
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
                if (place == here.position) {
                    key[i] = ((const uint4*)room.key)[i * TEAM + member];
                    value[i] = ((const uint4*)room.value)[i * TEAM + member];
                }
                unpack(key[i], number);
#pragma unroll
                for (int r = 0; r < PART; ++r) {
                    float asked[8];
                    unpack(query[r][i], asked);
#pragma unroll
                    for (int j = 0; j < 8; ++j) scores[r] += asked[j] * number[j];
                }
            }
            uint4 held[PIECES];
#pragma unroll
            for (int i = 0; i < PIECES; ++i) held[i] = value[i];
            if (tile + TILE < end) fetch(tile + TILE);
            float factors[PART];
#pragma unroll
            for (int r = 0; r < PART; ++r) {
#pragma unroll
                for (int other = TEAM / 2; other; other /= 2) scores[r] += __shfl_xor_sync(ALL, scores[r], other);
                float before = largest[r], score = place < end ? scores[r] * SCALING : LOWEST;
                largest[r] = fmaxf(before, score);
                factors[r] = expf(before - largest[r]);
                scores[r] = place < end ? expf(score - largest[r]) : 0;
                total[r] = total[r] * factors[r] + scores[r];
            }
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
                unpack(held[i], number);
#pragma unroll
                for (int r = 0; r < PART; ++r)
#pragma unroll
                    for (int j = 0; j < 8; ++j) sums[r][i][j] = sums[r][i][j] * factors[r] + scores[r] * number[j];
            }
        }
#pragma unroll
        for (int r = 0; r < PART; ++r) {  // the teams of a warp, then the warps
            float most = fmaxf(largest[r], __shfl_xor_sync(ALL, largest[r], 8));
            most = fmaxf(most, __shfl_xor_sync(ALL, most, 16));
            float factor = expf(largest[r] - most);
            total[r] *= factor;
            total[r] += __shfl_xor_sync(ALL, total[r], 8);
            total[r] += __shfl_xor_sync(ALL, total[r], 16);
            if (lane == 0) room.totals[warp][r] = make_float2(most, total[r]);
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {  // of eight numbers a lane goes on with half, and with half of those
                float half[4], quarter[2];
                int upper = lane & 8 ? 4 : 0, last = lane & 16 ? 2 : 0;
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    half[j] = sum_of_two(factor * sums[r][i][j], factor * sums[r][i][4 + j], 8);
#pragma unroll
                for (int j = 0; j < 2; ++j) quarter[j] = sum_of_two(half[j], half[2 + j], 16);
                int column = i * 64 + member * 8 + upper + last;
                *(float2*)&room.sums[warp][r][column] = make_float2(quarter[0], quarter[1]);
            }
        }
        meet_workers();
        finish(room, shared, partials + part * SPLITS, arrived + part, output + (kv * GROUP + first_head) * HEAD);
    }

    // The last block that is done with a part writes its `output`.
    __device__ __forceinline__ void finish(
        Attention& room, Shared& shared, Partial* partials, u32* arrived, u16* output) {
        bool is_own = threadIdx.x < min(PART, GROUP - first_head) * HEAD;
        int r = threadIdx.x / HEAD, column = threadIdx.x % HEAD;
        if (is_own) {
            float most = LOWEST, total = 0, sum = 0;
#pragma unroll
            for (int i = 0; i < WARPS; ++i) most = fmaxf(most, room.totals[i][r].x);
#pragma unroll
            for (int i = 0; i < WARPS; ++i) {
                float factor = expf(room.totals[i][r].x - most);
                total += factor * room.totals[i][r].y, sum += factor * room.sums[i][r][column];
            }
            if (splits == 1) output[threadIdx.x] = bits_of(sum / total);
            else {
                partials[split].sums[r][column] = sum;
                if (column == 0) partials[split].totals[r] = make_float2(most, total);
            }
        }
        if (splits == 1) return;
        meet_workers();
        if (threadIdx.x == 0) {
            shared.is_last = acquire_and_release_add(arrived, 1) + 1 == splits;
            if (shared.is_last) *arrived = 0;  // for the next layer
        }
        meet_workers();
        if (!shared.is_last || !is_own) return;
        float2 totals[SPLITS];
        float sums[SPLITS], most = LOWEST, total = 0, sum = 0;
#pragma unroll
        for (int i = 0; i < SPLITS; ++i) {
            totals[i] = i < splits ? __ldcg(&partials[i].totals[r]) : make_float2(LOWEST, 0);
            sums[i] = i < splits ? __ldcg(&partials[i].sums[r][column]) : 0;
        }
#pragma unroll
        for (int i = 0; i < SPLITS; ++i) most = fmaxf(most, totals[i].x);
#pragma unroll
        for (int i = 0; i < SPLITS; ++i) {
            float factor = expf(totals[i].x - most);
            total += factor * totals[i].y, sum += factor * sums[i];
        }
        output[threadIdx.x] = bits_of(sum / total);
    }
};
