"""Products of tiles and the rounding of their factors, on a GPU and in Triton's interpreter alike."""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def product(a, b, total):
    """a (M, K) @ b (K, N) + total, float32 sums; tensor cores for 16-bit factors, float32 ones stay float32.

    The interpreter would take the bits of bfloat16 for integers, so its factors are widened.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x in dtype, to nearest even. The interpreter truncates bfloat16, so there the bits are rounded first."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000, bits)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)
