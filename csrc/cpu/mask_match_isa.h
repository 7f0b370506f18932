#pragma once

#include "p2s/mask_match.h"

namespace p2s {

struct MaskIouTile {
  int64_t row_begin, row_end, column_begin, column_end;
};

// The serial parts of mask_match and mask_iou, once per instruction set. Each returns the name of its instruction set.
#define P2S_DECLARE(isa)                                                                                              \
  const char* mask_match_rows_##isa(const MaskMatchArgs& args, int64_t begin, int64_t end);                           \
  const char* mask_areas_##isa(const uint64_t* masks, int64_t words, int64_t* areas, int64_t begin, int64_t end);     \
  const char* mask_iou_tile_##isa(const MaskIouArgs& args, const int64_t* areas, const MaskIouTile& tile);
P2S_DECLARE(scalar)
P2S_DECLARE(avx2)
P2S_DECLARE(avx512)
#undef P2S_DECLARE

}  // namespace p2s
