#define P2S_ISA avx2
#include "gated_attention.inl"
