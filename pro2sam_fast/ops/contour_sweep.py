"""Boxes of score maps at every threshold and their best IoU with annotated boxes (`contour_sweep`).

This is the inner loop of the box metrics of weakly supervised localization: MaxBoxAcc (Choe et al. 2020) takes the
contours of a binarised map at up to 256 levels, SAT and TS-CAM its largest region at any thresholds. A map comes as the
index of the first threshold that a pixel does not pass, so that the foreground at threshold k is levels > k.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage

from .. import _native
from ._backends import check_call, register

__all__ = ["contour_sweep"]

RULES = ("pixels", "area", "all")
_EIGHT = np.ones((3, 3), dtype=bool)


def _contour_sweep(levels, boxes, first, empty, steps, rule, clamp):
    """Reference."""
    iou, found = _empty_sweep(levels, boxes, first, empty, steps, rule, clamp)
    truth = boxes.cpu().numpy()
    height, width = levels.shape[1:]
    last = np.array([np.inf, np.inf, width - 1, height - 1])
    for i, one in enumerate(levels.cpu().numpy()):
        annotated = truth[int(first[i]) : int(first[i + 1])]
        for k in range(steps):
            candidates = _candidates(one > k, rule)
            if not len(candidates):
                candidates = empty.cpu().numpy()[None]
            elif clamp:
                candidates = np.minimum(candidates, last).astype(np.int64)
            values = _iou_plus1(candidates[:, None], annotated[None]).max(1, initial=0)
            best = int(values.argmax())
            iou[i, k], found[i, k] = float(values[best]), torch.from_numpy(candidates[best])
    return iou, found


def _candidates(mask: np.ndarray, rule: str) -> np.ndarray:
    # bool (H, W) -> int64 (n, 4), half-open
    labels, count = ndimage.label(mask, _EIGHT)
    slices = ndimage.find_objects(labels)
    boxes = np.array([(x.start, y.start, x.stop, y.stop) for y, x in slices], dtype=np.int64).reshape(-1, 4)
    if count == 0:
        return boxes
    if rule == "pixels":
        return boxes[[np.bincount(labels.ravel())[1:].argmax()]]
    if rule == "area":
        areas = np.array([_outline_area(labels == i + 1) for i in range(count)])
        return boxes[[count - 1 - areas[::-1].argmax()]]
    outside, _ = ndimage.label(np.pad(~mask, 1, constant_values=True))
    slices = [s for i, s in enumerate(ndimage.find_objects(outside), 1) if i != outside[0, 0]]
    # the padding moved them by one, the contour runs one pixel around the hole
    grown = [(x.start - 2, y.start - 2, x.stop, y.stop) for y, x in slices]
    return np.concatenate([boxes, np.array(grown, dtype=np.int64).reshape(-1, 4)])


def _outline_area(component: np.ndarray) -> float:
    # of the polygon through the border pixels: full 2x2 windows of the filled component, and half of those with three
    filled = np.pad(ndimage.binary_fill_holes(component), 1).astype(np.int64)
    windows = filled[1:, 1:] + filled[1:, :-1] + filled[:-1, 1:] + filled[:-1, :-1]
    return float((windows == 4).sum() + 0.5 * (windows == 3).sum())


def _iou_plus1(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    size_a, size_b = a[..., 2:] - a[..., :2] + 1, b[..., 2:] - b[..., :2] + 1
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + 1
    inter = np.maximum(sides, 0.0).prod(-1)
    union = size_a.prod(-1) + size_b.prod(-1) - inter
    valid = (size_a > 0).all(-1) & (size_b > 0).all(-1) & (union > 0)
    return np.where(valid, inter / np.where(valid, union, 1.0), 0.0)


def contour_sweep(
    levels: torch.Tensor,
    boxes: torch.Tensor,
    first: torch.Tensor,
    steps: int,
    rule: str,
    empty: torch.Tensor,
    clamp: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The box of levels > k for every k in 0..steps - 1, and its IoU with the nearest annotated box.

    Components are 8-connected, holes 4-connected. Boxes are half-open; IoU counts widths as x1 - x0 + 1, as all
    reference evaluators do, and is 0 with an inverted box.

    Args:
        levels: int32 (B, H, W), at least 0.
        boxes: float64 (n, 4), annotated XYXY boxes of all maps.
        first: int64 (B + 1,); map i has the boxes first[i] to first[i + 1].
        steps: number of thresholds.
        rule: "pixels": the component with most pixels, the first in raster order on ties. "area": the one whose outer
            contour encloses the largest polygon through its pixel centres, the last in raster order on ties. "all":
            every component and every hole, whose contour runs one pixel around it; the one with the best IoU.
        empty: int64 (4,), the box where nothing is above the threshold.
        clamp: x1 to W - 1 and y1 to H - 1.
        backend: as for `mask_match`; "reference" and "cpu".

    Returns:
        iou: float64 (B, steps) in [0, 1], 0 where a map has no annotated box.
        found: int64 (B, steps, 4).

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or values don't fit.
        ConfigError: unknown back end.
        BackendError: the back end can't run here or not on this device.
    """
    check_call("contour_sweep", backend, levels=levels, boxes=boxes, first=first, empty=empty)
    return torch.ops.pro2sam_fast.contour_sweep(levels, boxes, first, empty, steps, rule, clamp, backend=backend)


