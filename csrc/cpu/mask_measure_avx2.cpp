#define P2S_ISA avx2
#include "mask_measure.inl"
