"""Boxes from masks and maps, and box IoU, as the weakly supervised localisation evaluators compute them.

Arrays are [row, column]. Boxes are (x0, y0, x1, y1), half-open in pixels: x0 <= x < x1. Components are 8-connected.
Sources: mask boxes of the Pro2SAM code (ECCV 2024); map boxes of the SAT code (ICCV 2023), also used for GTFormer.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from .errors import ConfigError

__all__ = [
    "close3x3",
    "components",
    "iou_exact",
    "iou_plus1",
    "largest_component",
    "largest_component_box",
    "map_box",
    "map_foreground",
    "otsu_threshold",
    "otsu_union",
    "tight_box",
]

Box = tuple[int, int, int, int]

_EIGHT = np.ones((3, 3), dtype=bool)


def otsu_threshold(image: np.ndarray) -> float | int:
    """Otsu's threshold: foreground is what lies above it.

    Integer and bool images have one bin per level, floating point images 256 bins between minimum and maximum with the
    bin centres as levels. Among equally good thresholds the lowest wins; a constant image gives its value.

    Args:
        image: real values without NaN or infinities, any shape, not empty.

    Raises:
        ConfigError: an empty image, another type, or values that aren't finite.
    """
    image = np.asarray(image)
    if image.size == 0 or image.dtype.kind not in "biuf":
        raise ConfigError(f"Otsu's threshold needs a non-empty image of real numbers, got {image.dtype} {image.shape}")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise ConfigError("Otsu's threshold needs finite values")
    low, high = image.min(), image.max()
    if low == high:
        return low.item()
    if image.dtype.kind == "f":
        counts, edges = np.histogram(image, bins=256)
        levels = (edges[:-1] + edges[1:]) / 2
    else:
        # an empty bin only repeats the variance of the level below it, which wins the tie
        levels, counts = np.unique(image, return_counts=True)
    offset = levels.astype(np.float64) - float(levels[0])
    below = np.cumsum(counts)[:-1]
    above = np.cumsum(counts[::-1])[::-1][1:]
    mean_below = np.cumsum(counts * offset)[:-1] / below
    mean_above = np.cumsum((counts * offset)[::-1])[::-1][1:] / above
    variance = below * above.astype(np.float64) * (mean_below - mean_above) ** 2
    return levels[int(np.argmax(variance))].item()


def close3x3(mask: np.ndarray) -> np.ndarray:
    """Binary closing with a 3x3 square: dilation with background outside the frame, then erosion with foreground
    outside. bool (H, W) -> bool (H, W)."""
    for axis in (0, 1):
        mask = _join(mask, axis, np.logical_or)
    for axis in (0, 1):
        mask = _join(mask, axis, np.logical_and)
    return mask


def _join(mask: np.ndarray, axis: int, combine: np.ufunc) -> np.ndarray:
    # every pixel with its two neighbours along the axis; what lies outside the frame is neutral
    out = mask.copy()
    source, target = np.moveaxis(mask, axis, 0), np.moveaxis(out, axis, 0)
    combine(target[1:], source[:-1], out=target[1:])
    combine(target[:-1], source[1:], out=target[:-1])
    return out


def components(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """8-connected components of a mask, in raster order of their first pixel.

    Args:
        mask: bool (H, W).

    Returns:
        labels int32 (H, W), 0 is background and component i has i + 1; areas int64 (n,) in pixels; boxes int64 (n, 4).
    """
    labels, count = ndimage.label(mask, structure=_EIGHT)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    slices = ndimage.find_objects(labels, max_label=count)
    boxes = np.array([(x.start, y.start, x.stop, y.stop) for y, x in slices], dtype=np.int64).reshape(-1, 4)
    return labels, areas, boxes


def otsu_union(mask: np.ndarray, min_region: int = 100) -> Box:
    """Box of a mask: the union of its larger regions after a 3x3 closing.

    Foreground is what lies above Otsu's threshold, so {0, 1} and {0, 255} masks stand for themselves and a constant
    image has none. The Pro2SAM code uses 100 pixels for final boxes and 10 to filter its gallery.

    Args:
        mask: bool, integer or floating point (H, W).
        min_region: smallest area in pixels, after the closing, of a region that counts.

    Returns:
        Half-open box; the whole frame (0, 0, W, H) if no region counts.

    Raises:
        ConfigError: not a two-dimensional non-empty image of finite real numbers.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.size == 0:
        raise ConfigError(f"a mask must be a non-empty two-dimensional image, got shape {mask.shape}")
    height, width = mask.shape
    frame = (0, 0, width, height)
    foreground = mask if mask.dtype == bool else mask > otsu_threshold(mask)
    tight = tight_box(foreground)
    if tight is None or foreground.all():
        return frame
    # two pixels of margin keep the closing exact: its dilation reaches one pixel out, its erosion looks one further
    left, top = max(tight[0] - 2, 0), max(tight[1] - 2, 0)
    crop = foreground[top : tight[3] + 2, left : tight[2] + 2]
    _, areas, boxes = components(close3x3(crop))
    boxes = boxes[areas >= min_region]
    if not len(boxes):
        return frame
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    return int(low[0]) + left, int(low[1]) + top, int(high[0]) + left, int(high[1]) + top


