#include <pybind11/stl.h>

#include "gated_attention_args.h"

namespace p2s {

void bind_gated_attention(py::module_& m) {
  m.def(
      "gated_attention",
      [](const std::array<uintptr_t, 6>& addresses, const std::array<int64_t, 6>& strides,
         const std::array<int64_t, 7>& sizes, bool gate, int64_t number, uintptr_t mean_map, int device,
         uintptr_t stream) {
        raise_unless_ok(gated_attention_cuda(gated_attention_args(addresses, strides, sizes, gate, number),
                                             pointer<float>(mean_map), device, pointer<void>(stream)),
                        "gated_attention");
      },
      py::call_guard<py::gil_scoped_release>(),
      "q, k, v (batch, n, dim) -> out (batch, rows, dim), maps (batch, queries, n), lse (batch, heads, rows), mean_map "
      "(batch, n).");
  m.def(
      "gated_attention_backward",
      [](const std::array<uintptr_t, 6>& addresses, const std::array<int64_t, 6>& strides,
         const std::array<int64_t, 7>& sizes, bool gate, int64_t number, uintptr_t grad_out, uintptr_t grad_maps,
         const std::array<uintptr_t, 3>& grads, uintptr_t grad_gate, uintptr_t mean_map, uintptr_t delta,
         uintptr_t grad_logits, int device, uintptr_t stream) {
        const auto args = gated_attention_grad_args(gated_attention_args(addresses, strides, sizes, gate, number),
                                                    grad_out, grad_maps, grads, grad_gate);
        raise_unless_ok(gated_attention_backward_cuda(args, pointer<const float>(mean_map), pointer<float>(delta),
                                                      pointer<float>(grad_logits), device, pointer<void>(stream)),
                        "gated_attention_backward");
      },
      py::call_guard<py::gil_scoped_release>(),
      "grads of q, k, v (batch, n, dim); scratch: grad_gate (batch, heads, n), delta (batch, heads, rows), grad_logits "
      "(batch, queries, n).");
}

}  // namespace p2s
