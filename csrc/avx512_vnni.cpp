#include "avx512.hpp"

namespace sparse_bitnet {

constexpr Kernel kAvx512Vnni = make_kernel<Avx512>("avx512-vnni", 8, &kFloatAvx512);

}  // namespace sparse_bitnet
