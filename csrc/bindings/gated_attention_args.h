#pragma once

#include <array>

#include "binding.h"
#include "p2s/gated_attention.h"

namespace p2s {

// addresses: q, k, v, out, maps, lse; strides: of items and rows of q, k, v;
// sizes: batch, n, dim, heads, queries, first_row, rows.
inline GatedAttentionArgs gated_attention_args(const std::array<uintptr_t, 6>& addresses,
                                               const std::array<int64_t, 6>& strides,
                                               const std::array<int64_t, 7>& sizes, bool gate, int64_t number) {
  const auto [q, k, v, out, maps, lse] = addresses;
  const auto [q_item, q_row, k_item, k_row, v_item, v_row] = strides;
  const auto [batch, n, dim, heads, queries, first_row, rows] = sizes;
  return {pointer<const void>(q), pointer<const void>(k), pointer<const void>(v), q_item, q_row, k_item, k_row, v_item,
          v_row, pointer<void>(out), pointer<float>(maps), pointer<float>(lse), batch, n, dim, heads, queries, first_row,
          rows, gate, static_cast<Number>(number)};
}

// grads: of q, k, v.
inline GatedAttentionGradArgs gated_attention_grad_args(const GatedAttentionArgs& forward, uintptr_t grad_out,
                                                        uintptr_t grad_maps, const std::array<uintptr_t, 3>& grads,
                                                        uintptr_t grad_gate) {
  const auto [grad_q, grad_k, grad_v] = grads;
  return {forward,
          pointer<const void>(grad_out),
          pointer<const float>(grad_maps),
          pointer<void>(grad_q),
          pointer<void>(grad_k),
          pointer<void>(grad_v),
          pointer<float>(grad_gate)};
}

}  // namespace p2s
