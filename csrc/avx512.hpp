// AVX-512 with VNNI: the product of four unsigned and four signed bytes is added to an int32.
#pragma once

#include <immintrin.h>

#include "kernel.hpp"

namespace sparse_bitnet {
namespace {

struct Avx512 {
    static constexpr int kLanes = 16, kRows = 12, kBlocks = 2;

    // Fields stay where they are in their byte, which multiplies them by 1, 4, 16, 64: no shifts but one at the end.
    struct I2 {
        static constexpr int kBytes = 64, kPlanes = 4, kReads = 64, kStep = 64;
        using Word = __m512i;
        struct Sums {
            __m512i field[4];
        };

        explicit I2(const Weight&) {}
        static Word load(const uint8_t* p) { return _mm512_loadu_si512(p); }
        static Word load_some(const uint8_t* p, size_t n) {
            return _mm512_maskz_loadu_epi8(n < 64 ? (__mmask64{1} << n) - 1 : ~__mmask64{0}, p);
        }
        static __m512i field(Word word, int index) {
            return _mm512_and_si512(word, _mm512_set1_epi8(static_cast<char>(3 << (2 * index))));
        }
        static void add(Sums& sums, Word word, const int8_t* x) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
                sums.field[i] = _mm512_dpbusd_epi32(sums.field[i], field(word, i), _mm512_loadu_si512(x + 64 * i));
        }
        static __m256i half(const Sums& sums) {
            const __m512i all = _mm512_add_epi32(
                _mm512_add_epi32(sums.field[0], _mm512_srai_epi32(sums.field[1], 2)),
                _mm512_add_epi32(_mm512_srai_epi32(sums.field[2], 4), _mm512_srai_epi32(sums.field[3], 6)));
            return _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
        }
        static void finish(const Sums (&sums)[4], int32_t* out) {
            const __m256i pairs = _mm256_hadd_epi32(half(sums[0]), half(sums[1]));
            const __m256i others = _mm256_hadd_epi32(half(sums[2]), half(sums[3]));
            const __m256i fours = _mm256_hadd_epi32(pairs, others);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                             _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1)));
        }
        static void store(Word word, uint8_t* out) {
            const __m512i low = _mm512_set1_epi8(3);
            for (int i = 0; i < 4; ++i)
                _mm512_storeu_si512(out + 64 * i, _mm512_and_si512(_mm512_srli_epi16(word, 2 * i), low));
        }
    };

    template <Format>
    using Reader = I2;

    template <int kCount>
    static void multiply_blocks(const uint8_t* unpacked, size_t stride, size_t width, const int8_t* block,
                                size_t out_stride, int32_t* out) {
        __m512i sums[kRows][kCount] = {};
        for (size_t at = 0; at < width; at += 4) {
            __m512i x[kCount];
            for (int i = 0; i < kCount; ++i) x[i] = _mm512_loadu_si512(block + (i * width + at) * kLanes);
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r) {
                const __m512i codes = _mm512_set1_epi32(static_cast<int>(four(unpacked + r * stride + at)));
#pragma GCC unroll 2
                for (int i = 0; i < kCount; ++i) sums[r][i] = _mm512_dpbusd_epi32(sums[r][i], codes, x[i]);
            }
        }
        alignas(64) int32_t rows[kRows][kCount][kLanes];
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
            for (int i = 0; i < kCount; ++i) _mm512_store_si512(rows[r][i], sums[r][i]);
        for (int r = 0; r < kRows; r += 4)
            for (int i = 0; i < kCount; ++i)
                turn_four(rows[r][i], kCount * kLanes, out + i * kLanes * out_stride + r, out_stride);
    }

    // Four rows of 16 tokens -> four integers beside each other for each token. On its own, or the compiler would mix it
    // with the loop above and no longer keep the sums in registers.
    [[gnu::noinline]] static void turn_four(const int32_t* rows, size_t row_stride, int32_t* out, size_t stride) {
        const __m512i a = _mm512_load_si512(rows), b = _mm512_load_si512(rows + row_stride);
        const __m512i c = _mm512_load_si512(rows + 2 * row_stride), d = _mm512_load_si512(rows + 3 * row_stride);
        const __m512i ab = _mm512_unpacklo_epi32(a, b), AB = _mm512_unpackhi_epi32(a, b);
        const __m512i cd = _mm512_unpacklo_epi32(c, d), CD = _mm512_unpackhi_epi32(c, d);
        const __m512i tokens[4] = {_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd),
                                   _mm512_unpacklo_epi64(AB, CD), _mm512_unpackhi_epi64(AB, CD)};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const auto store = [&](int token, __m128i four) {
                _mm_storeu_si128(reinterpret_cast<__m128i*>(out + (token + i) * stride), four);
            };
            store(0, _mm512_castsi512_si128(tokens[i]));
            store(4, _mm512_extracti32x4_epi32(tokens[i], 1));
            store(8, _mm512_extracti32x4_epi32(tokens[i], 2));
            store(12, _mm512_extracti32x4_epi32(tokens[i], 3));
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
}  // namespace sparse_bitnet
