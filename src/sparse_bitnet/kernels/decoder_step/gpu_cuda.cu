// One token through all layers of a decoder, in one launch. Compiled at run time by NVRTC, which defines BLOCKS,
// HIDDEN, FFN, HEADS, KV_HEADS, HEAD (numbers a head), PART (heads a block attends with), SPLITS (of the text, for
// attention), SCALING, EPSILON and SMALLEST.
//
// A block on every multiprocessor; they meet five times a layer: behind q, k and v, attention, o, gate and up, and down.
// Each quantises the whole token for itself, as that costs less than to wait for another, and multiplies its rows. What
// a stage needs and the one before it does not give, weights, norms and caches, is asked for while the blocks meet, and
// the stage after has the L2 cache read its weights from memory.
//
// Numbers are bf16, and rounded where those of transformers are; sums of products are integers, and exact.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int GROUP = HEADS / KV_HEADS, PARTS = (GROUP + PART - 1) / PART;  // heads that share keys, and blocks for them
constexpr int QUERIES = HEADS * HEAD, KEYS = KV_HEADS * HEAD;
constexpr int CHUNK = 64;         // columns whose codes a thread reads at once, 16 bytes
constexpr int TEAM = 8;           // threads that attend to a position together
constexpr int TILE = THREADS / TEAM;
constexpr int PIECES = HEAD / 64; // of a head, eight numbers from each of which a thread of a team has
constexpr u32 ALL = 0xFFFFFFFF;
constexpr float LOWEST = -3.4e38f;  // score, of a place that is none

static_assert(HEADS % KV_HEADS == 0 && HEAD % 64 == 0, "heads of 64, 128 or 256");

struct Matrix {
    const uint4* weight;  // the format i2: bits 2p and 2p + 1 of byte b of a row are the code of column 4 b + p, plus 1
    const u16* bias;      // or none
    float scale, unused;
};

struct Layer {
    Matrix q, k, v, o, gate, up, down;
    const u16 *input_norm, *ffn_norm, *query_norm, *key_norm;  // the last two, or none
    u16 *keys, *values;                                        // [KV_HEADS, places, HEAD]
};

struct Shared {
    alignas(16) float squares[WARPS];
    alignas(16) u32 largest[WARPS];
    alignas(16) int sums[WARPS];
    bool is_last;
};

struct Attention {
    float queries[PART][HEAD];
    u16 key[HEAD], value[HEAD];  // of the token
    float2 totals[WARPS][PART];
    float sums[WARPS][PART][HEAD];
};

__device__ __forceinline__ float number(u32 bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ u16 bits_of(float value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ float rounded(float value) { return number(bits_of(value)); }

__device__ __forceinline__ void unpack(uint4 words, float (&eight)[8]) {
    eight[0] = number(words.x & 0xFFFF), eight[1] = __uint_as_float(words.x & 0xFFFF0000);
    eight[2] = number(words.y & 0xFFFF), eight[3] = __uint_as_float(words.y & 0xFFFF0000);
    eight[4] = number(words.z & 0xFFFF), eight[5] = __uint_as_float(words.z & 0xFFFF0000);
    eight[6] = number(words.w & 0xFFFF), eight[7] = __uint_as_float(words.w & 0xFFFF0000);
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int other = 16; other; other /= 2) value += __shfl_xor_sync(ALL, value, other);
    return value;
}

// Where all blocks meet: what each has written before it arrives is there for all behind `wait`. Between the two a block
// may ask for what no other writes.
struct Meeting {
    u32 *arrived, expected;

    __device__ __forceinline__ void arrive() {
        __syncthreads();
        expected += gridDim.x;
        if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
    }

    __device__ __forceinline__ void wait() {
        if (threadIdx.x == 0) {
            u32 seen;
            do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
            while (seen < expected);
        }
        __syncthreads();
    }
};

// Has the L2 cache read so many bytes, a multiple of 16.
__device__ __forceinline__ void prefetch_bytes(const void* from, int bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
}

// The rows of a matrix of `rows` that fall to this block.
struct Span {
    int first, end;
    __device__ Span(int rows) : first((u64)blockIdx.x * rows / gridDim.x), end((u64)(blockIdx.x + 1) * rows / gridDim.x) {}
    __device__ int of_warp() const { return max(0, (end - first - (int)threadIdx.x / 32 + WARPS - 1) / WARPS); }
    __device__ int row(int i) const { return first + threadIdx.x / 32 + i * WARPS; }
};

__host__ __device__ constexpr int ceiling(int a, int b) { return (a + b - 1) / b; }

// ---- The token: COLUMNS numbers, eight neighbours a thread at a time.

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
        __syncthreads();
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
        __syncthreads();
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
        __syncthreads();
        return scale;
    }
};

