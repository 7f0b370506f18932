#pragma once

// Small dense products c = a b, one register tile of c at a time. What they multiply comes in units of 32 bits along the
// inner dimension: a float, or a pair of consecutive bfloat16. Internal linkage throughout, see words.h.
//   a  unit (i, u) at a[i * row + u * step]
//   b  packed in panels of columns; within a panel unit (u, column) at u * width + column
//   c  float (i, column) at c[i * row + column], written in whole vectors

#include "vectors.h"

namespace {
namespace P2S_ISA {

constexpr int64_t units_of(int64_t count, int per_unit) { return (count + per_unit - 1) / per_unit; }
constexpr int64_t vectors_of(int64_t count) { return (count + kLanes - 1) / kLanes; }
constexpr int64_t padded(int64_t count) { return vectors_of(count) * kLanes; }
inline int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }

struct Singles {
  static constexpr int per_unit = 1;
  static Floats multiply_add(Floats a, Floats b, Floats c) { return fused(a, b, c); }
  static Floats exp2(Floats x) { return P2S_ISA::exp2(x); }
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int per_unit = 2;
  static Floats multiply_add(Floats a, Floats b, Floats c) {
    return (Floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
  // Relative error below 8e-5, a thirtieth of a bfloat16's last place.
  static Floats exp2(Floats x) {
    const Floats f = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
    Floats y = fused(splat(7.802454501e-2f), f, splat(2.260671378e-1f));
    y = fused(y, f, splat(6.958335385e-1f));
    y = fused(y, f, splat(9.999252179e-1f));
    return (Floats)_mm512_scalef_ps((__m512)y, (__m512)x);
  }
};
#endif

struct Left {
  const float* units;
  int64_t row, step;
};

struct Result {
  float* values;
  int64_t row;
  bool accumulate;
};

// Vectors of the next panel when so many are left. One alone couldn't keep the multipliers busy: it shares with the one
// before it.
constexpr int64_t panel_vectors(int64_t left) {
  return left == kTileVectors + 1 ? (kTileVectors + 2) / 2 : left < kTileVectors ? left : kTileVectors;
}

// Up to kTileRows rows; those missing repeat the last one.
template <class Unit, int kVectors>
inline void product_tile(Left a, int64_t rows, const float* b, int64_t units, Result c) {
  Floats sums[kTileRows][kVectors];
  const float* left[kTileRows];
  for (int i = 0; i < kTileRows; ++i) {
    const int64_t row = at_most(i, rows - 1);
    left[i] = a.units + row * a.row;
    for (int j = 0; j < kVectors; ++j) {
      sums[i][j] = c.accumulate ? load(c.values + row * c.row + j * kLanes) : splat(0.0f);
    }
  }
  for (int64_t u = 0, offset = 0; u < units; ++u, offset += a.step, b += kVectors * kLanes) {
    Floats right[kVectors];
    for (int j = 0; j < kVectors; ++j) right[j] = load(b + j * kLanes);
    for (int i = 0; i < kTileRows; ++i) {
      const Floats x = splat(left[i][offset]);
      for (int j = 0; j < kVectors; ++j) sums[i][j] = Unit::multiply_add(x, right[j], sums[i][j]);
    }
  }
  for (int i = 0; i < kTileRows; ++i) {
    float* out = c.values + at_most(i, rows - 1) * c.row;
    for (int j = 0; j < kVectors; ++j) store(out + j * kLanes, sums[i][j]);
  }
}

// c (rows, vectors * kLanes) = a (rows, units) b. A long inner dimension is cut so that a panel's part stays in the
// first-level cache.
template <class Unit>
__attribute__((noinline)) void product(Left a, int64_t rows, const float* b, int64_t units, int64_t vectors, Result c) {
  constexpr int64_t kDepth = 128;
  for (int64_t first = 0, wide; first < vectors; first += wide) {
    wide = panel_vectors(vectors - first);
    for (int64_t u = 0; u == 0 || u < units; u += kDepth) {
      const int64_t deep = at_most(kDepth, units - u);
      const float* part = b + (first * units + u * wide) * kLanes;
      for (int64_t i = 0; i < rows; i += kTileRows) {
        const Left from = {a.units + i * a.row + u * a.step, a.row, a.step};
        const Result to = {c.values + i * c.row + first * kLanes, c.row, c.accumulate || u > 0};
        const int64_t high = at_most(kTileRows, rows - i);
        if (wide == kTileVectors) {
          product_tile<Unit, kTileVectors>(from, high, part, deep, to);
        } else if (wide == 1) {
          product_tile<Unit, 1>(from, high, part, deep, to);
        } else if (wide == 2) {
          product_tile<Unit, 2>(from, high, part, deep, to);
        } else {
          product_tile<Unit, 3>(from, high, part, deep, to);
        }
      }
    }
  }
}

// `count` values of a row as units along the row, with zeros up to a whole number of vectors' worth of values.
template <class Unit, class T>
inline void pack_row(const T* row, int64_t count, float gain, float* units) {
  for (int64_t c = 0; c < count; c += kLanes) {
    const Floats x = load_up_to(row + c, count - c) * splat(gain);
    if constexpr (Unit::per_unit == 1) {
      store(units + c, x);
    } else {
      store(reinterpret_cast<Bf16*>(units) + c, x);
    }
  }
}

// Units of pairs of values of two rows: (low[c], high[c]).
inline Floats pair_up(Floats low, Floats high) { return (Floats)((round_bf16(low) >> 16) | round_bf16(high)); }

// Rows lie pages apart, where the processor doesn't foresee the next one: they are asked for kRowsAhead before their
// turn.
constexpr int64_t kRowsAhead = 24;

template <class T>
struct Rows {
  const T* first;
  int64_t count, stride, channels;
  const float* gains;  // a factor for each row, or null

  const T* row(int64_t i) const { return first + i * stride; }
  float gain(int64_t i) const { return gains ? gains[i] : 1.0f; }
  template <int kWrite = 0>
  void prefetch_all() const {
    for (int64_t i = 0; i < count; ++i) prefetch<kWrite>(row(i), channels);
  }
  void prefetch_after(int64_t i) const { prefetch(row(at_most(i + kRowsAhead, count - 1)), channels); }
};

// b = rows: the inner dimension counts rows, columns are channels. Missing rows of a pair are zero.
template <class Unit, class T>
inline void pack_rows(Rows<T> rows, float* b) {
  const int64_t units = units_of(rows.count, Unit::per_unit), vectors = vectors_of(rows.channels);
  for (int64_t first = 0, wide; first < vectors; first += wide) {
    wide = panel_vectors(vectors - first);
    const int64_t end = at_most((first + wide) * kLanes, rows.channels);
    for (int64_t u = 0; u < units; ++u) {
      for (int r = 0; r < Unit::per_unit; ++r) rows.prefetch_after(u * Unit::per_unit + r);
      for (int64_t c = first * kLanes; c < end; c += kLanes, b += kLanes) {
        const auto values = [&](int64_t i) {
          return i < rows.count ? load_up_to(rows.row(i) + c, rows.channels - c) * splat(rows.gain(i)) : splat(0.0f);
        };
        if constexpr (Unit::per_unit == 1) {
          store(b, values(u));
        } else {
          store(b, pair_up(values(2 * u), values(2 * u + 1)));
        }
      }
    }
  }
}

// a = rows: units along the channels, rows `pitch` apart.
template <class Unit, class T>
inline void pack_left(Rows<T> rows, int64_t pitch, float* a) {
  for (int64_t i = 0; i < rows.count; ++i) {
    rows.prefetch_after(i);
    pack_row<Unit>(rows.row(i), rows.channels, rows.gain(i), a + i * pitch);
  }
}

typedef float Quad __attribute__((vector_size(16)));
typedef int32_t QuadIndex __attribute__((vector_size(16)));

inline Quad load_quad(const float* p) {
  Quad x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// b = rows transposed: the inner dimension counts channels, columns are rows; columns beyond the last row are zero.
// `stage`: scratch for 4 rows of channels, padded.
template <class Unit, class T>
inline void pack_transposed(Rows<T> rows, float* stage, float* b) {
  const int64_t units = units_of(rows.channels, Unit::per_unit), pitch = padded(rows.channels);
  const int64_t vectors = vectors_of(rows.count);
  for (int64_t first = 0, wide; first < vectors; first += wide) {
    wide = panel_vectors(vectors - first);
    for (int64_t column = 0; column < wide * kLanes; column += 4) {
      for (int64_t r = 0, j = first * kLanes + column; r < 4; ++r, ++j) {
        float* to = stage + r * pitch;
        if (j < rows.count) {
          rows.prefetch_after(j);
          pack_row<Unit>(rows.row(j), rows.channels, rows.gain(j), to);
        } else {
          std::memset(to, 0, static_cast<size_t>(pitch) * sizeof(float));
        }
      }
      float* to = b + first * kLanes * units + column;
      for (int64_t u = 0; u < units; u += 4) {
        const Quad r0 = load_quad(stage + u), r1 = load_quad(stage + pitch + u);
        const Quad r2 = load_quad(stage + 2 * pitch + u), r3 = load_quad(stage + 3 * pitch + u);
        const QuadIndex low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, front = {0, 1, 4, 5}, back = {2, 3, 6, 7};
        const Quad low01 = __builtin_shuffle(r0, r1, low), high01 = __builtin_shuffle(r0, r1, high);
        const Quad low23 = __builtin_shuffle(r2, r3, low), high23 = __builtin_shuffle(r2, r3, high);
        const Quad columns[4] = {__builtin_shuffle(low01, low23, front), __builtin_shuffle(low01, low23, back),
                                 __builtin_shuffle(high01, high23, front), __builtin_shuffle(high01, high23, back)};
        for (int64_t x = 0; x < at_most(4, units - u); ++x) {
          std::memcpy(to + (u + x) * wide * kLanes, &columns[x], 16);
        }
      }
    }
  }
}

}  // namespace P2S_ISA
}  // namespace
