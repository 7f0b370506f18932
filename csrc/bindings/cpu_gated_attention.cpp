#include <pybind11/stl.h>

#include <array>

#include "binding.h"
#include "p2s/gated_attention.h"

namespace p2s {
namespace {

// addresses: q, k, v, out, maps, lse; strides: of items and rows of q, k, v;
// sizes: batch, n, dim, heads, queries, first_row, rows.
GatedAttentionArgs gated_attention_args(const std::array<uintptr_t, 6>& addresses,
                                        const std::array<int64_t, 6>& strides, const std::array<int64_t, 7>& sizes,
                                        bool gate, bool bf16) {
  const auto [q, k, v, out, maps, lse] = addresses;
  const auto [q_item, q_row, k_item, k_row, v_item, v_row] = strides;
  const auto [batch, n, dim, heads, queries, first_row, rows] = sizes;
  return {pointer<const void>(q), pointer<const void>(k), pointer<const void>(v), q_item, q_row, k_item, k_row, v_item,
          v_row, pointer<void>(out), pointer<float>(maps), pointer<float>(lse), batch, n, dim, heads, queries,
          first_row, rows, gate, bf16};
}

}  // namespace

void bind_gated_attention(py::module_& m) {
  m.def("gated_attention_workspace", &gated_attention_workspace, py::arg("n"), py::arg("dim"), py::arg("heads"),
        py::arg("queries"), "Floats of scratch for each thread of the two functions below.");
  m.def(
      "gated_attention",
      [](const std::array<uintptr_t, 6>& addresses, const std::array<int64_t, 6>& strides,
         const std::array<int64_t, 7>& sizes, bool gate, bool bf16, uintptr_t workspace, int threads) {
        const char* isa = nullptr;
        const auto args = gated_attention_args(addresses, strides, sizes, gate, bf16);
        raise_unless_ok(gated_attention_cpu(args, pointer<float>(workspace), threads, &isa), "gated_attention");
        return isa;
      },
      py::call_guard<py::gil_scoped_release>(),
      "q, k, v (batch, n, dim) -> out (batch, rows, dim), maps (batch, queries, n), lse (batch, heads, rows). Returns "
      "the instruction set that ran.");
  m.def(
      "gated_attention_backward",
      [](const std::array<uintptr_t, 6>& addresses, const std::array<int64_t, 6>& strides,
         const std::array<int64_t, 7>& sizes, bool gate, bool bf16, uintptr_t grad_out, uintptr_t grad_maps,
         const std::array<uintptr_t, 3>& grads, uintptr_t grad_gate, uintptr_t workspace, int threads) {
        const char* isa = nullptr;
        const auto [grad_q, grad_k, grad_v] = grads;
        const GatedAttentionGradArgs args = {gated_attention_args(addresses, strides, sizes, gate, bf16),
                                             pointer<const void>(grad_out),
                                             pointer<const float>(grad_maps),
                                             pointer<void>(grad_q),
                                             pointer<void>(grad_k),
                                             pointer<void>(grad_v),
                                             pointer<float>(grad_gate)};
        raise_unless_ok(gated_attention_backward_cpu(args, pointer<float>(workspace), threads, &isa),
                        "gated_attention_backward");
        return isa;
      },
      py::call_guard<py::gil_scoped_release>(),
      "Gradients grad_out (batch, rows, dim) and grad_maps (batch, queries, n) -> gradients of q, k, v (batch, n, "
      "dim); grad_gate: scratch (batch, heads, n). Returns the instruction set that ran.");
}

}  // namespace p2s