def tight_box(mask: np.ndarray) -> Box | None:
    """Half-open extent of the foreground of a bool mask (H, W); None if it has none."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The component with most pixels, the first in raster order on ties. bool (H, W) -> bool (H, W), empty if empty."""
    labels, areas, _ = components(mask)
    return labels == 1 + int(areas.argmax()) if len(areas) else np.zeros(mask.shape, dtype=bool)


def largest_component_box(mask: np.ndarray) -> Box:
    """Half-open extent of `largest_component` of a bool mask (H, W); the whole frame (0, 0, W, H) if it is empty."""
    _, areas, boxes = components(mask)
    if not len(areas):
        return 0, 0, mask.shape[1], mask.shape[0]
    x0, y0, x1, y1 = boxes[int(areas.argmax())].tolist()
    return x0, y0, x1, y1


def map_foreground(score_map: np.ndarray | torch.Tensor, threshold: float, size: tuple[int, int]) -> np.ndarray:
    """Foreground of a coarse map: (M - min) / (max - min + 1e-5) on its own grid, bilinear to `size`, > `threshold`.

    Args:
        score_map: (h, w) finite values.
        threshold: in the normalised range.
        size: (H, W) of the result.

    Returns:
        bool (H, W). A constant map has no foreground for thresholds >= 0.

    Raises:
        ConfigError: not a two-dimensional non-empty map of finite values.
    """
    values = torch.as_tensor(score_map).detach().cpu()
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if values.ndim != 2 or values.numel() == 0 or not torch.isfinite(values).all():
        raise ConfigError(f"a score map must be two-dimensional with finite values, got shape {tuple(values.shape)}")
    low, high = values.min(), values.max()
    values = (values - low) / (high - low + 1e-5)
    values = F.interpolate(values[None, None], size=size, mode="bilinear", align_corners=False)
    return (values[0, 0] > threshold).numpy()


def map_box(score_map: np.ndarray | torch.Tensor, threshold: float, size: tuple[int, int] = (224, 224)) -> Box:
    """Box of a coarse map by the SAT protocol: largest component of `map_foreground`, else the whole frame."""
    return largest_component_box(map_foreground(score_map, threshold, size))


def iou_plus1(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU with widths x1 - x0 + 1, as all reference evaluators compute it, also on half-open boxes.

    Args:
        a, b: boxes (..., 4), broadcast against each other.

    Returns:
        float64 (...), 0 where a box is inverted (x1 < x0 or y1 < y0).
    """
    return _iou(a, b, 1.0)


def iou_exact(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of half-open boxes (..., 4), broadcast against each other: float64 (...), 0 for inverted or empty boxes."""
    return _iou(a, b, 0.0)


def _iou(a: np.ndarray, b: np.ndarray, extra: float) -> np.ndarray:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape[-1:] != (4,) or b.shape[-1:] != (4,):
        raise ConfigError(f"boxes must have shape (..., 4), got {a.shape} and {b.shape}")
    size_a, size_b = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    overlap = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + extra
    inter = np.maximum(overlap, 0).prod(-1)
    union = (size_a + extra).prod(-1) + (size_b + extra).prod(-1) - inter
    valid = (size_a >= 0).all(-1) & (size_b >= 0).all(-1) & (union > 0)
    return np.where(valid, inter / np.where(valid, union, 1.0), 0.0)
