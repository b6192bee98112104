// One token through all layers of a decoder, in one launch. Compiled at run time by NVRTC, which defines BLOCKS,
// THREADS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD (numbers a head), PART (heads a block attends with), SPLITS (of the text,
// for attention), SCALING, EPSILON, SMALLEST, and the bytes that the host reckons with for its structs.
//
// A block on every multiprocessor; they meet five times a layer: behind q, k and v, attention, o, gate and up, and
// down. Each quantises the whole token for itself, as that costs less than to wait for another, and multiplies its
// rows, which a warp that does nothing else has read ahead (stream.cuh). What else a stage needs and the one before it
// does not give, norms and caches, is asked for while the blocks meet.
//
// Numbers are bf16, and rounded where those of transformers are; sums of products are integers, and exact.

#include "attention.cuh"
#include "decoder.cuh"
#include "rows.cuh"
#include "stream.cuh"
#include "token.cuh"

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) decoder_step(
    const Layer* layers, u16* x, u16* qkv, u16* attention, u16* activated, Partial* partials, u32* arrived,
    const long long* position, const u16* cosines, const u16* sines, int count, int places) {
    extern __shared__ __align__(16) u8 dynamic[];
    __shared__ Shared shared;
    Layer* table = (Layer*)dynamic;
    u8* memory = dynamic + ceiling(count * sizeof(Layer), 16) * 16;  // codes of the token, or what attention needs
    Ring ring(memory + MEMORY_BYTES, shared);
    Place here = {(int)*position, places};
    if ((u64)*position >= (u64)places) __trap();
    for (int i = threadIdx.x; i < count * sizeof(Layer) / 8; i += THREADS + 32)
        ((u64*)table)[i] = __ldg((const u64*)layers + i);
    if (threadIdx.x < HEAD / 2) {
        size_t angle = (size_t)here.position * HEAD + threadIdx.x;
        shared.cosines[threadIdx.x] = number(cosines[angle]), shared.sines[threadIdx.x] = number(sines[angle]);
    }
    if (threadIdx.x == 0) {
        for (int i = 0; i < SLOTS; ++i) init_barrier(shared.full + i, 1), init_barrier(shared.empty + i, WARPS);
        publish_barriers();
    }
    __syncthreads();
    if (threadIdx.x >= THREADS) return Reader{ring, (int)threadIdx.x % 32}.read(table, count);

    using Slab = RowSlab<HIDDEN>;
    using Product = Rows<HIDDEN>;
    Span of_qkv(QUERIES + 2 * KEYS), of_ffn(FFN);
    int slabs_of_qkv = ceiling(of_qkv.count(), Slab::ROWS), slabs_of_ffn = ceiling(of_ffn.count(), Slab::ROWS / 2);
    int warp = threadIdx.x / 32, slab = Product::own_slab(), own = Product::own_row();
    int row_of_qkv = of_qkv.first + slab * Slab::ROWS + own * WARPS + warp;        // that this lane finishes, if there
    int row_of_ffn = of_ffn.first + slab * Slab::ROWS / 2 + own / 2 * WARPS + warp;  // of gate or, if odd, up
    Meeting meeting(arrived);
    Numbers<HIDDEN> norm;
    u32 bias;

    auto ask_for_qkv = [&](const Layer& layer) {
        int row = row_of_qkv;
        const Matrix& matrix = matrix_of(layer, row);
        bias = row_of_qkv < of_qkv.end ? bias_of(matrix, row) : 0;
        norm.read(layer.input_norm);
    };

    ask_for_qkv(table[0]);
    for (int index = 0; index < count; ++index) {
        const Layer &layer = table[index], &next = table[min(index + 1, count - 1)];
        {
            Token<HIDDEN> token(x);
            token.normalize(norm, shared);
            float scale = token.quantize(memory, shared);
            int sum = Product::multiply(ring, memory, shared, slabs_of_qkv, [&](int r) { return r * WARPS + warp; });
            int row = row_of_qkv;
            float of_weight = matrix_of(layer, row).scale;
            if (row_of_qkv < of_qkv.end) qkv[row_of_qkv] = bits_of(scaled(sum, of_weight, scale, bias));
        }
        meeting.arrive();
        Attending attending(layer, here);
        meeting.wait();
        attending.run(*(Attention*)memory, shared, layer, qkv, partials, arrived + COUNTERS, attention);
        meeting.arrive();
        Addition<QUERIES> addition(layer.o, x);
        meeting.wait();
        {
            Token<QUERIES> token(attention);
            addition.multiply(ring, memory, shared, token.quantize(memory, shared));
        }
        meeting.arrive();
        bias = row_of_ffn < of_ffn.end ? bias_of(own % 2 ? layer.up : layer.gate, row_of_ffn) : 0;
        norm.read(layer.ffn_norm);
        meeting.wait();
        {
            Token<HIDDEN> token(x);
            token.normalize(norm, shared);
            float scale = token.quantize(memory, shared);
            int sum = Product::multiply(ring, memory, shared, slabs_of_ffn, [&](int r) {
                return r % 2 * (Slab::ROWS / 2) + r / 2 * WARPS + warp;
            });
            float product = scaled(sum, (own % 2 ? layer.up : layer.gate).scale, scale, bias);
            float up = __shfl_down_sync(ALL, product, 1);
            if (own % 2 == 0 && row_of_ffn < of_ffn.end)
                activated[row_of_ffn] = bits_of(rounded(product / (1 + expf(-product))) * up);
        }
        meeting.arrive();
        Addition<FFN> addition_of_ffn(layer.down, x);
        if (index + 1 < count) attending.prefetch(next);
        meeting.wait();
        {
            Token<FFN> token(activated);
            addition_of_ffn.multiply(ring, memory, shared, token.quantize(memory, shared));
        }
        if (index + 1 == count) return;
        meeting.arrive();
        ask_for_qkv(next);
        meeting.wait();
    }
}
