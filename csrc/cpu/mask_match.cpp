#include "p2s/mask_match.h"

#include "mask_match_isa.h"
#include "p2s/isa.h"
#include "parallel.h"

namespace p2s {
namespace {

// Words below which another thread costs more than it saves.
constexpr int64_t kWordsPerThread = int64_t{1} << 16;
// Words of the `b` masks of one tile: stays in a core's second-level cache while the rows of `a` pass by.
constexpr int64_t kTileWords = int64_t{1} << 15;
constexpr int64_t kTileRows = 32;

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

}  // namespace

Status mask_match_cpu(const MaskMatchArgs& args, int threads, const char** isa) {
  const auto rows = P2S_DISPATCH(mask_match_rows);
  const char* ran = rows(args, 0, 0);
  parallel_for(args.count, ceil_div(kWordsPerThread, args.words + 1), threads,
               [&](int64_t begin, int64_t end) { rows(args, begin, end); });
  int64_t best = args.count == 0 ? -1 : 0;
  for (int64_t k = 1; k < args.count; ++k) {
    if (args.scores[k] > args.scores[best]) best = k;
  }
  *args.best = best;
  if (isa) *isa = ran;
  return {};
}

Status mask_iou_cpu(const MaskIouArgs& args, int64_t* areas, int threads, const char** isa) {
  const auto area = P2S_DISPATCH(mask_areas);
  const auto fill = P2S_DISPATCH(mask_iou_tile);
  const char* ran = fill(args, areas, {0, 0, 0, 0});
  const int64_t grain = ceil_div(kWordsPerThread, args.words + 1);
  parallel_for(args.rows, grain, threads,
               [&](int64_t begin, int64_t end) { area(args.a, args.words, areas, begin, end); });
  parallel_for(args.columns, grain, threads,
               [&](int64_t begin, int64_t end) { area(args.b, args.words, areas + args.rows, begin, end); });

  const int64_t tile_columns = std::max<int64_t>(4, kTileWords / (args.words + 1) / 4 * 4);
  const int64_t across = ceil_div(args.columns, tile_columns);
  const int64_t tiles = ceil_div(args.rows, kTileRows) * across;
  const int64_t tile_work = kTileRows * std::min(tile_columns, args.columns) * (args.words + 1);
  parallel_for(tiles, ceil_div(kWordsPerThread, tile_work + 1), threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = t / across * kTileRows, column = t % across * tile_columns;
      fill(args, areas,
           {row, std::min(row + kTileRows, args.rows), column, std::min(column + tile_columns, args.columns)});
    }
  });
  if (isa) *isa = ran;
  return {};
}

}  // namespace p2s
