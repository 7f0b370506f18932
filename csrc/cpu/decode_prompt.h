#pragma once

// What the sweeps do with one prompt's tokens. Probabilities over the T tokens of a head sum to 1, so the last one is
// expressed by the others: P v = v_last + sum_{t < T-1} P_t (v_t - v_last). Included inside a namespace of the unit's
// own.

constexpr int kUsualTokens = 7;  // of one point or one box
constexpr int kMostTokens = 32;

struct Dims {
  int heads, tokens, width;  // h, T, d
  int inner;                 // I = h d
  int rows;                  // h T
  int low_head, low;         // independent probabilities of a head, rounded up to even; of all heads
  int low_lanes;             // `low` in whole vectors
  int value_lanes;
  int tiles, pixels, row_words;
  int channels1, channels2;
  float scale;  // of scores, for powers of two
};

inline Dims dims_of(const DecodeShape& s) {
  Dims d;
  d.heads = int(s.heads), d.tokens = int(s.tokens), d.width = int(s.width);
  d.inner = d.heads * d.width, d.rows = d.heads * d.tokens;
  d.low_head = round_up(d.tokens - 1, 2), d.low = d.heads * d.low_head, d.low_lanes = round_up(d.low, kValueLanes);
  d.value_lanes = round_up(d.width, kValueLanes);
  d.tiles = int(s.tiles), d.pixels = int(s.pixels), d.row_words = int(s.row_words);
  d.channels1 = int(s.channels1), d.channels2 = int(s.channels2);
  d.scale = 1.44269504088896341f / __builtin_sqrtf(float(d.width));
  return d;
}

// Hands out parts of a buffer, or only counts them while there is none.
struct Arena {
  float* base;
  int64_t used = 0;
  float* take(int64_t count) {
    float* part = base ? base + used : nullptr;
    used += (count + 15) / 16 * 16;
    return part;
  }
  template <class... Part>
  void take_each(int64_t count, Part&... parts) {
    ((parts = take(count)), ...);
  }
};

// The matrix v (h, T, d) of one prompt as differences (low, d) to each head's last row, and those last rows (I).
struct LowRank {
  float *difference, *last;
  void place(const Dims& s, Arena& arena) {
    difference = arena.take(int64_t(s.low) * s.width);
    last = arena.take(s.inner);
  }
  void set(const Dims& s, const float* v) {
    for (int h = 0; h < s.heads; ++h, v += s.tokens * s.width) {
      const float* end = v + (s.tokens - 1) * s.width;
      for (int t = 0; t < s.low_head; ++t) {
        float* row = difference + (h * s.low_head + t) * s.width;
        for (int c = 0; c < s.width; ++c) row[c] = t < s.tokens - 1 ? v[t * s.width + c] - end[c] : 0.0f;
      }
      for (int c = 0; c < s.width; ++c) last[h * s.width + c] = end[c];
    }
  }
};

// A low-rank factor times a matrix (I, count): `columns` (count, low lanes) and `constant` (count), for its last rows.
struct Projected {
  float *columns, *constant;
  float* rows;  // (low lanes, F::size), of the columns at hand
  void place(const Dims& s, int count, Arena& arena) {
    columns = arena.take(int64_t(count) * s.low_lanes);
    rows = arena.take(int64_t(s.low_lanes) * F::size);
    constant = arena.take(count);
  }
  void set(const Dims& s, const LowRank& v, const float* map, int count) {
    for (int n = 0; n < count; n += F::size) {
      F total = set1(0.0f);
      for (int i = 0; i < s.inner; ++i) total = fma(set1(v.last[i]), load(map + int64_t(i) * count + n), total);
      store(constant + n, total);
      for (int j = s.low; j < s.low_lanes; ++j) store(rows + j * F::size, set1(0.0f));
      for (int h = 0; h < s.heads; ++h) {
        const float* m = map + int64_t(h) * s.width * count + n;
        for_blocks<kRows>(s.low_head, [&](auto block, int t) {
          constexpr int N = decltype(block)::value;
          const int j = h * s.low_head + t;
          const float* difference = v.difference + j * s.width;
          F sum[N];
#pragma GCC unroll 8
          for (int r = 0; r < N; ++r) sum[r] = set1(0.0f);
          for (int c = 0; c < s.width; ++c) {
            const F x = load(m + int64_t(c) * count);
#pragma GCC unroll 8
            for (int r = 0; r < N; ++r) sum[r] = fma(set1(difference[r * s.width + c]), x, sum[r]);
          }
#pragma GCC unroll 8
          for (int r = 0; r < N; ++r) store(rows + (j + r) * F::size, sum[r]);
        });
      }
      for (int first = 0; first < s.low_lanes; first += F::size) {
        F square[F::size];
        for (int r = 0; r < F::size; ++r) square[r] = load(rows + (first + r) * F::size);
        transpose(square);
        for (int i = 0; i < F::size; ++i) store(columns + (n + i) * s.low_lanes + first, square[i]);
      }
    }
  }
  // row (low lanes) = what head `head` of the factor's product has in common with `vector` (d), times `scale`; the same
  // of the last rows is returned.
  float couple(const Dims& s, int head, const float* vector, float scale, float* row) const {
    const float* from = columns + head * s.width * s.low_lanes;
    float own = 0;
    for (int c = 0; c < s.width; ++c) own += constant[head * s.width + c] * (vector[c] * scale);
    for (int j = 0; j < s.low_lanes; j += F::size) {
      F total = set1(0.0f);
      for (int c = 0; c < s.width; ++c) total = fma(set1(vector[c] * scale), load(from + c * s.low_lanes + j), total);
      store(row + j, total);
    }
    return own;
  }
};

