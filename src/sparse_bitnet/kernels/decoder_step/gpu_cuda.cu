// One token through all layers of a decoder, in one launch. Compiled at run time by NVRTC, which defines BLOCKS,
// THREADS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD (numbers a head), PART (heads a block attends with), SPLITS (of the text,
// for attention), SCALING, EPSILON, SMALLEST, and the bytes that the host reckons with for its structs.
//
// A block on every multiprocessor; they meet five times a layer: behind q, k and v, attention, o, gate and up, and
// down. Each quantises the whole token for itself, as that costs less than to wait for another, and multiplies its
// rows. What a stage needs and the one before it does not give, weights, norms and caches, is asked for while the
// blocks meet; and before that, the L2 cache is told to read weights and caches from memory.
//
// Numbers are bf16, and rounded where those of transformers are; sums of products are integers, and exact.

#include "attention.cuh"
#include "decoder.cuh"
#include "rows.cuh"
#include "token.cuh"

// Has the L2 cache read rows `first` to `end` of a matrix.
__device__ __forceinline__ void prefetch(const Matrix& matrix, int first, int end, int columns) {
    int row_bytes = columns / 4;
    if (first < end) prefetch_bytes((const u8*)matrix.weight + (size_t)first * row_bytes, (end - first) * row_bytes);
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
    Place here = {(int)*position, places};
    if (here.position >= places) __trap();
    for (int i = threadIdx.x; i < count * sizeof(Layer) / 8; i += THREADS)
        ((u64*)table)[i] = __ldg((const u64*)layers + i);
    if (threadIdx.x < HEAD / 2) {
        size_t angle = (size_t)here.position * HEAD + threadIdx.x;
        shared.cosines[threadIdx.x] = number(cosines[angle]), shared.sines[threadIdx.x] = number(sines[angle]);
    }
    __syncthreads();
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
                    if (i < own_qkv)
                        qkv[of_qkv.row(i)] = bits_of(scaled(sum, matrix_of(layer, row).scale, scale, bias));
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
                    if (i < own_ffn && i % 2 == 0)
                        activated[of_ffn.row(i / 2)] = bits_of(rounded(own / (1 + expf(-own))) * up);
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
        if (index + 1 == count) return;
        meeting.arrive();
        fetch_qkv(next);
        meeting.wait();
    }
}
