#pragma once

// Vectors of floats for the instruction set this translation unit is compiled for, and the two kinds of operands of
// products: float32, and pairs of bfloat16 with float32 sums. Included inside a namespace of the unit's own.

#if defined(__AVX512F__)

struct F {
  static constexpr int size = 16;
  __m512 v;
};

inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x.v); }
inline F set1(float x) { return {_mm512_set1_ps(x)}; }
inline F operator+(F x, F y) { return {_mm512_add_ps(x.v, y.v)}; }
inline F operator-(F x, F y) { return {_mm512_sub_ps(x.v, y.v)}; }
inline F operator*(F x, F y) { return {_mm512_mul_ps(x.v, y.v)}; }
inline F operator/(F x, F y) { return {_mm512_div_ps(x.v, y.v)}; }
inline F fma(F x, F y, F z) { return {_mm512_fmadd_ps(x.v, y.v, z.v)}; }
inline F max(F x, F y) { return {_mm512_max_ps(x.v, y.v)}; }
inline F sqrt(F x) { return {_mm512_sqrt_ps(x.v)}; }
inline bool any_greater(F x, F y) { return _mm512_cmp_ps_mask(x.v, y.v, _CMP_GT_OQ) != 0; }
inline float sum(F x) { return _mm512_reduce_add_ps(x.v); }
inline float greatest(F x) { return _mm512_reduce_max_ps(x.v); }
// x limited to [-limit, limit]
inline F clamp(F x, float limit) { return {_mm512_range_ps(x.v, _mm512_set1_ps(limit), 0x2)}; }
// x - floor(x)
inline F fraction(F x) { return {_mm512_reduce_ps(x.v, 0x9)}; }
// x * 2^floor(n)
inline F scale_exponent(F x, F n) { return {_mm512_scalef_ps(x.v, n.v)}; }
// Of a word with two bfloat16
inline F first_half(F x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.v), 16))}; }
inline F second_half(F x) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(int(0xffff0000u))))};
}

// Rows of a square of words become columns.
inline void transpose(F (&r)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512 a = _mm512_unpacklo_ps(r[i].v, r[i + 1].v), b = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
    const __m512 c = _mm512_unpacklo_ps(r[i + 2].v, r[i + 3].v), d = _mm512_unpackhi_ps(r[i + 2].v, r[i + 3].v);
    t[i] = _mm512_shuffle_ps(a, c, 0x44), t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44), t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
    r[i].v = _mm512_shuffle_f32x4(a, c, 0x88), r[i + 8].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[i + 4].v = _mm512_shuffle_f32x4(b, d, 0x88), r[i + 12].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

// out (4 * size) = a[0] b[0] c[0] d[0] a[1] ...
inline void store_interleaved(float* out, F a, F b, F c, F d) {
  const __m512 ab = _mm512_unpacklo_ps(a.v, b.v), high_ab = _mm512_unpackhi_ps(a.v, b.v);
  const __m512 cd = _mm512_unpacklo_ps(c.v, d.v), high_cd = _mm512_unpackhi_ps(c.v, d.v);
  // r<i> has a, b, c, d of i, 4 + i, 8 + i, 12 + i in its quarters
  const __m512 r0 = _mm512_shuffle_ps(ab, cd, 0x44), r1 = _mm512_shuffle_ps(ab, cd, 0xee);
  const __m512 r2 = _mm512_shuffle_ps(high_ab, high_cd, 0x44), r3 = _mm512_shuffle_ps(high_ab, high_cd, 0xee);
  const __m512 even01 = _mm512_shuffle_f32x4(r0, r1, 0x88), odd01 = _mm512_shuffle_f32x4(r0, r1, 0xdd);
  const __m512 even23 = _mm512_shuffle_f32x4(r2, r3, 0x88), odd23 = _mm512_shuffle_f32x4(r2, r3, 0xdd);
  _mm512_storeu_ps(out, _mm512_shuffle_f32x4(even01, even23, 0x88));
  _mm512_storeu_ps(out + 16, _mm512_shuffle_f32x4(odd01, odd23, 0x88));
  _mm512_storeu_ps(out + 32, _mm512_shuffle_f32x4(even01, even23, 0xdd));
  _mm512_storeu_ps(out + 48, _mm512_shuffle_f32x4(odd01, odd23, 0xdd));
}

#elif defined(__AVX2__)

struct F {
  static constexpr int size = 8;
  __m256 v;
};

