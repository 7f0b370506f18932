"""Mask matching (one query) and mask IoU (all pairs) of bit-packed masks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from case import Case, Floor, Runs, Skip

from pro2sam_fast.ops import mask_iou, mask_match, pack_masks

from . import Options
from .shared import back_ends

__all__ = ["cases"]

TESTS = ("tests/ops/test_mask_match.py",)
# count, side, by default
MATCH = ((100, 256, True), (1000, 512, True), (3000, 1024, True), (10_000, 1024, False), (1000, 2048, False))
IOU = ((100, 256, True), (300, 512, True), (1000, 512, False), (3000, 1024, False))
DENSE_LIMIT = 4 << 30  # bytes of float32 masks that a dense peer may take


def cases(options: Options) -> Iterator[Case]:
    for count, side, default in MATCH:
        yield Case(
            "mask_match",
            f"K={count} {side}x{side}",
            "int64",
            TESTS,
            functools.partial(_match, options.device, count, side),
            functools.partial(_floor, count, 1, side),
            default,
        )
    for count, side, default in IOU:
        yield Case(
            "mask_iou",
            f"K={count}x{count} {side}x{side}",
            "int64",
            TESTS,
            functools.partial(_iou, options.device, count, side),
            functools.partial(_floor, count, count, side),
            default,
        )


def _floor(rows: int, columns: int, side: int, facts) -> Floor:
    words = side * -(-side // 64)
    return Floor(bytes=8 * words * (rows + columns) + 4 * rows * columns, formula="packed masks read once, IoU written")


def _match(device: torch.device, count: int, side: int) -> Runs:
    masks, query = blobs(count, side, device, 1), blobs(1, side, device, 2)
    packed, packed_query = _flat(masks), _flat(query)[0]
    return Runs(
        back_ends(device, lambda name: mask_match(packed, packed_query, backend=name)),
        {"dense torch": _dense(masks, query), **_coco_peers(masks, query)},
    )


def _iou(device: torch.device, count: int, side: int) -> Runs:
    a, b = blobs(count, side, device, 1), blobs(count, side, device, 2)
    packed_a, packed_b = _flat(a), _flat(b)
    return Runs(
        back_ends(device, lambda name: mask_iou(packed_a, packed_b, backend=name)),
        {"dense torch": _dense(a, b), **_coco_peers(a, b)},
    )


def blobs(count: int, side: int, device: torch.device, seed: int) -> torch.Tensor:
    """Ellipses of all sizes with ragged borders, bool (count, side, side): run-length codes of natural length."""
    generator = torch.Generator().manual_seed(seed)
    centre, radius = (torch.rand((2, count, 1, 1), generator=generator) for _ in range(2))
    radius = 0.05 + 0.45 * radius
    y, x = (torch.linspace(0, 1, side).reshape(shape) for shape in ((1, side, 1), (1, 1, side)))
    ragged = torch.rand((1, side, side), generator=generator) * 0.3
    masks = torch.empty((count, side, side), dtype=torch.bool)
    for part in torch.arange(count).split(64):
        distance = ((y - centre[0, part]) / radius[0, part]) ** 2 + ((x - centre[1, part]) / radius[1, part]) ** 2
        masks[part] = distance + ragged < 1
    return masks.to(device)


def _flat(masks: torch.Tensor) -> torch.Tensor:
    return pack_masks(masks).flatten(1)


def _dense(a: torch.Tensor, b: torch.Tensor) -> Callable[[], torch.Tensor] | Skip:
    """What one writes without kernels: masks as float32 rows, the intersections as one product."""
    if 4 * (a.numel() + b.numel()) > DENSE_LIMIT:
        return Skip(f"float32 masks would take {4 * (a.numel() + b.numel()) / 2**30:.0f} GiB")
    dense_a, dense_b = a.flatten(1).float(), b.flatten(1).float()

    def match():
        inter = dense_a @ dense_b.T
        union = dense_a.sum(1, keepdim=True) + dense_b.sum(1) - inter
        iou = inter / union
        return iou, iou.argmax(dim=0)

    return match


def _coco_peers(a: torch.Tensor, b: torch.Tensor) -> dict[str, Callable[[], object] | Skip]:
    peers = {}
    for name, module in (("pycocotools", "pycocotools.mask"), ("faster-coco-eval", "faster_coco_eval.core.mask")):
        peers[name] = _coco(module, a, b)
    return peers


def _coco(module: str, a: torch.Tensor, b: torch.Tensor) -> Callable[[], object] | Skip:
    """IoU of run-length codes; encoding isn't timed, as packing isn't."""
    try:
        coco = __import__(module, fromlist=["iou"])
    except ImportError as error:
        return Skip(str(error))

    def encode(masks: torch.Tensor) -> list[object]:
        parts = (np.asfortranarray(part.permute(1, 2, 0).cpu().byte()) for part in masks.split(64))
        return [code for part in parts for code in coco.encode(part)]

    codes, others = encode(a), encode(b)
    return lambda: coco.iou(codes, others, [0] * len(others))
