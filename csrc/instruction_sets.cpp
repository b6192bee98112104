// What the processor can run.
#include <vector>

#include "packed_linear.hpp"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace sparse_bitnet {
namespace {

std::vector<const Kernel*> runnable() {
    std::vector<const Kernel*> found;
#if defined(__x86_64__)
    const bool avx512_vnni = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("avx512vnni");
    if (avx512_vnni && __builtin_cpu_supports("avx512vbmi")) found.push_back(&kAvx512Vbmi);
    if (avx512_vnni) found.push_back(&kAvx512Vnni);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kAvx2);
#elif defined(__aarch64__) && defined(__linux__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found.push_back(&kNeon);
#elif defined(__aarch64__)
    found.push_back(&kNeon);  // every Apple processor that runs 64-bit macOS
#endif
    found.push_back(&kScalar);
    found.push_back(nullptr);
    return found;
}

}  // namespace

const Kernel* const* kernels() {
    static const std::vector<const Kernel*> found = runnable();
    return found.data();
}

}  // namespace sparse_bitnet
