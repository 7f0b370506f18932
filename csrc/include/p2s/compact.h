#pragma once

#include <cstdint>

#include "p2s/status.h"

namespace p2s {

// Positions of the set flags, in order.
struct CompactArgs {
  const uint8_t* keep;  // (n), 0 or 1
  int64_t* index;       // (n), positions of the flags set, then -1
  int64_t* count;       // (1)
  int64_t n;
};

// `stream` is a cudaStream_t of `device`; nothing waits for the device.
Status compact_cuda(const CompactArgs& args, int device, void* stream);

}  // namespace p2s
