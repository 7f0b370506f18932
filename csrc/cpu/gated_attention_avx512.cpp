#define P2S_ISA avx512
#include "gated_attention.inl"