// ---- Products of the token with rows: a warp a row, a lane every 32nd chunk of its columns.

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

    __device__ __forceinline__ Addition(const Matrix& matrix, u16* x) : matrix(matrix), x(x), span(HIDDEN), count(span.of_warp()) {
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

// ---- Attention

// A head of queries or keys, normalised if there is a norm, and turned to its position; by a warp.
template <typename Store>
__device__ __forceinline__ void turn(const u16* from, const u16* norm, const u16* cosines, const u16* sines, Store store) {
    constexpr int HALF = HEAD / 2, EACH = HALF / 32;
    float low[EACH], high[EACH], squares = 0;
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        low[i] = number(__ldcg(from + i * 32 + lane)), high[i] = number(__ldcg(from + HALF + i * 32 + lane));
        squares += low[i] * low[i] + high[i] * high[i];
    }
    float factor = norm ? rsqrtf(warp_sum(squares) / HEAD + EPSILON) : 1;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        int column = i * 32 + lane;
        if (norm) {
            low[i] = rounded(number(norm[column]) * rounded(low[i] * factor));
            high[i] = rounded(number(norm[HALF + column]) * rounded(high[i] * factor));
        }
        float cosine = number(__ldg(cosines + column)), sine = number(__ldg(sines + column));
        store(column, rounded(rounded(low[i] * cosine) + rounded(-high[i] * sine)));
        store(HALF + column, rounded(rounded(high[i] * cosine) + rounded(low[i] * sine)));
    }
}

struct Partial {  // of the attention of PART heads over one split of the text
    float sums[PART][HEAD];
    float2 totals[PART];  // the largest score, and the sum of exp(score - largest)
};

struct Place {
    int position, places;  // of the token, and how many the caches have
    const u16 *cosines, *sines;
};

// PART heads of one group over one split of the text, first asked for and then attended to.
struct Attending {
    Place here;
    int split, splits, part, kv, first_head, first, end;  // heads of queries are counted within the group
    u16 *keys, *values;
    uint4 key[PIECES], value[PIECES];  // eight numbers of each piece of a head, at the place of this team

    __device__ __forceinline__ Attending(const Layer& layer, const Place& here) : here(here) {
        int width = ceiling(ceiling(here.position + 1, SPLITS), TILE) * TILE;
        splits = here.position / width + 1;
        part = blockIdx.x % (KV_HEADS * PARTS), split = blockIdx.x / (KV_HEADS * PARTS);
        kv = part / PARTS, first_head = part % PARTS * PART;
        first = split * width, end = min(first + width, here.position + 1);
        keys = layer.keys + (size_t)kv * here.places * HEAD;
        values = layer.values + (size_t)kv * here.places * HEAD;
        fetch(first);
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
        prefetch_bytes(from, (end - first) * HEAD * 2);
    }

    // The queries, and where the token is in this split its key and value, which go into the caches too.
    __device__ __forceinline__ void turn_token(Attention& room, const Layer& layer, const u16* qkv) {
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = first_head + warp;
        if (warp < PART && head < GROUP) {
            turn(qkv + (kv * GROUP + head) * HEAD, layer.query_norm, here.cosines, here.sines,
                 [&](int column, float number) { room.queries[warp][column] = number; });
        } else if (end > here.position && (warp == PART || warp == PART + 1)) {
            size_t place = (size_t)here.position * HEAD;
            const u16* from = qkv + QUERIES + kv * HEAD;
            if (warp == PART)
                turn(from, layer.key_norm, here.cosines, here.sines, [&](int column, float number) {
                    room.key[column] = bits_of(number);
                    if (first_head == 0) keys[place + column] = bits_of(number);
                });
            else
                for (int column = lane; column < HEAD; column += 32) {
                    room.value[column] = __ldcg(from + KEYS + column);
                    if (first_head == 0) values[place + column] = room.value[column];
                }
        }
        __syncthreads();
    }

