"""The mask gallery: what SAM proposes for one image, bit-packed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError
from .ops import pack_masks, popcount, unpack_masks
from .ops.mask_measure import boxes_of_masks
from .rle import coco_rle, mask_to_rle, packed_to_dense
from .transfer import to_device, to_host

__all__ = ["MaskGallery", "galleries_to_host"]

OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")


@dataclass(frozen=True, eq=False, repr=False)
class MaskGallery:
    """K masks of one image of H x W pixels and what is known about them, all on one device.

    Attributes:
        size: (H, W).
        masks: int64 (K, H, ceil(W/64)). Pixel x of a row is bit ``x % 64`` (0 = least significant) of word
            ``x // 64``; bits beyond W are zero.
        boxes: int64 (K, 4), XYXY of the extreme pixels, both ends inclusive; an empty mask has no extent.
        areas: int64 (K,), pixels.
        predicted_iou: float32 (K,), SAM's own estimate of the mask's IoU (not limited to [0, 1]).
        stability: float32 (K,), stability score in [0, 1]; NaN for a mask without any pixel above the lower cutoff.
        points: float64 (K, 2), the (x, y) prompt in pixels of the image.
        crop_boxes: int64 (K, 4), XYXY, half-open, of the crop in which the mask was found.
    """

    size: tuple[int, int]
    masks: Tensor
    boxes: Tensor
    areas: Tensor
    predicted_iou: Tensor
    stability: Tensor
    points: Tensor
    crop_boxes: Tensor

    def __post_init__(self) -> None:
        h, w = self.size
        object.__setattr__(self, "size", (int(h), int(w)))
        k = self.masks.shape[0]
        shapes = [(h, -(-w // 64)), (4,), (), (), (), (2,), (4,)]
        for field, tail in zip(fields(self)[1:], shapes, strict=True):
            shape = tuple(getattr(self, field.name).shape)
            if shape != (k, *tail):
                raise ConfigError(
                    f"{field.name} of {k} masks of {h} x {w} pixels must have shape {(k, *tail)}, got {shape}."
                )

    @classmethod
    def from_dense(
        cls,
        masks: Tensor,
        *,
        predicted_iou: Tensor | None = None,
        stability: Tensor | None = None,
        points: Tensor | None = None,
        crop_boxes: Tensor | None = None,
    ) -> MaskGallery:
        """A gallery of given masks, bool (K, H, W). Scores default to 1, points to 0, crops to the whole image."""
        k, h, w = masks.shape
        device = masks.device
        packed = pack_masks(masks)
        return cls(
            size=(h, w),
            masks=packed,
            boxes=boxes_of_masks(masks),
            areas=popcount(packed),
            predicted_iou=torch.ones(k, device=device) if predicted_iou is None else predicted_iou,
            stability=torch.ones(k, device=device) if stability is None else stability,
            points=torch.zeros(k, 2, dtype=torch.float64, device=device) if points is None else points,
            crop_boxes=torch.tensor([[0, 0, w, h]], device=device).expand(k, 4) if crop_boxes is None else crop_boxes,
        )

    @classmethod
    def empty(cls, size: tuple[int, int], device: torch.device | str = "cpu") -> MaskGallery:
        """A gallery without masks for an image of ``size`` (H, W)."""
        h, w = size
        shapes = [(h, -(-w // 64)), (4,), (), (), (), (2,), (4,)]
        kinds = [torch.int64, torch.int64, torch.int64, torch.float32, torch.float32, torch.float64, torch.int64]
        tensors = (torch.empty((0, *tail), dtype=kind, device=device) for tail, kind in zip(shapes, kinds, strict=True))
        return cls(size, *tensors)

    @classmethod
    def cat(cls, galleries: Sequence[MaskGallery]) -> MaskGallery:
        """One gallery of the masks of several (at least one) of the same image, in order."""
        size = galleries[0].size
        if any(g.size != size for g in galleries):
            raise ConfigError(f"galleries of different image sizes can't be joined: {[g.size for g in galleries]}.")
        if len(galleries) == 1:
            return galleries[0]
        names = [field.name for field in fields(cls)[1:]]
        return cls(size, *(torch.cat([getattr(g, name) for g in galleries]) for name in names))

    def __len__(self) -> int:
        return self.masks.shape[0]

    def __repr__(self) -> str:
        h, w = self.size
        return f"MaskGallery({len(self)} masks of {h} x {w} pixels, device={str(self.device)!r})"

    @property
    def device(self) -> torch.device:
        return self.masks.device

    def select(self, index: Tensor | Sequence[int] | slice) -> MaskGallery:
        """The masks at ``index`` (integers in the wanted order, a bool tensor (K,), or a slice)."""
        if not isinstance(index, (Tensor, slice)):
            index = torch.as_tensor(index, dtype=None if len(index) else torch.int64)
        if isinstance(index, Tensor):
            index = to_device(index, self.device)
        return type(self)(self.size, *(tensor[index] for tensor in self.tensors()))

    def tensors(self) -> list[Tensor]:
        """All of them, in their order."""
        return [getattr(self, field.name) for field in fields(self)[1:]]

    def dense(self) -> Tensor:
        """The masks as bool (K, H, W)."""
        return unpack_masks(self.masks, self.size[1])

    def packed_flat(self) -> Tensor:
        """The masks as int64 (K, H*ceil(W/64)), the form the matching ops take."""
        return self.masks.flatten(1)

    def to(self, device: torch.device | str) -> MaskGallery:
        """The gallery with all its tensors on ``device``."""
        if torch.device(device).type == "cpu":
            return galleries_to_host([self])[0]
        return type(self)(self.size, *(tensor.to(device) for tensor in self.tensors()))

    def to_records(self, output_mode: str = "binary_mask") -> list[dict[str, Any]]:
        """One dict a mask, with the keys, order, values and types of `segment_anything`'s mask generator.

        Keys: ``segmentation`` (bool (H, W) array, uncompressed RLE or COCO RLE), ``area`` int, ``bbox`` [x, y, w, h]
        with w and h the differences of inclusive pixel coordinates, ``predicted_iou`` float, ``point_coords``
        [[x, y]], ``stability_score`` float, ``crop_box`` [x, y, w, h]. Box coordinates are always integers
        (`segment_anything` turns them into floats when some batch of points had no survivor).

        Raises:
            ConfigError: for another ``output_mode``.
        """
        if output_mode not in OUTPUT_MODES:
            raise ConfigError(f"output_mode must be one of {', '.join(OUTPUT_MODES)}, got {output_mode!r}.")
        encode = {"binary_mask": lambda mask: mask, "uncompressed_rle": mask_to_rle, "coco_rle": coco_rle}[output_mode]
        columns = zip(
            packed_to_dense(self.masks, self.size[1]),
            self.areas.tolist(),
            _xywh(self.boxes).tolist(),
            self.predicted_iou.tolist(),
            self.points.tolist(),
            self.stability.tolist(),
            _xywh(self.crop_boxes).tolist(),
            strict=True,
        )
        return [
            {
                "segmentation": encode(mask),
                "area": area,
                "bbox": box,
                "predicted_iou": iou,
                "point_coords": [point],
                "stability_score": stability,
                "crop_box": crop,
            }
            for mask, area, box, iou, point, stability, crop in columns
        ]


def galleries_to_host(galleries: Sequence[MaskGallery]) -> list[MaskGallery]:
    """Galleries with all their tensors on the host, see :func:`pro2sam_fast.transfer.to_host`."""
    tensors = iter(to_host([tensor for gallery in galleries for tensor in gallery.tensors()]))
    return [MaskGallery(g.size, *itertools.islice(tensors, len(g.tensors()))) for g in galleries]


def _xywh(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
