#pragma once

// X2 -> transposed convolution -> layer norm -> GELU -> transposed convolution -> GELU -> dot with the hypernetworks'
// vectors, one tile of pixels at a time. Included inside a namespace of the unit's own.

template <class O>
struct Upscale {
  static constexpr int kParts = 4;     // positions of a transposed convolution with stride and kernel 2
  static constexpr int kChannels = 4;  // a block's accumulators leave registers to the activation that follows
  static constexpr int kMasks = 4;

  struct Scratch {
    float *scores, *row, *y, *z, *logits, *weight;
    bool has_weight = false;
    Projected projected;
    Probabilities p0, p1;
    void place(const Dims& s, Arena& arena) {
      scores = arena.take(s.tokens * kTile);
      row = arena.take(s.low_lanes + s.inner);
      y = arena.take(s.channels1 * kTile);
      z = arena.take(s.channels1 * kTile / O::pair);
      logits = arena.take(kMasks * kParts * kParts * kTile);
      weight = arena.take(kParts * s.channels2 * s.channels1 / O::pair);
      projected.place(s, kParts * s.channels1, arena);
      p0.place<O>(s, arena);
      p1.place<O>(s, arena);
      if (arena.base) p0.clear(s), p1.clear(s);
    }
  };
  float *k0, *k1, *query, *query_bias;
  float *map0, *bias0, *map1, *bias1;
  LowRank v0, v1;

  void place(const Dims& s, Arena& arena) {
    const int vectors = s.rows * s.width / O::pair, low = s.low / O::pair;
    v0.place(s, arena);
    v1.place(s, arena);
    arena.take_each(vectors, k0, k1);
    query = arena.take(s.rows * low);
    query_bias = arena.take(s.rows);
    arena.take_each(kParts * s.channels1 * low, map0, map1);
    arena.take_each(kParts * s.channels1, bias0, bias1);
  }

  void start(const Dims& s, const DecodeUpscaleArgs& args, int64_t prompt, Scratch& scratch) {
    const int64_t at = prompt * s.rows * s.width;
    const int columns = kParts * s.channels1;
    v0.set(s, args.v0 + at);
    v1.set(s, args.v1 + at);
    write_vectors<O>(s, k0, args.k0 + at, s.tokens, s.scale);
    write_vectors<O>(s, k1, args.k1 + at, s.tokens, s.scale);
    scratch.projected.set(s, v0, args.query, s.inner);
    write_coupling<O>(s, query, query_bias, scratch.projected, args.k1 + at, s.tokens, s.scale, scratch.row);
    write_map(s, map0, bias0, scratch.projected, v0, args.maps);
    write_map(s, map1, bias1, scratch.projected, v1, args.maps + int64_t(s.inner) * columns);
    for (int n = 0; n < columns; ++n) bias1[n] += args.vectors[n];
    if (scratch.has_weight) return;
    for (int n = 0; n < kParts * s.channels2; ++n) {
      const int words = s.channels1 / O::pair;
      write_panel<O, kChannels>(scratch.weight + n / s.channels2 * s.channels2 * words, words, s.channels2,
                                n % s.channels2, args.weight + n * s.channels1);
    }
    scratch.has_weight = true;
  }
  static void write_map(const Dims& s, float* panels, float* bias, Projected& projected, const LowRank& v,
                        const float* map) {
    const int columns = kParts * s.channels1, low = s.low / O::pair;
    projected.set(s, v, map, columns);
    for (int n = 0; n < columns; ++n) {
      bias[n] = projected.constant[n];
      write_panel<O, kChannels>(panels + n / s.channels1 * s.channels1 * low, low, s.channels1, n % s.channels1,
                                projected.columns + n * s.low_lanes);
    }
  }

  void visit(const Dims& s, const TileOf<O>& t, const DecodeUpscaleArgs& args, int64_t prompt,
             const Scratch& scratch) const {
    const int64_t at = (prompt * s.tiles + t.tile) * kTile, first = args.first[prompt];
    const int masks = int(args.first[prompt + 1] - first);
    const float *r1 = args.r1 + at, *r2 = args.r2 + at;
    attend_tokens0<O>(s, t.basis(kQueries0), k0, scratch.p0, scratch.scores);
    attend_tokens1<O>(s, t.basis(kQueries1), t.positional(kPositionalQueries1), {k1, query, query_bias}, scratch.p0, r1,
                      scratch.p1, scratch.scores);
    for (int i = 0; i < masks * kParts * kParts * kTile; ++i) scratch.logits[i] = 0;
    for (int part = 0; part < kParts; ++part) {
      float scale[kTile];
      convolve(s, t, args, part, r1, r2, scratch, scale);
      activate(s, args, scale, scratch);
      for (int k = 0; k < kParts; ++k) {
        contract(s, args, k, args.hyper + first * s.channels2, masks,
                 scratch.logits + (part * kParts + k) * masks * kTile, scratch);
      }
    }
    for (int m = 0; m < masks; ++m) write_mask(s, t, args, m, masks, first + m, scratch.logits);
  }