    __device__ __forceinline__ void run(
        Attention& room, Shared& shared, const Layer& layer, const u16* qkv, Partial* partials, u32* arrived, u16* output) {
        if (split >= splits) return;
        turn_token(room, layer, qkv);
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32, member = threadIdx.x % TEAM;
        float query[PART][PIECES][8], sums[PART][PIECES][8] = {}, largest[PART], total[PART] = {};
#pragma unroll
        for (int r = 0; r < PART; ++r) {
            largest[r] = LOWEST;
#pragma unroll
            for (int i = 0; i < PIECES; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j) query[r][i][j] = room.queries[r][i * 64 + member * 8 + j];
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
                for (int r = 0; r < PART; ++r)
#pragma unroll
                    for (int j = 0; j < 8; ++j) scores[r] += query[r][i][j] * number[j];
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
            for (int i = 0; i < PIECES; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    float sum = sums[r][i][j] * factor;
                    sum += __shfl_xor_sync(ALL, sum, 8);
                    sum += __shfl_xor_sync(ALL, sum, 16);
                    if (lane < TEAM) room.sums[warp][r][i * 64 + member * 8 + j] = sum;
                }
        }
        __syncthreads();
        finish(room, shared, partials + part * SPLITS, arrived + part, output + (kv * GROUP + first_head) * HEAD);
    }

