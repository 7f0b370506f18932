#pragma once

// Token-to-image attention 0; image-to-token attention 0 with its layer norm and token-to-image attention 1. Included
// inside a namespace of the unit's own.

template <class O>
struct Sweep0 {
  struct Scratch {
    float *scores, *weights;
    void place(const Dims& s, Arena& arena) {
      scores = arena.take(s.tokens * kTile);
      weights = arena.take(s.tokens * kTile);
    }
  };
  float *q, *x;
  PixelSoftmax softmax;

  void place(const Dims& s, Arena& arena) {
    q = arena.take(s.rows * s.width);
    x = arena.take(s.rows * s.value_lanes);
    softmax.place(s, arena);
  }
  void start(const Dims& s, const DecodeSweep0Args& args, int64_t prompt, const Scratch& scratch) {
    write_vectors<O>(s, q, args.q + prompt * s.rows * s.width, s.tokens, s.scale);
    softmax.clear(s);
    softmax.weights = scratch.weights;
    for (int i = 0; i < s.rows * s.value_lanes; ++i) x[i] = 0;
  }
  void visit(const Dims& s, const TileOf<O>& t, const DecodeSweep0Args&, int64_t, const Scratch& scratch) const {
    const int words = s.width / O::pair;
    const float* const none[1] = {nullptr};
    for (int h = 0; h < s.heads; ++h) {
      const float *keys = t.basis(kKeys0) + h * words * kTile, *vectors = q + h * words * s.tokens;
      for_blocks<kOutputs>(s.tokens, [&](auto n, int o) {
        for (int px = 0; px < kTile; px += kStep) {
          F sum[decltype(n)::value][kVectors];
          fill_block(sum, nullptr);
          dot_block<O>(sum, keys + px, vectors + words * o, words);
          store_block(scratch.scores + o * kTile + px, sum);
        }
      });
      hide_padding(s, t.tile, scratch.scores);
      const Accumulator to[1] = {{t.values(0, h), s.value_lanes, 0, x + h * s.tokens * s.value_lanes}};
      softmax.template add<O>(s, h, scratch.scores, none, to);
    }
  }
  void finish(const Dims& s, const DecodeSweep0Args& args, int64_t prompt, const Scratch&) const {
    for (int row = 0; row < s.rows; ++row) {
      const float share = 1 / softmax.total(s, 0, row);
      float* out = args.out + (prompt * s.rows + row) * s.width;
      for (int c = 0; c < s.width; ++c) out[c] = x[row * s.value_lanes + c] * share;
    }
  }
};

template <class O>
struct Sweep1 {
  struct Scratch {
    float *scores, *weights, *row;
    Projected projected;
    Probabilities p0;
    void place(const Dims& s, Arena& arena) {
      scores = arena.take(s.tokens * kTile);
      weights = arena.take(s.tokens * kTile);
      row = arena.take(s.low_lanes + s.inner);
      projected.place(s, s.inner, arena);
      p0.place<O>(s, arena);
      if (arena.base) p0.clear(s);
    }
  };
  LowRank v0;
  float *k0, *b0, *b0_last, *gram, *gram_bias, *q1, *key, *key_bias, *x, *x0;
  float gram_constant;
  PixelSoftmax softmax;

