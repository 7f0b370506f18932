"""Mask matching of Pro2SAM (ECCV 2024, Eq. 11): the gallery mask most similar to the coarse map is the object."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..boxes import Box, iou_exact, largest_component, largest_component_box, map_foreground, otsu_union, tight_box
from ..errors import ConfigError, Pro2SamError
from ..gallery import MaskGallery
from ..memory import items_per_chunk, joined
from ..ops import mask_match, pack_masks, popcount, unpack_masks
from ..ops.mask_measure import boxes_of_packed
from ..rle import packed_to_dense
from ..transfer import in_step, queues, to_device

__all__ = ["MatchResult", "NoMaskError", "fills_frame", "grid_masks", "match", "matching"]

RESOLUTIONS = ("mask", "official14")
SIMILARITIES = ("mask", "bbox", "mask+bbox")
ON_EMPTY = ("coarse", "raise")


class NoMaskError(Pro2SamError, LookupError):
    """No gallery mask is left to match and `on_empty="raise"` forbids the fallback."""


@dataclass(frozen=True, eq=False)
class MatchResult:
    """The mask chosen for one image.

    Attributes:
        index: of the mask in the gallery; -1 unless `source` is "sam".
        score: its entry of `scores`; 0 unless `source` is "sam".
        predicted_iou: SAM's own estimate for it; NaN unless `source` is "sam".
        source: "sam", a gallery mask; "coarse", the largest region of the coarse map; "full", the whole frame.
        mask: bool (H, W).
        scores: float32 (K,), of every gallery mask, also of those the filter dropped: its similarity to the map, times
            what `border_sigma` leaves of it.
        kept: bool (K,), False for masks that the filter dropped.
    """

    index: int
    score: float
    predicted_iou: float
    source: str
    mask: np.ndarray
    scores: np.ndarray
    kept: np.ndarray

    def box(self, rule: str = "otsu_union", min_region: int = 100) -> Box:
        """Half-open box of the mask, in its pixels.

        Args:
            rule: "otsu_union", the union of the regions of at least `min_region` pixels after a 3x3 closing, or
                "largest", the largest region.

        Returns:
            The whole frame if no region counts, for instance for a mask smaller than `min_region`.
        """
        if rule not in ("otsu_union", "largest"):
            raise ConfigError(f"box rule must be otsu_union or largest, got {rule!r}")
        return otsu_union(self.mask, min_region) if rule == "otsu_union" else largest_component_box(self.mask)


def matching(
    gallery: MaskGallery,
    coarse_map: Tensor,
    *,
    prompt_threshold: float = 0.2,
    match_resolution: str = "mask",
    similarity: str = "mask",
    drop_full_frame: bool = True,
    min_region_gallery: int = 10,
    border_sigma: float | None = None,
    min_score: float = 0.0,
    on_empty: str = "coarse",
    coarse_threshold: float = 0.4,
) -> Generator[list[Tensor], list[Tensor], MatchResult]:
    """Choose the gallery mask that is most similar to the binarised coarse map B; the first on ties.

    Args:
        gallery: K masks of H x W pixels, in descending predicted IoU.
        coarse_map: (h, w) values in [0, 1] that cover the whole image.
        prompt_threshold: B is where the map, not normalised, lies strictly above it.
        match_resolution: "mask" enlarges the map bilinearly to H x W (paper); "official14" shrinks the masks to the
            map's grid (released code), see `grid_masks`.
        similarity: "mask", IoU of the masks; "bbox", exact IoU of the half-open extents of B and the mask;
            "mask+bbox", their sum. The last two are the paper's ablation, which doesn't state how boxes are combined.
        drop_full_frame: leave out masks whose box is the whole frame, see `fills_frame`.
        min_region_gallery: smallest region in pixels for that box.
        border_sigma: multiply scores by exp(-b^2 / (2 border_sigma^2)), where b, the mask's pixels along the borders
            over the root of its area, tells background from objects (boundary connectivity; Zhu et al., CVPR 2014).
            None: don't, as in the paper.
        min_score: a best score that doesn't exceed it falls back.
        on_empty: "coarse" falls back to the largest region of the map where it, min-max normalised, lies above
            `coarse_threshold`, and to the whole frame if there is none. "raise" never falls back: no mask left is an
            error, and a best score of 0 selects the first mask left, as the released code does.
        coarse_threshold: for that fallback, in the normalised range.

    Raises:
        ConfigError: an option out of its range, or a map that isn't two-dimensional with finite values.
        NoMaskError: no mask left and `on_empty="raise"`.
    """
    for name, value, choices in (
        ("match_resolution", match_resolution, RESOLUTIONS),
        ("similarity", similarity, SIMILARITIES),
        ("on_empty", on_empty, ON_EMPTY),
    ):
        if value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    for name, value in (
        ("prompt_threshold", prompt_threshold),
        ("min_score", min_score),
        ("coarse_threshold", coarse_threshold),
    ):
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ConfigError(f"{name} must be a finite number, got {value!r}")
    if not isinstance(drop_full_frame, (bool, np.bool_)):
        raise ConfigError(f"drop_full_frame must be True or False, got {drop_full_frame!r}")
    if not isinstance(min_region_gallery, Integral) or min_region_gallery < 0:
        raise ConfigError(f"min_region_gallery must be a number of pixels, got {min_region_gallery!r}")
    if border_sigma is not None and not (isinstance(border_sigma, Real) and 0 < border_sigma < math.inf):
        raise ConfigError(f"border_sigma must be a positive number or None, got {border_sigma!r}")
    coarse_map = _check_map(coarse_map).to(gallery.masks.device)
    masks, binary = _at_resolution(gallery, coarse_map, prompt_threshold, match_resolution)
    compared = mask_match(masks.flatten(1), pack_masks(binary).flatten())[0]
    needed = [coarse_map.isfinite().all(), coarse_map, compared]
    if drop_full_frame:
        needed += _frame_flags(gallery.masks, gallery.size[1], min_region_gallery)
    if border_sigma is not None:
        needed += [_border_pixels(gallery.masks, gallery.size[1]), gallery.areas]
    finite, coarse_map, compared, *more = yield needed
    if not finite:
        raise ConfigError("the coarse map must be two-dimensional with finite values, got some that aren't finite")
    scores = np.zeros(len(gallery), dtype=np.float32)
    if similarity != "bbox":
        scores += compared.numpy()
    if similarity != "mask":
        scores += _box_similarity(masks, binary)
    if border_sigma is not None:
        along, area = (counts.numpy().astype(np.float64) for counts in more[-2:])
        scores *= np.exp(-(along**2) / (2 * border_sigma**2 * np.maximum(area, 1)))
    kept = np.ones(len(gallery), dtype=bool)
    if drop_full_frame:
        kept = ~(yield from _decided(gallery.masks, gallery.size[1], min_region_gallery, *more[:2]))

    left = np.flatnonzero(kept)
    if not len(left) and on_empty == "raise":
        raise NoMaskError(f"none of the {len(gallery)} gallery masks is left to match")
    if len(left):
        index = int(left[scores[left].argmax()])  # numpy's argmax takes the first
        if on_empty == "raise" or scores[index] > min_score:
            chosen = unpack_masks(gallery.masks[index], gallery.size[1]), gallery.predicted_iou[index]
            mask, predicted_iou = yield list(chosen)
            return MatchResult(index, float(scores[index]), float(predicted_iou), "sam", mask.numpy(), scores, kept)
    mask = largest_component(map_foreground(coarse_map, coarse_threshold, gallery.size))
    source = "coarse" if mask.any() else "full"
    if source == "full":
        mask = np.ones(gallery.size, dtype=bool)
    return MatchResult(-1, 0.0, math.nan, source, mask, scores, kept)


@functools.wraps(matching, assigned=("__doc__",))
def match(gallery: MaskGallery, coarse_map: Tensor, **options) -> MatchResult:
    return in_step([matching(gallery, coarse_map, **options)])[0]


def fills_frame(masks: Tensor, width: int, min_region: int = 10) -> np.ndarray:
    """Whether `otsu_union(mask, min_region)` is the whole frame, for many masks at once.

    True for masks that touch all four borders and for masks without a region of `min_region` pixels after the closing,
    whose box falls back to the frame.

    Args:
        masks: int64 (K, H, ceil(width / 64)) packed.
        width: W in pixels.
        min_region: in pixels.

    Returns:
        bool (K,) on the CPU.
    """

    def steps() -> Generator[list[Tensor], list[Tensor], np.ndarray]:
        flags = yield list(_frame_flags(masks, width, min_region))
        return (yield from _decided(masks, width, min_region, *flags))

    return in_step([steps()])[0]


def _chunks(masks: Tensor) -> tuple[Tensor, ...]:
    """Packed masks (K, H, words), a few at a time, at least once: a dozen integers per word are the work's most."""
    return masks.split(items_per_chunk(12 * masks[:1].nbytes))


