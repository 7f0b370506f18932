#pragma once

// Arithmetic that the CPU and CUDA share. A CUDA compiler fuses products and sums unless told not to, a host compiler is
// told by a flag; these say of each operation how often it rounds. Linkage is internal: see words.h.

#if defined(__CUDACC__)
#define P2S_HD static __host__ __device__ __forceinline__
#else
#define P2S_HD static inline
#endif

namespace p2s {

P2S_HD float product(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(x, y);
#else
  return x * y;
#endif
}

P2S_HD float quotient(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(x, y);
#else
  return x / y;
#endif
}

// x * y + z, rounded once.
P2S_HD float fused(float x, float y, float z) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(x, y, z);
#else
  return __builtin_fmaf(x, y, z);
#endif
}

}  // namespace p2s
