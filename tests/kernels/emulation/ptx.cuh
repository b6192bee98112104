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

inline u32 release_add(u32* to, u32 value) { return __atomic_fetch_add(to, value, __ATOMIC_RELEASE); }

inline u32 acquire(const u32* from) {
    emulation::yield();
    return __atomic_load_n(from, __ATOMIC_ACQUIRE);
}

inline u32 acquire_and_release_add(u32* to, u32 value) { return __atomic_fetch_add(to, value, __ATOMIC_ACQ_REL); }

inline void prefetch_bytes(const void* from, int bytes) {  // that are there to be read
    static volatile u8 read;
    read = ((const u8*)from)[0], read = ((const u8*)from)[bytes - 1];
}
