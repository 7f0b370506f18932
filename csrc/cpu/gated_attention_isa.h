#pragma once

#include "p2s/gated_attention.h"

namespace p2s {

// The serial parts of gated_attention, once per instruction set. Each returns the name of its instruction set.
//   maps           the maps of one item of the batch, for the keys [begin, end)
//   head           out and lse of one head of one item, for the output rows [begin, end)
//   backward_head  the gradients through attention of one head of one item
//   backward_maps  of one item: adds the gradients through the maps; needs all its heads to be done
#define P2S_DECLARE(isa)                                                                                               \
  const char* gated_maps_##isa(const GatedAttentionArgs& args, int64_t item, int64_t begin, int64_t end,               \
                               float* workspace);                                                                      \
  const char* gated_head_##isa(const GatedAttentionArgs& args, int64_t item, int64_t head, int64_t begin, int64_t end, \
                               float* workspace);                                                                      \
  const char* gated_backward_head_##isa(const GatedAttentionGradArgs& args, int64_t item, int64_t head,                \
                                        float* workspace);                                                             \
  const char* gated_backward_maps_##isa(const GatedAttentionGradArgs& args, int64_t item, float* workspace);
P2S_DECLARE(scalar)
P2S_DECLARE(avx2)
P2S_DECLARE(avx512)
P2S_DECLARE(avx512bf16)
#undef P2S_DECLARE

}  // namespace p2s

namespace {

// Scratch of one thread, in floats; the same for every instruction set. n and d are padded to whole vectors of 16.
struct GatedScratch {
  static constexpr int64_t kQueryRows = 48;  // rows of q that pass at a time
  static constexpr int64_t kMostGradRows = 102, kMostGradWeights = 24576;  // of the backward pass

  static constexpr int64_t round_up(int64_t x) { return (x + 15) / 16 * 16; }

  __attribute__((always_inline)) GatedScratch(int64_t n, int64_t dim, int64_t heads, int64_t queries) {
    const int64_t wide_n = round_up(n), wide_d = round_up(dim / heads), all = wide_n * wide_d;
    const auto next = [this](int64_t count) __attribute__((always_inline)) {
      const int64_t start = total;
      total += round_up(count);
      return start;
    };
    // More rows at a time save passes over the gradients of k and v; three arrays of weights must stay in the cache.
    grad_rows = kMostGradWeights / wide_n < kQueryRows      ? kQueryRows
                : kMostGradWeights / wide_n < kMostGradRows ? kMostGradWeights / wide_n / 6 * 6
                                                            : kMostGradRows;
    gate = next(wide_n);
    stage = next(4 * wide_d);
    k_columns = next(all);
    v_rows = next(all);
    left = next(grad_rows * wide_d);
    logits = next(grad_rows * wide_n);
    block = next(grad_rows * wide_d);
    v_columns = next(all);
    grad_k = next(all);
    grad_v = next(all);
    right = next(grad_rows * wide_d);
    grad_logits = next(grad_rows * wide_n);
    paired = next(grad_rows * wide_n);
    query_q = next(queries * round_up(dim));
    query_grad = next(queries * round_up(dim));
    grad_z = next(queries * wide_n);
  }

  int64_t total = 0, grad_rows, gate, stage, k_columns, v_rows, left, logits, block;
  int64_t v_columns, grad_k, grad_v, right, grad_logits, paired;
  int64_t query_q, query_grad, grad_z;
};

}  // namespace
