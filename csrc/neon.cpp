// NEON with the dot product of ARMv8.2: the product of four signed bytes and four others is added to an int32.
#include <arm_neon.h>

#include "kernel.hpp"

namespace sparse_bitnet {
namespace {

struct Neon {
    static constexpr int kLanes = 4, kRows = 4, kBlocks = 4;

    struct I2 {
        static constexpr int kBytes = 16, kPlanes = 4, kReads = 16, kStep = 16;
        using Word = uint8x16_t;
        struct Sums {
            int32x4_t all;
        };

        explicit I2(const Weight&) {}
        static Word load(const uint8_t* p) { return vld1q_u8(p); }
        static Word load_some(const uint8_t* p, size_t n) {
            uint8_t bytes[16] = {};
            memcpy(bytes, p, n);
            return load(bytes);
        }
        template <int index>
        static int8x16_t field(Word word) {
            if constexpr (index == 0)
                return vreinterpretq_s8_u8(vandq_u8(word, vdupq_n_u8(3)));
            else
                return vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(word, 2 * index), vdupq_n_u8(3)));
        }
        static void add(Sums& sums, Word word, const int8_t* x) {
            sums.all = vdotq_s32(sums.all, field<0>(word), vld1q_s8(x));
            sums.all = vdotq_s32(sums.all, field<1>(word), vld1q_s8(x + 16));
            sums.all = vdotq_s32(sums.all, field<2>(word), vld1q_s8(x + 32));
            sums.all = vdotq_s32(sums.all, field<3>(word), vld1q_s8(x + 48));
        }
        static void finish(const Sums (&sums)[4], int32_t* out) {
            vst1q_s32(out, vpaddq_s32(vpaddq_s32(sums[0].all, sums[1].all), vpaddq_s32(sums[2].all, sums[3].all)));
        }
        static void store(Word word, uint8_t* out) {
            vst1q_u8(out, vreinterpretq_u8_s8(field<0>(word)));
            vst1q_u8(out + 16, vreinterpretq_u8_s8(field<1>(word)));
            vst1q_u8(out + 32, vreinterpretq_u8_s8(field<2>(word)));
            vst1q_u8(out + 48, vreinterpretq_u8_s8(field<3>(word)));
        }
    };

    template <Format>
    using Reader = I2;

    template <int kCount>
    static void multiply_blocks(const uint8_t* unpacked, size_t stride, size_t width, const int8_t* block,
                                size_t out_stride, int32_t* out) {
        int32x4_t sums[kRows][kCount] = {};
        for (size_t at = 0; at < width; at += 4) {
            int8x16_t x[kCount];
            for (int i = 0; i < kCount; ++i) x[i] = vld1q_s8(block + (i * width + at) * kLanes);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                const int8x16_t codes = vreinterpretq_s8_u32(vdupq_n_u32(four(unpacked + r * stride + at)));
#pragma GCC unroll 4
                for (int i = 0; i < kCount; ++i) sums[r][i] = vdotq_s32(sums[r][i], codes, x[i]);
            }
        }
        for (int i = 0; i < kCount; ++i) {
            int32_t rows[kRows][kLanes];
            for (int r = 0; r < kRows; ++r) vst1q_s32(rows[r], sums[r][i]);
            const int32x4x4_t tokens = vld4q_s32(rows[0]);  // every fourth to one register: columns become rows
            for (int lane = 0; lane < kLanes; ++lane)
                vst1q_s32(out + (i * kLanes + lane) * out_stride, tokens.val[lane]);
        }
    }

    static void multiply_many(const uint8_t* unpacked, size_t stride, size_t width, const int8_t* block, size_t blocks,
                              size_t out_stride, int32_t* out) {
        switch (blocks) {
            case 1: return multiply_blocks<1>(unpacked, stride, width, block, out_stride, out);
            case 2: return multiply_blocks<2>(unpacked, stride, width, block, out_stride, out);
            case 3: return multiply_blocks<3>(unpacked, stride, width, block, out_stride, out);
            default: return multiply_blocks<4>(unpacked, stride, width, block, out_stride, out);
        }
    }
};

}  // namespace

constexpr Kernel kNeon = make_kernel<Neon>("neon", 8, &kFloatPlain);

}  // namespace sparse_bitnet
