#pragma once

#include "p2s/status.h"

namespace p2s {

// CPU instruction sets in ascending order of preference.
//   scalar      the compiler's baseline
//   avx2        AVX2, FMA, BMI1/2, POPCNT
//   avx512      AVX-512 F, BW, DQ, VL and VPOPCNTDQ
//   avx512bf16  the same and AVX512-BF16; ops without code for it use their avx512 code
enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };
constexpr int kIsaCount = 4;

const char* isa_name(Isa isa);

// True if this build has code for `isa`, the processor can run it and the operating system saves its registers.
bool isa_available(Isa isa);

// The instruction set that kernels use: the best available one, unless `isa_force` chose another.
Isa isa_active();

// Makes `name` the active instruction set; fails without a change if it is unknown or not available.
Status isa_force(const char* name);

template <class Function>
Function isa_pick(Function scalar, Function avx2, Function avx512, Function avx512bf16) {
  switch (isa_active()) {
    case Isa::avx512bf16:
      return avx512bf16;
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    default:
      return scalar;
  }
}

}  // namespace p2s

// P2S_DISPATCH(op) is the active instruction set's op_{scalar,avx2,avx512}, P2S_DISPATCH_BF16(op) that of
// op_{scalar,avx2,avx512,avx512bf16}.
#if defined(__x86_64__)
#define P2S_DISPATCH(op) ::p2s::isa_pick(&op##_scalar, &op##_avx2, &op##_avx512, &op##_avx512)
#define P2S_DISPATCH_BF16(op) ::p2s::isa_pick(&op##_scalar, &op##_avx2, &op##_avx512, &op##_avx512bf16)
#else
#define P2S_DISPATCH(op) (&op##_scalar)
#define P2S_DISPATCH_BF16(op) (&op##_scalar)
#endif
