#include <pybind11/stl.h>

#include "gated_attention_args.h"

namespace p2s {

void bind_gated_attention(py::module_& m) {
  m.def("gated_attention_workspace", &gated_attention_workspace, py::arg("n"), py::arg("dim"), py::arg("heads"),
        py::arg("queries"), "Floats of scratch for each thread of the two functions below.");
  m.def(
      "gated_attention",
      [](const std::array<uintptr_t, 6>& addresses, const std::array<int64_t, 6>& strides,
         const std::array<int64_t, 7>& sizes, bool gate, int64_t number, uintptr_t workspace, int threads) {
        const char* isa = nullptr;
        const auto args = gated_attention_args(addresses, strides, sizes, gate, number);
        raise_unless_ok(gated_attention_cpu(args, pointer<float>(workspace), threads, &isa), "gated_attention");
        return isa;
      },
      py::call_guard<py::gil_scoped_release>(),
      "q, k, v (batch, n, dim) -> out (batch, rows, dim), maps (batch, queries, n), lse (batch, heads, rows). Returns "
      "the instruction set that ran.");
  m.def(
      "gated_attention_backward",
      [](const std::array<uintptr_t, 6>& addresses, const std::array<int64_t, 6>& strides,
         const std::array<int64_t, 7>& sizes, bool gate, int64_t number, uintptr_t grad_out, uintptr_t grad_maps,
         const std::array<uintptr_t, 3>& grads, uintptr_t grad_gate, uintptr_t workspace, int threads) {
        const char* isa = nullptr;
        const auto args = gated_attention_grad_args(gated_attention_args(addresses, strides, sizes, gate, number),
                                                    grad_out, grad_maps, grads, grad_gate);
        raise_unless_ok(gated_attention_backward_cpu(args, pointer<float>(workspace), threads, &isa),
                        "gated_attention_backward");
        return isa;
      },
      py::call_guard<py::gil_scoped_release>(),
      "Gradients grad_out (batch, rows, dim) and grad_maps (batch, queries, n) -> gradients of q, k, v (batch, n, "
      "dim); grad_gate: scratch (batch, heads, n). Returns the instruction set that ran.");
}

}  // namespace p2s
