// AVX2: products of unsigned and signed bytes in pairs as int16, which codes + 1 = 0, 1, 2 keep within 512 a pair.
#include <immintrin.h>

#include "kernel.hpp"

namespace sparse_bitnet {
namespace {

struct Avx2 {
    static constexpr int kLanes = 8, kRows = 4, kBlocks = 2;

    struct I2 {
        static constexpr int kBytes = 32, kPlanes = 4, kReads = 32, kStep = 32;
        using Word = __m256i;
        struct Sums {
            __m256i all;
        };

        explicit I2(const Weight&) {}
        static Word load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
        static Word load_some(const uint8_t* p, size_t n) {
            uint8_t bytes[32] = {};
            memcpy(bytes, p, n);
            return load(bytes);
        }
        static __m256i field(Word word, int index) {
            return _mm256_and_si256(_mm256_srli_epi16(word, 2 * index), _mm256_set1_epi8(3));
        }
        static __m256i product(Word word, int index, const int8_t* x) {
            return _mm256_maddubs_epi16(field(word, index), load(reinterpret_cast<const uint8_t*>(x) + 32 * index));
        }
        // Four pairs are at most 4 * 3 * 2 * 128 = 3072 even for codes that no format writes.
        static void add(Sums& sums, Word word, const int8_t* x) {
            const __m256i all =
                _mm256_add_epi16(_mm256_add_epi16(product(word, 0, x), product(word, 1, x)),
                                 _mm256_add_epi16(product(word, 2, x), product(word, 3, x)));
            sums.all = _mm256_add_epi32(sums.all, _mm256_madd_epi16(all, _mm256_set1_epi16(1)));
        }
        static void finish(const Sums (&sums)[4], int32_t* out) {
            const __m256i fours = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0].all, sums[1].all),
                                                    _mm256_hadd_epi32(sums[2].all, sums[3].all));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                             _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1)));
        }
        static void store(Word word, uint8_t* out) {
            for (int i = 0; i < 4; ++i)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * i), field(word, i));
        }
    };

    template <Format>
    using Reader = I2;

    // Sums of int16 are widened after 32 pairs: 32 * 3 * 2 * 128 = 24,576 at most.
    template <int kCount>
    static void multiply_blocks(const uint8_t* unpacked, size_t stride, size_t width, const int8_t* block,
                                size_t out_stride, int32_t* out) {
        __m256i sums[kRows][kCount] = {};
        for (size_t start = 0; start < width; start += 128) {
            __m256i pairs[kRows][kCount] = {};
            for (size_t at = start; at < start + 128; at += 4) {
                __m256i x[kCount];
                for (int i = 0; i < kCount; ++i)
                    x[i] = I2::load(reinterpret_cast<const uint8_t*>(block) + (i * width + at) * kLanes);
#pragma GCC unroll 4
                for (int r = 0; r < kRows; ++r) {
                    const __m256i codes = _mm256_set1_epi32(static_cast<int>(four(unpacked + r * stride + at)));
#pragma GCC unroll 2
                    for (int i = 0; i < kCount; ++i)
                        pairs[r][i] = _mm256_add_epi16(pairs[r][i], _mm256_maddubs_epi16(codes, x[i]));
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
                for (int i = 0; i < kCount; ++i)
                    sums[r][i] = _mm256_add_epi32(sums[r][i], _mm256_madd_epi16(pairs[r][i], _mm256_set1_epi16(1)));
        }
        for (int i = 0; i < kCount; ++i)
            store_four(sums[0][i], sums[1][i], sums[2][i], sums[3][i], out + i * kLanes * out_stride, out_stride);
    }

    // Four rows of 8 tokens, to be four integers beside each other in each token's row
    static void store_four(__m256i a, __m256i b, __m256i c, __m256i d, int32_t* out, size_t stride) {
        const __m256i ab = _mm256_unpacklo_epi32(a, b), AB = _mm256_unpackhi_epi32(a, b);
        const __m256i cd = _mm256_unpacklo_epi32(c, d), CD = _mm256_unpackhi_epi32(c, d);
        const __m256i tokens[4] = {_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd),
                                   _mm256_unpacklo_epi64(AB, CD), _mm256_unpackhi_epi64(AB, CD)};
        for (int i = 0; i < 4; ++i) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * stride), _mm256_castsi256_si128(tokens[i]));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + (4 + i) * stride),
                             _mm256_extracti128_si256(tokens[i], 1));
        }
    }

    static void multiply_many(const uint8_t* unpacked, size_t stride, size_t width, const int8_t* block, size_t blocks,
                              size_t out_stride, int32_t* out) {
        if (blocks == 2)
            multiply_blocks<2>(unpacked, stride, width, block, out_stride, out);
        else
            multiply_blocks<1>(unpacked, stride, width, block, out_stride, out);
    }
};

}  // namespace

constexpr Kernel kAvx2 = make_kernel<Avx2>("avx2", 8, &kFloatAvx2);

}  // namespace sparse_bitnet
