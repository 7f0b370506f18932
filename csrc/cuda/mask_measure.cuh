#pragma once

#include "mask_tile.cuh"

namespace p2s {
namespace {

enum { kHigh, kLow, kCut, kCuts };

// Of one lane's columns: pixels above each cutoff, and the extent of those above the last.
struct MaskCounts {
  float cuts[kCuts];
  bool valid;  // the lane's column is one of the photo's
  int32_t x, pixels[kCuts], x0, y0, x1, y1;

  __device__ void rows(int32_t begin, int32_t end) {
    if (begin < y0) y0 = begin;
    if (end - 1 > y1) y1 = end - 1;
  }
  __device__ void columns(int32_t before) {
    if (pixels[kCut] == before) return;
    if (x < x0) x0 = x;
    if (x > x1) x1 = x;
  }
  __device__ void sure(int32_t begin, int32_t end, int all) {
    if (!valid) return;
    for (int i = 0; i < kCuts; ++i) pixels[i] += all >> i & 1 ? end - begin : 0;
    if (all >> kCut & 1) rows(begin, end);
  }
  __device__ void pixel(int32_t y, float value) {
    if (!valid) return;
    for (int i = 0; i < kCuts; ++i) pixels[i] += value > cuts[i];
    if (value > cuts[kCut]) rows(y, y + 1);
  }
};

// pixels above each cutoff, x0, y0, x1, y1
constexpr int kPartValues = kCuts + 4;

__device__ __forceinline__ int64_t mask_joined(int i, int64_t x, int64_t y) {
  if (i < kCuts) return x + y;
  return i < kCuts + 2 ? (x < y ? x : y) : (x > y ? x : y);
}

__device__ __forceinline__ int64_t mask_none(int i) { return i < kCuts ? 0 : i < kCuts + 2 ? INT32_MAX : -1; }

// One block a part of kPartRows rows of a mask.
template <bool copies>
__global__ void __launch_bounds__(kMaskThreads)
    mask_measure_kernel(MaskMeasureArgs args, MaskResize resize, int64_t* partial, int64_t parts) {
  __shared__ MaskRow rows[kPartRows];
  __shared__ int64_t joined[kPartValues][kMaskWarps];
  const MaskFrame& frame = args.frame;
  const int64_t k = blockIdx.x / parts;
  const int32_t row0 = static_cast<int32_t>(blockIdx.x % parts) * kPartRows;
  const int32_t height = static_cast<int32_t>(frame.height), width = static_cast<int32_t>(frame.width);
  const int32_t row_end = row0 + kPartRows < height ? row0 + kPartRows : height;
  for (int32_t y = row0 + threadIdx.x; y < row_end; y += kMaskThreads) rows[y - row0] = mask_row(resize, y);
  __syncthreads();

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int32_t bands = (row_end - row0 + kTileRows - 1) / kTileRows, strips = (width + kWarp - 1) / kWarp;
  MaskCounts sink{{args.high, args.low, args.cut}, false, 0, {0, 0, 0}, INT32_MAX, INT32_MAX, -1, -1};
  for (int32_t tile = warp; tile < bands * strips; tile += kMaskWarps) {
    const int32_t begin = row0 + tile / strips * kTileRows;
    sink.x = tile % strips * kWarp + lane;
    sink.valid = sink.x < width;
    const int32_t before = sink.pixels[kCut];
    mask_visit_tile<copies>(args.low_res + k * frame.rows * frame.columns, frame, resize, rows, row0, begin,
                            begin + kTileRows < row_end ? begin + kTileRows : row_end, sink.x, lane, sink.cuts, kCuts,
                            sink);
    sink.columns(before);
  }

  int64_t mine[kPartValues] = {sink.pixels[kHigh], sink.pixels[kLow], sink.pixels[kCut], sink.x0, sink.y0, sink.x1,
                               sink.y1};
#pragma unroll
  for (int i = 0; i < kPartValues; ++i) {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      mine[i] = mask_joined(i, mine[i], __shfl_xor_sync(kAllLanes, mine[i], lanes));
    }
    if (lane == 0) joined[i][warp] = mine[i];
  }
  __syncthreads();
  const int i = threadIdx.x;
  if (i >= kPartValues) return;
  int64_t value = joined[i][0];
  for (int w = 1; w < kMaskWarps; ++w) value = mask_joined(i, value, joined[i][w]);
  partial[blockIdx.x * int64_t{kPartValues} + i] = value;
}

// One warp a mask.
__global__ void __launch_bounds__(kMaskThreads)
    mask_join_kernel(MaskMeasureArgs args, const int64_t* partial, int64_t parts) {
  const int lane = threadIdx.x % kWarp;
  const int64_t k = blockIdx.x * int64_t{kMaskWarps} + threadIdx.x / kWarp;
  if (k >= args.count) return;
  int64_t value[kPartValues];
#pragma unroll
  for (int i = 0; i < kPartValues; ++i) {
    value[i] = mask_none(i);
    for (int64_t part = lane; part < parts; part += kWarp) {
      value[i] = mask_joined(i, value[i], partial[(k * parts + part) * kPartValues + i]);
    }
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      value[i] = mask_joined(i, value[i], __shfl_xor_sync(kAllLanes, value[i], lanes));
    }
  }
  if (lane != 0) return;
  args.inner[k] = value[kHigh];
  args.outer[k] = value[kLow];
  args.areas[k] = value[kCut];
  for (int i = 0; i < 4; ++i) args.boxes[4 * k + i] = value[kCut] == 0 ? 0 : value[kCuts + i];
}

