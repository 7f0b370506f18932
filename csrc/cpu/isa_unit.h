#pragma once

// What every translation unit of one instruction set, P2S_ISA, starts with.

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

// P2S_NAME(op) is op_<isa>.
#define P2S_JOIN_(a, b) a##_##b
#define P2S_JOIN(a, b) P2S_JOIN_(a, b)
#define P2S_NAME(op) P2S_JOIN(op, P2S_ISA)

namespace {

// What the unit is really compiled for.
#if defined(__AVX512BF16__)
constexpr const char* kIsaName = "avx512bf16";
#elif defined(__AVX512VPOPCNTDQ__)
constexpr const char* kIsaName = "avx512";
#elif defined(__AVX2__)
constexpr const char* kIsaName = "avx2";
#else
constexpr const char* kIsaName = "scalar";
#endif

}  // namespace
