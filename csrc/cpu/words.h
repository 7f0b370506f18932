#pragma once

// A vector of 64-bit words for the instruction set this translation unit is compiled for, P2S_ISA. Everything has
// internal linkage: an inline function shared between units could be replaced by a copy that needs a newer processor.

#include "isa_unit.h"

namespace {

#if defined(__AVX512VPOPCNTDQ__)

struct Words {
  static constexpr int64_t size = 8;
  __m512i v;
  static Words zero() { return {_mm512_setzero_si512()}; }
  static Words load(const uint64_t* p) { return {_mm512_loadu_si512(p)}; }
  static Words load_part(const uint64_t* p, int64_t n) {
    return {_mm512_maskz_loadu_epi64(static_cast<__mmask8>((1u << n) - 1u), p)};
  }
  friend Words operator&(Words x, Words y) { return {_mm512_and_si512(x.v, y.v)}; }
  friend Words operator|(Words x, Words y) { return {_mm512_or_si512(x.v, y.v)}; }
  Words& operator+=(Words x) { return v = _mm512_add_epi64(v, x.v), *this; }
  Words popcount() const { return {_mm512_popcnt_epi64(v)}; }
  int64_t sum() const { return _mm512_reduce_add_epi64(v); }
};

#elif defined(__AVX2__)

struct Words {
  static constexpr int64_t size = 4;
  __m256i v;
  static Words zero() { return {_mm256_setzero_si256()}; }
  static Words load(const uint64_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  static Words load_part(const uint64_t* p, int64_t n) {
    const __m256i lanes = _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
    return {_mm256_maskload_epi64(reinterpret_cast<const long long*>(p), lanes)};
  }
  friend Words operator&(Words x, Words y) { return {_mm256_and_si256(x.v, y.v)}; }
  friend Words operator|(Words x, Words y) { return {_mm256_or_si256(x.v, y.v)}; }
  Words& operator+=(Words x) { return v = _mm256_add_epi64(v, x.v), *this; }
  // Looks both nibbles of each byte up, then adds the eight bytes of each word (Mula, Kurz, Lemire 2018).
  Words popcount() const {
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                           0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i nibble = _mm256_set1_epi8(0x0f);
    const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(v, nibble));
    const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble));
    return {_mm256_sad_epu8(_mm256_add_epi8(low, high), _mm256_setzero_si256())};
  }
  int64_t sum() const {
    const __m128i pair = _mm_add_epi64(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    return _mm_cvtsi128_si64(pair) + _mm_extract_epi64(pair, 1);
  }
};

#else

struct Words {
  static constexpr int64_t size = 1;
  uint64_t v;
  static Words zero() { return {0}; }
  // Of any alignment: `torch.frombuffer` takes any offset.
  static Words load(const uint64_t* p) {
    Words x;
    std::memcpy(&x.v, p, sizeof x.v);
    return x;
  }
  static Words load_part(const uint64_t*, int64_t) { return {0}; }
  friend Words operator&(Words x, Words y) { return {x.v & y.v}; }
  friend Words operator|(Words x, Words y) { return {x.v | y.v}; }
  Words& operator+=(Words x) { return v += x.v, *this; }
  // The baseline has no popcount instruction: adds within pairs, nibbles, bytes, then the bytes by a product.
  Words popcount() const {
    const uint64_t pairs = v - ((v >> 1) & 0x5555555555555555u);
    const uint64_t nibbles = (pairs & 0x3333333333333333u) + ((pairs >> 2) & 0x3333333333333333u);
    const uint64_t bytes = (nibbles + (nibbles >> 4)) & 0x0f0f0f0f0f0f0f0fu;
    return {(bytes * 0x0101010101010101u) >> 56};
  }
  int64_t sum() const { return static_cast<int64_t>(v); }
};

#endif

}  // namespace
