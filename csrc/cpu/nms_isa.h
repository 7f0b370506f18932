#pragma once

#include <cstdint>

namespace p2s {

// Boxes in the order of the visit, filled up to whole words of 64.
struct NmsBoxes {
  const float *x0, *y0, *x1, *y1, *areas;  // (64 * words)
  uint64_t* alive;                         // (words), one bit a box, none for the fill; all zero afterwards
  int64_t words;
  float threshold;
};

// Once per instruction set: writes the positions of the boxes kept and returns their number.
#define P2S_DECLARE(isa) int64_t nms_greedy_##isa(const NmsBoxes& boxes, int64_t* keep, const char** name);
P2S_DECLARE(scalar)
P2S_DECLARE(avx2)
P2S_DECLARE(avx512)
#undef P2S_DECLARE

}  // namespace p2s
