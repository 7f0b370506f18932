#pragma once

#include "p2s/mask_measure.h"
#include "p2s/mask_tap.h"

namespace p2s {

// How wide an instruction set works: columns a vector, and over how many neighbouring values a vector may pick.
struct MaskLanes {
  const char* isa;
  int64_t size, window;
};

// Taps of every row and column of a frame. Columns come in words of 64: `lead` columns before the frame's first and as
// many after its last as fill a word repeat its ends. A column of the photo lies between the columns a and b of the
// input, and each of those between two low-resolution columns.
struct MaskPlan {
  MaskFrame frame;
  int64_t lead, words;
  int64_t band;             // rows that are examined, and skipped, together
  bool windowed;            // no vector picks from more than `window` values
  const int32_t* base;      // (words * 64 / size), low-resolution column from which a vector's indices count
  const int32_t* index;     // (words * 64 / size, 4, size), both taps of a, both of b
  const float* weight;      // (words * 64 / size, 6, size), weights of a's taps, of b's, of a and b
  const int32_t* support;   // (words, 2), first and last low-resolution column of a word
  const MaskTap* input_row;  // (input_height)
  const MaskTap* row;        // (height)
};

// The serial parts of mask_measure and mask_pack, once per instruction set: mask k.
#define P2S_DECLARE(isa)                                                                          \
  MaskLanes mask_measure_lanes_##isa();                                                           \
  void mask_measure_one_##isa(const MaskMeasureArgs& args, const MaskPlan& plan, int64_t k);      \
  void mask_pack_one_##isa(const MaskPackArgs& args, const MaskPlan& plan, int64_t k);
P2S_DECLARE(scalar)
P2S_DECLARE(avx2)
P2S_DECLARE(avx512)
#undef P2S_DECLARE

}  // namespace p2s