def _frame_flags(masks: Tensor, width: int, min_region: int) -> tuple[Tensor, Tensor]:
    """Which masks fill the frame for certain, and for which that takes a closer look: bool (K,)."""
    parts = [_frame_flags_of_few(part, width, min_region) for part in _chunks(masks)]
    return tuple(map(joined, zip(*parts, strict=True)))


def _frame_flags_of_few(masks: Tensor, width: int, min_region: int) -> tuple[Tensor, Tensor]:
    # The closing reaches the border from at most one pixel away, so a mask that stays two pixels away from some border
    # fills the frame only by the fallback. That is excluded by any horizontal run of min_region pixels.
    near_all = torch.stack([near.flatten(1).any(1) for near in _sides(masks, width, 2, torch.bitwise_or)]).all(0)
    filled = torch.zeros_like(near_all)
    undecided = near_all | ~_has_run(masks, min_region)
    if min_region <= min(width, masks.shape[1]):
        # A run of min_region pixels from a border inwards is part of a region that counts; one from each settles it.
        some = slice(None) if queues(masks.device) else undecided.nonzero().squeeze(1)
        runs = _sides(masks[some], width, max(min_region, 1), torch.bitwise_and)
        filled[some] = undecided[some] & torch.stack([run.flatten(1).any(1) for run in runs]).all(0)
    return filled, undecided & ~filled


