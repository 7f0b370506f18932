// Included by mask_match_<isa>.cpp with P2S_ISA defined; see words.h for what differs between the instruction sets.

#include "mask_match_isa.h"
#include "words.h"

namespace {
inline namespace P2S_ISA {

inline float ratio(int64_t inter, int64_t uni) {
  return uni == 0 ? 0.0f : static_cast<float>(inter) / static_cast<float>(uni);
}

inline int64_t area(const uint64_t* x, int64_t words) {
  Words sum = Words::zero();
  int64_t w = 0;
  for (; w + Words::size <= words; w += Words::size) sum += Words::load(x + w).popcount();
  if (w < words) sum += Words::load_part(x + w, words - w).popcount();
  return sum.sum();
}

// Scores of N consecutive masks at `x`: N streams from memory, and the query is loaded once for them.
template <int N>
inline void match(const uint64_t* x, const uint64_t* y, int64_t words, float* scores) {
  Words inter[N], uni[N];
  for (int k = 0; k < N; ++k) inter[k] = uni[k] = Words::zero();
  const auto step = [&](int k, Words p, Words q) {
    inter[k] += (p & q).popcount();
    uni[k] += (p | q).popcount();
  };
  int64_t w = 0;
  for (; w + Words::size <= words; w += Words::size) {
    const Words q = Words::load(y + w);
    for (int k = 0; k < N; ++k) step(k, Words::load(x + k * words + w), q);
  }
  if (w < words) {
    const Words q = Words::load_part(y + w, words - w);
    for (int k = 0; k < N; ++k) step(k, Words::load_part(x + k * words + w, words - w), q);
  }
  for (int k = 0; k < N; ++k) scores[k] = ratio(inter[k].sum(), uni[k].sum());
}

// |x & y_j| of one mask with N consecutive masks at `y`.
template <int N>
inline void intersect(const uint64_t* x, const uint64_t* y, int64_t words, int64_t* out) {
  Words sum[N];
  for (int j = 0; j < N; ++j) sum[j] = Words::zero();
  int64_t w = 0;
  for (; w + Words::size <= words; w += Words::size) {
    const Words p = Words::load(x + w);
    for (int j = 0; j < N; ++j) sum[j] += (p & Words::load(y + j * words + w)).popcount();
  }
  if (w < words) {
    const Words p = Words::load_part(x + w, words - w);
    for (int j = 0; j < N; ++j) sum[j] += (p & Words::load_part(y + j * words + w, words - w)).popcount();
  }
  for (int j = 0; j < N; ++j) out[j] = sum[j].sum();
}

}  // namespace P2S_ISA
}  // namespace

namespace p2s {

const char* P2S_NAME(mask_match_rows)(const MaskMatchArgs& args, int64_t begin, int64_t end) {
  constexpr int kRows = 4;
  int64_t k = begin;
  for (; k + kRows <= end; k += kRows) {
    match<kRows>(args.masks + k * args.words, args.query, args.words, args.scores + k);
  }
  for (; k < end; ++k) match<1>(args.masks + k * args.words, args.query, args.words, args.scores + k);
  return kIsaName;
}

const char* P2S_NAME(mask_areas)(const uint64_t* masks, int64_t words, int64_t* areas, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) areas[k] = area(masks + k * words, words);
  return kIsaName;
}

const char* P2S_NAME(mask_iou_tile)(const MaskIouArgs& args, const int64_t* areas, const MaskIouTile& tile) {
  constexpr int kColumns = 4;
  const int64_t* area_b = areas + args.rows;
  for (int64_t i = tile.row_begin; i < tile.row_end; ++i) {
    const uint64_t* x = args.a + i * args.words;
    float* out = args.iou + i * args.columns;
    int64_t inter[kColumns];
    int64_t j = tile.column_begin;
    for (; j + kColumns <= tile.column_end; j += kColumns) {
      intersect<kColumns>(x, args.b + j * args.words, args.words, inter);
      for (int c = 0; c < kColumns; ++c) out[j + c] = ratio(inter[c], areas[i] + area_b[j + c] - inter[c]);
    }
    for (; j < tile.column_end; ++j) {
      intersect<1>(x, args.b + j * args.words, args.words, inter);
      out[j] = ratio(inter[0], areas[i] + area_b[j] - inter[0]);
    }
  }
  return kIsaName;
}

}  // namespace p2s
