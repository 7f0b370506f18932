"""Counts and boxes of masks from low-resolution logits (`mask_measure`), and the masks, packed (`mask_pack`).

SAM gives logits of (4e, 4e) for an input frame of (S, S) pixels, of which the photo fills the upper left (h, w). Those
of the photo's (H, W) pixels come from two bilinear resizes (Kirillov et al. 2023, `Sam.postprocess_masks`): to the
frame, cut to (h, w), then to the photo; half-pixel centres, no antialiasing, float32.

Both resizes interpolate along rows before columns, so a kernel computes a few rows at a time with the operands and
roundings of the two, and nothing where the logits around are sure to stay on one side of every cutoff. Between values a
and b with weights 1 - w and w it takes fma(1 - w, a, w * b), the product w * b rounded first, as PyTorch does on
processors with fused instructions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from .. import _native
from ..memory import items_per_chunk
from ._backends import check_call, register, triton_kernels
from .packing import pack_masks, unpack_masks, words_per_row

__all__ = ["mask_measure", "mask_pack", "upsample_logits"]

# Outputs of at most so many rows and columns together go to another kernel of PyTorch's, which rounds in another order.
_FEW_ROWS_AND_COLUMNS = 128

Size = Sequence[int]
Measures = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def upsample_logits(low_res: torch.Tensor, img_size: int, input_size: Size, original_size: Size) -> torch.Tensor:
    """Mask logits at the resolution of the photo, in float32; see the two resizes above.

    The masks are passed as a batch of one-channel images. With exactly three channels and one thread PyTorch's CPU
    kernel rounds in another order; one channel gives the multi-threaded result whatever the number of threads or masks.

    Args:
        low_res: (K, 4e, 4e) logits.
        img_size: S.
        input_size: (h, w) of the resized photo, at most (S, S).
        original_size: (H, W) of the photo.

    Returns:
        float32 (K, H, W).
    """
    if low_res.shape[0] == 0:
        return low_res.new_zeros((0, *original_size), dtype=torch.float32)
    x = low_res.float().unsqueeze(1)
    x = F.interpolate(x, (img_size, img_size), mode="bilinear", align_corners=False)
    x = x[..., : input_size[0], : input_size[1]]
    return F.interpolate(x, tuple(original_size), mode="bilinear", align_corners=False).squeeze(1)


def _chunks(low_res: torch.Tensor, img_size: int, input_size: Size, size: Size) -> Iterator[torch.Tensor]:
    """Full-resolution logits (k, H, W) of a few masks at a time, at least once."""
    for part in low_res.split(items_per_chunk(4 * (img_size**2 + size[0] * size[1]))):
        yield upsample_logits(part, img_size, input_size, size)


def _mask_measure(
    low_res: torch.Tensor, img_size: int, input_size: Size, size: Size, threshold: float, offset: float
) -> Measures:
    """Reference. low_res (K, n, m) -> inner, outer, areas (K), boxes (K, 4)."""
    parts = []
    for logits in _chunks(low_res, img_size, input_size, size):
        cuts = (threshold + offset, threshold - offset, threshold)
        counts = [(logits > cut).sum(dim=(1, 2)) for cut in cuts]
        parts.append((*counts, boxes_of_masks(logits > threshold)))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _mask_pack(
    low_res: torch.Tensor, img_size: int, input_size: Size, size: Size, threshold: float, canvas: Size, origin: Size
) -> torch.Tensor:
    """Reference. low_res (K, n, m) -> (K, H', ceil(W' / 64))."""
    parts = []
    for logits in _chunks(low_res, img_size, input_size, size):
        masks = logits.new_zeros((len(logits), *canvas), dtype=torch.bool)
        masks[:, origin[0] : origin[0] + size[0], origin[1] : origin[1] + size[1]] = logits > threshold
        parts.append(pack_masks(masks))
    return torch.cat(parts)


def boxes_of_masks(masks: torch.Tensor) -> torch.Tensor:
    """Boxes of bool masks (K, H, W): int64 (K, 4), XYXY of the extreme pixels; [0, 0, 0, 0] for an empty mask."""
    if masks.numel() == 0:
        return torch.zeros(masks.shape[0], 4, dtype=torch.int64, device=masks.device)
    return _boxes(masks.any(dim=1), masks.any(dim=2))


def boxes_of_packed(masks: torch.Tensor, width: int) -> torch.Tensor:
    """Boxes of packed masks, int64 (K, H, ceil(width / 64)), as those of `boxes_of_masks`."""
    if masks.numel() == 0:
        return torch.zeros(masks.shape[0], 4, dtype=torch.int64, device=masks.device)
    rows = (masks != 0).any(dim=2)
    while masks.shape[1] > 1:
        half = masks.shape[1] // 2
        masks = torch.cat([masks[:, :half] | masks[:, half : 2 * half], masks[:, 2 * half :]], dim=1)
    return _boxes(unpack_masks(masks, width).squeeze(1), rows)


def _boxes(columns: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Boxes (K, 4) of masks that occupy columns bool (K, W) and rows bool (K, H)."""
    spans = []
    for occupied in (columns, rows):
        n = occupied.shape[1]
        first = occupied.to(torch.uint8).argmax(dim=1)
        last = n - 1 - occupied.flip(1).to(torch.uint8).argmax(dim=1)
        spans.append((first, last))
    (x0, x1), (y0, y1) = spans
    return torch.stack([x0, y0, x1, y1], dim=1) * rows.any(dim=1)[:, None]


