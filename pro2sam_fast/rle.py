"""Run-length encoding of masks as COCO tools expect it: column-major runs that alternate, starting with zeros."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from .ops import unpack_masks

__all__ = ["coco_rle", "mask_to_rle", "packed_to_dense", "rle_to_mask"]


def packed_to_dense(masks: Tensor, width: int) -> Iterator[np.ndarray]:
    """Bit-packed masks int64 (K, H, ceil(width/64)) -> K bool arrays (H, width), one at a time."""
    for mask in masks.cpu():
        yield unpack_masks(mask, width).numpy()


def mask_to_rle(mask: np.ndarray) -> dict[str, Any]:
    """bool (H, W) -> ``{"size": [H, W], "counts": [zeros, ones, zeros, ...]}``.

    Column-major. A mask whose first pixel is set starts with a run of 0 zeros; an empty one is ``[H*W]``.
    """
    flat = np.ascontiguousarray(mask.T).ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(edges, prepend=0, append=flat.size).tolist()
    return {"size": [int(n) for n in mask.shape], "counts": [0, *counts] if flat[0] else counts}


def rle_to_mask(rle: dict[str, Any]) -> np.ndarray:
    """Inverse of :func:`mask_to_rle`: bool (H, W)."""
    h, w = rle["size"]
    counts = np.asarray(rle["counts"], dtype=np.int64)
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return np.ascontiguousarray(flat.reshape(w, h).T)


def coco_rle(mask: np.ndarray) -> dict[str, Any]:
    """bool (H, W) -> ``{"size": [H, W], "counts": str}``, the compressed form of the COCO API."""
    from pycocotools import mask as coco

    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")}
