#pragma once

#include "p2s/decode.h"

namespace p2s {

// The serial parts of the sweeps, once per instruction set. Without a workspace they return the floats that they need;
// with one they work on the prompts begin..end.
#define P2S_DECLARE(isa)                                                                                              \
  int64_t decode_sweep0_##isa(const DecodeSweep0Args&, int64_t begin, int64_t end, float* workspace, const char**);   \
  int64_t decode_sweep1_##isa(const DecodeSweep1Args&, int64_t begin, int64_t end, float* workspace, const char**);   \
  int64_t decode_sweep2_##isa(const DecodeSweep2Args&, int64_t begin, int64_t end, float* workspace, const char**);   \
  int64_t decode_upscale_##isa(const DecodeUpscaleArgs&, int64_t begin, int64_t end, float* workspace, const char**);
P2S_DECLARE(scalar)
P2S_DECLARE(avx2)
P2S_DECLARE(avx512)
P2S_DECLARE(avx512bf16)
#undef P2S_DECLARE

}  // namespace p2s
