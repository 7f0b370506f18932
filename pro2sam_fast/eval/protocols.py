"""Evaluation protocols of weakly supervised localization by name. The same words hide different computations in the
published code bases, so each is spelled out here and none is mixed with another.

    sat        SAT (ICCV 2023), GTFormer's Table 1: view 256 cropped to 224; map normalised on its own grid with an
               epsilon, then upsampled; largest component by pixels; no foreground gives the whole frame
    direct224  the same, the photo squeezed to 224 x 224 (Pro2SAM's evaluators and matching)
    wsoleval   Choe et al. (CVPR 2020): map upsampled (bicubic), then normalised, then uint8; contours
    tscam      TS-CAM (ICCV 2021): map upsampled (bilinear), then normalised, then uint8; largest contour
    mask       Pro2SAM's final masks: `boxes.otsu_union` of the mask in a 224 x 224 view

Boxes are half-open, the annotated ones as the data set's files have them; all four code bases nevertheless score them
with widths x1 - x0 + 1 (`boxes.iou_plus1`), and so does this package unless asked for `boxes.iou_exact`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import ConfigError, DataError

__all__ = ["PROTOCOLS", "Protocol", "level_maps", "prepare_score_maps", "protocol", "score_levels", "transform_boxes"]

EPSILON = 1e-5


@dataclass(frozen=True)
class Protocol:
    """One of the protocols above.

    Attributes:
        name: its key in `PROTOCOLS`.
        resize, crop: the view is the photo at resize x resize, aspect ignored, of which the central crop x crop counts.
        boxes: arithmetic of `transform_boxes`.
        map: how a coarse map becomes levels: "sat", "wsoleval" or "tscam"; None where boxes come from masks.
        rule: of `ops.contour_sweep`.
        clamp: predicted boxes end at the last pixel's index.
        empty: the box where there is no foreground.
        loc_strict: Top-1 and Top-5 localisation need IoU > 0.5 instead of >= 0.5.
    """

    name: str
    resize: int = 224
    crop: int = 224
    boxes: str = "divide"
    map: str | None = "sat"
    rule: str = "pixels"
    clamp: bool = False
    empty: tuple[int, int, int, int] = (0, 0, 224, 224)
    loc_strict: bool = False


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("sat", resize=256),
        Protocol("direct224"),
        Protocol("wsoleval", boxes="multiply", map="wsoleval", rule="area", clamp=True, empty=(0, 0, 0, 0)),
        Protocol("tscam", map="tscam", rule="area", empty=(0, 0, 1, 1), loc_strict=True),
        Protocol("mask", map=None),
    )
}


def protocol(name: str) -> Protocol:
    """The protocol of that name; ConfigError names the choices."""
    if name not in PROTOCOLS:
        raise ConfigError(f"unknown protocol {name!r}, choose from {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def transform_boxes(
    boxes: np.ndarray, size: tuple[int, int], protocol: Protocol, single_precision: bool = False
) -> np.ndarray:
    """Annotated boxes in the pixels of the evaluated view, truncated to integers as the protocol does it.

    Args:
        boxes: (n, 4) XYXY in the photo's pixels.
        size: (W, H) of the photo.
        protocol: "divide": x / W * resize - offset, then x0, y0 at least 0 and x1, y1 at most crop - 1, so that a box
            outside the crop becomes inverted. "multiply": x * resize / W of boxes that end at the photo's last pixel.
        single_precision: the quotient is rounded to float32, as SAT does on ILSVRC.

    Returns:
        float64 (n, 4) integral values.
    """
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    sides = np.array([*size, *size], dtype=np.float64)
    if protocol.boxes == "multiply":
        boxes[:, 2:] = np.minimum(boxes[:, 2:], sides[2:] - 1)
        return np.trunc(boxes * protocol.resize / sides)
    offset = (protocol.resize - protocol.crop) // 2
    if single_precision:
        boxes, sides = boxes.astype(np.float32), sides.astype(np.float32)
    moved = (boxes / sides * protocol.resize - offset).astype(np.float64)
    moved[:, :2] = np.maximum(moved[:, :2], 0)
    moved[:, 2:] = np.minimum(moved[:, 2:], protocol.crop - 1)
    return np.trunc(moved)


def level_maps(
    maps: np.ndarray | torch.Tensor, thresholds: Sequence[float], protocol: Protocol
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coarse maps as levels in the protocol's view, so that the foreground at threshold k is levels > index[k].

    Args:
        maps: (B, h, w) real values. Under "sat" and "direct224" a constant map has no foreground at thresholds >= 0;
            under "wsoleval" neither has one with NaN; else NaN is an error, under "tscam" a constant map too.
        thresholds: rising, in the normalised range.
        protocol: one with a map.

    Returns:
        levels: int32 (B, crop, crop), at least 0. index: int64 (B, K).

    Raises:
        DataError: a map that the protocol can't take.
        ConfigError: shapes or thresholds don't fit.
    """
    maps = torch.as_tensor(maps)
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    if maps.ndim != 3 or 0 in maps.shape[1:]:
        raise ConfigError(f"maps must be (B, h, w), got {tuple(maps.shape)}")
    steps = torch.as_tensor(np.asarray(thresholds, dtype=np.float64))
    if steps.ndim != 1 or len(steps) == 0 or bool((steps.diff() <= 0).any()):
        raise ConfigError("thresholds must be a rising list of one or more numbers")
    if protocol.map == "wsoleval":
        return score_levels(prepare_score_maps(maps, protocol.crop), steps)
    bad = ~torch.isfinite(maps).flatten(1).all(1)
    if bad.any():
        raise DataError(
            f"score map {int(bad.nonzero()[0])} has NaN or infinite values, which {protocol.name} can't use."
        )
    if protocol.map == "sat":
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        values = _resized((maps - low) / (high - low + EPSILON), protocol.crop, "bilinear")
        # as many thresholds as lie below the value
        levels = torch.searchsorted(steps.to(values.dtype), values.contiguous(), side="left")
        return levels.int(), torch.arange(len(steps)).expand(len(maps), -1)
    values = _resized(maps, protocol.crop, "bilinear")
    low, high = values.amin((1, 2), keepdim=True), values.amax((1, 2), keepdim=True)
    if (flat := (high <= low).flatten()).any():
        raise DataError(f"score map {int(flat.nonzero()[0])} is constant; the tscam protocol has no box for it.")
    return score_levels((values - low) / (high - low), steps)


def prepare_score_maps(maps: torch.Tensor, size: int = 224) -> torch.Tensor:
    """Score maps as the wsolevaluation protocol makes them of coarse maps (B, h, w): bicubic to ``size``, then min-max.

    Returns float64 (B, size, size) in [0, 1]; all zero where the map is constant or has NaN.
    """
    values = _resized(maps.double(), size, "bicubic")
    low, high = values.amin((1, 2), keepdim=True), values.amax((1, 2), keepdim=True)
    usable = high > low  # False with NaN
    return torch.where(usable, (values - low) / torch.where(usable, high - low, 1.0), 0.0)


def score_levels(maps: torch.Tensor, thresholds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Score maps (B, h, w) in [0, 1] -> uint8 levels as int32, and the level int(threshold * highest level), (B, K)."""
    levels = (255 * maps).int()
    peaks = levels.amax((1, 2)).double()
    return levels, (thresholds[None] * peaks[:, None]).long()


def _resized(maps: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    if tuple(maps.shape[1:]) == (size, size):
        return maps
    return F.interpolate(maps[:, None], size=(size, size), mode=mode, align_corners=False)[:, 0]
