#define P2S_ISA scalar
#include "mask_measure.inl"