def _check_contour_sweep(levels, boxes, first, empty, steps, rule, clamp):
    for name, tensor, dtype in (
        ("levels", levels, torch.int32),
        ("boxes", boxes, torch.float64),
        ("first", first, torch.int64),
        ("empty", empty, torch.int64),
    ):
        if tensor.dtype != dtype or tensor.layout != torch.strided:
            raise TypeError(f"contour_sweep: {name} must be a dense {dtype} tensor, got {tensor.dtype} {tensor.layout}")
        if tensor.device != levels.device:
            raise ValueError(f"contour_sweep: all inputs must be on one device, got {name} on {tensor.device}")
    if levels.dim() != 3 or min(levels.shape[1:]) < 1:
        raise ValueError(f"contour_sweep: levels must be (B, H, W), got {tuple(levels.shape)}")
    if boxes.dim() != 2 or boxes.shape[1] != 4 or tuple(empty.shape) != (4,) or first.shape != (len(levels) + 1,):
        raise ValueError(
            f"contour_sweep: boxes must be (n, 4), first ({len(levels) + 1},) and empty (4,), "
            f"got {tuple(boxes.shape)}, {tuple(first.shape)} and {tuple(empty.shape)}"
        )
    if rule not in RULES or not 1 <= steps < 2**31:
        raise ValueError(f"contour_sweep: rule must be one of {RULES} and steps at least 1, got {rule!r} and {steps}")


def _empty_sweep(levels, boxes, first, empty, steps, rule, clamp):
    iou = torch.empty((len(levels), steps), dtype=torch.float64, device=levels.device)
    return iou, torch.empty((len(levels), steps, 4), dtype=torch.int64, device=levels.device)


def _contour_sweep_cpu(levels, boxes, first, empty, steps, rule, clamp):
    if len(levels) and int(levels.min()) < 0:
        raise ValueError("contour_sweep: levels must be at least 0")
    if bool((first.diff() < 0).any()) or int(first[0]) < 0 or int(first[-1]) > len(boxes):
        raise ValueError(f"contour_sweep: first must rise from 0 or more to at most {len(boxes)}")
    inputs = [x.contiguous() for x in (levels, boxes, first, empty)]
    outputs = _empty_sweep(levels, boxes, first, empty, steps, rule, clamp)
    addresses = [x.data_ptr() for x in (*inputs, *outputs)]
    _native._cpu.contour_sweep(addresses, [*levels.shape, steps], RULES.index(rule), clamp, torch.get_num_threads())
    return outputs


def _example(rule):
    """Two maps of noise with three and no annotated boxes; above the last thresholds there is nothing."""

    def arguments(device):
        generator = torch.Generator().manual_seed(0)
        levels = torch.randint(7, (2, 14, 19), generator=generator, dtype=torch.int32)
        boxes = torch.tensor([[2, 3, 9, 8], [0, 0, 19, 14], [10, 5, 18, 6]], dtype=torch.float64)
        first, empty = torch.tensor([0, 3, 3]), torch.tensor([0, 0, 1, 1])
        return *(x.to(device) for x in (levels, boxes, first, empty)), 9, rule, True

    return arguments


register(
    "contour_sweep(Tensor levels, Tensor boxes, Tensor first, Tensor empty, SymInt steps, str rule, bool clamp, *, "
    'str backend="auto") -> (Tensor iou, Tensor found)',
    _check_contour_sweep,
    {"reference": _contour_sweep, "cpu": _contour_sweep_cpu},
    _empty_sweep,
    {"exact": _example("area"), torch.float64: _example("all")},
)
