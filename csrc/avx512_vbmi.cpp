#include "avx512_vbmi.hpp"

namespace sparse_bitnet {

constexpr Kernel kAvx512Vbmi = make_kernel<Avx512Vbmi>("avx512-vbmi", 8, &kFloatAvx512);

}  // namespace sparse_bitnet
