#define P2S_ISA avx512bf16
#include "decode_sweeps.inl"