def mask_measure(
    low_res: torch.Tensor,
    img_size: int,
    input_size: Size,
    size: Size,
    threshold: float,
    offset: float,
    backend: str = "auto",
) -> Measures:
    """Pixel counts and boxes of masks at the resolution of the photo.

    Args:
        low_res: float32 (K, n, m), logits.
        img_size: S, side of the input frame.
        input_size: (h, w) of the part of it that isn't padding, in 1 to S.
        size: (H, W) of the photo.
        threshold: t; a pixel belongs to the mask where its logit is above this, compared in float32.
        offset: o, of the two cutoffs between which a mask's area shows its stability.
        backend: "auto" takes the fastest that can run and warns once if that isn't the device's first choice;
            "reference", "cpu", "cuda" or "triton" work or raise. A resize to at most 128 rows and columns together is
            PyTorch's also in the name of "cpu": it rounds such ones in an order of their own.

    Returns:
        inner: int64 (K,), pixels above t + o.
        outer: int64 (K,), pixels above t - o.
        areas: int64 (K,), pixels above t.
        boxes: int64 (K, 4), XYXY of the extreme pixels above t, inclusive; [0, 0, 0, 0] if there is none.

    Raises:
        TypeError: `low_res` isn't a dense float32 tensor.
        ValueError: a size isn't positive or doesn't fit.
        ConfigError: unknown back end.
        BackendError: the back end can't run here or not on this device; the message carries the reason.
    """
    check_call("mask_measure", backend, low_res=low_res)
    return torch.ops.pro2sam_fast.mask_measure(low_res, img_size, input_size, size, threshold, offset, backend=backend)


def mask_pack(
    low_res: torch.Tensor,
    img_size: int,
    input_size: Size,
    size: Size,
    threshold: float,
    canvas: Size | None = None,
    origin: Size = (0, 0),
    backend: str = "auto",
) -> torch.Tensor:
    """Masks at the resolution of the photo, bit-packed (see `packing`).

    Args:
        low_res, img_size, input_size, size, threshold, backend: as for `mask_measure`.
        canvas: (H', W') of an image of which the photo is a part; the photo itself if None.
        origin: (y, x) of the photo's first pixel in it.

    Returns:
        int64 (K, H', ceil(W' / 64)), zero outside the photo.

    Raises:
        As `mask_measure`.
    """
    check_call("mask_pack", backend, low_res=low_res)
    canvas = size if canvas is None else canvas
    return torch.ops.pro2sam_fast.mask_pack(
        low_res, img_size, input_size, size, threshold, canvas, origin, backend=backend
    )


def _check_frame(op: str, low_res: torch.Tensor, img_size: int, input_size: Size, size: Size) -> None:
    if low_res.dtype != torch.float32 or low_res.layout != torch.strided:
        raise TypeError(f"{op}: low_res must be a dense float32 tensor, got {low_res.dtype}, {low_res.layout}")
    if low_res.dim() != 3 or low_res.shape[1] < 1 or low_res.shape[2] < 1:
        raise ValueError(f"{op}: low_res must be (K, n, m) with n and m positive, got {tuple(low_res.shape)}")
    if len(input_size) != 2 or not all(1 <= n <= img_size for n in input_size):
        raise ValueError(f"{op}: input_size must be (h, w) from 1 to img_size {img_size}, got {tuple(input_size)}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{op}: size must be (H, W), both positive, got {tuple(size)}")


def _check_mask_measure(low_res, img_size, input_size, size, threshold, offset) -> None:
    _check_frame("mask_measure", low_res, img_size, input_size, size)


def _check_mask_pack(low_res, img_size, input_size, size, threshold, canvas, origin) -> None:
    _check_frame("mask_pack", low_res, img_size, input_size, size)
    if len(canvas) != 2 or len(origin) != 2 or min(origin) < 0:
        raise ValueError(f"mask_pack: canvas and origin must be (H', W') and (y, x), got {canvas} and {origin}")
    if any(start + n > whole for start, n, whole in zip(origin, size, canvas, strict=True)):
        raise ValueError(
            f"mask_pack: {tuple(size)} pixels at {tuple(origin)} don't fit into a canvas of {tuple(canvas)}"
        )


def _empty_mask_measure(low_res, img_size, input_size, size, threshold, offset) -> Measures:
    count = low_res.shape[0]
    return tuple(
        torch.empty(shape, dtype=torch.int64, device=low_res.device) for shape in ((count,),) * 3 + ((count, 4),)
    )


def _empty_mask_pack(low_res, img_size, input_size, size, threshold, canvas, origin) -> torch.Tensor:
    shape = (low_res.shape[0], canvas[0], words_per_row(canvas[1]))
    return torch.empty(shape, dtype=torch.int64, device=low_res.device)


