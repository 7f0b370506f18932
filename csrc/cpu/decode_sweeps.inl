// Included by decode_sweeps_<isa>.cpp with P2S_ISA defined. Prompts of the same image go through the tiles of its bases
// in small groups, so that a tile stays in the second-level cache while they pass by.

#include "decode_isa.h"
#include "isa_unit.h"

// The name of the instruction set is part of every function's name.
namespace p2s {
namespace P2S_ISA {
namespace {

#include "lanes.h"
//
#include "decode_blocks.h"
//
#include "decode_prompt.h"
//
#include "decode_attention.h"

// In the order of ops/decode_sweeps.py.
enum Basis { kKeys0, kKeys1, kB0, kQueries0, kQueries1, kB00, kB01, kKeysF, kConvolution };
enum Positional { kPositionalKeys1, kPositionalQueries1, kPositionalKeysF };

constexpr int kGroup = 4;

// One tile of an image's bases.
template <class O>
struct TileOf {
  const Dims& s;
  const DecodeImage& from;
  int64_t image;
  int tile;

  const float* basis(int index) const {
    return from.bases + ((image * s.tiles + tile) * s.row_words + int64_t(index) * (s.inner / O::pair)) * kTile;
  }
  const float* positional(int index) const {
    return from.positional + (int64_t(tile) * 3 + index) * (s.inner / O::pair) * kTile;
  }
  const float* values(int index, int head) const {
    const int64_t size = int64_t(kTile / O::pair) * s.value_lanes;
    return from.values + (((image * s.tiles + tile) * 3 + index) * s.heads + head) * size;
  }
  const float* norm(int index) const { return from.norms + ((image * 3 + index) * s.tiles + tile) * kTile; }
};

// out (d) of a row = (sums + sum_j low_j columns_j + ...) of one head, all divided by `total`
inline void add_low_rank(const Dims& s, float* out, int head, const Projected& from, const float* low, float constant) {
  for (int c = 0; c < s.width; ++c) {
    const float* column = from.columns + (head * s.width + c) * s.low_lanes;
    F part = set1(0.0f);
    for (int j = 0; j < s.low_lanes; j += F::size) part = fma(load(low + j), load(column + j), part);
    out[c] += sum(part) + constant * from.constant[head * s.width + c];
  }
}

// Some prompts of `args` through some tiles, in groups of up to kGroup of one image. Returns the floats of workspace
// that this needs, and does nothing else without one.
template <class O, class Prompt, class Args>
int64_t sweep(const Args& args, const DecodeRange& range, float* workspace) {
  const Dims s = dims_of(args.shape);
  Arena arena{workspace};
  Prompt prompts[kGroup];
  typename Prompt::Scratch scratch;
  for (Prompt& prompt : prompts) prompt.place(s, arena);
  scratch.place(s, arena);
  if (!workspace) return arena.used;
  for (int64_t first = range.first_prompt; first < range.last_prompt;) {
    const int64_t image = args.image.image[first];
    int count = 0;
    for (; count < kGroup && first + count < range.last_prompt && args.image.image[first + count] == image; ++count) {
      prompts[count].start(s, args, first + count, scratch);
    }
    for (int tile = int(range.first_tile); tile < int(range.last_tile); ++tile) {
      const TileOf<O> t{s, args.image, image, tile};
      for (int i = 0; i < count; ++i) prompts[i].visit(s, t, args, first + i, scratch);
    }
    for (int i = 0; i < count; ++i) prompts[i].finish(s, args, first + i, scratch);
    first += count;
  }
  return arena.used;
}

#include "decode_sweep1.h"
//
#include "decode_sweep2.h"
//
#include "decode_upscale.h"

}  // namespace
}  // namespace P2S_ISA

// The floats of workspace for any range, or, given that workspace, the work on one.
#define P2S_DEFINE(op, Sweep, Args)                                                                        \
  int64_t P2S_NAME(op)(const Args& args, const DecodeRange& range, float* workspace, const char** isa) {   \
    using namespace P2S_ISA;                                                                               \
    *isa = kIsaName;                                                                                       \
    return args.shape.pair == 1 ? sweep<Float32, Sweep<Float32>>(args, range, workspace)                   \
                                : sweep<BFloat16, Sweep<BFloat16>>(args, range, workspace);                \
  }
P2S_DEFINE(decode_sweep0, Sweep0, DecodeSweep0Args)
P2S_DEFINE(decode_sweep1, Sweep1, DecodeSweep1Args)
P2S_DEFINE(decode_sweep2, Sweep2, DecodeSweep2Args)
P2S_DEFINE(decode_upscale, Upscale, DecodeUpscaleArgs)
#undef P2S_DEFINE

}  // namespace p2s
