#pragma once

#include <cstdint>

#include "p2s/status.h"

namespace p2s {

// Fills small holes and removes small islands of packed masks, in place. Regions are 8-connected.
struct MaskCleanArgs {
  uint64_t* masks;  // (count, height, words), zero beyond the width
  bool* changed;    // (count), whether a mask had a small region
  int64_t count, height, width, words;
  double min_area;  // regions of fewer pixels are small
};

// Fails if memory is short.
Status mask_clean_cpu(const MaskCleanArgs& args, int threads);

}  // namespace p2s
