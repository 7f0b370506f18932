#define P2S_ISA scalar
#include "decode_sweeps.inl"
