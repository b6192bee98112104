// Plain C++, for processors without any of the other instruction sets, and as the one to compare them with.
#include "kernel.hpp"

namespace sparse_bitnet {
namespace {

struct Scalar {
    static constexpr int kLanes = 4, kRows = 4, kBlocks = 1;

    struct I2 {
        static constexpr int kBytes = 4, kPlanes = 4, kReads = 4, kStep = 4;
        using Word = uint32_t;
        struct Sums {
            int32_t all;
        };

        explicit I2(const Weight&) {}
        static Word load(const uint8_t* p) { return four(p); }
        static Word load_some(const uint8_t* p, size_t n) {
            uint32_t word = 0;
            memcpy(&word, p, n);
            return word;
        }
        static int32_t code(Word word, int plane, int byte) { return word >> (8 * byte + 2 * plane) & 3; }
        static void add(Sums& sums, Word word, const int8_t* x) {
            for (int plane = 0; plane < 4; ++plane)
                for (int byte = 0; byte < 4; ++byte) sums.all += code(word, plane, byte) * x[4 * plane + byte];
        }
        static void finish(const Sums (&sums)[4], int32_t* out) {
            for (int r = 0; r < 4; ++r) out[r] = sums[r].all;
        }
        static void store(Word word, uint8_t* out) {
            for (int plane = 0; plane < 4; ++plane)
                for (int byte = 0; byte < 4; ++byte)
                    out[4 * plane + byte] = static_cast<uint8_t>(code(word, plane, byte));
        }
    };

    template <Format>
    using Reader = I2;

    static void multiply_many(const uint8_t* unpacked, size_t stride, size_t width, const int8_t* block, size_t,
                              size_t out_stride, int32_t* out) {
        for (int r = 0; r < kRows; ++r)
            for (int lane = 0; lane < kLanes; ++lane) {
                int32_t sum = 0;
                for (size_t at = 0; at < width; ++at)
                    sum += unpacked[r * stride + at] * block[at / 4 * 4 * kLanes + 4 * lane + at % 4];
                out[lane * out_stride + r] = sum;
            }
    }
};

}  // namespace

constexpr Kernel kScalar = make_kernel<Scalar>("scalar", 8, &kFloatPlain);

}  // namespace sparse_bitnet
