#pragma once

#include <cstdint>

#include "p2s/status.h"

namespace p2s {

// IoU of `count` bit-packed masks with one query, and the index of the first best score.
struct MaskMatchArgs {
  const uint64_t* masks;  // (count, words)
  const uint64_t* query;  // (words)
  float* scores;          // (count), popcount(and) / popcount(or), 0 for 0 / 0
  int64_t* best;          // (1), -1 if count is 0
  int64_t count;
  int64_t words;
};

// IoU of every mask of `a` with every mask of `b`.
struct MaskIouArgs {
  const uint64_t* a;  // (rows, words)
  const uint64_t* b;  // (columns, words)
  float* iou;         // (rows, columns)
  int64_t rows;
  int64_t columns;
  int64_t words;
};

// `areas`: scratch for rows + columns values. `isa`, where not null, receives the name of the instruction set whose code
// ran, as that code's own translation unit knows it.
Status mask_match_cpu(const MaskMatchArgs& args, int threads, const char** isa);
Status mask_iou_cpu(const MaskIouArgs& args, int64_t* areas, int threads, const char** isa);

// `stream` is a cudaStream_t of `device`; nothing waits for the device.
Status mask_match_cuda(const MaskMatchArgs& args, int device, void* stream);
Status mask_iou_cuda(const MaskIouArgs& args, int device, void* stream);

}  // namespace p2s
