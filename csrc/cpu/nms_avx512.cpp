#define P2S_ISA avx512
#include "nms.inl"
