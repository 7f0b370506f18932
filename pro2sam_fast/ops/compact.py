"""Positions of the set flags, in order (`compact`): what a filter leaves, without waiting for the device."""

from __future__ import annotations

import torch

from .. import _native
from ._backends import check_call, register, triton_kernels

__all__ = ["compact"]


def _compact(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference. keep (N) -> index (N), count ()."""
    count = keep.sum()
    order = keep.argsort(descending=True, stable=True)
    return order.masked_fill(torch.arange(len(keep), device=keep.device) >= count, -1), count


def compact(keep: torch.Tensor, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the set flags, ascending.

    Unlike `nonzero`, the shape of the result doesn't depend on the flags, so nothing waits for the device.

    Args:
        keep: bool (N,).
        backend: "auto" takes the fastest that can run and warns once if that isn't the device's first choice;
            "reference", "cuda" or "triton" work or raise. On a CPU the reference is the fastest.

    Returns:
        index: int64 (N,), positions of the set flags in ascending order, then -1.
        count: int64 (), their number.

    Raises:
        TypeError: `keep` isn't a dense bool tensor.
        ValueError: `keep` isn't one-dimensional.
        ConfigError: unknown back end.
        BackendError: the back end can't run here or not on this device; the message carries the reason.
    """
    check_call("compact", backend, keep=keep)
    return torch.ops.pro2sam_fast.compact(keep, backend=backend)


def _check_compact(keep: torch.Tensor) -> None:
    if keep.dtype != torch.bool or keep.layout != torch.strided:
        raise TypeError(f"compact: keep must be a dense bool tensor, got {keep.dtype}, {keep.layout}")
    if keep.dim() != 1:
        raise ValueError(f"compact: keep must be (N,), got {tuple(keep.shape)}")


def _empty_compact(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.empty((keep.shape[0],), dtype=torch.int64, device=keep.device)
    return index, torch.empty((), dtype=torch.int64, device=keep.device)


def _compact_cuda(keep):
    keep = keep.contiguous()
    index, count = _empty_compact(keep)
    stream = torch.cuda.current_stream(keep.device).cuda_stream
    _native._cuda.compact(keep.data_ptr(), index.data_ptr(), count.data_ptr(), len(keep), keep.device.index, stream)
    return index, count


def _compact_triton(keep):
    index, count = _empty_compact(keep)
    triton_kernels("compact").compact(keep.contiguous(), index, count)
    return index, count


def _example(device):
    return (torch.rand(3001, generator=torch.Generator().manual_seed(0)).to(device) < 0.3,)


register(
    'compact(Tensor keep, *, str backend="auto") -> (Tensor index, Tensor count)',
    _check_compact,
    {"reference": _compact, "cuda": _compact_cuda, "triton": _compact_triton},
    _empty_compact,
    {"exact": _example},
)
