#pragma once

#include "p2s/decode.h"

namespace p2s {

// Prompts and tiles, from first to before last.
struct DecodeRange {
  int64_t first_prompt = 0, last_prompt = 0, first_tile = 0, last_tile = 0;
};

// The serial parts of the sweeps, once per instruction set. Without a workspace they return the floats that they need;
// with one they work on a range.
#define P2S_DECLARE(isa)                                                                                     \
  int64_t decode_sweep0_##isa(const DecodeSweep0Args&, const DecodeRange&, float* workspace, const char**);  \
  int64_t decode_sweep1_##isa(const DecodeSweep1Args&, const DecodeRange&, float* workspace, const char**);  \
  int64_t decode_sweep2_##isa(const DecodeSweep2Args&, const DecodeRange&, float* workspace, const char**);  \
  int64_t decode_upscale_##isa(const DecodeUpscaleArgs&, const DecodeRange&, float* workspace, const char**);
P2S_DECLARE(scalar)
P2S_DECLARE(avx2)
P2S_DECLARE(avx512)
P2S_DECLARE(avx512bf16)
#undef P2S_DECLARE

}  // namespace p2s
