#pragma once

#include <cstdint>

#include "p2s/status.h"

namespace p2s {

// What the sweeps of the mask decoder share; pro2sam_fast/ops/decode_sweeps.py has the formulas and the layouts. Words
// are 32 bits: one float, or two bfloat16 (`pair` 2), and stand in float arrays.
struct DecodeShape {
  int64_t pair;
  int64_t tiles, pixels;
  int64_t row_words;  // words a pixel in `bases`
  int64_t prompts, heads, tokens, width;
  int64_t channels;              // of the image: D
  int64_t channels1, channels2;  // after the transposed convolutions; 0 in the sweeps
  float eps;
};

struct DecodeImage {
  const float* bases;       // (images, tiles, row_words, 64)
  const float* values;      // (images, tiles, 3, heads, 64 / pair, lanes)
  const float* norms;       // (images, 3, tiles * 64)
  const float* positional;  // (tiles, 3 * heads * width / pair, 64)
  const int64_t* image;     // (prompts)
};

struct DecodeSweep0Args {
  DecodeShape shape;
  DecodeImage image;
  const float* q;  // (prompts, heads, tokens, width), as k0, v0, k1, v1, out below
  float* out;
};

struct DecodeSweep1Args {
  DecodeShape shape;
  DecodeImage image;
  const float *k0, *v0, *q1;
  const float* maps;  // (3, inner, inner): gram, key, value
  const float* bias;  // (inner)
  float* out;
  float* r1;  // (prompts, tiles * 64)
};

struct DecodeSweep2Args {
  DecodeShape shape;
  DecodeImage image;
  const float* r1;
  const float *k0, *v0, *k1, *v1, *qf;
  const float* maps;     // (8, inner, inner): query, gram0, gram01, gram1, key0, key1, value0, value1
  const float* vectors;  // (5, inner): beta0, beta1, key, value, constant
  float beta_norm;
  float* out;
  float* r2;
};

struct DecodeUpscaleArgs {
  DecodeShape shape;  // eps is that of the layer norm between the convolutions
  DecodeImage image;
  const float *r1, *r2;
  const float *k0, *v0, *k1, *v1;
  const float* hyper;    // (masks, channels2)
  const int64_t* first;  // (prompts + 1): prompt i has the masks first[i]..first[i + 1]
  const float* query;    // (inner, inner)
  const float* maps;     // (2, inner, 4 * channels1)
  const float* vectors;  // (2, 4 * channels1): times r2, constant
  const float* norm;     // (2, channels1): weight, bias
  const float* weight;   // (4 * channels2, channels1)
  const float* bias;     // (channels2)
  int64_t grid_height, grid_width;
  float* out;  // (masks, 4 * grid_height, 4 * grid_width)
};

// `isa` receives the name of the instruction set that ran.
Status decode_sweep0_cpu(const DecodeSweep0Args& args, int threads, const char** isa);
Status decode_sweep1_cpu(const DecodeSweep1Args& args, int threads, const char** isa);
Status decode_sweep2_cpu(const DecodeSweep2Args& args, int threads, const char** isa);
Status decode_upscale_cpu(const DecodeUpscaleArgs& args, int threads, const char** isa);

}  // namespace p2s
