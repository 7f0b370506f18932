#include "p2s/gated_attention.h"

#include <atomic>

#include "gated_attention_isa.h"
#include "p2s/isa.h"
#include "parallel.h"

namespace p2s {
namespace {

constexpr int64_t kKeysAtOnce = 128;  // of an item's maps

// Heads of the batch below which the rows of one are shared out too.
constexpr int64_t kHeadsPerThread = 2;

// body(index, scratch) for every index, taken one at a time by whichever thread is free, each with its own scratch.
template <class Body>
void share_out(int64_t count, int threads, float* workspace, int64_t floats, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(threads, count), 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i, workspace + slot * floats);
    }
  });
}

int64_t workspace_of(const GatedAttentionArgs& args) {
  return gated_attention_workspace(args.n, args.dim, args.heads, args.queries);
}

}  // namespace

int64_t gated_attention_workspace(int64_t n, int64_t dim, int64_t heads, int64_t queries) {
  return GatedScratch(n, dim, heads, queries).total;
}

Status gated_attention_cpu(const GatedAttentionArgs& args, float* workspace, int threads, const char** isa) {
  const auto maps = P2S_DISPATCH_BF16(gated_maps);
  const auto head = P2S_DISPATCH_BF16(gated_head);
  const int64_t floats = workspace_of(args), heads = args.batch * args.heads;
  const int64_t map_parts = args.queries > 0 ? (args.n + kKeysAtOnce - 1) / kKeysAtOnce : 0;
  share_out(args.batch * map_parts, threads, workspace, floats, [&](int64_t i, float* scratch) {
    const int64_t begin = i % map_parts * kKeysAtOnce;
    maps(args, i / map_parts, begin, std::min(begin + kKeysAtOnce, args.n), scratch);
  });
  std::atomic<const char*> ran{nullptr};
  const int64_t parts = heads < kHeadsPerThread * threads ? std::min<int64_t>(threads, args.rows) : 1;
  share_out(heads * parts, threads, workspace, floats, [&](int64_t i, float* scratch) {
    const int64_t at = i / parts, part = i % parts;
    const int64_t begin = args.rows * part / parts, end = args.rows * (part + 1) / parts;
    ran.store(head(args, at / args.heads, at % args.heads, begin, end, scratch), std::memory_order_relaxed);
  });
  if (isa) *isa = ran.load();
  return {};
}

Status gated_attention_backward_cpu(const GatedAttentionGradArgs& args, float* workspace, int threads,
                                    const char** isa) {
  const auto head = P2S_DISPATCH_BF16(gated_backward_head);
  const auto maps = P2S_DISPATCH_BF16(gated_backward_maps);
  const GatedAttentionArgs& forward = args.forward;
  const int64_t floats = workspace_of(forward);
  std::atomic<const char*> ran{nullptr};
  share_out(forward.batch * forward.heads, threads, workspace, floats, [&](int64_t i, float* scratch) {
    ran.store(head(args, i / forward.heads, i % forward.heads, scratch), std::memory_order_relaxed);
  });
  share_out(forward.queries > 0 ? forward.batch : 0, threads, workspace, floats,
            [&](int64_t item, float* scratch) { maps(args, item, scratch); });
  if (isa) *isa = ran.load();
  return {};
}

}  // namespace p2s
