#define P2S_ISA scalar
#include "gated_attention.inl"
