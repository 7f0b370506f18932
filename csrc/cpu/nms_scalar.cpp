#define P2S_ISA scalar
#include "nms.inl"
