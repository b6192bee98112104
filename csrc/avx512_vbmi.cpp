#include "avx512_vbmi.hpp"

namespace sparse_bitnet {

static bool can_run() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}

extern const Kernel kAvx512Vbmi = make_kernel<Avx512Vbmi>("avx512-vbmi", can_run, 8);

}  // namespace sparse_bitnet
