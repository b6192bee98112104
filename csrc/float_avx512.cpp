#include <immintrin.h>

#include "float_loops.hpp"

namespace sparse_bitnet {
namespace {

struct Avx512Floats {
    static constexpr int kWidth = 16;

    struct Codes {
        static void multiply(const int8_t* const* codes, const int16_t* x, size_t width, int32_t* out) {
            __m512i sums[kTogether] = {};
            for (size_t at = 0; at < width; at += 32) {
                prefetch(reinterpret_cast<const uint8_t*>(codes[0]) + at * kTogether, 128);
                const __m512i some = _mm512_loadu_si512(x + at);
#pragma GCC unroll 4
                for (int r = 0; r < kTogether; ++r) {
                    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes[r] + at));
                    sums[r] = _mm512_dpwssd_epi32(sums[r], _mm512_cvtepi8_epi16(bytes), some);
                }
            }
            for (int r = 0; r < kTogether; ++r) out[r] = _mm512_reduce_add_epi32(sums[r]);
        }
    };
};

}  // namespace

constexpr FloatKernel kFloatAvx512 = make_float_kernel<Avx512Floats>();

}  // namespace sparse_bitnet
