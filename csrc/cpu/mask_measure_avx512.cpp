#define P2S_ISA avx512
#include "mask_measure.inl"
