// AVX-512 with VBMI besides: bytes go anywhere in a vector, and bit fields are cut at any bit, which reads t5 and g4.
#pragma once

#include "avx512.hpp"

namespace sparse_bitnet {
namespace {

// 64 numbers of kBits bits: their bytes are spread eight numbers to a 64-bit lane, cut, and looked up as bytes of i2.
template <int kBits, Format format>
struct G4 : Avx512::I2 {
    static constexpr int kStep = 8 * kBits;

    __m512i spread, cuts, book;

    explicit G4(const Weight& weight) : I2(weight) {
        uint8_t from[64], at[64];
        for (int i = 0; i < 64; ++i) {
            from[i] = static_cast<uint8_t>(i % 8 < kBits ? i / 8 * kBits + i % 8 : 0);
            at[i] = static_cast<uint8_t>(i % 8 * kBits);
        }
        spread = _mm512_loadu_si512(from);
        cuts = _mm512_loadu_si512(at);
        book = _mm512_loadu_si512(codebook(format));
    }
    // The lookup takes the lowest 6 bits: with 5 bits a number, the next number's lowest bit chooses between two copies.
    Word numbers(Word packed) const {
        return _mm512_permutexvar_epi8(_mm512_multishift_epi64_epi8(cuts, _mm512_permutexvar_epi8(spread, packed)),
                                       book);
    }
    Word load(const uint8_t* p) const { return numbers(I2::load(p)); }
    Word load_some(const uint8_t* p, size_t n) const { return numbers(I2::load_some(p, n)); }
};

// A table of 256 gives the lower four digits of a byte as a byte of i2; the fifth is told by comparing.
struct T5 {
    static constexpr int kBytes = 64, kPlanes = 5, kReads = 64, kStep = 64;
    struct Word {
        __m512i four, fifth;
    };
    using Sums = Avx512::I2::Sums;

    __m512i table[4];

    explicit T5(const Weight&) {
        uint8_t bytes[256];
        for (int byte = 0; byte < 256; ++byte)
            bytes[byte] =
                static_cast<uint8_t>(byte % 3 | byte / 3 % 3 << 2 | byte / 9 % 3 << 4 | byte / 27 % 3 << 6);
        for (int i = 0; i < 4; ++i) table[i] = _mm512_loadu_si512(bytes + 64 * i);
    }
    Word digits(__m512i packed) const {
        const __m512i one = _mm512_set1_epi8(1);
        const __m512i low = _mm512_permutex2var_epi8(table[0], packed, table[1]);
        const __m512i high = _mm512_permutex2var_epi8(table[2], packed, table[3]);
        const __m512i four = _mm512_mask_blend_epi8(_mm512_movepi8_mask(packed), low, high);
        const __m512i fifth = _mm512_maskz_mov_epi8(_mm512_cmpge_epu8_mask(packed, _mm512_set1_epi8(81)), one);
        const __mmask64 is_two = _mm512_cmpge_epu8_mask(packed, _mm512_set1_epi8(static_cast<char>(162)));
        return {four, _mm512_mask_add_epi8(fifth, is_two, one, one)};
    }
    Word load(const uint8_t* p) const { return digits(Avx512::I2::load(p)); }
    Word load_some(const uint8_t* p, size_t n) const { return digits(Avx512::I2::load_some(p, n)); }
    static void add(Sums& sums, Word word, const int8_t* x) {
        Avx512::I2::add(sums, word.four, x);
        sums.field[0] = _mm512_dpbusd_epi32(sums.field[0], word.fifth, _mm512_loadu_si512(x + 256));
    }
    static void finish(const Sums (&sums)[4], int32_t* out) { Avx512::I2::finish(sums, out); }
    static void store(Word word, uint8_t* out) {
        Avx512::I2::store(word.four, out);
        _mm512_storeu_si512(out + 256, word.fifth);
    }
};

template <Format>
struct VbmiReader {
    using Type = Avx512::I2;
};
template <>
struct VbmiReader<Format::t5> {
    using Type = T5;
};
template <>
struct VbmiReader<Format::g4> {
    using Type = G4<6, Format::g4>;
};
template <>
struct VbmiReader<Format::g4s2> {
    using Type = G4<5, Format::g4s2>;
};
template <>
struct VbmiReader<Format::g4s3> {
    using Type = G4<5, Format::g4s3>;
};

struct Avx512Vbmi : Avx512 {
    template <Format format>
    using Reader = typename VbmiReader<format>::Type;
};

}  // namespace
}  // namespace sparse_bitnet