// Panels of every head for vectors (h, count, d) with d words each: (h, d words * count).
template <class O>
inline void write_vectors(const Dims& s, float* panels, const float* vectors, int count, float scale) {
  float row[256];
  for (int h = 0; h < s.heads; ++h, panels += s.width / O::pair * count) {
    for (int o = 0; o < count; ++o, vectors += s.width) {
      for (int c = 0; c < s.width; ++c) row[c] = vectors[c] * scale;
      write_panel<O, kOutputs>(panels, s.width / O::pair, count, o, row);
    }
  }
}

// Panels of every head that couple `from` with vectors (h, count, d): (h, low words * count), and biases (h * count).
template <class O>
inline void write_coupling(const Dims& s, float* panels, float* bias, const Projected& from, const float* vectors,
                           int count, float scale, float* row) {
  for (int h = 0; h < s.heads; ++h, panels += s.low / O::pair * count) {
    for (int o = 0; o < count; ++o, vectors += s.width) {
      bias[h * count + o] = from.couple(s, h, vectors, scale, row);
      write_panel<O, kOutputs>(panels, s.low / O::pair, count, o, row);
    }
  }
}

// Probabilities of one tile: `rows` (low lanes, 64) in float32, `words` (low words, 64) for products over the
// probabilities, `across` (pixel words, low lanes) for products over the pixels.
struct Probabilities {
  float *rows, *words, *across;
  template <class O>
  void place(const Dims& s, Arena& arena) {
    rows = arena.take(s.low_lanes * kTile);
    words = O::pair == 1 ? rows : arena.take(s.low / O::pair * kTile);
    across = arena.take(s.low_lanes * kTile / O::pair);
  }
  void clear(const Dims& s) {
    for (int i = 0; i < s.low_lanes * kTile; ++i) rows[i] = 0;
  }

  // scores (T, 64), to the base of two: softmax over the tokens of `head`
  template <class O>
  void set(const Dims& s, int head, const float* scores) const {
    s.tokens == kUsualTokens ? set_tokens<O, kUsualTokens>(s, s.tokens, head, scores)
                             : set_tokens<O, kMostTokens>(s, s.tokens, head, scores);
  }

  // Unrolled for the usual number of tokens.
  template <class O, int most>
  void set_tokens(const Dims& s, int count, int head, const float* scores) const {
    const int first = head * s.low_head, tokens = most == kUsualTokens ? most : count;
    for (int px = 0; px < kTile; px += F::size) {
      F e[most], best = load(scores + px), total = set1(0.0f);
      for (int t = 1; t < tokens; ++t) best = max(best, load(scores + t * kTile + px));
      for (int t = 0; t < tokens; ++t) e[t] = O::exp2(load(scores + t * kTile + px) - best), total = total + e[t];
      const F part = set1(1.0f) / total;
      for (int t = 0; t + 1 < tokens; ++t) store(rows + (first + t) * kTile + px, e[t] * part);
      if (O::pair == 1) continue;
      for (int j = first; j < first + s.low_head; j += 2) {
        O::store_channels(words + j / 2 * kTile + px, kTile, load(rows + j * kTile + px),
                          load(rows + (j + 1) * kTile + px));
      }
    }
  }

  template <class O>
  void turn(const Dims& s) const {
    for (int j = 0; j < s.low_lanes; j += F::size) {
      for (int k = 0; k < kTile / O::pair; k += F::size) {
        F square[F::size];
        for (int i = 0; i < F::size; ++i) square[i] = O::load_pixels(rows + (j + i) * kTile + k * O::pair);
        transpose(square);
        for (int i = 0; i < F::size; ++i) store(across + (k + i) * s.low_lanes + j, square[i]);
      }
    }
  }

  template <class O>
  F load_row(int j, int px) const {
    return O::channel(load(words + j / O::pair * kTile + px), j % O::pair);
  }
};

