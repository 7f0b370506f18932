#pragma once

#include <cstdint>

#include "p2s/status.h"

namespace p2s {

enum class Number : int64_t { float32, bfloat16, float16 };

// Attention whose values are scaled by the mean of the query tokens' foreground maps. `d` is dim / heads.
//   maps[g, j] = sigmoid(q[n - queries + g] . k[j] / (heads sqrt(d)))        over all dim channels
//   out^h = softmax(q^h k^h^T / sqrt(d)) (mean_g maps * v^h)                 for each head h
struct GatedAttentionArgs {
  const void* q;  // (batch, n, dim) of `number`; channels are consecutive
  const void* k;
  const void* v;
  int64_t q_item, q_row, k_item, k_row, v_item, v_row;  // strides in elements
  void* out;                                            // (batch, rows, dim): output rows first_row, ...
  float* maps;                                          // (batch, queries, n)
  float* lse;                                           // (batch, heads, rows): logarithm of the softmax's sum
  int64_t batch, n, dim, heads, queries, first_row, rows;
  bool gate;  // false leaves the values alone; queries >= 1 otherwise
  Number number;
};

// `forward` holds what the forward pass took and gave; its out, maps and lse are read.
struct GatedAttentionGradArgs {
  GatedAttentionArgs forward;
  const void* grad_out;    // (batch, rows, dim), of the dtype of q
  const float* grad_maps;  // (batch, queries, n)
  void* grad_q;            // (batch, n, dim), of the dtype of q
  void* grad_k;
  void* grad_v;
  float* grad_gate;  // scratch (batch, heads, n)
};

// Floats of scratch for each thread.
int64_t gated_attention_workspace(int64_t n, int64_t dim, int64_t heads, int64_t queries);

// For float32 and bfloat16. `workspace`: `threads` times that many floats, 64-byte aligned. `isa` as for mask_match.
Status gated_attention_cpu(const GatedAttentionArgs& args, float* workspace, int threads, const char** isa);
Status gated_attention_backward_cpu(const GatedAttentionGradArgs& args, float* workspace, int threads,
                                    const char** isa);

// For heads of 32 or 64 channels; every address and stride of q, k, v, out and of their gradients is a multiple of 16
// bytes, and offsets within an item fit 32 bits. mean_map (batch, n): mean of the maps over the queries; delta (batch,
// heads, rows) and grad_logits (batch, queries, n) are scratch. `stream` is a cudaStream_t of `device`; nothing waits for
// the device.
Status gated_attention_cuda(const GatedAttentionArgs& args, float* mean_map, int device, void* stream);
Status gated_attention_backward_cuda(const GatedAttentionGradArgs& args, const float* mean_map, float* delta,
                                     float* grad_logits, int device, void* stream);

}  // namespace p2s
