#include <atomic>
#include <cstdlib>
#include <memory>

#include "decode_isa.h"
#include "p2s/isa.h"
#include "parallel.h"

namespace p2s {
namespace {

struct Free {
  void operator()(float* p) const { std::free(p); }
};

// Shares the prompts out among threads, each with its own workspace, or the tiles of all prompts where these are too few
// and nothing is summed over tiles. No result depends on who computes it.
template <class Args>
Status run(int64_t (*sweep)(const Args&, const DecodeRange&, float*, const char**), const Args& args, int threads,
           const char** isa, bool sums_tiles = true) {
  constexpr size_t kAlignment = 64;
  const size_t floats = static_cast<size_t>(sweep(args, {}, nullptr, isa) + 15) / 16 * 16;
  const int64_t prompts = args.shape.prompts, tiles = args.shape.tiles;
  const bool by_tile = !sums_tiles && prompts < threads;
  const int64_t count = by_tile ? tiles : prompts, parts = std::max<int64_t>(1, std::min<int64_t>(threads, count));
  const std::unique_ptr<float, Free> workspace(
      static_cast<float*>(std::aligned_alloc(kAlignment, floats * sizeof(float) * static_cast<size_t>(parts))));
  if (!workspace) return {"out of memory"};
  std::atomic<size_t> part{0};
  parallel_for(count, 1, static_cast<int>(parts), [&](int64_t begin, int64_t end) {
    const DecodeRange range = by_tile ? DecodeRange{0, prompts, begin, end} : DecodeRange{begin, end, 0, tiles};
    const char* ignored;
    sweep(args, range, workspace.get() + part.fetch_add(1) * floats, &ignored);
  });
  return {};
}

}  // namespace

Status decode_sweep0_cpu(const DecodeSweep0Args& args, int threads, const char** isa) {
  return run(P2S_DISPATCH_BF16(decode_sweep0), args, threads, isa);
}

Status decode_sweep1_cpu(const DecodeSweep1Args& args, int threads, const char** isa) {
  return run(P2S_DISPATCH_BF16(decode_sweep1), args, threads, isa);
}

Status decode_sweep2_cpu(const DecodeSweep2Args& args, int threads, const char** isa) {
  return run(P2S_DISPATCH_BF16(decode_sweep2), args, threads, isa);
}

Status decode_upscale_cpu(const DecodeUpscaleArgs& args, int threads, const char** isa) {
  return run(P2S_DISPATCH_BF16(decode_upscale), args, threads, isa, false);
}

}  // namespace p2s
