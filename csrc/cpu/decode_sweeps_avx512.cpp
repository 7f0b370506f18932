#define P2S_ISA avx512
#include "decode_sweeps.inl"
