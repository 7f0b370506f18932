#pragma once

#include "p2s/compact.h"
#include "warp.cuh"

namespace p2s {
namespace {

// One block; a warp takes kCompactPer consecutive words of 32 flags at a time.
constexpr int kCompactThreads = 1024, kCompactPer = 8;
constexpr int kCompactWarps = kCompactThreads / kWarp;

__global__ void __launch_bounds__(kCompactThreads) compact_kernel(CompactArgs args) {
  static_assert(kCompactWarps == kWarp, "a warp scans one count of every warp");
  __shared__ int counts[kCompactWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int64_t kept = 0;
  for (int64_t base = 0; base < args.n; base += int64_t{kCompactThreads} * kCompactPer) {
    const int64_t mine = base + int64_t{warp} * kCompactPer * kWarp + lane;
    unsigned flags[kCompactPer];
    int found = 0;
    for (int i = 0; i < kCompactPer; ++i) {
      const int64_t at = mine + i * kWarp;
      flags[i] = __ballot_sync(kAllLanes, at < args.n && args.keep[at] != 0);
      found += __popc(flags[i]);
    }
    if (lane == 0) counts[warp] = found;
    __syncthreads();
    const int upto = warp_scan(counts[lane], lane);
    int64_t to = kept + __shfl_sync(kAllLanes, upto, warp) - found;
    kept += __shfl_sync(kAllLanes, upto, kWarp - 1);
    for (int i = 0; i < kCompactPer; ++i) {
      if (flags[i] >> lane & 1) args.index[to + __popc(flags[i] & ((1u << lane) - 1))] = mine + i * kWarp;
      to += __popc(flags[i]);
    }
    __syncthreads();
  }
  for (int64_t at = kept + threadIdx.x; at < args.n; at += kCompactThreads) args.index[at] = -1;
  if (threadIdx.x == 0) *args.count = kept;
}

}  // namespace
}  // namespace p2s