  // y (channels1, 64): centred output of the first convolution at one position; scale (64): its reciprocal deviation
  void convolve(const Dims& s, const TileOf<O>& t, const DecodeUpscaleArgs& args, int part, const float* r1,
                const float* r2, const Scratch& scratch, float* scale) const {
    const int low = s.low / O::pair, begin = part * s.channels1;
    const float *shared = t.basis(kConvolution), *constant = args.vectors + kParts * s.channels1;
    for (int px = 0; px < kTile; ++px) scale[px] = 0;
    for_blocks<kChannels>(s.channels1, [&](auto count, int c) {
      constexpr int N = decltype(count)::value;
      const int n = begin + c;
      for (int px = 0; px < kTile; px += kStep) {
        F sum[N][kVectors];
#pragma GCC unroll 8
        for (int o = 0; o < N; ++o) {
          const F bias = set1(bias0[n + o]);
          const float* row = shared + (n + o) / O::pair * kTile + px;
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) sum[o][v] = O::channel(load(row + v * F::size), (n + o) % O::pair) + bias;
        }
        dot_block<O>(sum, scratch.p0.words + px, map0 + n * low, low);
        scale_block(sum, r1 + px, bias1 + n);
        dot_block<O>(sum, scratch.p1.words + px, map1 + n * low, low);
        scale_block(sum, r2 + px, constant + n);
        store_block(scratch.y + c * kTile + px, sum);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          F square = load(scale + px + v * F::size);
#pragma GCC unroll 8
          for (int o = 0; o < N; ++o) square = fma(sum[o][v], sum[o][v], square);
          store(scale + px + v * F::size, square);
        }
      }
    });
    const F share = set1(1.0f / static_cast<float>(s.channels1)), eps = set1(args.shape.eps);
    for (int px = 0; px < kTile; px += F::size) {
      store(scale + px, set1(1.0f) / sqrt(fma(load(scale + px), share, eps)));
    }
  }

  // z (channels1 words, 64) = GELU(layer norm)
  static void activate(const Dims& s, const DecodeUpscaleArgs& args, const float* scale, const Scratch& scratch) {
    const float *weight = args.norm, *bias = args.norm + s.channels1;
    for (int c = 0; c < s.channels1; c += 2) {
      for (int px = 0; px < kTile; px += F::size) {
        const F factor = load(scale + px);
        const float* y = scratch.y + c * kTile + px;
        O::store_channels(scratch.z + c / O::pair * kTile + px, kTile,
                          O::gelu(fma(load(y) * factor, set1(weight[c]), set1(bias[c]))),
                          O::gelu(fma(load(y + kTile) * factor, set1(weight[c + 1]), set1(bias[c + 1]))));
      }
    }
  }

  // logits (masks, 64) += hyper (masks, channels2) . GELU of the second convolution at position `k`
  static void contract(const Dims& s, const DecodeUpscaleArgs& args, int k, const float* hyper, int masks,
                       float* logits, const Scratch& scratch) {
    const int words = s.channels1 / O::pair;
    const float* weight = scratch.weight + k * s.channels2 * words;
    for_blocks<kChannels>(s.channels2, [&](auto count, int c) {
      constexpr int N = decltype(count)::value;
      for (int px = 0; px < kTile; px += kStep) {
        F sum[N][kVectors];
        fill_block(sum, args.bias + c);
        dot_block<O>(sum, scratch.z + px, weight + c * words, words);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          F g[N];
#pragma GCC unroll 8
          for (int o = 0; o < N; ++o) g[o] = O::gelu(sum[o][v]);
          for (int m = 0; m < masks; ++m) {
            float* to = logits + m * kTile + px + v * F::size;
            F total = load(to);
#pragma GCC unroll 8
            for (int o = 0; o < N; ++o) total = fma(set1(hyper[m * s.channels2 + c + o]), g[o], total);
            store(to, total);
          }
        }
      }
    });
  }

  // logits (position 1, position 2, masks, 64) -> rows of one mask; a position is (row, column) of two by two
  static void write_mask(const Dims& s, const TileOf<O>& t, const DecodeUpscaleArgs& args, int m, int masks,
                         int64_t mask, const float* logits) {
    const int width = int(args.grid_width), first = t.tile * kTile, count = least(kTile, s.pixels - first);
    float* out = args.out + mask * 16 * s.pixels;
#pragma GCC unroll 8
    for (int i = 0; i < 2; ++i) {
      for (int k = 0; k < 2; ++k) {
        float line[4 * kTile];
        for (int px = 0; px < kTile; px += F::size) {
          const auto at = [&](int j, int l) {
            return load(logits + (((2 * i + j) * kParts + 2 * k + l) * masks + m) * kTile + px);
          };
          store_interleaved(line + 4 * px, at(0, 0), at(0, 1), at(1, 0), at(1, 1));
        }
        for (int px = 0; px < count;) {
          const int y = (first + px) / width, x = (first + px) % width, run = least(width - x, count - px);
          float* row = out + int64_t(4 * y + 2 * i + k) * 4 * width + 4 * x;
          __builtin_memcpy(row, line + 4 * px, sizeof(float) * 4 * run);
          px += run;
        }
      }
    }
  }

  void finish(const Dims&, const DecodeUpscaleArgs&, int64_t, const Scratch&) const {}
};
