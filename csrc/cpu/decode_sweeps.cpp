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

// Shares the prompts out among threads, each with its own workspace. No result depends on who computes it.
template <class Args>
Status run(int64_t (*sweep)(const Args&, int64_t, int64_t, float*, const char**), const Args& args, int threads,
           const char** isa) {
  constexpr size_t kAlignment = 64;
  const size_t floats = static_cast<size_t>(sweep(args, 0, 0, nullptr, isa) + 15) / 16 * 16;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, args.shape.prompts));
  const std::unique_ptr<float, Free> workspace(
      static_cast<float*>(std::aligned_alloc(kAlignment, floats * sizeof(float) * static_cast<size_t>(parts))));
  if (!workspace) return {"out of memory"};
  std::atomic<size_t> part{0};
  parallel_for(args.shape.prompts, 1, static_cast<int>(parts), [&](int64_t begin, int64_t end) {
    const char* ignored;
    sweep(args, begin, end, workspace.get() + part.fetch_add(1) * floats, &ignored);
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
  return run(P2S_DISPATCH_BF16(decode_upscale), args, threads, isa);
}

}  // namespace p2s
