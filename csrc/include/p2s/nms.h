#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "p2s/status.h"

namespace p2s {

// Greedy non-maximum suppression: a box visited removes those after it whose IoU with it exceeds `threshold`.
struct NmsArgs {
  const float* boxes;    // (count, 4), x0 y0 x1 y1
  const int64_t* order;  // (count), of the visit
  int64_t* keep;         // (count), boxes kept in the order of the visit, then -1
  int64_t* kept;         // (1)
  int64_t count;
  double threshold;
};

// The largest float up to x: a float is above x if and only if it is above that.
inline float float_below(double x) {
  const float rounded = static_cast<float>(x);
  return rounded > x ? std::nextafter(rounded, -std::numeric_limits<float>::infinity()) : rounded;
}

// Fails if memory is short. `isa` as for mask_match_cpu.
Status nms_cpu(const NmsArgs& args, const char** isa);

// What the kernels of a GPU need besides. Boxes come in words of 64, `words_at_once` of which are dealt with together.
struct NmsScratch {
  const int64_t* taking_part;  // (1), how many of the visit's first boxes take part; null: all
  uint64_t* alive;             // (words), one bit a box that is kept
  uint64_t* overlaps;          // (words_at_once, 64 * words), bit j of (w, i): box i overlaps box j of the w-th word
  int64_t words_at_once;       // 1 .. 65535
};

// `stream` is a cudaStream_t of `device`; nothing waits for the device.
Status nms_cuda(const NmsArgs& args, const NmsScratch& scratch, int device, void* stream);

}  // namespace p2s
