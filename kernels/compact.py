"""Triton back end of `compact`. Tensors are contiguous and checked by the caller."""

import torch
import triton
import triton.language as tl

from .launch import on

BLOCK = 2048


@triton.jit
def compact_kernel(keep, index, count, n, BLOCK: tl.constexpr):
    # One program; keep (n) as bytes, index (n), count (1).
    kept = tl.full((), 0, tl.int64)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        flag = tl.load(keep + at, mask=at < n, other=0).to(tl.int32)
        tl.store(index + kept + tl.cumsum(flag, 0) - 1, at.to(tl.int64), mask=flag != 0)
        kept += tl.sum(flag, 0)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(index + at, tl.full((BLOCK,), -1, tl.int64), mask=(at >= kept) & (at < n))
    tl.store(count, kept)


def compact(keep: torch.Tensor, index: torch.Tensor, count: torch.Tensor) -> None:
    """keep bool (N,) -> index int64 (N,), count int64 ()."""
    with on(keep):
        compact_kernel[(1,)](keep.view(torch.uint8), index, count, len(keep), BLOCK=BLOCK)


AHEAD_OF_TIME = ((compact_kernel, {"keep": "*u8", "index": "*i64", "count": "*i64", "n": "i32"}, {"BLOCK": BLOCK}),)
