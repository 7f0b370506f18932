"""From SAM's low-resolution logits to filtered masks: resizing, stability, boxes, NMS, small regions.

The arithmetic is that of the `segment_anything` package (Kirillov et al. 2023, "Automatic mask generation"), so that
the same logits give the same masks bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

__all__ = [
    "Frame",
    "boxes_of_masks",
    "measure_masks",
    "near_crop_edge",
    "nms",
    "remove_small_regions",
    "stability_score",
    "upsample_chunks",
    "upsample_logits",
]

# Floats that one chunk of full-resolution logits may hold (64 MiB); results do not depend on it.
_CHUNK_ELEMENTS = 1 << 24
# A box side this close (pixels) to a crop's side touches it.
_EDGE_TOLERANCE = 20.0
_EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


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


def upsample_logits(
    low_res: Tensor, img_size: int, input_size: tuple[int, int], original_size: tuple[int, int]
) -> Tensor:
    """Mask logits at the resolution of the photo.

    Two bilinear resizes (half-pixel centres, no antialiasing): to the S x S input frame, cut to the part that is not
    padding, then to the photo. Computed in float32.

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


def upsample_chunks(low_res: Tensor, frame: Frame) -> Iterator[tuple[slice, Tensor]]:
    """The masks of a crop at its own resolution, a few at a time: slices of K with their float32 logits (k, h, w)."""
    h, w = frame.crop_size
    step = max(1, _CHUNK_ELEMENTS // (frame.img_size**2 + h * w))
    for start in range(0, low_res.shape[0], step):
        part = slice(start, min(start + step, low_res.shape[0]))
        yield part, upsample_logits(low_res[part], frame.img_size, frame.input_size, (h, w))


def stability_score(logits: Tensor, mask_threshold: float, offset: float) -> Tensor:
    """IoU of the masks cut at ``mask_threshold + offset`` and ``- offset``: logits (K, H, W) -> float32 (K,).

    The smaller mask lies in the larger, so this is a ratio of pixel counts. NaN where both are empty.
    """
    high = (logits > mask_threshold + offset).sum(-1, dtype=torch.int32).sum(-1, dtype=torch.int32)
    low = (logits > mask_threshold - offset).sum(-1, dtype=torch.int32).sum(-1, dtype=torch.int32)
    return high / low


def boxes_of_masks(masks: Tensor) -> Tensor:
    """Boxes of bool masks (K, H, W): int64 (K, 4), XYXY of the extreme pixels; [0, 0, 0, 0] for an empty mask."""
    if masks.numel() == 0:
        return torch.zeros(masks.shape[0], 4, dtype=torch.int64, device=masks.device)
    spans = []
    for occupied in (masks.any(dim=1), masks.any(dim=2)):
        n = occupied.shape[1]
        first = occupied.to(torch.uint8).argmax(dim=1)
        last = n - 1 - occupied.flip(1).to(torch.uint8).argmax(dim=1)
        spans.append((first, last))
    (x0, x1), (y0, y1) = spans
    return torch.stack([x0, y0, x1, y1], dim=1) * masks.any(dim=2).any(dim=1)[:, None]


def near_crop_edge(boxes: Tensor, frame: Frame) -> Tensor:
    """Which boxes, int64 (K, 4) in the crop's pixels, touch a crop side that is no image side: bool (K,)."""
    x0, y0, _, _ = frame.crop_box
    h, w = frame.image_size
    boxes = (boxes + boxes.new_tensor([x0, y0, x0, y0])).float()
    at_crop = (boxes - boxes.new_tensor(frame.crop_box)).abs() <= _EDGE_TOLERANCE
    at_image = (boxes - boxes.new_tensor([0, 0, w, h])).abs() <= _EDGE_TOLERANCE
    return (at_crop & ~at_image).any(dim=1)


def measure_masks(
    low_res: Tensor, frame: Frame, mask_threshold: float, stability_offset: float, stability_thresh: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Drops unstable masks and masks cut by a crop side; a few masks at full resolution at a time.

    Args:
        low_res: (K, 4e, 4e) logits.
        frame: the crop.
        mask_threshold: a pixel belongs to the mask where its logit is above this.
        stability_offset: see :func:`stability_score`.
        stability_thresh: least stability score kept; 0 or less keeps all.

    Returns:
        Indices int64 (k,) of the masks kept, their stability float32 (k,) and boxes int64 (k, 4) in the crop's pixels.
    """
    device = low_res.device
    kept, scores, boxes = [], [], []
    for part, logits in upsample_chunks(low_res, frame):
        stability = stability_score(logits, mask_threshold, stability_offset)
        index = torch.arange(part.start, part.stop, device=device)
        if stability_thresh > 0.0:
            keep = stability >= stability_thresh
            logits, stability, index = logits[keep], stability[keep], index[keep]
        box = boxes_of_masks(logits > mask_threshold)
        keep = ~near_crop_edge(box, frame)
        kept.append(index[keep])
        scores.append(stability[keep])
        boxes.append(box[keep])
    if not kept:
        return (
            torch.zeros(0, dtype=torch.int64, device=device),
            torch.zeros(0, device=device),
            torch.zeros(0, 4, dtype=torch.int64, device=device),
        )
    return torch.cat(kept), torch.cat(scores), torch.cat(boxes)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression with the semantics of torchvision's CPU kernel.

    Boxes are visited by descending score, equal scores by ascending index. A visited box removes every later one
    whose float32 IoU with it is greater than ``iou_threshold`` (compared in double). Areas are (x1-x0)*(y1-y0); two
    boxes without area have the IoU 0/0 = NaN and do not remove each other. Runs on the CPU.

    Args:
        boxes: (K, 4) XYXY, taken as float32.
        scores: (K,).
        iou_threshold: at least 0; 1 or more removes nothing.

    Returns:
        int64 (k,): indices of the boxes kept, in the order of the visit, on the device of ``boxes``.
    """
    order = scores.detach().cpu().sort(descending=True, stable=True).indices.numpy()
    x0, y0, x1, y1 = np.ascontiguousarray(boxes.detach().cpu().float().numpy()[order].T)
    areas = (x1 - x0) * (y1 - y0)
    alive = np.ones(len(order), dtype=bool)
    zero = np.float32(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        for i in range(len(order)):
            if not alive[i]:
                continue
            rest = slice(i + 1, None)
            width = np.maximum(zero, np.minimum(x1[i], x1[rest]) - np.maximum(x0[i], x0[rest]))
            height = np.maximum(zero, np.minimum(y1[i], y1[rest]) - np.maximum(y0[i], y0[rest]))
            overlap = width * height
            iou = overlap / (areas[i] + areas[rest] - overlap)
            alive[rest] &= ~(iou.astype(np.float64) > iou_threshold)
    return torch.from_numpy(order[alive]).to(boxes.device)


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
    labels, count = ndimage.label(~mask if holes else mask, structure=_EIGHT_CONNECTED)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    small = areas < min_area
    if not small.any():
        return mask, False
    inside = np.empty(count + 1, dtype=bool)
    inside[0] = holes
    inside[1:] = small if holes else ~small
    if not holes and small.all():
        inside[_largest_region(labels, areas)] = True
    return inside[labels], True


def _largest_region(labels: np.ndarray, areas: np.ndarray) -> int:
    # Of equally large regions, the first in the order in which block-based labelling meets them: 2 x 2 blocks, row by
    # row (Bolelli et al. 2019), as OpenCV does.
    largest = np.flatnonzero(areas == areas.max()) + 1
    if len(largest) == 1:
        return int(largest[0])
    rows, columns = np.nonzero(np.isin(labels, largest))
    first = np.lexsort((columns // 2, rows // 2))[0]
    return int(labels[rows[first], columns[first]])