def _leave_to_torch(img_size: int, size: Size) -> bool:
    return min(2 * img_size, sum(size)) <= _FEW_ROWS_AND_COLUMNS


def _mask_measure_cpu(low_res, img_size, input_size, size, threshold, offset):
    if _leave_to_torch(img_size, size):
        return _mask_measure(low_res, img_size, input_size, size, threshold, offset)
    low_res = low_res.contiguous()
    out = _empty_mask_measure(low_res, img_size, input_size, size, threshold, offset)
    _native._cpu.mask_measure(
        low_res.data_ptr(),
        *(x.data_ptr() for x in out),
        len(low_res),
        (*low_res.shape[1:], img_size, *input_size, *size),
        *(threshold + offset, threshold - offset, threshold),
        torch.get_num_threads(),
    )
    return out


def _mask_pack_cpu(low_res, img_size, input_size, size, threshold, canvas, origin):
    if _leave_to_torch(img_size, size):
        return _mask_pack(low_res, img_size, input_size, size, threshold, canvas, origin)
    low_res = low_res.contiguous()
    masks = _empty_mask_pack(low_res, img_size, input_size, size, threshold, canvas, origin)
    _native._cpu.mask_pack(
        low_res.data_ptr(),
        masks.data_ptr(),
        len(low_res),
        (*low_res.shape[1:], img_size, *input_size, *size),
        threshold,
        *masks.shape[1:],
        *(origin[1], origin[0]),
        torch.get_num_threads(),
    )
    return masks


def _example(device: torch.device) -> tuple:
    """Logits in waves, and where they go: enlarged, then reduced along one side and enlarged along the other."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn((5, 1, 6, 6), generator=generator) * 4
    low_res = F.interpolate(coarse, (32, 32), mode="bicubic")[:, 0].to(device)
    return low_res, 128, (128, 80), (200, 70)


def _mask_measure_cuda(low_res, img_size, input_size, size, threshold, offset):
    low_res = low_res.contiguous()
    out = _empty_mask_measure(low_res, img_size, input_size, size, threshold, offset)
    values = _native._cuda.mask_partial_values(len(low_res), size[0])
    partial = torch.empty((values,), dtype=torch.int64, device=low_res.device)
    _native._cuda.mask_measure(
        *(x.data_ptr() for x in (low_res, *out, partial)),
        len(low_res),
        (*low_res.shape[1:], img_size, *input_size, *size),
        *(threshold + offset, threshold - offset, threshold),
        low_res.device.index,
        torch.cuda.current_stream(low_res.device).cuda_stream,
    )
    return out


def _mask_pack_cuda(low_res, img_size, input_size, size, threshold, canvas, origin):
    low_res = low_res.contiguous()
    masks = _empty_mask_pack(low_res, img_size, input_size, size, threshold, canvas, origin)
    _native._cuda.mask_pack(
        low_res.data_ptr(),
        masks.data_ptr(),
        len(low_res),
        (*low_res.shape[1:], img_size, *input_size, *size),
        threshold,
        *masks.shape[1:],
        *(origin[1], origin[0]),
        low_res.device.index,
        torch.cuda.current_stream(low_res.device).cuda_stream,
    )
    return masks


def _mask_measure_triton(low_res, img_size, input_size, size, threshold, offset):
    out = _empty_mask_measure(low_res, img_size, input_size, size, threshold, offset)
    cuts = (threshold + offset, threshold - offset, threshold)
    triton_kernels("mask_measure").mask_measure(low_res.contiguous(), *out, img_size, input_size, size, cuts)
    return out


def _mask_pack_triton(low_res, img_size, input_size, size, threshold, canvas, origin):
    masks = _empty_mask_pack(low_res, img_size, input_size, size, threshold, canvas, origin)
    triton_kernels("mask_measure").mask_pack(low_res.contiguous(), masks, img_size, input_size, size, threshold, origin)
    return masks


register(
    "mask_measure(Tensor low_res, SymInt img_size, SymInt[] input_size, SymInt[] size, float threshold, float offset, "
    '*, str backend="auto") -> (Tensor inner, Tensor outer, Tensor areas, Tensor boxes)',
    _check_mask_measure,
    {
        "reference": _mask_measure,
        "cpu": _mask_measure_cpu,
        "cuda": _mask_measure_cuda,
        "triton": _mask_measure_triton,
    },
    _empty_mask_measure,
    {"exact": lambda device: (*_example(device), 0.0, 1.0)},
)
register(
    "mask_pack(Tensor low_res, SymInt img_size, SymInt[] input_size, SymInt[] size, float threshold, SymInt[] canvas, "
    'SymInt[] origin, *, str backend="auto") -> Tensor',
    _check_mask_pack,
    {"reference": _mask_pack, "cpu": _mask_pack_cpu, "cuda": _mask_pack_cuda, "triton": _mask_pack_triton},
    _empty_mask_pack,
    {"exact": lambda device: (*_example(device), 0.0, (210, 90), (7, 20))},
)
