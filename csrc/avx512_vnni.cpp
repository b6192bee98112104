#include "avx512.hpp"

namespace sparse_bitnet {

static bool can_run() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

extern const Kernel kAvx512Vnni = make_kernel<Avx512>("avx512-vnni", can_run, 8);

}  // namespace sparse_bitnet
