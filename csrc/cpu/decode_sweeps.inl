// Included by decode_sweeps_<isa>.cpp with P2S_ISA defined. Prompts of the same image go through the tiles of its bases in
// small groups, so that a tile stays in the second-level cache while they pass by.

#include <cstdint>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "decode_isa.h"

#define P2S_TEXT_(x) #x
#define P2S_TEXT(x) P2S_TEXT_(x)
#define P2S_JOIN_(a, b) a##_##b
#define P2S_JOIN(a, b) P2S_JOIN_(a, b)
#define P2S_NAME(op) P2S_JOIN(op, P2S_ISA)

// The name of the instruction set is part of every function's name.
namespace p2s {
namespace P2S_ISA {
namespace {

#include "lanes.h"
//
#include "decode_blocks.h"
//
#include "decode_prompt.h"
//
#include "decode_attention.h"

// In the order of ops/decode_sweeps.py.
enum Basis { kKeys0, kKeys1, kB0, kQueries0, kQueries1, kB00, kB01, kKeysF, kConvolution };
enum Positional { kPositionalKeys1, kPositionalQueries1, kPositionalKeysF };

constexpr int kGroup = 4;

// One tile of an image's bases.
template <class O>
struct TileOf {
  const Dims& s;
  const DecodeImage& from;
  int64_t image;
  int tile;

  const float* basis(int index) const {
    return from.bases + ((image * s.tiles + tile) * s.row_words + int64_t(index) * (s.inner / O::pair)) * kTile;
  }
  const float* positional(int index) const {
    return from.positional + (int64_t(tile) * 3 + index) * (s.inner / O::pair) * kTile;
  }
  const float* values(int index, int head) const {
    const int64_t size = int64_t(kTile / O::pair) * s.value_lanes;
    return from.values + (((image * s.tiles + tile) * 3 + index) * s.heads + head) * size;
  }
  const float* norm(int index) const { return from.norms + ((image * 3 + index) * s.tiles + tile) * kTile; }
};

// out (d) of a row = (sums + sum_j low_j columns_j + ...) of one head, all divided by `total`
inline void add_low_rank(const Dims& s, float* out, int head, const Projected& from, const float* low, float constant) {
  for (int c = 0; c < s.width; ++c) {
    const float* column = from.columns + (head * s.width + c) * s.low_lanes;
    F part = set1(0.0f);
    for (int j = 0; j < s.low_lanes; j += F::size) part = fma(load(low + j), load(column + j), part);
    out[c] += sum(part) + constant * from.constant[head * s.width + c];
  }
}

// Prompts begin..end of `args` through all tiles, in groups of up to kGroup of one image. Returns the floats of workspace
// that this needs, and does nothing else without one.
template <class O, class Prompt, class Args>
int64_t sweep(const Args& args, int64_t begin, int64_t end, float* workspace) {
  const Dims s = dims_of(args.shape);
  Arena arena{workspace};
  Prompt prompts[kGroup];
  typename Prompt::Scratch scratch;
  for (Prompt& prompt : prompts) prompt.place(s, arena);
  scratch.place(s, arena);
  if (!workspace) return arena.used;
  for (int64_t first = begin; first < end;) {
    const int64_t image = args.image.image[first];
    int count = 0;
    for (; count < kGroup && first + count < end && args.image.image[first + count] == image; ++count) {
      prompts[count].start(s, args, first + count, scratch);
    }
    for (int tile = 0; tile < s.tiles; ++tile) {
      const TileOf<O> t{s, args.image, image, tile};
      for (int i = 0; i < count; ++i) prompts[i].visit(s, t, args, first + i, scratch);
    }
    for (int i = 0; i < count; ++i) prompts[i].finish(s, args, first + i, scratch);
    first += count;
  }
  return arena.used;
}

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
    for (int i = 0; i < s.inner / O::pair; ++i) words[i] = O::word(scratch[i * O::pair], scratch[i * O::pair + O::pair - 1]);
  }
  void visit(const Dims& s, const TileOf<O>& t, const DecodeSweep1Args& args, int64_t prompt, const Scratch& scratch) const {
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
    for (int j = 0; j < s.low; ++j) {
      row[j] = inner_product(v0.difference + j * s.width, beta0 + j / s.low_head * s.width, s.width);
      for (int n = 0; n < s.inner; ++n) row[j] += projected.columns[n * s.low_lanes + j] * v1.last[n];
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
  void visit(const Dims& s, const TileOf<O>& t, const DecodeSweep2Args& args, int64_t prompt, const Scratch& scratch) const {
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

#include "decode_upscale.h"

}  // namespace
}  // namespace P2S_ISA

// The floats of workspace for any range of prompts, or, given that workspace, the prompts begin..end.
#define P2S_DEFINE(op, Sweep, Args)                                                                        \
  int64_t P2S_NAME(op)(const Args& args, int64_t begin, int64_t end, float* workspace, const char** isa) { \
    using namespace P2S_ISA;                                                                               \
    *isa = P2S_TEXT(P2S_ISA);                                                                              \
    return args.shape.pair == 1 ? sweep<Float32, Sweep<Float32>>(args, begin, end, workspace)              \
                                : sweep<BFloat16, Sweep<BFloat16>>(args, begin, end, workspace);           \
  }
P2S_DEFINE(decode_sweep0, Sweep0, DecodeSweep0Args)
P2S_DEFINE(decode_sweep1, Sweep1, DecodeSweep1Args)
P2S_DEFINE(decode_sweep2, Sweep2, DecodeSweep2Args)
P2S_DEFINE(decode_upscale, Upscale, DecodeUpscaleArgs)
#undef P2S_DEFINE

}  // namespace p2s
