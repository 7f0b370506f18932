#pragma once

#include <cstdint>

namespace p2s {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Sum over the lanes; lane 0 has it.
__device__ __forceinline__ int64_t warp_sum(int64_t x) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_down_sync(kAllLanes, x, lanes);
  return x;
}

// What any lane has set; every lane has it.
__device__ __forceinline__ uint64_t warp_or(uint64_t x) {
  const unsigned low = __reduce_or_sync(kAllLanes, static_cast<unsigned>(x));
  return static_cast<uint64_t>(__reduce_or_sync(kAllLanes, static_cast<unsigned>(x >> 32))) << 32 | low;
}

// Sum over the lanes up to this one.
__device__ __forceinline__ int warp_scan(int x, int lane) {
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const int before = __shfl_up_sync(kAllLanes, x, lanes);
    if (lane >= lanes) x += before;
  }
  return x;
}

}  // namespace p2s
