#include <immintrin.h>

#include "float_loops.hpp"

namespace sparse_bitnet {
namespace {

struct Avx2Floats {
    static constexpr int kWidth = 8;

    struct Codes {
        static void multiply(const int8_t* const* codes, const int16_t* x, size_t width, int32_t* out) {
            __m256i sums[kTogether] = {};
            for (size_t at = 0; at < width; at += 16) {
                prefetch(reinterpret_cast<const uint8_t*>(codes[0]) + at * kTogether, at % 32 ? 0 : 128);
                const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + at));
#pragma GCC unroll 4
                for (int r = 0; r < kTogether; ++r) {
                    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes[r] + at));
                    const __m256i products = _mm256_madd_epi16(_mm256_cvtepi8_epi16(bytes), some);
                    sums[r] = _mm256_add_epi32(sums[r], products);
                }
            }
            const __m256i fours = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]),
                                                    _mm256_hadd_epi32(sums[2], sums[3]));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                             _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1)));
        }
    };
};

}  // namespace

constexpr FloatKernel kFloatAvx2 = make_float_kernel<Avx2Floats>();

}  // namespace sparse_bitnet