// Image-to-token attention 0 of one tile: queries (I words, 64), keys (h, d words * T).
template <class O>
inline void attend_tokens0(const Dims& s, const float* queries, const float* keys, const Probabilities& p,
                           float* scores) {
  const int words = s.width / O::pair;
  for (int h = 0; h < s.heads; ++h, queries += words * kTile, keys += words * s.tokens) {
    for_blocks<kOutputs>(s.tokens, [&](auto n, int o) {
      for (int px = 0; px < kTile; px += kStep) {
        F sum[decltype(n)::value][kVectors];
        fill_block(sum, nullptr);
        dot_block<O>(sum, queries + px, keys + words * o, words);
        store_block(scores + o * kTile + px, sum);
      }
    });
    p.set<O>(s, h, scores);
  }
}

// Scores of one head: factor * (basis . vectors + words . coupling + bias) + positional . vectors
struct Coupled {
  const float* vectors;   // (h, d words * T)
  const float* coupling;  // (h, low words * T)
  const float* bias;      // (h * T)
};
template <class O>
inline void coupled_scores(const Dims& s, int h, const float* basis, const float* positional, const Coupled& c,
                           const Probabilities& p, const float* factor, float* scores) {
  const int words = s.width / O::pair, low = s.low / O::pair;
  basis += h * words * kTile, positional += h * words * kTile;
  const float *vectors = c.vectors + h * words * s.tokens, *coupling = c.coupling + h * low * s.tokens;
  for_blocks<kOutputs>(s.tokens, [&](auto n, int o) {
    for (int px = 0; px < kTile; px += kStep) {
      F sum[decltype(n)::value][kVectors];
      fill_block(sum, c.bias + h * s.tokens + o);
      dot_block<O>(sum, basis + px, vectors + words * o, words);
      dot_block<O>(sum, p.words + px, coupling + low * o, low);
      scale_block(sum, factor + px, nullptr);
      dot_block<O>(sum, positional + px, vectors + words * o, words);
      store_block(scores + o * kTile + px, sum);
    }
  });
}

// Image-to-token attention 1 of one tile.
template <class O>
inline void attend_tokens1(const Dims& s, const float* queries, const float* positional, const Coupled& keys,
                           const Probabilities& p0, const float* r1, const Probabilities& p1, float* scores) {
  for (int h = 0; h < s.heads; ++h) {
    coupled_scores<O>(s, h, queries, positional, keys, p0, r1, scores);
    p1.set<O>(s, h, scores);
  }
}

// out (64) += sum_j left_j (basis_j . vectors_j + right . gram_j + bias_j), j over all probabilities. A symmetric gram
// is given as its lower triangle of heads.
template <class O>
inline void add_quadratic(const Dims& s, float* out, const Probabilities& left, const Probabilities& right,
                          const float* gram, const float* bias, bool symmetric, const float* basis,
                          const float* vectors) {
  const int words = s.width / O::pair, low = s.low / O::pair, n = s.low_head;
  for (int h = 0; h < s.heads; ++h) {
    const int length = symmetric ? (h + 1) * n / O::pair : low;
    for_blocks<kOutputs>(n, [&](auto count, int o) {
      for (int px = 0; px < kTile; px += kStep) {
        F sum[decltype(count)::value][kVectors];
        fill_block(sum, bias + h * n + o);
        if (basis) dot_block<O>(sum, basis + h * words * kTile + px, vectors + words * (h * n + o), words);
        dot_block<O>(sum, right.words + px, gram + low * (h * n + o), length);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const int at = px + v * F::size;
          F total = load(out + at);
#pragma GCC unroll 8
          for (int i = 0; i < decltype(count)::value; ++i) {
            total = fma(sum[i][v], left.load_row<O>(h * n + o + i, at), total);
          }
          store(out + at, total);
        }
      }
    });
  }
}

// Panels of the quadratic form of a low-rank factor with itself: off-diagonal heads count twice, those above the
// diagonal not at all. `linear` (h d) is added to the factor's last rows in the linear part.
template <class O>
inline void write_gram(const Dims& s, float* panels, float* bias, const Projected& from, const LowRank& v,
                       const float* linear, float* row) {
  const int n = s.low_head;
  for (int j = 0; j < s.low; ++j) {
    const int h = j / n;
    const float* difference = v.difference + j * s.width;
    bias[j] = 2 * from.couple(s, h, difference, 1.0f, row);
    for (int c = 0; linear && c < s.width; ++c) bias[j] += 2 * difference[c] * linear[h * s.width + c];
    for (int i = 0; i < h * n; ++i) row[i] *= 2;
    for (int i = (h + 1) * n; i < s.low; ++i) row[i] = 0;
    write_panel<O, kOutputs>(panels + h * n * (s.low / O::pair), s.low / O::pair, n, j % n, row);
  }
}

inline float inner_product(const float* x, const float* y, int count) {
  float total = 0;
  for (int i = 0; i < count; ++i) total += x[i] * y[i];
  return total;
}
