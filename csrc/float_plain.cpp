#include "float_loops.hpp"

namespace sparse_bitnet {
namespace {

struct Plain {
    static constexpr int kWidth = 4;
    using Codes = PlainCodes;
};

}  // namespace

constexpr FloatKernel kFloatPlain = make_float_kernel<Plain>();

}  // namespace sparse_bitnet
