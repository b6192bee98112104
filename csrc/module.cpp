// The module sparse_bitnet._native. Tensors come as addresses: cpu_native.py has looked at them, and to hand over an
// object each would take as long as a small product.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>

#include "decoder.hpp"
#include "packed_linear.hpp"
#include "sampling.hpp"

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
    packed_linears(&problem, 1, *kernels()[instruction_set], threads);
}

using Address = std::uintptr_t;
using Row = std::vector<std::int32_t>;
using StoredProjection = std::tuple<Address, std::size_t, std::size_t, std::size_t, int, Address, Address>;

// Of `rows, in_features, row_bytes, format`, with the addresses of the bytes before and of scale and bias after.
Projection projection(const StoredProjection& stored) {
    const auto& [bytes, rows, in_features, row_bytes, format, scale, bias] = stored;
    return {{pointer<const std::uint8_t>(bytes), rows, in_features, row_bytes, static_cast<Format>(format)},
            pointer<const float>(scale), pointer<const float>(bias)};
}

void add_layer(Model& model, const std::vector<StoredProjection>& seven, Address attention_norm, Address mlp_norm,
               Address query_norm, Address key_norm) {
    if (seven.size() != 7) throw std::invalid_argument("a layer has 7 projections");
    model.layers.push_back({projection(seven[0]), projection(seven[1]), projection(seven[2]), projection(seven[3]),
                            projection(seven[4]), projection(seven[5]), projection(seven[6]),
                            pointer<const float>(attention_norm), pointer<const float>(mlp_norm),
                            pointer<const float>(query_norm), pointer<const float>(key_norm)});
}

void go_on(const Model& model, const std::vector<Cache*>& caches, const std::vector<Row>& tokens, bool every,
           Address logits, int instruction_set, int threads) {
    if (caches.size() != tokens.size()) throw std::invalid_argument("tokens do not belong to the sequences");
    std::vector<Step> steps;
    for (std::size_t i = 0; i < caches.size(); ++i) steps.push_back({caches[i], tokens[i].data(), tokens[i].size()});
    forward(model, *kernels()[instruction_set], threads, steps, every, pointer<float>(logits));
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

    const nb::call_guard<nb::gil_scoped_release> without_gil;
    nb::class_<Model>(module, "Model")
        .def("__init__",
             [](Model* model, std::size_t vocabulary, std::size_t hidden, std::size_t ffn, std::size_t heads,
                std::size_t kv_heads, std::size_t head, float epsilon, bool int4, std::vector<float> frequencies,
                float rotary_scale, Address embedding, int embedding_dtype, Address final_norm) {
                 new (model) Model{vocabulary, hidden, ffn, heads, kv_heads, head, epsilon, int4,
                                   std::move(frequencies), rotary_scale, pointer<const void>(embedding),
                                   static_cast<Dtype>(embedding_dtype), pointer<const float>(final_norm), {}, {}};
             })
        .def("add_layer", add_layer)
        .def("set_head", [](Model& model, Address rows, Address scales, int dtype, std::size_t stride) {
            model.output = {pointer<const void>(rows), pointer<const float>(scales), static_cast<Dtype>(dtype),
                            model.hidden, stride};
        });
    nb::class_<Cache>(module, "Cache")
        .def(nb::init<const Model&, std::size_t>())
        .def_prop_ro("length", &Cache::length)
        .def_prop_ro("bytes", &Cache::bytes);
    module.def("forward", go_on, without_gil);
    module.def(
        "quantize_head",
        [](Address rows, int dtype, std::size_t count, std::size_t width, std::size_t stride, Address codes,
           Address scales, int instruction_set, int threads) {
            quantize_head(pointer<const void>(rows), static_cast<Dtype>(dtype), count, width, stride, threads,
                          *kernels()[instruction_set], pointer<std::int8_t>(codes), pointer<float>(scales));
        },
        without_gil);
    module.def(
        "sample",
        [](Address logits, std::size_t vocabulary, float temperature, std::size_t top_k, float top_p, float penalty,
           const Row& seen, double uniform) {
            return sample(pointer<float>(logits), vocabulary, {temperature, top_k, top_p, penalty}, seen, uniform);
        },
        without_gil);
}

}  // namespace sparse_bitnet
