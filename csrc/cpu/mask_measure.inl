// Included by mask_measure_<isa>.cpp with P2S_ISA defined; see floats.h for what differs between the instruction sets.

#include "floats.h"
#include "mask_measure_isa.h"
#include "words.h"

namespace p2s {
namespace {
inline namespace P2S_ISA {

constexpr int64_t kBits = 64;
// Words of a strip that is computed together; its rows stay in the first-level cache.
constexpr int64_t kStripWords = 8;
constexpr int64_t kStrip = kStripWords * kBits;

// Low-resolution logits of one mask.
struct Logits {
  const float* values;
  int64_t columns;
  bool tame;  // all finite, none huge
};

inline Logits logits_of(const float* low_res, const MaskFrame& frame, int64_t k) {
  const int64_t n = frame.rows * frame.columns;
  const float* p = low_res + k * n;
  const Floats limit = Floats::all(kMaskTame), zero = Floats::all(0.0f);
  constexpr uint64_t every = (uint64_t{1} << Floats::size) - 1;
  uint64_t fit = every;
  int64_t i = 0;
  for (; i + Floats::size <= n; i += Floats::size) fit &= Floats::load(p + i).within(limit);
  if (i < n) fit &= Floats::load_part(p + i, n - i, zero).within(limit);
  return {p, frame.columns, fit == every};
}

struct Range {
  float low, high;
};

// Least and largest of the values on which a word's rows [begin, end) depend.
inline Range support(const Logits& logits, const MaskPlan& plan, int64_t word, int64_t begin, int64_t end) {
  const int64_t top = plan.input_row[plan.row[begin].first].first;
  const int64_t bottom = plan.input_row[plan.row[end - 1].second].second;
  const int64_t left = plan.support[2 * word], n = plan.support[2 * word + 1] - left + 1;
  Floats low = Floats::all(kMaskTame), high = Floats::all(-kMaskTame);
  for (int64_t y = top; y <= bottom; ++y) {
    const float* p = logits.values + y * logits.columns + left;
    int64_t x = 0;
    for (; x + Floats::size <= n; x += Floats::size) {
      const Floats v = Floats::load(p + x);
      low = Floats::min(low, v);
      high = Floats::max(high, v);
    }
    if (x < n) {
      low = Floats::min(low, Floats::load_part(p + x, n - x, low));
      high = Floats::max(high, Floats::load_part(p + x, n - x, high));
    }
  }
  return {low.least(), high.most()};
}

// Columns of the frame among the 64 of a word.
inline uint64_t valid_bits(const MaskPlan& plan, int64_t word) {
  uint64_t bits = ~uint64_t{0};
  if (word == 0) bits &= bits << plan.lead;
  const int64_t left = plan.lead + plan.frame.width - word * kBits;
  return left < kBits ? bits & ((uint64_t{1} << left) - 1) : bits;
}

// Rows of logits at words [word, word_end) of the photo. Low-resolution row j, resized horizontally, is kept at slot
// j % 2 until another takes the slot; so is row i of the input, resized to the photo's columns.
class Strip {
 public:
  Strip(const Logits& logits, const MaskPlan& plan, int64_t word, int64_t word_end)
      : logits_(logits), plan_(plan), group_(word * kGroups), groups_((word_end - word) * kGroups) {}

  const float* input_row(int64_t i) {
    float* out = input_[i % 2];
    if (input_at_[i % 2] != i) {
      input_at_[i % 2] = i;
      const MaskTap tap = plan_.input_row[i];
      const float* top = low_row(tap.first);
      const float* bottom = low_row(tap.second);
      const Floats w0 = Floats::all(tap.w0), w1 = Floats::all(tap.w1);
      for (int64_t g = 0; g < groups_; ++g) {
        const float* p = top + g * 2 * Floats::size;
        const float* q = bottom + g * 2 * Floats::size;
        const float* weight = plan_.weight + ((group_ + g) * 6 + 4) * Floats::size;
        const Floats a = Floats::lerp(w0, Floats::load(p), w1, Floats::load(q));
        const Floats b = Floats::lerp(w0, Floats::load(p + Floats::size), w1, Floats::load(q + Floats::size));
        Floats::lerp(Floats::load(weight), a, Floats::load(weight + Floats::size), b).store(out + g * Floats::size);
      }
    }
    return out;
  }

 private:
  static constexpr int64_t kGroups = kBits / Floats::size;

  // A vector for the columns a of the input, then one for the columns b, for every group.
  const float* low_row(int64_t j) {
    float* out = low_[j % 2];
    if (low_at_[j % 2] != j) {
      low_at_[j % 2] = j;
      const float* row = logits_.values + j * logits_.columns;
      plan_.windowed ? fill<Window>(row, out) : fill<Anywhere>(row, out);
    }
    return out;
  }

  template <class Source>
  void fill(const float* row, float* out) const {
    for (int64_t g = group_; g < group_ + groups_; ++g, out += 2 * Floats::size) {
      const Source from = Source::load(row + plan_.base[g]);
      const int32_t* index = plan_.index + g * 4 * Floats::size;
      const float* weight = plan_.weight + g * 6 * Floats::size;
      for (int64_t side = 0; side < 2; ++side, index += 2 * Floats::size, weight += 2 * Floats::size) {
        Floats::lerp(Floats::load(weight), from.pick(index), Floats::load(weight + Floats::size),
                     from.pick(index + Floats::size))
            .store(out + side * Floats::size);
      }
    }
  }

  const Logits& logits_;
  const MaskPlan& plan_;
  const int64_t group_, groups_;
  int64_t low_at_[2] = {-1, -1}, input_at_[2] = {-1, -1};
  alignas(64) float low_[2][2 * kStrip];
  alignas(64) float input_[2][kStrip];
};

// Which of 64 values between two input rows exceed each of N cutoffs.
template <int N>
inline void above(const float* top, const float* bottom, const MaskTap& tap, const Floats* cuts, uint64_t* bits) {
  const Floats w0 = Floats::all(tap.w0), w1 = Floats::all(tap.w1);
  for (int i = 0; i < N; ++i) bits[i] = 0;
  for (int64_t x = 0; x < kBits; x += Floats::size) {
    const Floats v = Floats::lerp(w0, Floats::load(top + x), w1, Floats::load(bottom + x));
    for (int i = 0; i < N; ++i) bits[i] |= v.above(cuts[i]) << x;
  }
}

// Visits a mask in bands of rows. sure(begin, end, word, all) gets rows [begin, end) of a word where bit i of `all` says
// of every pixel whether it exceeds cutoff i; unsure(y, word, bits) every other row, one bit a pixel for each cutoff.
template <int N, class Sure, class Unsure>
inline void visit(const MaskPlan& plan, const Logits& logits, const float (&cuts)[N], Sure sure, Unsure unsure) {
  Floats cut[N];
  for (int i = 0; i < N; ++i) cut[i] = Floats::all(cuts[i]);
  for (int64_t begin = 0; begin < plan.frame.height; begin += plan.band) {
    const int64_t end = begin + plan.band < plan.frame.height ? begin + plan.band : plan.frame.height;
    int64_t open = 0;  // words [open, word) are unsure
    for (int64_t word = 0; word <= plan.words; ++word) {
      int all = -1;
      if (word < plan.words && logits.tame) {
        const Range range = support(logits, plan, word, begin, end);
        all = mask_settled(range.low, range.high, cuts, N);
      }
      if (open < word && (word == plan.words || all >= 0 || word - open == kStripWords)) {
        Strip strip(logits, plan, open, word);
        for (int64_t y = begin; y < end; ++y) {
          const MaskTap& tap = plan.row[y];
          const float* top = strip.input_row(tap.first);
          const float* bottom = strip.input_row(tap.second);
          for (int64_t w = open; w < word; ++w) {
            uint64_t bits[N];
            above<N>(top + (w - open) * kBits, bottom + (w - open) * kBits, tap, cut, bits);
            unsure(y, w, bits);
          }
        }
        open = word;
      }
      if (all >= 0) {
        sure(begin, end, word, all);
        open = word + 1;
      }
    }
  }
}

inline int64_t count(uint64_t bits) { return __builtin_popcountll(bits); }

// Extent of the set pixels of rows and words.
struct Extent {
  int64_t x0 = INT64_MAX, y0 = INT64_MAX, x1 = -1, y1 = -1;

  void add(int64_t begin, int64_t end, int64_t word, uint64_t bits) {
    if (bits == 0) return;
    const int64_t left = word * kBits + __builtin_ctzll(bits), right = word * kBits + 63 - __builtin_clzll(bits);
    if (left < x0) x0 = left;
    if (right > x1) x1 = right;
    if (begin < y0) y0 = begin;
    if (end > y1 + 1) y1 = end - 1;
  }
};

}  // namespace P2S_ISA
}  // namespace

MaskLanes P2S_NAME(mask_measure_lanes)() {
  return {kIsaName, Floats::size, Floats::window};
}

void P2S_NAME(mask_measure_one)(const MaskMeasureArgs& args, const MaskPlan& plan, int64_t k) {
  enum { kHigh, kLow, kCut, kCuts };
  const float cuts[kCuts] = {args.high, args.low, args.cut};
  const Logits logits = logits_of(args.low_res, plan.frame, k);
  int64_t pixels[kCuts] = {0, 0, 0};
  Extent extent;
  visit(
      plan, logits, cuts,
      [&](int64_t begin, int64_t end, int64_t word, int all) {
        const uint64_t valid = valid_bits(plan, word);
        for (int i = 0; i < kCuts; ++i) pixels[i] += all >> i & 1 ? count(valid) * (end - begin) : 0;
        if (all >> kCut & 1) extent.add(begin, end, word, valid);
      },
      [&](int64_t y, int64_t word, const uint64_t (&bits)[kCuts]) {
        const uint64_t valid = valid_bits(plan, word);
        for (int i = 0; i < kCuts; ++i) pixels[i] += count(bits[i] & valid);
        extent.add(y, y + 1, word, bits[kCut] & valid);
      });
  args.inner[k] = pixels[kHigh];
  args.outer[k] = pixels[kLow];
  args.areas[k] = pixels[kCut];
  const bool empty = extent.x1 < 0;
  const int64_t box[4] = {extent.x0, extent.y0, extent.x1, extent.y1};
  for (int i = 0; i < 4; ++i) args.boxes[4 * k + i] = empty ? 0 : box[i];
}

void P2S_NAME(mask_pack_one)(const MaskPackArgs& args, const MaskPlan& plan, int64_t k) {
  const float cuts[1] = {args.cut};
  const Logits logits = logits_of(args.low_res, plan.frame, k);
  uint64_t* mask = args.masks + k * args.image_height * args.words;
  std::memset(mask, 0, sizeof(uint64_t) * static_cast<size_t>(args.image_height * args.words));
  uint64_t* first = mask + args.y0 * args.words + args.x0 / kBits;
  visit(
      plan, logits, cuts,
      [&](int64_t begin, int64_t end, int64_t word, int all) {
        if (!all) return;
        const uint64_t valid = valid_bits(plan, word);
        for (int64_t y = begin; y < end; ++y) first[y * args.words + word] = valid;
      },
      [&](int64_t y, int64_t word, const uint64_t (&bits)[1]) {
        first[y * args.words + word] = bits[0] & valid_bits(plan, word);
      });
}

}  // namespace p2s
