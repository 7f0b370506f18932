// The blocks of csrc/cuda/gated_attention.cuh, one after another on the host.
#include "gated_attention.cuh"

#include <memory>

using namespace p2s;

namespace {

template <class T, int STEPS>
void run(const Call& c, float* mean_map, const Gradients* g) {
  const GatedAttentionArgs& a = c.a;
  const auto blocks = [&](int64_t count, int per) { return a.batch * a.heads * ((count + per - 1) / per); };
  if (g == nullptr) {
    for (int64_t item = 0; item < a.batch && a.queries > 0; ++item) {
      for (int first = 0; first < a.n; first += kBackwardRows<T>) maps_tile<T>(c, mean_map, item, first);
    }
    const auto shared = std::make_unique<ForwardShared<T, STEPS>>();
    const int64_t count = blocks(a.rows, kWarps * kForwardRows<T>);
    for (int64_t i = 0; i < count; ++i) forward_block<T, STEPS>(*shared, c, i);
    return;
  }
  const auto shared = std::make_unique<BackwardShared<T, STEPS>>();
  const int64_t count = blocks(a.n, kWarps * kBackwardRows<T>), chunks = a.batch * a.n * (a.dim / kInChunk<T>);
  for (int64_t i = 0; i < count; ++i) keys_block<T, STEPS>(*shared, c, *g, i);
  for (int64_t i = 0; i < chunks && a.queries > 0; ++i) maps_gradient<T>(c, *g, i);
  for (int64_t i = 0; i < count; ++i) rows_block<T, STEPS>(*shared, c, *g, i);
}

template <class T>
void run(const Call& c, float* mean_map, const Gradients* g) {
  (c.a.dim / c.a.heads == 32 ? run<T, 2> : run<T, 4>)(c, mean_map, g);
}

}  // namespace

// pointers: q, k, v, out, maps, lse, mean_map, then for gradients grad_out, grad_maps, grad_q, grad_k, grad_v, delta,
// grad_gate, grad_logits. strides and sizes as in bindings.
extern "C" void gated_attention_blocks(void** p, const int64_t* strides, const int64_t* sizes, int gate, int64_t number,
                                       int backward) {
  const auto floats = [&](int i) { return static_cast<float*>(p[i]); };
  Call c{};
  c.a = {p[0],     p[1],     p[2],     strides[0], strides[1], strides[2], strides[3], strides[4], strides[5], p[3],
         floats(4), floats(5), sizes[0], sizes[1],   sizes[2],   sizes[3],   sizes[4],   sizes[5],   sizes[6],   gate != 0,
         static_cast<Number>(number)};
  c.mean_map = floats(6);
  c.scale = 1.0f / std::sqrt(static_cast<float>(c.a.dim / c.a.heads));
  Gradients g{};
  if (backward) {
    g.a = {c.a, p[7], floats(8), p[9], p[10], p[11], floats(13)};
    g.delta = floats(12);
    g.grad_logits = floats(14);
  }
  constexpr decltype(&run<Float32>) runs[] = {run<Float32>, run<Bfloat16>, run<Float16>};
  runs[number](c, floats(6), backward ? &g : nullptr);
}
