#pragma once

#include <cstdint>

#include "p2s/status.h"

namespace p2s {

// How low-resolution logits become those of a photo: resized to img_size x img_size, cut to input_height x input_width,
// resized to height x width. Both resizes are bilinear with half-pixel centres, horizontal before vertical.
struct MaskFrame {
  int64_t rows, columns;  // of the low-resolution logits
  int64_t img_size;
  int64_t input_height, input_width;  // 1 .. img_size
  int64_t height, width;
};

// Pixel counts above three cutoffs, and the box of the pixels above the last. The logits may have any alignment.
struct MaskMeasureArgs {
  const float* low_res;  // (count, rows, columns)
  int64_t* inner;        // (count), pixels above `high`
  int64_t* outer;        // (count), pixels above `low`
  int64_t* areas;        // (count), pixels above `cut`
  int64_t* boxes;        // (count, 4), x0 y0 x1 y1 of the extreme pixels above `cut`, 0 0 0 0 if there is none
  int64_t count;
  MaskFrame frame;
  float high, low, cut;
};

// Bit-packed masks of the pixels above `cut`, inside larger images.
struct MaskPackArgs {
  const float* low_res;  // (count, rows, columns)
  uint64_t* masks;       // (count, image_height, words)
  int64_t count;
  MaskFrame frame;
  float cut;
  int64_t image_height, words;
  int64_t x0, y0;  // of the frame in the image
};

// Fails if memory for the tables of taps is short. `isa` as for mask_match_cpu.
Status mask_measure_cpu(const MaskMeasureArgs& args, int threads, const char** isa);
Status mask_pack_cpu(const MaskPackArgs& args, int threads, const char** isa);

// How torch finds positions on a CUDA device; see mask_tap.h.
constexpr bool kCudaFuses = true;

// `partial`: scratch for so many values. `stream` is a cudaStream_t of `device`; nothing waits for the device.
int64_t mask_partial_values_cuda(int64_t count, int64_t height);
Status mask_measure_cuda(const MaskMeasureArgs& args, int64_t* partial, int device, void* stream);
Status mask_pack_cuda(const MaskPackArgs& args, int device, void* stream);

}  // namespace p2s
