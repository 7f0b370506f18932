#include "p2s/mask_measure.h"

#include <atomic>

#include "mask_measure_isa.h"
#include "p2s/isa.h"
#include "parallel.h"

namespace p2s {
namespace {

// Pixels below which another thread costs more than it saves.
constexpr int64_t kPixelsPerThread = int64_t{1} << 19;
constexpr int64_t kWordBits = 64;
constexpr int64_t kIndices = 4, kWeights = 6;
constexpr int64_t kBandRows = 32;

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

struct Tables {
  std::vector<int32_t> base, index, support;
  std::vector<float> weight;
  std::vector<MaskTap> input_row, row;
  MaskPlan plan;

  Tables(const MaskFrame& frame, int64_t lead, const MaskLanes& lanes) {
    const int64_t words = ceil_div(lead + frame.width, kWordBits), groups = words * kWordBits / lanes.size;
    const MaskAxis input_rows = mask_axis(frame.rows, frame.img_size, false);
    const MaskAxis rows = mask_axis(frame.input_height, frame.height, false);
    const MaskAxis input_columns = mask_axis(frame.columns, frame.img_size, false);
    const MaskAxis columns = mask_axis(frame.input_width, frame.width, false);
    for (int32_t y = 0; y < frame.input_height; ++y) input_row.push_back(mask_tap(input_rows, y));
    for (int32_t y = 0; y < frame.height; ++y) row.push_back(mask_tap(rows, y));
    index.resize(groups * kIndices * lanes.size);
    weight.resize(groups * kWeights * lanes.size);
    bool windowed = frame.columns >= lanes.window;
    int32_t last = 0;
    for (int64_t x = 0; x < words * kWordBits; ++x) {
      const int64_t group = x / lanes.size, lane = x % lanes.size;
      const int64_t inside = std::min(std::max<int64_t>(x - lead, 0), frame.width - 1);
      const MaskTap outer = mask_tap(columns, static_cast<int32_t>(inside));
      const MaskTap a = mask_tap(input_columns, outer.first), b = mask_tap(input_columns, outer.second);
      if (x % kWordBits == 0) support.push_back(a.first);
      if (lane == 0) base.push_back(a.first);
      last = b.second;
      if (x % kWordBits == kWordBits - 1) support.push_back(last);
      if (last - base[group] >= lanes.window) windowed = false;
      const int32_t indices[kIndices] = {a.first, a.second, b.first, b.second};
      const float weights[kWeights] = {a.w0, a.w1, b.w0, b.w1, outer.w0, outer.w1};
      for (int64_t i = 0; i < kIndices; ++i) index[(group * kIndices + i) * lanes.size + lane] = indices[i];
      for (int64_t i = 0; i < kWeights; ++i) weight[(group * kWeights + i) * lanes.size + lane] = weights[i];
    }
    for (int64_t group = 0; group < groups; ++group) {
      // a window never reaches beyond the row
      if (windowed) base[group] = std::min(base[group], static_cast<int32_t>(frame.columns - lanes.window));
      for (int64_t i = 0; i < kIndices * lanes.size; ++i) index[group * kIndices * lanes.size + i] -= base[group];
    }
    plan = {frame,          lead,           words,         kBandRows, windowed, base.data(), index.data(),
            weight.data(), support.data(), input_row.data(), row.data()};
  }
};

// one(plan, k) for every mask k. Masks cost unequally, so threads take them one by one.
template <class Args, class One>
Status for_each_mask(const Args& args, int64_t lead, const MaskLanes& lanes, int threads, const One& one) {
  if (args.count == 0) return {};
  const MaskFrame& frame = args.frame;
  try {
    const Tables tables(frame, lead, lanes);
    std::atomic<int64_t> next{0};
    const int64_t pixels = frame.height * frame.width;
    const int64_t parts = std::min<int64_t>(threads, ceil_div(args.count * pixels, kPixelsPerThread));
    parallel_for(std::max<int64_t>(1, std::min(parts, args.count)), 1, threads, [&](int64_t, int64_t) {
      for (int64_t k = next++; k < args.count; k = next++) one(args, tables.plan, k);
    });
  } catch (const std::exception&) {
    return {"out of memory"};
  }
  return {};
}

}  // namespace

Status mask_measure_cpu(const MaskMeasureArgs& args, int threads, const char** isa) {
  const MaskLanes lanes = P2S_DISPATCH(mask_measure_lanes)();
  if (isa) *isa = lanes.isa;
  return for_each_mask(args, 0, lanes, threads, P2S_DISPATCH(mask_measure_one));
}

Status mask_pack_cpu(const MaskPackArgs& args, int threads, const char** isa) {
  const MaskLanes lanes = P2S_DISPATCH(mask_measure_lanes)();
  if (isa) *isa = lanes.isa;
  return for_each_mask(args, args.x0 % kWordBits, lanes, threads, P2S_DISPATCH(mask_pack_one));
}

}  // namespace p2s
