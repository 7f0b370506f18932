#include "launch.h"
#include "p2s/mask_match.h"
#include "warp.cuh"

namespace p2s {
namespace {

__device__ __forceinline__ float ratio(int64_t inter, int64_t uni) {
  return uni == 0 ? 0.0f : __fdiv_rn(static_cast<float>(inter), static_cast<float>(uni));
}

// One block a mask. `wide`: words is even and both pointers are 16-byte aligned, so that two words load at once.
constexpr int kMatchThreads = 128;

template <bool wide>
__global__ void __launch_bounds__(kMatchThreads) mask_match_kernel(MaskMatchArgs args) {
  const uint64_t* mask = args.masks + static_cast<int64_t>(blockIdx.x) * args.words;
  int64_t inter = 0, uni = 0;
  if constexpr (wide) {
    const auto* mask2 = reinterpret_cast<const ulonglong2*>(mask);
    const auto* query2 = reinterpret_cast<const ulonglong2*>(args.query);
#pragma unroll 4  // what the compiler takes by itself, but then it spills on sm_120
    for (int64_t w = threadIdx.x; w < args.words / 2; w += kMatchThreads) {
      const ulonglong2 x = mask2[w], y = query2[w];
      inter += __popcll(x.x & y.x) + __popcll(x.y & y.y);
      uni += __popcll(x.x | y.x) + __popcll(x.y | y.y);
    }
  } else {
    for (int64_t w = threadIdx.x; w < args.words; w += kMatchThreads) {
      const uint64_t x = mask[w], y = args.query[w];
      inter += __popcll(x & y);
      uni += __popcll(x | y);
    }
  }
  __shared__ int64_t inters[kMatchThreads / kWarp], unis[kMatchThreads / kWarp];
  inter = warp_sum(inter);
  uni = warp_sum(uni);
  if (threadIdx.x % kWarp == 0) {
    inters[threadIdx.x / kWarp] = inter;
    unis[threadIdx.x / kWarp] = uni;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kMatchThreads / kWarp; ++i) {
      inter += inters[i];
      uni += unis[i];
    }
    args.scores[blockIdx.x] = ratio(inter, uni);
  }
}

struct Candidate {
  float score;
  int64_t index;
};

// A total order, so that the result doesn't depend on the order of the reduction: higher score, then lower index.
__device__ __forceinline__ Candidate better(Candidate x, Candidate y) {
  return y.score > x.score || (y.score == x.score && y.index < x.index) ? y : x;
}

__device__ __forceinline__ Candidate warp_best(Candidate x) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    x = better(x, {__shfl_down_sync(kAllLanes, x.score, lanes), __shfl_down_sync(kAllLanes, x.index, lanes)});
  }
  return x;
}

// One block for all scores; scores are never negative. count 0 leaves index -1.
constexpr int kBestThreads = 1024;

__global__ void __launch_bounds__(kBestThreads) first_best_kernel(const float* scores, int64_t count, int64_t* best) {
  const Candidate none{-1.0f, -1};
  Candidate mine = none;
  for (int64_t k = threadIdx.x; k < count; k += kBestThreads) mine = better(mine, {scores[k], k});
  __shared__ Candidate winners[kBestThreads / kWarp];
  mine = warp_best(mine);
  if (threadIdx.x % kWarp == 0) winners[threadIdx.x / kWarp] = mine;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    mine = warp_best(winners[threadIdx.x]);
    if (threadIdx.x == 0) *best = mine.index;
  }
}

// A block fills a tile of kTile x kTile pairs; a thread holds kPer x kPer of them. kStep words of both tiles are staged at
// a time; the odd row length keeps a warp's reads on different banks.
constexpr int kTile = 64, kSide = 16, kPer = kTile / kSide, kStep = 8, kThreads = kSide * kSide;

