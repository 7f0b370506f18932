#include "gated_attention.cuh"
#include "launch.h"

#include <cmath>
#include <type_traits>

namespace p2s {
namespace {

// At once on one multiprocessor: more would spill registers.
template <int STEPS>
constexpr int kBlocks = STEPS > 2 ? 2 : 3;

template <class T>
__global__ void __launch_bounds__(kThreads) gated_attention_maps_kernel(Call c, float* mean_map) {
  const int64_t tiles = (c.a.n + kRows - 1) / kRows, tile = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (tile < c.a.batch * tiles) maps_tile<Warp, T>(c, mean_map, tile / tiles, static_cast<int>(tile % tiles) * kRows);
}

template <class T, int STEPS>
__global__ void __launch_bounds__(kThreads, kBlocks<STEPS>) gated_attention_kernel(Call c) {
  __shared__ Shared<STEPS> shared;
  forward_block<T>(shared, c, blockIdx.x);
}

template <class T, int STEPS>
__global__ void __launch_bounds__(kThreads, kBlocks<STEPS>) gated_attention_keys_kernel(Call c, Gradients g) {
  __shared__ Shared<STEPS> shared;
  keys_block<T>(shared, c, g, blockIdx.x);
}

template <class T>
__global__ void __launch_bounds__(kThreads) gated_attention_maps_gradient_kernel(Call c, Gradients g) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index < c.a.batch * c.a.n * (c.a.dim / 8)) maps_gradient<T>(c, g, index);
}

template <class T, int STEPS>
__global__ void __launch_bounds__(kThreads, kBlocks<STEPS>) gated_attention_rows_kernel(Call c, Gradients g) {
  __shared__ Shared<STEPS> shared;
  rows_block<T>(shared, c, g, blockIdx.x);
}

constexpr int64_t kMaxBlocks = 0x7fffffff;

int64_t ceiling(int64_t count, int64_t per) { return (count + per - 1) / per; }

template <class T, int STEPS>
cudaError_t forward(const Call& c, float* mean_map, cudaStream_t queue) {
  const GatedAttentionArgs& a = c.a;
  if (a.queries > 0) {
    gated_attention_maps_kernel<T><<<ceiling(a.batch * ceiling(a.n, kRows), kWarps), kThreads, 0, queue>>>(c, mean_map);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  if (a.rows > 0) {
    const int64_t blocks = a.batch * a.heads * ceiling(a.rows, kWarps * kForwardBlocks * kRows);
    gated_attention_kernel<T, STEPS><<<blocks, kThreads, 0, queue>>>(c);
  }
  return cudaGetLastError();
}

template <class T, int STEPS>
cudaError_t backward(const Call& c, const Gradients& g, cudaStream_t queue) {
  const GatedAttentionArgs& a = c.a;
  const int64_t blocks = a.batch * a.heads * ceiling(a.n, kWarps * kRows);
  gated_attention_keys_kernel<T, STEPS><<<blocks, kThreads, 0, queue>>>(c, g);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  if (a.queries > 0) {
    gated_attention_maps_gradient_kernel<T><<<ceiling(a.batch * a.n * (a.dim / 8), kThreads), kThreads, 0, queue>>>(c, g);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  gated_attention_rows_kernel<T, STEPS><<<blocks, kThreads, 0, queue>>>(c, g);
  return cudaGetLastError();
}

// run(Bfloat16 or Float16, channels of a head / 16); what the header asks for is checked here, nothing else.
template <class F>
Status dispatch(const GatedAttentionArgs& a, int device, F run) {
  const int64_t width = a.dim / a.heads;
  if (width != 32 && width != 64) return {"heads must have 32 or 64 channels"};
  // The largest grid of any kernel here.
  if (a.batch * a.n * a.dim / 8 / kThreads >= kMaxBlocks || a.batch * a.heads * ceiling(a.n, kRows) >= kMaxBlocks) {
    return {"too many tokens for one launch"};
  }
  if (a.batch == 0) return {};
  DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return to_status(guard.error());
  constexpr std::integral_constant<int, 4> wide;
  constexpr std::integral_constant<int, 2> narrow;
  if (a.bf16) return to_status(width == 64 ? run(Bfloat16(), wide) : run(Bfloat16(), narrow));
  return to_status(width == 64 ? run(Float16(), wide) : run(Float16(), narrow));
}

Call call_of(const GatedAttentionArgs& a, const float* mean_map) {
  return {a, mean_map, 1.0f / std::sqrt(static_cast<float>(a.dim / a.heads))};
}

}  // namespace

Status gated_attention_cuda(const GatedAttentionArgs& args, float* mean_map, int device, void* stream) {
  return dispatch(args, device, [&](auto type, auto steps) {
    return forward<decltype(type), steps()>(call_of(args, mean_map), mean_map, static_cast<cudaStream_t>(stream));
  });
}

Status gated_attention_backward_cuda(const GatedAttentionGradArgs& args, const float* mean_map, float* delta,
                                     float* grad_logits, int device, void* stream) {
  return dispatch(args.forward, device, [&](auto type, auto steps) {
    const Gradients gradients{args, delta, grad_logits};
    return backward<decltype(type), steps()>(call_of(args.forward, mean_map), gradients,
                                             static_cast<cudaStream_t>(stream));
  });
}

}  // namespace p2s
