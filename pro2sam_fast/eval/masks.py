"""Evaluation of Pro2SAM as a whole: coarse maps matched with SAM's masks, boxes of the chosen masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.localization import LabelledPhoto, LocalizationDataset
from ..data.tables import open_image
from ..pipelines.matching import MatchResult, match
from .gallery_cache import GalleryCache
from .localization import LocalizationAccuracy
from .maps import PixelReport, Predictions, count_pixels, likeliest_label, pixel_report, squeezed
from .protocols import PROTOCOLS, transform_boxes
from .ranks import gathered, ranks

__all__ = ["MaskReport", "evaluate_mask_pixels", "evaluate_masks"]

_VIEW = 224


@dataclass
class MaskReport:
    """metrics: see `LocalizationAccuracy.compute`. sources: photos by what made their mask: sam, coarse or full.
    accuracy: holds the records."""

    metrics: dict[str, float]
    sources: dict[str, int]
    accuracy: LocalizationAccuracy


@torch.inference_mode()
def evaluate_masks(
    predictions: Predictions,
    data: LocalizationDataset,
    galleries: GalleryCache,
    *,
    matching: Mapping[str, Any] | None = None,
    sam_input: int | str = 224,
    box: str = "otsu_union",
    min_region_box: int = 100,
    iou_set: Sequence[float] = (0.5, 0.7, 0.9),
    iou: str = "plus1",
) -> MaskReport:
    """Matches every map with its photo's gallery and scores the box of the chosen mask in a 224 x 224 view; under
    torchrun the ranks share the photos.

    Args:
        predictions: of photos of `data`; scores decide Top-1 and Top-5 if they are there.
        galleries: gives the masks.
        matching: options of `pipelines.matching.match`.
        sam_input: "native", or the side of the square to which photos are squeezed for SAM (224 in the published
            evaluation).
        box, min_region_box: as for `Localizer`.
        iou_set, iou: as for `evaluate_maps`.
    """
    rules = PROTOCOLS["mask"]
    own = LocalizationAccuracy(rules, iou)
    for n, photo, found in _matched(predictions, data, galleries, matching, sam_input):
        height, width = found.mask.shape
        scaled = np.asarray(found.box(box, min_region_box), dtype=np.float64) * _VIEW / np.array([width, height] * 2)
        truth = transform_boxes(photo.boxes, predictions.sizes[n], rules)
        scores = None if predictions.scores is None else predictions.scores[n]
        own.update(photo.id, likeliest_label(photo, scores), truth, scaled, scores, source=found.source)
    records = {record.id: record for part in gathered(list(own.records.values())) for record in part}
    accuracy = LocalizationAccuracy(rules, iou)
    accuracy.merge(records[key] for key in predictions.ids)
    accuracy.require(photo.id for photo in data.photos)
    return MaskReport(accuracy.compute(iou_set), dict(Counter(r.source for r in records.values())), accuracy)


@torch.inference_mode()
def evaluate_mask_pixels(
    predictions: Predictions,
    data: LocalizationDataset,
    galleries: GalleryCache,
    *,
    matching: Mapping[str, Any] | None = None,
    sam_input: int | str = 224,
) -> PixelReport:
    """PxAP of the chosen masks, whose pixels have the score 1 and all others 0, in 224 x 224 pixels; arguments as for
    `evaluate_masks`, of photos with masks."""
    own = {
        photo.id: count_pixels(photo, squeezed(found.mask, _VIEW).astype(np.float64))
        for _, photo, found in _matched(predictions, data, galleries, matching, sam_input)
    }
    counted = {key: one for part in gathered(own) for key, one in part.items()}
    return pixel_report([counted[key] for key in predictions.ids])


def _matched(
    predictions: Predictions,
    data: LocalizationDataset,
    galleries: GalleryCache,
    matching: Mapping[str, Any] | None,
    sam_input: int | str,
) -> Iterator[tuple[int, LabelledPhoto, MatchResult]]:
    """This rank's photos, their place in the predictions, and the masks chosen for them."""
    by_id = {photo.id: photo for photo in data.photos}
    rank, world = ranks()
    for n in range(rank, len(predictions.ids), world):
        photo = by_id[predictions.ids[n]]
        image = open_image(photo.path).convert("RGB")
        if sam_input != "native":
            image = image.resize((sam_input, sam_input), Image.Resampling.BILINEAR)
        gallery = galleries.generate([np.asarray(image)])[0]
        yield n, photo, match(gallery, torch.from_numpy(predictions.maps[n]), **(matching or {}))