// The 32 pixels of a row of the tile, one bit each, kept by the lane of that row.
struct MaskBits {
  float cut;
  bool valid;
  int lane;
  int32_t band;  // row of lane 0
  unsigned bits;

  __device__ void sure(int32_t begin, int32_t end, int all) {
    const unsigned inside = __ballot_sync(kAllLanes, valid);
    if (all && band + lane >= begin && band + lane < end) bits = inside;
  }
  __device__ void pixel(int32_t y, float value) {
    const unsigned row = __ballot_sync(kAllLanes, valid && value > cut);
    if (y == band + lane) bits = row;
  }
};

// One block a part of kPartRows rows of an image; every half word of the image is written once.
template <bool copies>
__global__ void __launch_bounds__(kMaskThreads)
    mask_pack_kernel(MaskPackArgs args, MaskResize resize, int64_t parts) {
  __shared__ MaskRow rows[kPartRows];
  const MaskFrame& frame = args.frame;
  const int64_t k = blockIdx.x / parts;
  const int32_t image_row = static_cast<int32_t>(blockIdx.x % parts) * kPartRows;
  const int32_t image_height = static_cast<int32_t>(args.image_height), y0 = static_cast<int32_t>(args.y0);
  const int32_t image_end = image_row + kPartRows < image_height ? image_row + kPartRows : image_height;
  const int32_t height = static_cast<int32_t>(frame.height), row0 = image_row - y0;  // in the photo, also outside of it
  for (int32_t i = threadIdx.x; i < kPartRows; i += kMaskThreads) {
    if (row0 + i >= 0 && row0 + i < height) rows[i] = mask_row(resize, row0 + i);
  }
  __syncthreads();

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int32_t bands = (image_end - image_row + kTileRows - 1) / kTileRows;
  const int32_t strips = static_cast<int32_t>(2 * args.words), width = static_cast<int32_t>(frame.width);
  auto* halves = reinterpret_cast<unsigned*>(args.masks) + (k * args.image_height + image_row) * strips;
  for (int32_t tile = warp; tile < bands * strips; tile += kMaskWarps) {
    const int32_t band = tile / strips * kTileRows, strip = tile % strips;
    const int32_t begin = row0 + band < 0 ? 0 : row0 + band;
    const int32_t below = row0 + band + kTileRows, end = below < height ? below : height;
    const int32_t x = strip * kWarp + lane - static_cast<int32_t>(args.x0);
    MaskBits sink{args.cut, x >= 0 && x < width, lane, row0 + band, 0};
    if (begin < end && __any_sync(kAllLanes, sink.valid)) {
      mask_visit_tile<copies>(args.low_res + k * frame.rows * frame.columns, frame, resize, rows, row0, begin, end, x,
                              lane, &sink.cut, 1, sink);
    }
    if (image_row + band + lane < image_end) halves[int64_t{band + lane} * strips + strip] = sink.bits;
  }
}

}  // namespace
}  // namespace p2s
