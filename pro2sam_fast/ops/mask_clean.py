"""Clean-up of packed masks (`mask_clean`): small holes are filled, then small islands removed.

A region is small if it has fewer pixels than a bound. Results are those of `segment_anything`'s clean-up (Kirillov et
al. 2023, "Automatic mask generation"), whose regions come from OpenCV.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage

from .. import _native
from ..boxes import tight_box
from ._backends import check_call, check_packed, register
from .packing import pack_masks, unpack_masks, words_per_row

__all__ = ["mask_clean", "remove_small_regions"]

_EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


def _mask_clean(masks: torch.Tensor, width: int, min_area: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference. masks (K, H, ceil(width / 64)) -> cleaned (K, H, ceil(width / 64)), changed (K)."""
    cleaned, changed = masks.clone(), torch.zeros(len(masks), dtype=torch.bool, device=masks.device)
    for i in range(len(masks)):
        mask = unpack_masks(masks[i], width).cpu().numpy()
        mask, filled = remove_small_regions(mask, min_area, "holes")
        mask, removed = remove_small_regions(mask, min_area, "islands")
        if filled or removed:
            cleaned[i], changed[i] = pack_masks(torch.from_numpy(mask)), True
    return cleaned, changed


def remove_small_regions(mask: np.ndarray, min_area: float, mode: str) -> tuple[np.ndarray, bool]:
    """Fills small holes or removes small islands of a mask; regions are 8-connected.

    Args:
        mask: bool (H, W).
        min_area: regions of fewer pixels are small.
        mode: ``"holes"`` fills small regions of the background, those at the border too; ``"islands"`` removes small
            regions of the mask, but keeps the largest one if all are small.

    Returns:
        The mask, bool (H, W), and whether it had any small region.
    """
    holes = mode == "holes"
    height, width = mask.shape
    top, bottom, left, right = _window(mask, min_area)
    crop = mask[top:bottom, left:right]
    labels, count = ndimage.label(~crop if holes else crop, structure=_EIGHT_CONNECTED)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    if holes:
        # what the window cuts off belongs to the regions at its sides
        areas[labels[0, 0]] += top * width + left * (bottom - top)
        areas[labels[-1, 0]] += (height - bottom) * width
        areas[labels[0, -1]] += (width - right) * (bottom - top)
    small = areas[1:] < min_area
    if not small.any():
        return mask, False
    inside = np.empty(count + 1, dtype=bool)
    inside[0] = holes
    inside[1:] = small if holes else ~small
    if not holes and small.all():
        inside[_largest_region(labels, areas[1:])] = True
    cleaned = np.zeros_like(mask)
    cleaned[top:bottom, left:right] = inside[labels]
    return cleaned, True


def _window(mask: np.ndarray, min_area: float) -> tuple[int, int, int, int]:
    """Rows [top, bottom) and columns [left, right) that hold a mask and all small regions of its background.

    What is cut off at a side lies behind a line of background and has at least `min_area` pixels. The origin is even,
    as :func:`_largest_region` counts in 2 x 2 blocks.
    """
    height, width = mask.shape
    x0, y0, x1, y1 = tight_box(mask) or (0, 0, width, height)
    top, left = (max(0, at - 1) // 2 * 2 for at in (y0, x0))
    bottom, right = min(y1 + 1, height), min(x1 + 1, width)
    if top * width < min_area:
        top = 0
    if (height - bottom) * width < min_area:
        bottom = height
    if left * (bottom - top) < min_area:
        left = 0
    if (width - right) * (bottom - top) < min_area:
        right = width
    return top, bottom, left, right


def _largest_region(labels: np.ndarray, areas: np.ndarray) -> int:
    # Of equally large regions, the first in the order in which block-based labelling meets them: 2 x 2 blocks, row by
    # row (Bolelli et al. 2019), as OpenCV does.
    largest = np.flatnonzero(areas == areas.max()) + 1
    if len(largest) == 1:
        return int(largest[0])
    rows, columns = np.nonzero(np.isin(labels, largest))
    first = np.lexsort((columns // 2, rows // 2))[0]
    return int(labels[rows[first], columns[first]])


def mask_clean(
    masks: torch.Tensor, width: int, min_area: float, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks without small holes and islands, see `remove_small_regions`.

    Args:
        masks: int64 (K, H, ceil(width / 64)), packed.
        width: W in pixels.
        min_area: regions of fewer pixels are small.
        backend: "auto" takes the fastest that can run and warns once if that isn't the device's first choice;
            "reference" or "cpu" work or raise.

    Returns:
        cleaned: int64 (K, H, ceil(width / 64)).
        changed: bool (K,), whether a mask had a small region.

    Raises:
        TypeError: `masks` isn't a dense int64 tensor.
        ValueError: its shape doesn't fit `width`, or it has no pixels.
        ConfigError: unknown back end.
        BackendError: the back end can't run here or not on this device; the message carries the reason.
    """
    check_call("mask_clean", backend, masks=masks)
    return torch.ops.pro2sam_fast.mask_clean(masks, width, min_area, backend=backend)


def _check_mask_clean(masks: torch.Tensor, width: int, min_area: float) -> None:
    check_packed("mask_clean", masks=masks)
    if masks.dim() != 3 or width < 1 or masks.shape[1] < 1 or masks.shape[2] != words_per_row(width):
        raise ValueError(
            f"mask_clean: masks of {width} columns must be (K, H, {words_per_row(width)}) with H and the columns "
            f"positive, got {tuple(masks.shape)}"
        )


def _empty_mask_clean(masks, width, min_area) -> tuple[torch.Tensor, torch.Tensor]:
    cleaned = torch.empty_like(masks, memory_format=torch.contiguous_format)
    return cleaned, torch.empty((masks.shape[0],), dtype=torch.bool, device=masks.device)


def _mask_clean_cpu(masks, width, min_area):
    cleaned, changed = _empty_mask_clean(masks, width, min_area)
    cleaned.copy_(masks)
    count, height, words = masks.shape
    addresses = cleaned.data_ptr(), changed.data_ptr()
    _native._cpu.mask_clean(*addresses, count, height, width, words, min_area, torch.get_num_threads())
    return cleaned, changed


def _example(device):
    """Noise of every density: holes and islands of all sizes, ties among the largest."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand((6, 21, 70), generator=generator) < torch.linspace(0.02, 0.95, 6)[:, None, None]
    return pack_masks(masks).to(device), 70, 9.0


register(
    'mask_clean(Tensor masks, SymInt width, float min_area, *, str backend="auto") -> (Tensor cleaned, Tensor changed)',
    _check_mask_clean,
    {"reference": _mask_clean, "cpu": _mask_clean_cpu},
    _empty_mask_clean,
    {"exact": _example},
)
