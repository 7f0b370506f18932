#pragma once

// Token-to-image attention over all pixels, tile by tile, for one prompt. Included inside a namespace of the unit's
// own.

// Sums over pixels of (weight * factor) times rows of a basis; `factor` counts from 0.
struct Accumulator {
  const float* basis;  // of one head and tile: (pixel words, lanes)
  int lanes;
  int factor;
  float* sums;  // of one head: (T, lanes)
};

// The running softmax of all rows (h, T). Weights are 2^(score - reference); the reference of a row is its greatest
// score when it was last set, and is set anew only when a score exceeds it by more than `kSlack`.
struct PixelSoftmax {
  static constexpr float kSlack = 24.0f, kNone = -1e30f;
  static constexpr int kSums = 3;
  float* reference;  // (h T)
  float* sums;       // (kSums, h T, lanes): of weights, and of weights times each factor
  float* weights;    // (2, T, pixel words)

  void place(const Dims& s, Arena& arena) {
    reference = arena.take(s.rows);
    sums = arena.take(int64_t(kSums) * s.rows * kValueLanes);
  }
  void clear(const Dims& s) {
    for (int i = 0; i < s.rows; ++i) reference[i] = kNone;
    for (int i = 0; i < kSums * s.rows * kValueLanes; ++i) sums[i] = 0;
  }
  float total(const Dims& s, int which, int row) const {
    const float* from = sums + (int64_t(which) * s.rows + row) * kValueLanes;
    F part = load(from);
    for (int i = F::size; i < kValueLanes; i += F::size) part = part + load(from + i);
    return sum(part);
  }

  // scores (T, 64) of head `h` in one tile, to the base of two; factors: rows of 64
  template <class O, int kFactors, int kAccumulators>
  void add(const Dims& s, int h, const float* scores, const float* const (&factors)[kFactors],
           const Accumulator (&accumulators)[kAccumulators]) const {
    constexpr int words = kTile / O::pair;
    const int first = h * s.tokens;
    bool above = false;
    for (int t = 0; t < s.tokens; ++t) {
      F best = load(scores + t * kTile);
      for (int px = F::size; px < kTile; px += F::size) best = max(best, load(scores + t * kTile + px));
      above |= any_greater(best, set1(reference[first + t] + kSlack));
    }
    if (above) move(s, first, scores, accumulators, kAccumulators);
    for (int t = 0; t < s.tokens; ++t) {
      const F from = set1(reference[first + t]);
      F total[1 + kFactors];
      for (F& x : total) x = set1(0.0f);
      for (int px = 0; px < kTile; px += 2 * F::size) {
        const F a = O::exp2(load(scores + t * kTile + px) - from);
        const F b = O::exp2(load(scores + t * kTile + px + F::size) - from);
        total[0] = total[0] + (a + b);
        for (int f = 0; f < kFactors; ++f) {
          F x = a, y = b;
          if (factors[f]) x = x * load(factors[f] + px), y = y * load(factors[f] + px + F::size);
          total[1 + f] = total[1 + f] + (x + y);
          O::store_pixels(weights + (f * s.tokens + t) * words + px / O::pair, x, y);
        }
      }
      for (int f = 0; f <= kFactors; ++f) {
        float* to = sums + (int64_t(f) * s.rows + first + t) * kValueLanes;
        store(to, load(to) + total[f]);
      }
    }
    for (const Accumulator& a : accumulators) {
      outer_product<O>(a.sums, weights + a.factor * s.tokens * words, s.tokens, a.basis, a.lanes);
    }
  }

  __attribute__((noinline)) void move(const Dims& s, int first, const float* scores, const Accumulator* accumulators,
                                      int count) const {
    for (int t = 0; t < s.tokens; ++t) {
      F best = load(scores + t * kTile);
      for (int px = F::size; px < kTile; px += F::size) best = max(best, load(scores + t * kTile + px));
      const float next = greatest(best);
      if (next <= reference[first + t]) continue;
      const F shrink = Float32::exp2(set1(reference[first + t] - next));
      reference[first + t] = next;
      const auto scale = [&](float* x, int lanes) {
        for (int i = 0; i < lanes; i += F::size) store(x + i, load(x + i) * shrink);
      };
      for (int f = 0; f < kSums; ++f) scale(sums + (int64_t(f) * s.rows + first + t) * kValueLanes, kValueLanes);
      for (int a = 0; a < count; ++a) scale(accumulators[a].sums + t * accumulators[a].lanes, accumulators[a].lanes);
    }
  }
};

// Pixels beyond the image take no part.
inline void hide_padding(const Dims& s, int tile, float* scores) {
  const int valid = s.pixels - tile * kTile;
  if (valid >= kTile) return;
  for (int t = 0; t < s.tokens; ++t) {
    for (int px = valid; px < kTile; ++px) scores[t * kTile + px] = PixelSoftmax::kNone;
  }
}
