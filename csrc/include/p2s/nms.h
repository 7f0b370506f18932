#pragma once

#include <cstdint>

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

// Fails if memory is short. `isa` as for mask_match_cpu.
Status nms_cpu(const NmsArgs& args, const char** isa);

}  // namespace p2s
