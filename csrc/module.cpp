// The module sparse_bitnet._native. Tensors come as addresses: cpu_native.py has looked at them, and to hand over an
// object each would take as long as a small product.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "packed_linear.hpp"

namespace nb = nanobind;

namespace sparse_bitnet {
namespace {

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernel* const* kernel = kernels(); *kernel != nullptr; ++kernel) names.emplace_back((*kernel)->name);
    return names;
}

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void multiply(int instruction_set, std::uintptr_t x, int dtype, std::size_t tokens, std::size_t in_features,
              bool int4, std::uintptr_t weight, std::size_t rows, std::size_t row_bytes, int format,
              std::uintptr_t scale, std::uintptr_t row_scale, std::uintptr_t bias, int bias_dtype, std::uintptr_t y,
              int threads) {
    const Problem problem{
        {pointer<const std::uint8_t>(weight), rows, in_features, row_bytes, static_cast<Format>(format)},
        pointer<const void>(x),
        static_cast<Dtype>(dtype),
        tokens,
        int4,
        pointer<const float>(scale),
        pointer<const float>(row_scale),
        pointer<const void>(bias),
        static_cast<Dtype>(bias_dtype),
        pointer<void>(y)};
    packed_linear(problem, *kernels()[instruction_set], threads);
}

}  // namespace

NB_MODULE(_native, module) {
    module.doc() = "Native kernels of sparse_bitnet; see csrc/.";
    module.def("instruction_sets", instruction_sets, "Those that this processor can run, the fastest first.");
    module.def("packed_linear", multiply, nb::call_guard<nb::gil_scoped_release>(),
               "instruction_set is an index; addresses are of contiguous memory, 0 for None.");
    module.def(
        "read_bytes",
        [](std::uintptr_t address, std::size_t bytes, int threads) {
            return read_bytes(pointer<const std::uint8_t>(address), bytes, threads);
        },
        nb::call_guard<nb::gil_scoped_release>(), "Reads memory as fast as this machine can and does nothing with it.");
}

}  // namespace sparse_bitnet