    // The last block that is done with a part writes its `output`.
    __device__ __forceinline__ void finish(Attention& room, Shared& shared, Partial* partials, u32* arrived, u16* output) {
        bool is_own = threadIdx.x < min(PART, GROUP - first_head) * HEAD;
        int r = threadIdx.x / HEAD;
        if (is_own) {
            float most = LOWEST, total = 0, sum = 0;
#pragma unroll
            for (int i = 0; i < WARPS; ++i) most = fmaxf(most, room.totals[i][r].x);
#pragma unroll
            for (int i = 0; i < WARPS; ++i) {
                float factor = expf(room.totals[i][r].x - most);
                total += factor * room.totals[i][r].y, sum += factor * room.sums[i][0][threadIdx.x];
            }
            if (splits == 1) output[threadIdx.x] = bits_of(sum / total);
            else {
                partials[split].sums[0][threadIdx.x] = sum;
                if (threadIdx.x % HEAD == 0) partials[split].totals[r] = make_float2(most, total);
            }
        }
        if (splits == 1) return;
        __syncthreads();
        if (threadIdx.x == 0) {
            u32 others;
            asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(others) : "l"(arrived) : "memory");
            shared.is_last = others + 1 == splits;
            if (shared.is_last) *arrived = 0;  // for the next layer
        }
        __syncthreads();
        if (!shared.is_last || !is_own) return;
        float2 totals[SPLITS];
        float sums[SPLITS], most = LOWEST, total = 0, sum = 0;
#pragma unroll
        for (int i = 0; i < SPLITS; ++i) {
            totals[i] = i < splits ? __ldcg(&partials[i].totals[r]) : make_float2(LOWEST, 0);
            sums[i] = i < splits ? __ldcg(&partials[i].sums[0][threadIdx.x]) : 0;
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

// ---- The layers

__device__ __forceinline__ void prefetch(const Matrix& matrix, int first, int end, int columns) {
    if (first < end) prefetch_bytes((const u8*)matrix.weight + (size_t)first * (columns / 4), (end - first) * (columns / 4));
}

// The matrix of a row of [q; k; v], and its place there.
__device__ __forceinline__ const Matrix& matrix_of(const Layer& layer, int& row) {
    if (row < QUERIES) return layer.q;
    row -= QUERIES;
    if (row < KEYS) return layer.k;
    row -= KEYS;
    return layer.v;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decoder_step(
    const Layer* layers, u16* x, u16* qkv, u16* attention, u16* activated, Partial* partials, u32* arrived,
    const long long* position, const u16* cosines, const u16* sines, int count, int places) {
    extern __shared__ __align__(16) u8 dynamic[];
    __shared__ Shared shared;
    Layer* table = (Layer*)dynamic;
    u8* memory = dynamic + ceiling(count * sizeof(Layer), 16) * 16;  // codes of the token, or what attention needs
    for (int i = threadIdx.x; i < count * sizeof(Layer) / 8; i += THREADS) ((u64*)table)[i] = __ldg((const u64*)layers + i);
    __syncthreads();
    Place here = {(int)*position, places, cosines + *position * HEAD, sines + *position * HEAD};
    Span of_qkv(QUERIES + 2 * KEYS), of_hidden(HIDDEN), of_ffn(FFN);
    int own_qkv = of_qkv.of_warp(), own_ffn = 2 * of_ffn.of_warp();
    Meeting meeting = {arrived, 0};
    Rows<HIDDEN, at_a_time(QUERIES + 2 * KEYS, HIDDEN)> rows_of_qkv;
    Rows<HIDDEN, 2 * at_a_time(FFN, 2 * HIDDEN)> rows_of_ffn;
    Numbers<HIDDEN> norm;
    u32 bias;

    auto row_of_qkv = [&](const Layer& layer, int i) {
        int row = of_qkv.row(i);
        const Matrix& matrix = matrix_of(layer, row);
        return matrix.weight + (size_t)row * (HIDDEN / CHUNK);
    };
    auto bias_of_qkv = [&](const Layer& layer, int i) {
        int row = of_qkv.row(i);
        const Matrix& matrix = matrix_of(layer, row);
        return i < own_qkv ? bias_of(matrix, row) : 0;
    };
    auto fetch_qkv = [&](const Layer& layer) {
        rows_of_qkv.fetch(0, own_qkv, [&](int i) { return row_of_qkv(layer, i); });
        bias = bias_of_qkv(layer, rows_of_qkv.own(0, own_qkv));
        norm.read(layer.input_norm);
    };

    fetch_qkv(table[0]);
    for (int index = 0; index < count; ++index) {
        const Layer &layer = table[index], &next = table[min(index + 1, count - 1)];
        {
            Token<HIDDEN> token(x);
            token.normalize(norm, shared);
            float scale = token.quantize(memory, shared);
            rows_of_qkv.multiply(
                memory, shared, own_qkv, [&](int i) { return row_of_qkv(layer, i); }, bias,
                [&](int i) { return bias_of_qkv(layer, i); },
                [&](int i, int sum, u32 bias) {
                    int row = of_qkv.row(i);
                    if (i < own_qkv) qkv[of_qkv.row(i)] = bits_of(scaled(sum, matrix_of(layer, row).scale, scale, bias));
                });
        }
        meeting.arrive();
        Attending attending(layer, here);
        if (threadIdx.x == 32) prefetch(layer.o, of_hidden.first, of_hidden.end, QUERIES);
        if (threadIdx.x == 64) prefetch(layer.gate, of_ffn.first, of_ffn.end, HIDDEN);
        if (threadIdx.x == 96) prefetch(layer.up, of_ffn.first, of_ffn.end, HIDDEN);
        meeting.wait();
        attending.run(*(Attention*)memory, shared, layer, qkv, partials, arrived + 1, attention);
        meeting.arrive();
        Addition<QUERIES> addition(layer.o, x);
        if (threadIdx.x == 32) prefetch(layer.down, of_hidden.first, of_hidden.end, FFN);
        meeting.wait();
        {
            Token<QUERIES> token(attention);
            addition.multiply(memory, shared, token.quantize(memory, shared));
        }
        meeting.arrive();
        auto row_of_ffn = [&](int i) {
            return (i % 2 ? layer.up : layer.gate).weight + (size_t)of_ffn.row(i / 2) * (HIDDEN / CHUNK);
        };
        auto bias_of_ffn = [&](int i) {
            return i < own_ffn ? bias_of(i % 2 ? layer.up : layer.gate, of_ffn.row(i / 2)) : 0;
        };
        rows_of_ffn.fetch(0, own_ffn, row_of_ffn);
        bias = bias_of_ffn(rows_of_ffn.own(0, own_ffn));
        norm.read(layer.ffn_norm);
        if (index + 1 < count) {
            int key = of_qkv.first - QUERIES, value = key - KEYS, rows = of_qkv.end - of_qkv.first;
            if (threadIdx.x == 32) prefetch(next.q, of_qkv.first, min(of_qkv.end, QUERIES), HIDDEN);
            if (threadIdx.x == 64) prefetch(next.k, max(key, 0), min(key + rows, KEYS), HIDDEN);
            if (threadIdx.x == 96) prefetch(next.v, max(value, 0), value + rows, HIDDEN);
        }
        meeting.wait();
        {
            Token<HIDDEN> token(x);
            token.normalize(norm, shared);
            float scale = token.quantize(memory, shared);
            rows_of_ffn.multiply(
                memory, shared, own_ffn, row_of_ffn, bias, bias_of_ffn, [&](int i, int sum, u32 bias) {
                    float own = scaled(sum, (i % 2 ? layer.up : layer.gate).scale, scale, bias);
                    float up = __shfl_down_sync(ALL, own, 1);
                    if (i < own_ffn && i % 2 == 0) activated[of_ffn.row(i / 2)] = bits_of(rounded(own / (1 + expf(-own))) * up);
                });
        }
        meeting.arrive();
        Addition<FFN> addition_of_ffn(layer.down, x);
        if (index + 1 < count) attending.prefetch(next);
        meeting.wait();
        {
            Token<FFN> token(activated);
            addition_of_ffn.multiply(memory, shared, token.quantize(memory, shared));
        }
        meeting.arrive();
        if (index + 1 < count) fetch_qkv(next);
        meeting.wait();
    }
}