__global__ void __launch_bounds__(kThreads) mask_iou_kernel(MaskIouArgs args) {
  __shared__ uint64_t rows[kTile][kStep + 1], columns[kTile][kStep + 1];
  __shared__ int64_t areas[2][kTile];
  const int64_t tiles_down = (args.rows + kTile - 1) / kTile;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) % tiles_down * kTile;
  const int64_t column0 = static_cast<int64_t>(blockIdx.x) / tiles_down * kTile;
  const int ty = threadIdx.x / kSide, tx = threadIdx.x % kSide;

  int64_t inter[kPer][kPer] = {};
  int64_t area = 0;
  for (int64_t w0 = 0; w0 < args.words; w0 += kStep) {
    for (int i = threadIdx.x; i < kTile * kStep; i += kThreads) {
      const int r = i / kStep, w = i % kStep;
      const bool inside = w0 + w < args.words;
      rows[r][w] = inside && row0 + r < args.rows ? args.a[(row0 + r) * args.words + w0 + w] : 0;
      columns[r][w] = inside && column0 + r < args.columns ? args.b[(column0 + r) * args.words + w0 + w] : 0;
    }
    __syncthreads();
    if (threadIdx.x < 2 * kTile) {
      const uint64_t* mine = threadIdx.x < kTile ? rows[threadIdx.x] : columns[threadIdx.x - kTile];
      for (int w = 0; w < kStep; ++w) area += __popcll(mine[w]);
    }
    for (int w = 0; w < kStep; ++w) {
      uint64_t x[kPer], y[kPer];
      for (int i = 0; i < kPer; ++i) x[i] = rows[ty + i * kSide][w];
      for (int j = 0; j < kPer; ++j) y[j] = columns[tx + j * kSide][w];
      for (int i = 0; i < kPer; ++i) {
        for (int j = 0; j < kPer; ++j) inter[i][j] += __popcll(x[i] & y[j]);
      }
    }
    __syncthreads();
  }
  if (threadIdx.x < 2 * kTile) areas[threadIdx.x / kTile][threadIdx.x % kTile] = area;
  __syncthreads();
  for (int i = 0; i < kPer; ++i) {
    for (int j = 0; j < kPer; ++j) {
      const int r = ty + i * kSide, c = tx + j * kSide;
      if (row0 + r < args.rows && column0 + c < args.columns) {
        args.iou[(row0 + r) * args.columns + column0 + c] = ratio(inter[i][j], areas[0][r] + areas[1][c] - inter[i][j]);
      }
    }
  }
}

constexpr int64_t kMaxBlocks = 0x7fffffff;

}  // namespace

Status mask_match_cuda(const MaskMatchArgs& args, int device, void* stream) {
  if (args.count > kMaxBlocks) return {"too many masks for one launch"};
  DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return to_status(guard.error());
  const auto queue = static_cast<cudaStream_t>(stream);
  if (args.count > 0) {
    const auto blocks = static_cast<unsigned>(args.count);
    const auto bits = reinterpret_cast<uintptr_t>(args.masks) | reinterpret_cast<uintptr_t>(args.query);
    if (args.words % 2 == 0 && bits % sizeof(ulonglong2) == 0) {
      mask_match_kernel<true><<<blocks, kMatchThreads, 0, queue>>>(args);
    } else {
      mask_match_kernel<false><<<blocks, kMatchThreads, 0, queue>>>(args);
    }
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return to_status(error);
  }
  first_best_kernel<<<1, kBestThreads, 0, queue>>>(args.scores, args.count, args.best);
  return to_status(cudaGetLastError());
}

Status mask_iou_cuda(const MaskIouArgs& args, int device, void* stream) {
  const int64_t blocks = (args.rows + kTile - 1) / kTile * ((args.columns + kTile - 1) / kTile);
  if (blocks == 0) return {};
  if (blocks > kMaxBlocks) return {"too many mask pairs for one launch"};
  DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return to_status(guard.error());
  mask_iou_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return to_status(cudaGetLastError());
}

}  // namespace p2s
