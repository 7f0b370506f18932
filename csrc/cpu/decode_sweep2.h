#pragma once

// Image-to-token attention 1 with its layer norm and the final token-to-image attention. Included inside a namespace of
// the unit's own.

template <class O>
struct Sweep2 {
  struct Scratch {
    float *scores, *weights, *row;
    Projected projected;
    Probabilities p0, p1;
    void place(const Dims& s, Arena& arena) {
      scores = arena.take(s.tokens * kTile);
      weights = arena.take(2 * s.tokens * kTile);
      row = arena.take(s.low_lanes + s.inner);
      projected.place(s, s.inner, arena);
      p0.place<O>(s, arena);
      p1.place<O>(s, arena);
      if (arena.base) p0.clear(s), p1.clear(s);
    }
  };
  LowRank v0, v1;
  float *k0, *k1, *query, *query_bias;
  float *b00, *b00_last, *gram0, *gram0_bias;
  float *gram1, *gram1_bias;
  float *b01, *b01_last, *gram01, *gram01_bias, *linear;
  float *qf, *key0, *key0_bias, *key1, *key1_bias;
  float *x, *x0, *x1;
  float constant0, constant1, constant01;
  PixelSoftmax softmax;

  void place(const Dims& s, Arena& arena) {
    const int vectors = s.rows * s.width / O::pair, low_vectors = s.low * s.width / O::pair, low = s.low / O::pair;
    v0.place(s, arena);
    v1.place(s, arena);
    arena.take_each(vectors, k0, k1, qf);
    arena.take_each(low_vectors, b00, b01);
    arena.take_each(s.inner / O::pair, b00_last, b01_last);
    arena.take_each(s.low * low, gram0, gram1, gram01);
    arena.take_each(s.low_lanes, gram0_bias, gram1_bias, gram01_bias, linear);
    arena.take_each(s.rows * low, query, key0, key1);
    arena.take_each(s.rows, query_bias, key0_bias, key1_bias);
    x = arena.take(s.rows * s.value_lanes);
    arena.take_each(s.rows * s.low_lanes, x0, x1);
    softmax.place(s, arena);
  }
  void start(const Dims& s, const DecodeSweep2Args& args, int64_t prompt, Scratch& scratch) {
    const int64_t at = prompt * s.rows * s.width, size = int64_t(s.inner) * s.inner;
    const auto map = [&](int index) { return args.maps + index * size; };
    const float *beta0 = args.vectors, *beta1 = beta0 + s.inner, *beta_key = beta1 + s.inner;
    Projected& projected = scratch.projected;
    float* row = scratch.row;
    v0.set(s, args.v0 + at);
    v1.set(s, args.v1 + at);
    write_vectors<O>(s, k0, args.k0 + at, s.tokens, s.scale);
    write_vectors<O>(s, k1, args.k1 + at, s.tokens, s.scale);
    projected.set(s, v0, map(0), s.inner);
    write_coupling<O>(s, query, query_bias, projected, args.k1 + at, s.tokens, s.scale, row);

    write_vectors<O>(s, b00, v0.difference, s.low_head, 2.0f);
    Sweep1<O>::write_row(s, b00_last, v0.last, 2.0f, row);
    projected.set(s, v0, map(1), s.inner);
    write_gram<O>(s, gram0, gram0_bias, projected, v0, nullptr, row);
    constant0 = inner_product(projected.constant, v0.last, s.inner);

    projected.set(s, v1, map(3), s.inner);
    write_gram<O>(s, gram1, gram1_bias, projected, v1, beta1, row);
    constant1 = args.beta_norm + inner_product(projected.constant, v1.last, s.inner) +
                2 * inner_product(beta1, v1.last, s.inner);

    write_vectors<O>(s, b01, v1.difference, s.low_head, 1.0f);
    Sweep1<O>::write_row(s, b01_last, v1.last, 1.0f, row);
    projected.set(s, v0, map(2), s.inner);
    write_coupling<O>(s, gram01, gram01_bias, projected, v1.difference, s.low_head, 1.0f, row);
    constant01 = inner_product(projected.constant, v1.last, s.inner) + inner_product(beta0, v0.last, s.inner);
    for (int j = 0; j < s.low_lanes; j += F::size) {
      F total = set1(0.0f);
      const float* column = projected.columns + j;
      for (int n = 0; n < s.inner; ++n) total = fma(set1(v1.last[n]), load(column + n * s.low_lanes), total);
      store(row + j, total);
    }
    for (int j = 0; j < s.low; ++j) {
      row[j] += inner_product(v0.difference + j * s.width, beta0 + j / s.low_head * s.width, s.width);
    }
    for (int i = 0; i < s.low / O::pair; ++i) linear[i] = O::word(row[i * O::pair], row[i * O::pair + O::pair - 1]);

    write_vectors<O>(s, qf, args.qf + at, s.tokens, s.scale);
    projected.set(s, v0, map(4), s.inner);
    write_coupling<O>(s, key0, key0_bias, projected, args.qf + at, s.tokens, s.scale, row);
    projected.set(s, v1, map(5), s.inner);
    write_coupling<O>(s, key1, key1_bias, projected, args.qf + at, s.tokens, s.scale, row);
    for (int r = 0; r < s.rows; ++r) {
      key1_bias[r] += s.scale * inner_product(args.qf + at + r * s.width, beta_key + r / s.tokens * s.width, s.width);
    }
    softmax.clear(s);
    softmax.weights = scratch.weights;
    for (int i = 0; i < s.rows * s.value_lanes; ++i) x[i] = 0;
    for (int i = 0; i < s.rows * s.low_lanes; ++i) x0[i] = x1[i] = 0;
  }
  void visit(const Dims& s, const TileOf<O>& t, const DecodeSweep2Args& args, int64_t prompt,
             const Scratch& scratch) const {
    const Probabilities &p0 = scratch.p0, &p1 = scratch.p1;
    const int64_t at = (prompt * s.tiles + t.tile) * kTile;
    const float* r1 = args.r1 + at;
    float* r2 = args.r2 + at;
    attend_tokens0<O>(s, t.basis(kQueries0), k0, p0, scratch.scores);
    attend_tokens1<O>(s, t.basis(kQueries1), t.positional(kPositionalQueries1), {k1, query, query_bias}, p0, r1, p1,
                      scratch.scores);
    p0.template turn<O>(s);
    p1.template turn<O>(s);

    float shared[kTile], own[kTile], cross[kTile], both[kTile];
    for (int px = 0; px < kTile; ++px) {
      shared[px] = t.norm(1)[px] + constant0;
      cross[px] = t.norm(2)[px] + constant01;
      own[px] = constant1;
    }
    add_row_product<O>(shared, t.basis(kB00), b00_last, s.inner / O::pair);
    add_quadratic<O>(s, shared, p0, p0, gram0, gram0_bias, true, t.basis(kB00), b00);
    add_quadratic<O>(s, own, p1, p1, gram1, gram1_bias, true, nullptr, nullptr);
    add_row_product<O>(cross, t.basis(kB01), b01_last, s.inner / O::pair);
    add_row_product<O>(cross, p0.words, linear, s.low / O::pair);
    add_quadratic<O>(s, cross, p1, p0, gram01, gram01_bias, false, t.basis(kB01), b01);
    for (int px = 0; px < kTile; ++px) own[px] += r1[px] * (r1[px] * shared[px] + 2 * cross[px]);
    Sweep1<O>::reciprocal_deviation(r2, own, args.shape);
    for (int px = 0; px < kTile; ++px) both[px] = r1[px] * r2[px];

    const float* const factors[2] = {both, r2};
    for (int h = 0; h < s.heads; ++h) {
      final_scores(s, t, h, p0, p1, r1, r2, scratch.scores);
      hide_padding(s, t.tile, scratch.scores);
      const int row = h * s.tokens;
      const Accumulator to[3] = {{t.values(2, h), s.value_lanes, 0, x + row * s.value_lanes},
                                 {p0.across, s.low_lanes, 0, x0 + row * s.low_lanes},
                                 {p1.across, s.low_lanes, 1, x1 + row * s.low_lanes}};
      softmax.template add<O>(s, h, scratch.scores, factors, to);
    }
  }
  void final_scores(const Dims& s, const TileOf<O>& t, int h, const Probabilities& p0, const Probabilities& p1,
                    const float* r1, const float* r2, float* scores) const {
    const int words = s.width / O::pair, low = s.low / O::pair;
    const float* basis = t.basis(kKeysF) + h * words * kTile;
    const float* positional = t.positional(kPositionalKeysF) + h * words * kTile;
    const float* vectors = qf + h * words * s.tokens;
    for_blocks<kOutputs>(s.tokens, [&](auto n, int o) {
      const int row = h * s.tokens + o;
      for (int px = 0; px < kTile; px += kStep) {
        F sum[decltype(n)::value][kVectors];
        fill_block(sum, key0_bias + row);
        dot_block<O>(sum, basis + px, vectors + words * o, words);
        dot_block<O>(sum, p0.words + px, key0 + low * row, low);
        scale_block(sum, r1 + px, key1_bias + row);
        dot_block<O>(sum, p1.words + px, key1 + low * row, low);
        scale_block(sum, r2 + px, nullptr);
        dot_block<O>(sum, positional + px, vectors + words * o, words);
        store_block(scores + o * kTile + px, sum);
      }
    });
  }
  void finish(const Dims& s, const DecodeSweep2Args& args, int64_t prompt, Scratch& scratch) const {
    const int64_t size = int64_t(s.inner) * s.inner;
    const float *beta_value = args.vectors + 3 * s.inner, *constant = beta_value + s.inner;
    float* outs = args.out + prompt * s.rows * s.width;
    scratch.projected.set(s, v0, args.maps + 6 * size, s.inner);
    for (int row = 0; row < s.rows; ++row) {
      float* out = outs + row * s.width;
      for (int c = 0; c < s.width; ++c) out[c] = x[row * s.value_lanes + c];
      add_low_rank(s, out, row / s.tokens, scratch.projected, x0 + row * s.low_lanes, softmax.total(s, 1, row));
    }
    scratch.projected.set(s, v1, args.maps + 7 * size, s.inner);
    for (int row = 0; row < s.rows; ++row) {
      float* out = outs + row * s.width;
      const int h = row / s.tokens;
      const float sum2 = softmax.total(s, 2, row), share = 1 / softmax.total(s, 0, row);
      add_low_rank(s, out, h, scratch.projected, x1 + row * s.low_lanes, sum2);
      for (int c = 0; c < s.width; ++c) {
        out[c] = (out[c] + sum2 * beta_value[h * s.width + c]) * share + constant[h * s.width + c];
      }
    }
  }
};
