// The kernel of kernels/decoder_step/gpu_cuda.cu, launched on a CPU.

#include "gpu_cuda.cu"

alignas(16) thread_local u8 dynamic[SHARED_BYTES];

extern "C" void launch(
    const void* layers, void* x, void* qkv, void* attention, void* activated, void* partials, void* arrived,
    const void* position, const void* cosines, const void* sines, int count, int places, int seed) {
    emulation::run(BLOCKS, THREADS + 32, seed, [=] {
        decoder_step(
            (const Layer*)layers, (u16*)x, (u16*)qkv, (u16*)attention, (u16*)activated, (Partial*)partials,
            (u32*)arrived, (const long long*)position, (const u16*)cosines, (const u16*)sines, count, places);
    });
}
