#pragma once

// A vector of float32 for the instruction set this translation unit is compiled for, P2S_ISA. As in words.h, everything
// has internal linkage.

#include "isa_unit.h"

namespace {
inline namespace P2S_ISA {

// `window`: over how many neighbouring values `Window` picks by index; `Anywhere` picks over any distance.
// `above` and `within` return one bit a lane; `within` asks for |x| < limit, which NaN isn't.

#if defined(__AVX512F__)

struct Floats {
  static constexpr int64_t size = 16, window = 32;
  __m512 v;
  static Floats all(float x) { return {_mm512_set1_ps(x)}; }
  static Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Floats load_part(const float* p, int64_t n, Floats rest) {
    return {_mm512_mask_loadu_ps(rest.v, static_cast<__mmask16>((1u << n) - 1u), p)};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  friend Floats operator+(Floats x, Floats y) { return {_mm512_add_ps(x.v, y.v)}; }
  friend Floats operator-(Floats x, Floats y) { return {_mm512_sub_ps(x.v, y.v)}; }
  friend Floats operator*(Floats x, Floats y) { return {_mm512_mul_ps(x.v, y.v)}; }
  friend Floats operator/(Floats x, Floats y) { return {_mm512_div_ps(x.v, y.v)}; }
  static Floats min(Floats x, Floats y) { return {_mm512_min_ps(x.v, y.v)}; }
  static Floats max(Floats x, Floats y) { return {_mm512_max_ps(x.v, y.v)}; }
  float least() const { return _mm512_reduce_min_ps(v); }
  float most() const { return _mm512_reduce_max_ps(v); }
  uint64_t above(Floats x) const { return _mm512_cmp_ps_mask(v, x.v, _CMP_GT_OQ); }
  uint64_t within(Floats limit) const { return _mm512_cmp_ps_mask(_mm512_abs_ps(v), limit.v, _CMP_LT_OQ); }
  // fma(w0, x, w1 * y)
  static Floats lerp(Floats w0, Floats x, Floats w1, Floats y) {
    return {_mm512_fmadd_ps(w0.v, x.v, _mm512_mul_ps(w1.v, y.v))};
  }
};

struct Window {
  __m512 low, high;
  static Window load(const float* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }
  Floats pick(const int32_t* index) const {
    return {_mm512_permutex2var_ps(low, _mm512_loadu_si512(index), high)};
  }
};

struct Anywhere {
  const float* p;
  static Anywhere load(const float* p) { return {p}; }
  Floats pick(const int32_t* index) const { return {_mm512_i32gather_ps(_mm512_loadu_si512(index), p, 4)}; }
};

#elif defined(__AVX2__)

struct Floats {
  static constexpr int64_t size = 8, window = 8;
  __m256 v;
  static Floats all(float x) { return {_mm256_set1_ps(x)}; }
  static Floats load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Floats load_part(const float* p, int64_t n, Floats rest) {
    const __m256i lanes = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                                             _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return {_mm256_blendv_ps(rest.v, _mm256_maskload_ps(p, lanes), _mm256_castsi256_ps(lanes))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  friend Floats operator+(Floats x, Floats y) { return {_mm256_add_ps(x.v, y.v)}; }
  friend Floats operator-(Floats x, Floats y) { return {_mm256_sub_ps(x.v, y.v)}; }
  friend Floats operator*(Floats x, Floats y) { return {_mm256_mul_ps(x.v, y.v)}; }
  friend Floats operator/(Floats x, Floats y) { return {_mm256_div_ps(x.v, y.v)}; }
  static Floats min(Floats x, Floats y) { return {_mm256_min_ps(x.v, y.v)}; }
  static Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.v, y.v)}; }
  float least() const {
    __m128 x = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_min_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_min_ss(x, _mm_movehdup_ps(x)));
  }
  float most() const {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  static uint64_t bits(__m256 lanes) { return static_cast<uint64_t>(static_cast<unsigned>(_mm256_movemask_ps(lanes))); }
  uint64_t above(Floats x) const { return bits(_mm256_cmp_ps(v, x.v, _CMP_GT_OQ)); }
  uint64_t within(Floats limit) const {
    return bits(_mm256_cmp_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v), limit.v, _CMP_LT_OQ));
  }
  static Floats lerp(Floats w0, Floats x, Floats w1, Floats y) {
    return {_mm256_fmadd_ps(w0.v, x.v, _mm256_mul_ps(w1.v, y.v))};
  }
};

struct Window {
  __m256 low;
  static Window load(const float* p) { return {_mm256_loadu_ps(p)}; }
  Floats pick(const int32_t* index) const {
    return {_mm256_permutevar8x32_ps(low, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)))};
  }
};

struct Anywhere {
  const float* p;
  static Anywhere load(const float* p) { return {p}; }
  Floats pick(const int32_t* index) const {
    return {_mm256_i32gather_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)), 4)};
  }
};

#else

struct Floats {
  static constexpr int64_t size = 1, window = 1;
  float v;
  static Floats all(float x) { return {x}; }
  // Of any alignment.
  static Floats load(const float* p) {
    Floats x;
    std::memcpy(&x.v, p, sizeof x.v);
    return x;
  }
  static Floats load_part(const float*, int64_t, Floats rest) { return rest; }
  void store(float* p) const { *p = v; }
  friend Floats operator+(Floats x, Floats y) { return {x.v + y.v}; }
  friend Floats operator-(Floats x, Floats y) { return {x.v - y.v}; }
  friend Floats operator*(Floats x, Floats y) { return {x.v * y.v}; }
  friend Floats operator/(Floats x, Floats y) { return {x.v / y.v}; }
  static Floats min(Floats x, Floats y) { return y.v < x.v ? y : x; }
  static Floats max(Floats x, Floats y) { return x.v < y.v ? y : x; }
  float least() const { return v; }
  float most() const { return v; }
  uint64_t above(Floats x) const { return v > x.v; }
  uint64_t within(Floats limit) const { return v < limit.v && v > -limit.v; }
  // The baseline has no fused instruction. The product is exact in double; a sum rounded to odd (Boldo, Melquiond 2008)
  // rounds to float as if it had been exact.
  static Floats lerp(Floats w0, Floats x, Floats w1, Floats y) {
    const double product = static_cast<double>(w0.v) * static_cast<double>(x.v);
    const double addend = static_cast<double>(w1.v * y.v);
    double sum = product + addend;
    const double part = sum - product;
    const double error = (product - (sum - part)) + (addend - part);
    uint64_t bits;
    std::memcpy(&bits, &sum, sizeof bits);
    if ((error < 0 || error > 0) && (bits & 1) == 0) {
      bits += (error > 0) == (sum > 0) ? 1 : -1;
      std::memcpy(&sum, &bits, sizeof bits);
    }
    return {static_cast<float>(sum)};
  }
};

struct Anywhere {
  const float* p;
  static Anywhere load(const float* p) { return {p}; }
  Floats pick(const int32_t* index) const { return Floats::load(p + *index); }
};

using Window = Anywhere;

#endif

}  // namespace P2S_ISA
}  // namespace
