#pragma once

#include <cstdint>

#include "p2s/status.h"

namespace p2s {

enum class ContourRule : int { kPixels = 0, kArea = 1, kAll = 2 };

// Boxes of the foreground levels > k of every map, for all k, and their best IoU with the map's annotated boxes.
struct ContourSweepArgs {
  const int32_t* levels;  // (count, height, width), 0 and more
  const double* boxes;    // (first[count], 4), x0 y0 x1 y1
  const int64_t* first;   // (count + 1): map i has the boxes first[i] to first[i + 1]
  const int64_t* empty;   // (4), the box where there is no foreground
  double* iou;            // (count, steps)
  int64_t* found;         // (count, steps, 4)
  int64_t count, height, width, steps;
  ContourRule rule;
  bool clamp;  // x1 to width - 1, y1 to height - 1
};

// Fails if memory is short.
Status contour_sweep_cpu(const ContourSweepArgs& args, int threads);

}  // namespace p2s
