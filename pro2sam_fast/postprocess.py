"""From SAM's low-resolution logits to filtered masks: resizing, stability, boxes, NMS, small regions.

The arithmetic is that of the `segment_anything` package (Kirillov et al. 2023, "Automatic mask generation"), so that
the same logits give the same masks bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .ops import mask_measure
from .ops.mask_clean import remove_small_regions
from .ops.mask_measure import boxes_of_masks, upsample_logits

__all__ = [
    "Frame",
    "boxes_of_masks",
    "measure_masks",
    "near_crop_edge",
    "nms",
    "remove_small_regions",
    "score_masks",
    "select",
    "upsample_logits",
]

# A box side this close (pixels) to a crop's side touches it.
_EDGE_TOLERANCE = 20.0


class Frame(NamedTuple):
    """Where a crop's logits live.

    img_size: side S of the square input frame. input_size: (h, w) of the resized crop inside it, without padding.
    crop_box: XYXY, half-open, in the image. image_size: (H, W).
    """

    img_size: int
    input_size: tuple[int, int]
    crop_box: tuple[int, int, int, int]
    image_size: tuple[int, int]

    @property
    def crop_size(self) -> tuple[int, int]:
        x0, y0, x1, y1 = self.crop_box
        return y1 - y0, x1 - x0

    @property
    def is_whole_image(self) -> bool:
        return self.crop_size == tuple(self.image_size)


def near_crop_edge(boxes: Tensor, frame: Frame) -> Tensor:
    """Which boxes, int64 (K, 4) in the crop's pixels, touch a crop side that is no image side: bool (K,)."""
    near = boxes.new_zeros(len(boxes), dtype=torch.bool)
    if frame.is_whole_image:
        return near
    x0, y0, _, _ = frame.crop_box
    h, w = frame.image_size
    # side by side, as constants in a tensor would have to be copied to the device
    for side, offset, crop, image in zip(boxes.unbind(1), (x0, y0, x0, y0), frame.crop_box, (0, 0, w, h), strict=True):
        at = (side + offset).float()
        near |= ((at - crop).abs() <= _EDGE_TOLERANCE) & ((at - image).abs() > _EDGE_TOLERANCE)
    return near


def score_masks(
    low_res: Tensor, frame: Frame, mask_threshold: float, stability_offset: float, stability_thresh: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which masks are stable and not cut by a crop side, without waiting for the device.

    The stability score is the IoU of the masks cut at ``mask_threshold + stability_offset`` and ``- stability_offset``
    at the crop's resolution. The smaller mask lies in the larger, so this is a ratio of pixel counts; NaN where both
    are empty.

    Args:
        low_res: float32 (K, 4e, 4e) logits.
        frame: the crop.
        mask_threshold: a pixel belongs to the mask where its logit is above this.
        stability_offset: in logits.
        stability_thresh: least stability score kept; 0 or less keeps all.

    Returns:
        Which masks are kept, bool (K,), their stability float32 (K,), boxes int64 (K, 4) in the crop's pixels and areas
        int64 (K,).
    """
    inner, outer, areas, boxes = mask_measure(
        low_res, frame.img_size, frame.input_size, frame.crop_size, mask_threshold, stability_offset
    )
    stability = inner / outer
    keep = ~near_crop_edge(boxes, frame)
    if stability_thresh > 0.0:
        keep &= stability >= stability_thresh
    return keep, stability, boxes, areas


def measure_masks(
    low_res: Tensor, frame: Frame, mask_threshold: float, stability_offset: float, stability_thresh: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Drops unstable masks and masks cut by a crop side; see :func:`score_masks`.

    Returns:
        Indices int64 (k,) of the masks kept, their stability float32 (k,), boxes int64 (k, 4) in the crop's pixels and
        areas int64 (k,).
    """
    keep, *measures = score_masks(low_res, frame, mask_threshold, stability_offset, stability_thresh)
    index = keep.nonzero().squeeze(1)
    return index, *(x[index] for x in measures)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression with the semantics of torchvision's CPU kernel.

    Boxes are visited by descending score, equal scores by ascending index. A visited box removes every later one
    whose float32 IoU with it is greater than ``iou_threshold`` (compared in double). Areas are (x1-x0)*(y1-y0); two
    boxes without area have the IoU 0/0 = NaN and do not remove each other.

    Args:
        boxes: (K, 4) XYXY, taken as float32.
        scores: (K,).
        iou_threshold: at least 0; 1 or more removes nothing.

    Returns:
        int64 (k,): indices of the boxes kept, in the order of the visit, on the device of ``boxes``.
    """
    keep, kept = ops.nms(boxes.detach().float(), scores.detach(), iou_threshold)
    return keep[: int(kept)]


def select(keep: Tensor, boxes: Tensor, scores: Tensor, iou_threshold: float) -> tuple[Tensor, Tensor]:
    """:func:`nms` among the boxes kept so far, without waiting for the device.

    Args:
        keep: bool (K,).
        boxes, scores, iou_threshold: as for :func:`nms`.

    Returns:
        int64 (K,): indices of the boxes kept, in the order of the visit, then any others; int64 (): their number.
    """
    index, count = ops.compact(keep)
    index = index.clamp(min=0)
    visited, kept = ops.nms(boxes[index].float(), scores[index], iou_threshold, count)
    return index[visited], kept