inline F load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x.v); }
inline F set1(float x) { return {_mm256_set1_ps(x)}; }
inline F operator+(F x, F y) { return {_mm256_add_ps(x.v, y.v)}; }
inline F operator-(F x, F y) { return {_mm256_sub_ps(x.v, y.v)}; }
inline F operator*(F x, F y) { return {_mm256_mul_ps(x.v, y.v)}; }
inline F operator/(F x, F y) { return {_mm256_div_ps(x.v, y.v)}; }
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.v, y.v, z.v)}; }
inline F max(F x, F y) { return {_mm256_max_ps(x.v, y.v)}; }
inline F sqrt(F x) { return {_mm256_sqrt_ps(x.v)}; }
inline bool any_greater(F x, F y) { return _mm256_movemask_ps(_mm256_cmp_ps(x.v, y.v, _CMP_GT_OQ)) != 0; }
inline F clamp(F x, float limit) {
  return {_mm256_max_ps(_mm256_min_ps(x.v, _mm256_set1_ps(limit)), _mm256_set1_ps(-limit))};
}
inline F fraction(F x) { return {_mm256_sub_ps(x.v, _mm256_floor_ps(x.v))}; }
inline F scale_exponent(F x, F n) {
  const __m256i exponent = _mm256_cvtps_epi32(_mm256_floor_ps(_mm256_max_ps(n.v, _mm256_set1_ps(-126.0f))));
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(x.v, _mm256_castsi256_ps(bits))};
}
inline F first_half(F x) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.v), 16))}; }
inline F second_half(F x) {
  return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(int(0xffff0000u))))};
}

#else

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(16)));
struct F {
  static constexpr int size = 4;
  Floats v;
};

inline F load(const float* p) {
  F x;
  __builtin_memcpy(&x.v, p, sizeof x.v);
  return x;
}
inline void store(float* p, F x) { __builtin_memcpy(p, &x.v, sizeof x.v); }
inline F set1(float x) { return {Floats{x, x, x, x}}; }
inline F operator+(F x, F y) { return {x.v + y.v}; }
inline F operator-(F x, F y) { return {x.v - y.v}; }
inline F operator*(F x, F y) { return {x.v * y.v}; }
inline F operator/(F x, F y) { return {x.v / y.v}; }
inline F fma(F x, F y, F z) { return {x.v * y.v + z.v}; }
inline F max(F x, F y) { return {x.v > y.v ? x.v : y.v}; }
inline F sqrt(F x) {
  for (int i = 0; i < F::size; ++i) x.v[i] = __builtin_sqrtf(x.v[i]);
  return x;
}
inline bool any_greater(F x, F y) {
  const Integers greater = x.v > y.v;
  return (greater[0] | greater[1] | greater[2] | greater[3]) != 0;
}
inline F clamp(F x, float limit) {
  const F high = set1(limit), low = set1(-limit);
  x.v = x.v < high.v ? x.v : high.v;
  return {x.v > low.v ? x.v : low.v};
}
inline Integers floor(F x) {
  const Integers whole = __builtin_convertvector(x.v, Integers);
  return whole + (__builtin_convertvector(whole, Floats) > x.v);
}
inline F limited_exponent(F n) { return max(n, set1(-126.0f)); }
inline F fraction(F x) {
  x = limited_exponent(x);
  return {x.v - __builtin_convertvector(floor(x), Floats)};
}
inline F scale_exponent(F x, F n) {
  const Integers bits = (floor(limited_exponent(n)) + 127) << 23;
  return {x.v * (Floats)bits};
}
inline F first_half(F x) { return {(Floats)((Integers)x.v << 16)}; }
inline F second_half(F x) { return {(Floats)((Integers)x.v & int32_t(0xffff0000u))}; }

#endif

#if !defined(__AVX512F__)

inline float sum(F x) {
  float lanes[F::size], total = 0;
  store(lanes, x);
  for (float lane : lanes) total += lane;
  return total;
}
inline float greatest(F x) {
  float lanes[F::size];
  store(lanes, x);
  float best = lanes[0];
  for (float lane : lanes) best = lane > best ? lane : best;
  return best;
}
inline void store_interleaved(float* out, F a, F b, F c, F d) {
  for (int i = 0; i < F::size; ++i, out += 4) out[0] = a.v[i], out[1] = b.v[i], out[2] = c.v[i], out[3] = d.v[i];
}
inline void transpose(F (&r)[F::size]) {
  float square[F::size][F::size];
  for (int i = 0; i < F::size; ++i) {
    for (int j = 0; j < F::size; ++j) square[j][i] = r[i].v[j];
  }
  for (int i = 0; i < F::size; ++i) r[i] = load(square[i]);
}

#endif

// Rounded to bfloat16, to nearest, ties to even.
inline uint32_t bfloat16_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

struct Float32 {
  static constexpr int pair = 1;
  static float word(float x, float) { return x; }
  static F dot(F sum, F x, F y) { return fma(x, y, sum); }
  // Rows `x` and `y` of channels 0 and 1 as one row of words, or as two.
  static void store_channels(float* words, int64_t stride, F x, F y) {
    store(words, x);
    store(words + stride, y);
  }
  // Consecutive numbers as words.
  static void store_words(float* words, F x) { store(words, x); }
  // Consecutive pixels `x` and `y` of one row.
  static void store_pixels(float* words, F x, F y) {
    store(words, x);
    store(words + F::size, y);
  }
  static F load_pixels(const float* row) { return load(row); }
  static F channel(F word, int) { return word; }