def _decided(
    masks: Tensor, width: int, min_region: int, filled: Tensor, undecided: Tensor
) -> Generator[list[Tensor], list[Tensor], np.ndarray]:
    """The closer look, on the host."""
    filled, index = filled.numpy(), np.flatnonzero(undecided)
    if len(index):
        (chosen,) = yield [masks[to_device(torch.from_numpy(index), masks.device)]]
        frame = (0, 0, width, masks.shape[1])
        filled[index] = [otsu_union(mask, min_region) == frame for mask in packed_to_dense(chosen, width)]
    return filled


def _sides(masks: Tensor, width: int, depth: int, combine: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """The `depth` lines of packed masks (K, H, words) along each border, where there are so many, combined to one.

    Top and bottom as words (K, words), left and right as 0 or 1 (K, H).
    """
    rows, columns = range(min(depth, masks.shape[1])), range(min(depth, width))
    lines = (
        [masks[:, y] for y in rows],
        [masks[:, -1 - y] for y in rows],
        [_column(masks, x) for x in columns],
        [_column(masks, width - 1 - x) for x in columns],
    )
    return [functools.reduce(combine, side) for side in lines]


def _border_pixels(masks: Tensor, width: int) -> Tensor:
    """Rows and columns in which packed masks come within three pixels of each border, summed: int64 (K,)."""
    return sum(popcount(side) for side in _sides(masks, width, 3, torch.bitwise_or))


def grid_masks(masks: Tensor, width: int, grid: tuple[int, int]) -> Tensor:
    """Masks shrunk to a grid: bilinear with half-pixel centres and without antialias, any non-zero value is foreground.

    A cell is then the OR of the at most 2 x 2 pixels that its sample position lies between: for 224 to 14 pixels, of
    rows and columns 16 u + 7 and 16 u + 8.

    Args:
        masks: int64 (K, H, ceil(width / 64)) packed.
        width: W in pixels.
        grid: (h, w).

    Returns:
        bool (K, h, w).
    """
    rows, columns = (_taps(*sizes).to(masks.device) for sizes in ((masks.shape[1], grid[0]), (width, grid[1])))
    picked = masks[:, rows[0]] | masks[:, rows[1]]  # (K, h, words)
    picked = [(picked[:, :, x // 64] >> (x % 64)) & 1 for x in columns]
    return (picked[0] | picked[1]).bool()


def _taps(size: int, cells: int) -> Tensor:
    """int64 (2, cells): the pixels on both sides of every sample position ((i + 1/2) size / cells - 1/2), clamped."""
    position = (2 * torch.arange(cells) + 1) * size - cells  # in units of 1 / (2 cells)
    position.clamp_(min=0)
    low = position // (2 * cells)
    high = torch.where(position % (2 * cells) == 0, low, low + 1).clamp_(max=size - 1)
    return torch.stack([low, high])


def _column(masks: Tensor, x: int) -> Tensor:
    """Column x of packed masks as 0 or 1: int64 (K, H)."""
    return (masks[:, :, x // 64] >> (x % 64)) & 1


def _has_run(masks: Tensor, length: int) -> Tensor:
    """Whether a word of packed masks (K, H, words) has `length` set pixels in a row: bool (K,).

    Runs over a word boundary may be missed, so False isn't certain.
    """
    if length > 64:
        return torch.zeros(len(masks), dtype=torch.bool, device=masks.device)
    if queues(masks.device):
        return _row_has_run(masks, length)
    found = _row_has_run(masks[:, ::16], length)  # enough for nearly all
    missed = (~found).nonzero().squeeze(1)
    found[missed] = _row_has_run(masks[missed], length)
    return found


def _row_has_run(masks: Tensor, length: int) -> Tensor:
    done, runs = 1, masks
    while done < length:
        step = min(done, length - done)
        runs = runs & (runs >> step) & ((1 << (64 - step)) - 1)  # bit x: pixels x .. x + done + step - 1 are set
        done += step
    return (runs != 0).flatten(1).any(1)


def _at_resolution(
    gallery: MaskGallery, coarse_map: Tensor, threshold: float, resolution: str
) -> tuple[Tensor, Tensor]:
    """Packed gallery masks (K, H', words) and the binarised map, bool (H', W')."""
    if resolution == "official14":
        masks = pack_masks(grid_masks(gallery.masks, gallery.size[1], tuple(coarse_map.shape)))
        return masks, coarse_map > threshold
    enlarged = F.interpolate(coarse_map[None, None], size=gallery.size, mode="bilinear", align_corners=False)
    return gallery.masks, enlarged[0, 0] > threshold


def _box_similarity(masks: Tensor, binary: Tensor) -> np.ndarray:
    """Exact IoU float32 (K,) of the extents of packed masks with that of one bool mask; 0 where one is empty."""
    boxes = torch.cat([boxes_of_packed(part, binary.shape[1]) for part in _chunks(masks)]).cpu().numpy()
    boxes[:, 2:] += masks.flatten(1).any(1).cpu().numpy()[:, None]
    return iou_exact(boxes, tight_box(binary.cpu().numpy()) or (0, 0, 0, 0)).astype(np.float32)


def _check_map(coarse_map: Tensor) -> Tensor:
    values = torch.as_tensor(coarse_map).detach()
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if values.ndim != 2 or values.numel() == 0:
        raise ConfigError(f"the coarse map must be two-dimensional with finite values, got shape {tuple(values.shape)}")
    return values
