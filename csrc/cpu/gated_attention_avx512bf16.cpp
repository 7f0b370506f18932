#define P2S_ISA avx512bf16
#include "gated_attention.inl"
