#pragma once

#include <cstdint>

#include "p2s/host_device.h"

namespace p2s {

// The two values between which a bilinear resize interpolates along an axis, and their weights.
struct MaskTap {
  int32_t first, second;
  float w0, w1;
};

// A resize along one axis. Positions are float32; PyTorch's CUDA kernel rounds ratio * (at + 0.5) - 0.5 once (`fused`),
// its CPU kernel rounds the product too and copies an axis that keeps its length.
struct MaskAxis {
  int32_t in, out;
  float ratio;
  bool fused;
};

P2S_HD MaskAxis mask_axis(int64_t in, int64_t out, bool fused) {
  return {static_cast<int32_t>(in), static_cast<int32_t>(out), static_cast<float>(in) / static_cast<float>(out), fused};
}

P2S_HD MaskTap mask_tap(const MaskAxis& axis, int32_t at) {
  if (axis.in == axis.out && !axis.fused) return {at, at, 1.0f, 0.0f};
  const float centre = static_cast<float>(at) + 0.5f;
  const float position = axis.fused ? fused(axis.ratio, centre, -0.5f) : product(axis.ratio, centre) - 0.5f;
  const float from = position < 0.0f ? 0.0f : position;
  const int32_t whole = static_cast<int32_t>(from), last = axis.in - 1;
  const int32_t first = whole < last ? whole : last;
  const float beyond = from - static_cast<float>(first);
  const float w1 = beyond < 1.0f ? beyond : 1.0f;
  return {first, first < last ? first + 1 : last, 1.0f - w1, w1};
}

// Between values a and b; w1 * b is rounded first.
P2S_HD float mask_lerp(float w0, float a, float w1, float b) { return fused(w0, a, product(w1, b)); }

// Beyond it a sum of products could overflow.
constexpr float kMaskTame = 0x1p120f;

// Which of `count` cutoffs every value interpolated between values from `low` to `high`, tame ones, exceeds, one bit
// each; -1 if that isn't sure for one of them. Values are nested means, off by less than 2^-20 of the larger end after
// four interpolations, or by subnormals.
P2S_HD int mask_settled(double low, double high, const float* cuts, int count) {
  const double size = -low > high ? -low : high;
  const double margin = size * 0x1p-19 + 0x1p-126;
  int all = 0;
  for (int i = 0; i < count; ++i) {
    const double cut = cuts[i];
    if (low > cut + margin) {
      all |= 1 << i;
    } else if (!(high < cut - margin)) {
      return -1;
    }
  }
  return all;
}

}  // namespace p2s
