#define P2S_ISA avx2
#include "nms.inl"
