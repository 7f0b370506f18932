#include "gated_attention.cuh"
#include "launch.h"

#include <cmath>
#include <type_traits>

namespace p2s {
namespace {

// At once on one multiprocessor: more would spill registers.
template <int STEPS>
constexpr int kBlocks = STEPS > 2 ? 2 : 3;

// Of shared memory that a block gets without asking.
constexpr size_t kStatic = 48 << 10;

template <class S>
P2S_TILE S& shared() {
  if constexpr (sizeof(S) > kStatic) {
    extern __shared__ Chunk asked[];
    return *reinterpret_cast<S*>(asked);
  } else {
    __shared__ S given;
    return given;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) gated_attention_maps_kernel(Call c, float* mean_map) {
  constexpr int keys = kBackwardRows<T>;
  const int64_t tiles = (c.a.n + keys - 1) / keys, tile = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (tile < c.a.batch * tiles) maps_tile<T>(c, mean_map, tile / tiles, static_cast<int>(tile % tiles) * keys);
}

template <class T, int STEPS>
__global__ void __launch_bounds__(kThreads, kBlocks<STEPS>) gated_attention_kernel(Call c) {
  forward_block<T, STEPS>(shared<ForwardShared<T, STEPS>>(), c, blockIdx.x);
}

template <class T, int STEPS>
__global__ void __launch_bounds__(kThreads, kBlocks<STEPS>) gated_attention_keys_kernel(Call c, Gradients g) {
  keys_block<T, STEPS>(shared<BackwardShared<T, STEPS>>(), c, g, blockIdx.x);
}

template <class T>
__global__ void __launch_bounds__(kThreads) gated_attention_maps_gradient_kernel(Call c, Gradients g) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index < c.a.batch * c.a.n * (c.a.dim / kInChunk<T>)) maps_gradient<T>(c, g, index);
}

template <class T, int STEPS>
__global__ void __launch_bounds__(kThreads, kBlocks<STEPS>) gated_attention_rows_kernel(Call c, Gradients g) {
  rows_block<T, STEPS>(shared<BackwardShared<T, STEPS>>(), c, g, blockIdx.x);
}

constexpr int64_t kMaxBlocks = 0x7fffffff;

int64_t ceiling(int64_t count, int64_t per) { return (count + per - 1) / per; }

// BYTES: of shared memory, as far as the kernel asks for it.
template <size_t BYTES = 0, class K, class... A>
cudaError_t launch(K kernel, int64_t blocks, cudaStream_t queue, const A&... arguments) {
  constexpr size_t asked = BYTES > kStatic ? BYTES : 0;
  static_assert(asked <= 99 << 10, "more than sm_86 lends a block");
  if constexpr (asked > 0) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, asked);
    if (error != cudaSuccess) return error;
  }
  kernel<<<blocks, kThreads, asked, queue>>>(arguments...);
  return cudaGetLastError();
}

template <class T, int STEPS>
cudaError_t forward(const Call& c, float* mean_map, cudaStream_t queue) {
  const GatedAttentionArgs& a = c.a;
  if (a.queries > 0) {
    const int64_t blocks = ceiling(a.batch * ceiling(a.n, kBackwardRows<T>), kWarps);
    const cudaError_t error = launch(gated_attention_maps_kernel<T>, blocks, queue, c, mean_map);
    if (error != cudaSuccess) return error;
  }
  if (a.rows == 0) return cudaSuccess;
  const int64_t blocks = a.batch * a.heads * ceiling(a.rows, kWarps * kForwardRows<T>);
  return launch<sizeof(ForwardShared<T, STEPS>)>(gated_attention_kernel<T, STEPS>, blocks, queue, c);
}

template <class T, int STEPS>
cudaError_t backward(const Call& c, const Gradients& g, cudaStream_t queue) {
  const GatedAttentionArgs& a = c.a;
  constexpr size_t bytes = sizeof(BackwardShared<T, STEPS>);
  const int64_t blocks = a.batch * a.heads * ceiling(a.n, kWarps * kBackwardRows<T>);
  cudaError_t error = launch<bytes>(gated_attention_keys_kernel<T, STEPS>, blocks, queue, c, g);
  if (error == cudaSuccess && a.queries > 0) {
    const int64_t chunks = a.batch * a.n * (a.dim / kInChunk<T>);
    error = launch(gated_attention_maps_gradient_kernel<T>, ceiling(chunks, kThreads), queue, c, g);
  }
  if (error != cudaSuccess) return error;
  return launch<bytes>(gated_attention_rows_kernel<T, STEPS>, blocks, queue, c, g);
}

// run(Float32, Bfloat16 or Float16, channels of a head / 16); what the header asks for is checked here, nothing else.
template <class F>
Status dispatch(const GatedAttentionArgs& a, int device, F run) {
  const int64_t width = a.dim / a.heads;
  if (width != 32 && width != 64) return {"heads must have 32 or 64 channels"};
  // The largest grid of any kernel here.
  if (a.batch * a.n * a.dim / 4 / kThreads >= kMaxBlocks || a.batch * a.heads * ceiling(a.n, 16) >= kMaxBlocks) {
    return {"too many tokens for one launch"};
  }
  if (a.batch == 0) return {};
  DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return to_status(guard.error());
  const auto heads = [&](auto type) {
    if (width == 64) return to_status(run(type, std::integral_constant<int, 4>()));
    return to_status(run(type, std::integral_constant<int, 2>()));
  };
  if (a.number == Number::float32) return heads(Float32());
  return a.number == Number::bfloat16 ? heads(Bfloat16()) : heads(Float16());
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
