#pragma once

// Register-blocked products of pixel tiles with the operands of one prompt. Included inside a namespace of the unit's
// own.

// Accumulators stay in registers only where they never leave the function.
#define ALWAYS_INLINE __attribute__((always_inline)) inline

constexpr int kTile = 64;
constexpr int kValueLanes = 16;
#if defined(__AVX512F__)
// Accumulators, one tile row and a broadcast operand fill 32 registers.
constexpr int kVectors = 4, kOutputs = 6, kRows = 8, kColumns = 3;
#else
constexpr int kVectors = 2, kOutputs = 6, kRows = 6, kColumns = 2;
#endif
constexpr int kStep = kVectors * F::size;  // pixels a block

template <int N>
struct Int {
  static constexpr int value = N;
};

constexpr int least(int x, int y) { return x < y ? x : y; }
constexpr int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

// The size of equal blocks of at most `most` that cover `count`; the last one may be smaller.
constexpr int block_size(int count, int most) {
  const int blocks = (count + most - 1) / most;
  return (count + blocks - 1) / blocks;
}

// body(Int<n>, begin) for every block of `count`.
template <int most, class Body>
inline void for_blocks(int count, Body body) {
  static_assert(most <= 8, "more cases");
  const int size = block_size(count, most);
  for (int begin = 0; begin < count; begin += size) {
    switch (least(size, count - begin)) {
      case 1: body(Int<1>{}, begin); break;
      case 2: body(Int<2>{}, begin); break;
      case 3: if constexpr (most >= 3) body(Int<3>{}, begin); break;
      case 4: if constexpr (most >= 4) body(Int<4>{}, begin); break;
      case 5: if constexpr (most >= 5) body(Int<5>{}, begin); break;
      case 6: if constexpr (most >= 6) body(Int<6>{}, begin); break;
      case 7: if constexpr (most >= 7) body(Int<7>{}, begin); break;
      case 8: if constexpr (most >= 8) body(Int<8>{}, begin); break;
    }
  }
}

// A panel holds the operands of `count` outputs with `words` words each, block by block of up to `most`: (words,
// outputs of the block).
template <class O, int most>
inline void write_panel(float* panel, int words, int count, int output, const float* row) {
  const int size = block_size(count, most), begin = output / size * size, width = least(size, count - begin);
  float* to = panel + begin * words + (output - begin);
  constexpr int kWords = F::size / O::pair;
  int k = 0;
  for (; k + kWords <= words; k += kWords) {
    float line[F::size];
    O::store_words(line, load(row + k * O::pair));
    for (int i = 0; i < kWords; ++i) to[(k + i) * width] = line[i];
  }
  for (; k < words; ++k) to[k * width] = O::word(row[k * O::pair], row[k * O::pair + O::pair - 1]);
}

// sum[o][v] += basis (words, 64 pixels) . panel (words, NO)
template <class O, int NO>
ALWAYS_INLINE void dot_block(F (&sum)[NO][kVectors], const float* basis, const float* panel, int words) {
  for (int k = 0; k < words; ++k, basis += kTile, panel += NO) {
    F b[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) b[v] = load(basis + v * F::size);
#pragma GCC unroll 8
    for (int o = 0; o < NO; ++o) {
      const F w = set1(panel[o]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[o][v] = O::dot(sum[o][v], b[v], w);
    }
  }
}

template <int NO>
ALWAYS_INLINE void fill_block(F (&sum)[NO][kVectors], const float* bias) {
#pragma GCC unroll 8
  for (int o = 0; o < NO; ++o) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[o][v] = bias ? set1(bias[o]) : set1(0.0f);
  }
}

// sum[o] = sum[o] * factor (64 pixels) + bias[o]
template <int NO>
ALWAYS_INLINE void scale_block(F (&sum)[NO][kVectors], const float* factor, const float* bias) {
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const F f = load(factor + v * F::size);
#pragma GCC unroll 8
    for (int o = 0; o < NO; ++o) sum[o][v] = bias ? fma(sum[o][v], f, set1(bias[o])) : sum[o][v] * f;
  }
}

template <int NO>
ALWAYS_INLINE void store_block(float* rows, const F (&sum)[NO][kVectors]) {
#pragma GCC unroll 8
  for (int o = 0; o < NO; ++o) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(rows + o * kTile + v * F::size, sum[o][v]);
  }
}

// out (rows, lanes) += weights (rows, pixel words) . basis (pixel words, lanes)
template <class O>
inline void outer_product(float* out, const float* weights, int rows, const float* basis, int lanes) {
  constexpr int words = kTile / O::pair;
  for_blocks<kRows>(rows, [&](auto nr, int row) {
    for_blocks<kColumns>(lanes / F::size, [&](auto nc, int column) {
      constexpr int NR = decltype(nr)::value, NC = decltype(nc)::value;
      float* to = out + row * lanes + column * F::size;
      const float* b = basis + column * F::size;
      const float* w = weights + row * words;
      F total[NR][NC];
#pragma GCC unroll 8
      for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < NC; ++c) total[r][c] = load(to + r * lanes + c * F::size);
      }
      for (int k = 0; k < words; ++k, b += lanes, ++w) {
        F x[NC];
#pragma GCC unroll 8
        for (int c = 0; c < NC; ++c) x[c] = load(b + c * F::size);
#pragma GCC unroll 8
        for (int r = 0; r < NR; ++r) {
          const F weight = set1(w[r * words]);
#pragma GCC unroll 8
          for (int c = 0; c < NC; ++c) total[r][c] = O::dot(total[r][c], x[c], weight);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < NC; ++c) store(to + r * lanes + c * F::size, total[r][c]);
      }
    });
  });
}

// out (64 pixels) += basis (words, 64 pixels) . row (words); four partial sums hide the latency
template <class O>
inline void add_row_product(float* out, const float* basis, const float* row, int words) {
  constexpr int kParts = 4;
  for (int px = 0; px < kTile; px += kStep) {
    F part[kParts][kVectors];
    fill_block(part, nullptr);
    const auto step = [&](int k, int i) {
      const F w = set1(row[k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) part[i][v] = O::dot(part[i][v], load(basis + k * kTile + px + v * F::size), w);
    };
    int k = 0;
    for (; k + kParts <= words; k += kParts) {
#pragma GCC unroll 8
      for (int i = 0; i < kParts; ++i) step(k + i, i);
    }
    for (; k < words; ++k) step(k, 0);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* to = out + px + v * F::size;
      store(to, load(to) + ((part[0][v] + part[1][v]) + (part[2][v] + part[3][v])));
    }
  }
}
