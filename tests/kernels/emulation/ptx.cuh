// kernels/decoder_step/ptx.cuh on a CPU.

#pragma once

#include "cuda.hpp"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

inline u16 bits_of(float value) {
    u32 bits = __float_as_uint(value);
    if (value != value) return 0x7FFF;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

inline void release_add(u32* to, u32 value) { __atomic_fetch_add(to, value, __ATOMIC_RELEASE); }

inline u32 acquire(const u32* from) {
    emulation::yield();
    return __atomic_load_n(from, __ATOMIC_ACQUIRE);
}

inline u32 acquire_and_release_add(u32* to, u32 value) { return __atomic_fetch_add(to, value, __ATOMIC_ACQ_REL); }

inline void meet_workers() {
    emulation::block->workers.expected = THREADS;
    emulation::meet(emulation::block->workers);
}

// A barrier: arrivals that are to come, how many a phase has, bytes that are to come, the parity of the phase.
struct Barrier { int16_t pending, arrivals; int32_t bytes_and_parity; };
static_assert(sizeof(Barrier) == 8, "in the place of one of a GPU");

inline void end_phase(Barrier* barrier) {
    if (barrier->pending || barrier->bytes_and_parity >> 1) return;
    barrier->pending = barrier->arrivals, barrier->bytes_and_parity ^= 1;
}

inline void init_barrier(u64* barrier, u32 arrivals) { *(Barrier*)barrier = {(int16_t)arrivals, (int16_t)arrivals, 0}; }

inline void publish_barriers() {}

inline void arrive(u64* barrier) {
    --((Barrier*)barrier)->pending;
    end_phase((Barrier*)barrier);
}

inline void arrive_expecting(u64* barrier, u32 bytes) {
    ((Barrier*)barrier)->bytes_and_parity += 2 * bytes;
    arrive(barrier);
}

inline void wait(u64* barrier, u32 parity) {
    auto& copies = emulation::block->copies;
    while ((((Barrier*)barrier)->bytes_and_parity & 1) == (int)parity) {
        if (!copies.empty()) {
            std::swap(copies[emulation::block->random() % copies.size()], copies.back());
            auto copy = copies.back();
            copies.pop_back();
            copy();
        }
        emulation::yield();
    }
}

inline void copy(void* to, const void* from, u32 bytes, u64* barrier) {  // done when somebody waits for some copy
    if (bytes % 16 || (uintptr_t)to % 16 || (uintptr_t)from % 16) std::abort();
    std::memset(to, 0xFF, bytes);
    emulation::block->copies.push_back([=] {
        std::memcpy(to, from, bytes);
        ((Barrier*)barrier)->bytes_and_parity -= 2 * bytes;
        end_phase((Barrier*)barrier);
    });
}

inline void prefetch_bytes(const void* from, int bytes) {  // that are there to be read
    static volatile u8 read;
    read = ((const u8*)from)[0], read = ((const u8*)from)[bytes - 1];
}