  // 2^x within 6e-8
  static F exp2(F x) {
    const F f = fraction(x);
    F p = fma(f, set1(1.895453021e-3f), set1(8.943397570e-3f));
    p = fma(f, p, set1(5.586800675e-2f));
    p = fma(f, p, set1(2.401381318e-1f));
    p = fma(f, p, set1(6.931549532e-1f));
    p = fma(f, p, set1(9.999999416e-1f));
    return scale_exponent(p, x);
  }
  // x (1 + erf(x / sqrt 2)) / 2, erf as a quotient of polynomials
  static F gelu(F x) {
    const F z = clamp(x * set1(0.70710678118654752f), 4.0f), t = z * z;
    F p = fma(t, set1(-2.72614225801306e-10f), set1(2.77068142495902e-08f));
    p = fma(t, p, set1(-2.10102402082508e-06f));
    p = fma(t, p, set1(-5.69250639462346e-05f));
    p = fma(t, p, set1(-7.34990630326855e-04f));
    p = fma(t, p, set1(-2.95459980854025e-03f));
    p = fma(t, p, set1(-1.60960333262415e-02f));
    F q = fma(t, set1(-1.45660718464996e-05f), set1(-2.13374055278905e-04f));
    q = fma(t, q, set1(-1.68282697438203e-03f));
    q = fma(t, q, set1(-7.37332916720468e-03f));
    q = fma(t, q, set1(-1.42647390514189e-02f));
    const F half = x * set1(0.5f);
    return fma(half, z * p / q, half);
  }
};

struct BFloat16 {
  static constexpr int pair = 2;
  static float word(float x, float y) {
    const uint32_t bits = bfloat16_bits(x) | bfloat16_bits(y) << 16;
    float result;
    __builtin_memcpy(&result, &bits, sizeof result);
    return result;
  }
#if defined(__AVX512BF16__)
  static F dot(F sum, F x, F y) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_castps_si512(x.v), (__m512bh)_mm512_castps_si512(y.v))};
  }
  static void store_channels(float* words, int64_t, F x, F y) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(y.v, x.v);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(words, _mm512_permutexvar_epi16(order, both));
  }
  static void store_words(float* words, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), (__m256i)_mm512_cvtneps_pbh(x.v));
  }
  static void store_pixels(float* words, F x, F y) {
    _mm512_storeu_si512(words, (__m512i)_mm512_cvtne2ps_pbh(y.v, x.v));
  }
  // size words of 2 * size consecutive pixels
  static F load_pixels(const float* row) {
    return {_mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(row + 16), _mm512_loadu_ps(row)))};
  }
#else
  static F dot(F sum, F x, F y) {
    return fma(second_half(x), second_half(y), fma(first_half(x), first_half(y), sum));
  }
  static void store_channels(float* words, int64_t, F x, F y) {
    float a[F::size], b[F::size];
    store(a, x);
    store(b, y);
    for (int i = 0; i < F::size; ++i) words[i] = word(a[i], b[i]);
  }
  static void store_words(float* words, F x) {
    float row[F::size];
    store(row, x);
    for (int i = 0; i < F::size / 2; ++i) words[i] = word(row[2 * i], row[2 * i + 1]);
  }
  static void store_pixels(float* words, F x, F y) {
    float row[2 * F::size];
    store(row, x);
    store(row + F::size, y);
    store(words, load_pixels(row));
  }
  static F load_pixels(const float* row) {
    float words[F::size];
    for (int i = 0; i < F::size; ++i) words[i] = word(row[2 * i], row[2 * i + 1]);
    return load(words);
  }
#endif
  static F channel(F word, int index) { return index == 0 ? first_half(word) : second_half(word); }

  // 2^x within 8e-5 of itself, a thirtieth of a bfloat16's last place
  static F exp2(F x) {
    const F f = fraction(x);
    F p = fma(f, set1(7.802454501e-2f), set1(2.260671378e-1f));
    p = fma(f, p, set1(6.958335385e-1f));
    p = fma(f, p, set1(9.999252179e-1f));
    return scale_exponent(p, x);
  }
  // x (1 + erf(x / sqrt 2)) / 2 within 1.9e-4: an odd polynomial that is 1/2 from 3.9 on
  static F gelu(F x) {
    const F z = clamp(x, 3.9f), t = z * z;
    F p = fma(t, set1(2.584942935e-08f), set1(-1.736149360e-06f));
    p = fma(t, p, set1(5.024359865e-05f));
    p = fma(t, p, set1(-8.312296646e-04f));
    p = fma(t, p, set1(8.829112619e-03f));
    p = fma(t, p, set1(-6.463983106e-02f));
    p = fma(t, p, set1(3.978958714e-01f));
    return x * fma(z, p, set1(0.5f));
  }
};
