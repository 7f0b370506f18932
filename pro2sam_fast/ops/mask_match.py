"""IoU of bit-packed masks with one query mask and the best of them (`mask_match`), or of all pairs (`mask_iou`).

This is the mask matching of Pro2SAM: the gallery of SAM masks against the binarised coarse map. Rows of n words are
packed masks, flattened (see `packing`). IoU is popcount(a & b) / popcount(a | b), both counts rounded to float32 first,
and 0 for two empty masks; every back end returns these very floats.
"""

from __future__ import annotations

import torch

from .. import _native
from ._backends import check_call, check_packed, register, triton_kernels
from .packing import popcount

__all__ = ["mask_iou", "mask_match"]


def _mask_match(masks: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference. masks (K, n), query (n) -> scores (K), best ()."""
    scores = _ratio(popcount(masks & query), popcount(masks | query))
    best = scores.argmax() if len(scores) else torch.full((), -1, dtype=torch.int64, device=masks.device)
    return scores, best


def _mask_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Reference. a (K, n), b (M, n) -> (K, M)."""
    rows = [_ratio(popcount(mask & b), popcount(mask | b)) for mask in a]
    return torch.stack(rows) if rows else torch.empty((0, len(b)), dtype=torch.float32, device=a.device)


def _ratio(inter: torch.Tensor, union: torch.Tensor) -> torch.Tensor:
    return inter.to(torch.float32) / union.clamp(min=1).to(torch.float32)


def mask_match(masks: torch.Tensor, query: torch.Tensor, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """IoU of every mask with the query, and the index of the best mask.

    Args:
        masks: int64 (K, n), packed.
        query: int64 (n,), packed, on the same device.
        backend: "auto" takes the fastest that can run and warns once if that isn't the device's first choice;
            "reference", "cpu", "cuda" or "triton" work or raise.

    Returns:
        scores: float32 (K,) in [0, 1].
        best: int64 (), index of the first highest score; -1 if K is 0.

    Raises:
        TypeError: an argument isn't an int64 tensor.
        ValueError: shapes or devices don't fit.
        ConfigError: unknown back end.
        BackendError: the back end can't run here or not on this device; the message carries the reason.
    """
    check_call("mask_match", backend, masks=masks, query=query)
    return torch.ops.pro2sam_fast.mask_match(masks, query, backend=backend)


def mask_iou(a: torch.Tensor, b: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """IoU of every mask of `a` with every mask of `b`.

    Args:
        a: int64 (K, n), packed.
        b: int64 (M, n), packed, on the same device.
        backend: as for `mask_match`.

    Returns:
        float32 (K, M) in [0, 1].

    Raises:
        As `mask_match`.
    """
    check_call("mask_iou", backend, a=a, b=b)
    return torch.ops.pro2sam_fast.mask_iou(a, b, backend=backend)


def _check_mask_match(masks: torch.Tensor, query: torch.Tensor) -> None:
    check_packed("mask_match", masks=masks, query=query)
    if masks.dim() != 2 or query.dim() != 1 or masks.shape[1] != query.shape[0]:
        raise ValueError(
            f"mask_match: masks must be (K, n) and query (n,), got {tuple(masks.shape)} and {tuple(query.shape)}"
        )


def _check_mask_iou(a: torch.Tensor, b: torch.Tensor) -> None:
    check_packed("mask_iou", a=a, b=b)
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"mask_iou: a must be (K, n) and b (M, n), got {tuple(a.shape)} and {tuple(b.shape)}")


def _empty_mask_match(masks: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.empty((masks.shape[0],), dtype=torch.float32, device=masks.device)
    return scores, torch.empty((), dtype=torch.int64, device=masks.device)


def _empty_mask_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.empty((a.shape[0], b.shape[0]), dtype=torch.float32, device=a.device)


def _mask_match_cpu(masks, query):
    masks, query = masks.contiguous(), query.contiguous()
    scores, best = _empty_mask_match(masks, query)
    _native._cpu.mask_match(
        masks.data_ptr(), query.data_ptr(), scores.data_ptr(), best.data_ptr(), *masks.shape, torch.get_num_threads()
    )
    return scores, best


def _mask_iou_cpu(a, b):
    a, b = a.contiguous(), b.contiguous()
    iou = _empty_mask_iou(a, b)
    areas = torch.empty((len(a) + len(b),), dtype=torch.int64)
    _native._cpu.mask_iou(
        a.data_ptr(), b.data_ptr(), iou.data_ptr(), areas.data_ptr(), *iou.shape, a.shape[1], torch.get_num_threads()
    )
    return iou


def _mask_match_cuda(masks, query):
    masks, query = masks.contiguous(), query.contiguous()
    scores, best = _empty_mask_match(masks, query)
    stream = torch.cuda.current_stream(masks.device).cuda_stream
    _native._cuda.mask_match(
        masks.data_ptr(), query.data_ptr(), scores.data_ptr(), best.data_ptr(), *masks.shape, masks.device.index, stream
    )
    return scores, best


def _mask_iou_cuda(a, b):
    a, b = a.contiguous(), b.contiguous()
    iou = _empty_mask_iou(a, b)
    stream = torch.cuda.current_stream(a.device).cuda_stream
    _native._cuda.mask_iou(a.data_ptr(), b.data_ptr(), iou.data_ptr(), *iou.shape, a.shape[1], a.device.index, stream)
    return iou


def _mask_match_triton(masks, query):
    scores, best = _empty_mask_match(masks, query)
    triton_kernels("mask_match").mask_match(masks.contiguous(), query.contiguous(), scores, best)
    return scores, best


def _mask_iou_triton(a, b):
    iou = _empty_mask_iou(a, b)
    triton_kernels("mask_match").mask_iou(a.contiguous(), b.contiguous(), iou)
    return iou


def _words(device: torch.device, *shape: int) -> torch.Tensor:
    """The same random masks each time, a quarter full."""
    generator = torch.Generator().manual_seed(sum(shape))
    words = torch.randint(-(2**63), 2**63 - 1, (2, *shape), generator=generator)
    return (words[0] & words[1]).to(device)


register(
    'mask_match(Tensor masks, Tensor query, *, str backend="auto") -> (Tensor scores, Tensor best)',
    _check_mask_match,
    {"reference": _mask_match, "cpu": _mask_match_cpu, "cuda": _mask_match_cuda, "triton": _mask_match_triton},
    _empty_mask_match,
    {"exact": lambda device: (_words(device, 40, 19), _words(device, 19))},
)
register(
    'mask_iou(Tensor a, Tensor b, *, str backend="auto") -> Tensor',
    _check_mask_iou,
    {"reference": _mask_iou, "cpu": _mask_iou_cpu, "cuda": _mask_iou_cuda, "triton": _mask_iou_triton},
    _empty_mask_iou,
    {"exact": lambda device: (_words(device, 20, 9), _words(device, 18, 9))},
)
