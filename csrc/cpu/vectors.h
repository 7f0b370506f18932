#pragma once

// A vector of floats for the instruction set this translation unit is compiled for, and what attention needs of it.
// Everything has internal linkage, see words.h, and what the compiler doesn't inline carries P2S_ISA in its name.

#include "isa_unit.h"

namespace {
namespace P2S_ISA {

// kLanes floats a vector; a register tile is kTileRows x kTileVectors, which leaves registers for its operands.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kTileVectors = 2;
#else
constexpr int kLanes = 4, kTileVectors = 2;  // what every x86-64 and arm64 has
#endif
constexpr int kTileRows = 6;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

// bfloat16, the upper half of a float
struct Bf16 {
  uint16_t bits;
};

inline Floats load(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline Floats widen(Halves x) { return (Floats)(__builtin_convertvector(x, Bits) << 16); }

inline Floats load(const Bf16* p) {
  Halves x;
  std::memcpy(&x, p, sizeof x);
  return widen(x);
}

// The first `count` < kLanes values, then zeros.
template <class T>
inline Floats load_part(const T* p, int64_t count) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T));
  return load(lanes);
}

// Of `count` values from `p` on, those that fill a vector.
template <class T>
inline Floats load_up_to(const T* p, int64_t count) {
  return count >= kLanes ? load(p) : load_part(p, count);
}

inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }

// Rounded to bfloat16, ties to even, in the upper halves; the lower halves are zero.
inline Bits round_bf16(Floats x) {
  const Bits bits = (Bits)x;
  const Bits rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return (x == x ? rounded : bits | 0x400000) & 0xffff0000;
}

inline Halves narrow(Floats x) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  return __builtin_convertvector(round_bf16(x) >> 16, Halves);
#endif
}

inline void store(Bf16* p, Floats x) {
  const Halves half = narrow(x);
  std::memcpy(p, &half, sizeof half);
}

template <class T>
inline void store_up_to(T* p, Floats x, int64_t count) {
  if (count >= kLanes) return store(p, x);
  T lanes[kLanes];
  store(lanes, x);
  std::memcpy(p, lanes, static_cast<size_t>(count) * sizeof(T));
}

// Asks for `count` values from `p` on, to be read soon, or to be written if `kWrite`.
template <int kWrite = 0, class T>
inline void prefetch(const T* p, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(p + i, kWrite);
}

inline Floats splat(float x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (Floats)_mm256_set1_ps(x);
#else
  return Floats{x, x, x, x};
#endif
}

// a * b + c
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Of the lanes, halves combined with each other: a fixed tree.
template <class Combine>
inline float reduce(Floats x, Combine combine) {
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] = combine(lanes[i], lanes[i + width]);
  }
  return lanes[0];
}

inline float sum(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  return reduce(x, [](float a, float b) { return a + b; });
#endif
}

inline float largest(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  return reduce(x, [](float a, float b) { return a > b ? a : b; });
#endif
}

// 2^x: 0 far below -126, infinity from 127.5 on, relative error below 1e-7 between; NaN stays.
inline Floats exp2(Floats x) {
#if defined(__AVX512F__)
  const Floats f = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const Floats low = splat(-127.0f), high = splat(128.0f), magic = splat(12582912.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Floats whole = (x + magic) - magic, f = x - whole;
#endif
  Floats y = splat(1.53707049e-4f);
  y = fused(y, f, splat(1.33998482e-3f));
  y = fused(y, f, splat(9.61837359e-3f));
  y = fused(y, f, splat(5.55032901e-2f));
  y = fused(y, f, splat(2.40226477e-1f));
  y = fused(y, f, splat(6.93147182e-1f));
  y = fused(y, f, splat(1.0f));
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)y, (__m512)(x - f));
#else
  return y * (Floats)((Bits)(__builtin_convertvector(whole, Ints) + 127) << 23);
#endif
}

// Logarithm to the base of two of normal numbers; NaN stays. With t = (m - 1) / (m + 1) for a mantissa m in [sqrt(1/2),
// sqrt(2)), ln m = 2 (t + t^3/3 + t^5/5 + ...).
inline Floats log2(Floats x) {
  const Bits shifted = (Bits)x - 0x3f3504f3;  // the bits of sqrt(1/2)
  const Ints exponent = (Ints)shifted >> 23;
  const Floats m = (Floats)((shifted & 0x7fffff) + 0x3f3504f3), one = splat(1.0f);
  const Floats t = (m - one) / (m + one), u = t * t;
  Floats y = splat(2.88539008f / 9);
  y = fused(y, u, splat(2.88539008f / 7));
  y = fused(y, u, splat(2.88539008f / 5));
  y = fused(y, u, splat(2.88539008f / 3));
  y = fused(y, u, splat(2.88539008f));
  return x == x ? fused(y, t, __builtin_convertvector(exponent, Floats)) : x;
}

}  // namespace P2S_ISA
}  // namespace
