#pragma once

#include "p2s/mask_measure.h"
#include "p2s/mask_tap.h"
#include "warp.cuh"

namespace p2s {
namespace {

// A warp works on tiles of 32 x 32 pixels, a lane on a column of the tile, top to bottom; a block on kPartBands bands of
// tiles from one side of the image to the other.
constexpr int kTileRows = 32, kPartBands = 4, kPartRows = kPartBands * kTileRows;
constexpr int kMaskThreads = 256, kMaskWarps = kMaskThreads / kWarp;
// Low-resolution values a pixel of a tile beyond which looking for the least and the largest doesn't pay.
constexpr int kMostSupport = 4;

// The two resizes along both axes; a resize that changes neither copies.
struct MaskResize {
  MaskAxis input_row, row, input_column, column;
  bool copies_input, copies;
};

inline MaskResize mask_resize(const MaskFrame& f, bool fused) {
  return {mask_axis(f.rows, f.img_size, fused),
          mask_axis(f.input_height, f.height, fused),
          mask_axis(f.columns, f.img_size, fused),
          mask_axis(f.input_width, f.width, fused),
          f.rows == f.img_size && f.columns == f.img_size,
          f.input_height == f.height && f.input_width == f.width};
}

// The input rows between which a row of the photo lies, and the low-resolution rows between which those lie.
struct MaskRow {
  MaskTap photo, top, bottom;
};

// Likewise for a column.
struct MaskColumn {
  MaskTap photo, a, b;
};

P2S_HD MaskRow mask_row(const MaskResize& resize, int32_t y) {
  const MaskTap photo = mask_tap(resize.row, y);
  return {photo, mask_tap(resize.input_row, photo.first), mask_tap(resize.input_row, photo.second)};
}

P2S_HD MaskColumn mask_column(const MaskResize& resize, int32_t x) {
  const MaskTap photo = mask_tap(resize.column, x);
  return {photo, mask_tap(resize.input_column, photo.first), mask_tap(resize.input_column, photo.second)};
}

// Logits of one column of the photo, row by row downwards. Kept are two low-resolution rows, resized horizontally, at the
// input columns a and b, and two rows of the input, resized to the photo's column.
template <bool copies>
class MaskWalk {
 public:
  __device__ MaskWalk(const float* low_res, int64_t columns, bool copies_input, const MaskColumn& column)
      : low_res_(low_res), columns_(columns), copies_input_(copies_input), column_(column) {}

  __device__ float next(const MaskRow& row) {
    if (row.photo.first != top_at_) {
      top_ = row.photo.first == bottom_at_ ? bottom_ : input(row.top);
      top_at_ = row.photo.first;
    }
    if constexpr (copies) return top_;
    if (row.photo.second != bottom_at_) {
      bottom_ = row.photo.second == top_at_ ? top_ : input(row.bottom);
      bottom_at_ = row.photo.second;
    }
    return mask_lerp(row.photo.w0, top_, row.photo.w1, bottom_);
  }

 private:
  struct Pair {
    float a, b;
  };

  __device__ float along(const float* row, const MaskTap& tap) const {
    const float first = row[tap.first];
    return copies_input_ ? first : mask_lerp(tap.w0, first, tap.w1, row[tap.second]);
  }

  __device__ Pair low(int32_t j) const {
    const float* row = low_res_ + j * columns_;
    return {along(row, column_.a), copies ? 0.0f : along(row, column_.b)};
  }

  __device__ float across(const MaskTap& tap, float first, float second) const {
    return copies_input_ ? first : mask_lerp(tap.w0, first, tap.w1, second);
  }

  __device__ float input(const MaskTap& row) {
    if (row.first != upper_at_) {
      upper_ = row.first == lower_at_ ? lower_ : low(row.first);
      upper_at_ = row.first;
    }
    if (row.second != lower_at_) {
      lower_ = row.second == upper_at_ ? upper_ : low(row.second);
      lower_at_ = row.second;
    }
    const float a = across(row, upper_.a, lower_.a);
    if constexpr (copies) return a;
    return mask_lerp(column_.photo.w0, a, column_.photo.w1, across(row, upper_.b, lower_.b));
  }

  const float* low_res_;
  int64_t columns_;
  bool copies_input_;
  MaskColumn column_;
  int32_t top_at_ = -1, bottom_at_ = -1, upper_at_ = -1, lower_at_ = -1;
  float top_ = 0.0f, bottom_ = 0.0f;
  Pair upper_{0.0f, 0.0f}, lower_{0.0f, 0.0f};
};

// What is sure of a tile before any of its pixels is computed: see mask_settled. All lanes get the same.
__device__ __forceinline__ int mask_tile_settled(const float* low_res, int64_t columns, const MaskRow& first,
                                                 const MaskRow& last, int32_t left, int32_t right, int pixels, int lane,
                                                 const float* cuts, int count) {
  const int32_t top = first.top.first, bottom = last.bottom.second;
  if (int64_t{bottom - top + 1} * (right - left + 1) > int64_t{kMostSupport} * pixels) return -1;
  float low = kMaskTame, high = -kMaskTame;
  bool tame = true;
  for (int32_t j = top + lane / 8; j <= bottom; j += kWarp / 8) {
    for (int32_t i = left + lane % 8; i <= right; i += 8) {
      const float value = low_res[j * columns + i];
      tame = tame && fabsf(value) <= kMaskTame;
      low = fminf(low, value);
      high = fmaxf(high, value);
    }
  }
  if (!__all_sync(kAllLanes, tame)) return -1;
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    low = fminf(low, __shfl_xor_sync(kAllLanes, low, lanes));
    high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, lanes));
  }
  return mask_settled(low, high, cuts, count);
}

// Rows [begin, end) of the photo in one column, the lane's: sink.sure(begin, end, all) gets them where bit i of `all` says
// of every pixel whether it exceeds cutoff i, else sink.pixel(y, value) every row. rows[y - row0] is the tap of row y.
template <bool copies, class Sink>
__device__ __forceinline__ void mask_visit_tile(const float* low_res, const MaskFrame& frame, const MaskResize& resize,
                                                const MaskRow* rows, int32_t row0, int32_t begin, int32_t end, int32_t x,
                                                int lane, const float* cuts, int count, Sink& sink) {
  const int32_t width = static_cast<int32_t>(frame.width);
  const MaskColumn column = mask_column(resize, x < 0 ? 0 : x < width ? x : width - 1);
  const int32_t left = __shfl_sync(kAllLanes, column.a.first, 0);
  const int32_t right = __shfl_sync(kAllLanes, column.b.second, kWarp - 1);
  const int all = mask_tile_settled(low_res, frame.columns, rows[begin - row0], rows[end - 1 - row0], left, right,
                                    (end - begin) * kWarp, lane, cuts, count);
  if (all >= 0) {
    sink.sure(begin, end, all);
    return;
  }
  MaskWalk<copies> walk(low_res, frame.columns, resize.copies_input, column);
  for (int32_t y = begin; y < end; ++y) sink.pixel(y, walk.next(rows[y - row0]));
}

}  // namespace
}  // namespace p2s
