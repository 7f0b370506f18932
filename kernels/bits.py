"""Bit arithmetic shared by the kernels."""

import triton
import triton.language as tl


@triton.jit
def popcount(words):
    """Set bits of each int64 word, as int64. `>>` drags the sign in, the bit masks drop it again."""
    pairs = words - ((words >> 1) & 0x5555555555555555)
    nibbles = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (octets * 0x0101010101010101) >> 56


@triton.jit
def ratio(inter, union):
    """float32 inter / union, correctly rounded; 0 where union is 0."""
    return tl.div_rn(inter.to(tl.float32), tl.maximum(union, 1).to(tl.float32))