  void place(const Dims& s, Arena& arena) {
    const int vectors = s.rows * s.width / O::pair, low = s.low / O::pair;
    v0.place(s, arena);
    k0 = arena.take(vectors);
    b0 = arena.take(s.low * s.width / O::pair);
    b0_last = arena.take(s.inner / O::pair);
    gram = arena.take(s.low * low);
    gram_bias = arena.take(s.low);
    q1 = arena.take(vectors);
    key = arena.take(s.rows * low);
    key_bias = arena.take(s.rows);
    x = arena.take(s.rows * s.value_lanes);
    x0 = arena.take(s.rows * s.low_lanes);
    softmax.place(s, arena);
  }
  void start(const Dims& s, const DecodeSweep1Args& args, int64_t prompt, Scratch& scratch) {
    const int64_t at = prompt * s.rows * s.width, map = int64_t(s.inner) * s.inner;
    v0.set(s, args.v0 + at);
    write_vectors<O>(s, k0, args.k0 + at, s.tokens, s.scale);
    write_vectors<O>(s, b0, v0.difference, s.low_head, 2.0f);
    write_row(s, b0_last, v0.last, 2.0f, scratch.row);
    scratch.projected.set(s, v0, args.maps, s.inner);
    write_gram<O>(s, gram, gram_bias, scratch.projected, v0, nullptr, scratch.row);
    gram_constant = inner_product(scratch.projected.constant, v0.last, s.inner);
    write_vectors<O>(s, q1, args.q1 + at, s.tokens, s.scale);
    scratch.projected.set(s, v0, args.maps + map, s.inner);
    write_coupling<O>(s, key, key_bias, scratch.projected, args.q1 + at, s.tokens, s.scale, scratch.row);
    softmax.clear(s);
    softmax.weights = scratch.weights;
    for (int i = 0; i < s.rows * s.value_lanes; ++i) x[i] = 0;
    for (int i = 0; i < s.rows * s.low_lanes; ++i) x0[i] = 0;
  }
  static void write_row(const Dims& s, float* words, const float* row, float scale, float* scratch) {
    for (int i = 0; i < s.inner; ++i) scratch[i] = row[i] * scale;
    for (int i = 0; i < s.inner; i += O::pair) words[i / O::pair] = O::word(scratch[i], scratch[i + O::pair - 1]);
  }
  void visit(const Dims& s, const TileOf<O>& t, const DecodeSweep1Args& args, int64_t prompt,
             const Scratch& scratch) const {
    attend_tokens0<O>(s, t.basis(kQueries0), k0, scratch.p0, scratch.scores);
    scratch.p0.template turn<O>(s);

    float var[kTile];
    float* r1 = args.r1 + (prompt * s.tiles + t.tile) * kTile;
    for (int px = 0; px < kTile; ++px) var[px] = t.norm(0)[px] + gram_constant;
    add_row_product<O>(var, t.basis(kB0), b0_last, s.inner / O::pair);
    add_quadratic<O>(s, var, scratch.p0, scratch.p0, gram, gram_bias, true, t.basis(kB0), b0);
    reciprocal_deviation(r1, var, args.shape);

    const float* const factors[1] = {r1};
    const Coupled queries{q1, key, key_bias};
    for (int h = 0; h < s.heads; ++h) {
      coupled_scores<O>(s, h, t.basis(kKeys1), t.positional(kPositionalKeys1), queries, scratch.p0, r1, scratch.scores);
      hide_padding(s, t.tile, scratch.scores);
      const Accumulator to[2] = {{t.values(1, h), s.value_lanes, 0, x + h * s.tokens * s.value_lanes},
                                 {scratch.p0.across, s.low_lanes, 0, x0 + h * s.tokens * s.low_lanes}};
      softmax.template add<O>(s, h, scratch.scores, factors, to);
    }
  }
  static void reciprocal_deviation(float* r, const float* sum, const DecodeShape& shape) {
    const F share = set1(1.0f / static_cast<float>(shape.channels)), eps = set1(shape.eps);
    for (int px = 0; px < kTile; px += F::size) {
      store(r + px, set1(1.0f) / sqrt(fma(max(load(sum + px), set1(0.0f)), share, eps)));
    }
  }
  void finish(const Dims& s, const DecodeSweep1Args& args, int64_t prompt, Scratch& scratch) const {
    scratch.projected.set(s, v0, args.maps + 2 * int64_t(s.inner) * s.inner, s.inner);
    for (int row = 0; row < s.rows; ++row) {
      const int h = row / s.tokens;
      float* out = args.out + (prompt * s.rows + row) * s.width;
      for (int c = 0; c < s.width; ++c) out[c] = x[row * s.value_lanes + c];
      add_low_rank(s, out, h, scratch.projected, x0 + row * s.low_lanes, softmax.total(s, 1, row));
      const float share = 1 / softmax.total(s, 0, row);
      for (int c = 0; c < s.width; ++c) out[c] = out[c] * share + args.bias[h * s.width + c];
    }
  }
};
