#define P2S_ISA avx2
#include "decode_sweeps.inl"
