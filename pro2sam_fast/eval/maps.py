"""Evaluation of coarse maps on a data set with boxes: predict once, then sweep thresholds under a protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..data.localization import LocalizationDataset
from ..data.tables import open_image
from ..data.views import TestView, ten_crops
from ..errors import ConfigError, DataError
from .box_accuracy import sweep_maps
from .localization import LocalizationAccuracy
from .protocols import Protocol, protocol, transform_boxes

__all__ = ["SELECTIONS", "MapReport", "Predictions", "evaluate_maps", "predict_maps"]

SELECTIONS = ("fixed", "oracle_sum", "val_split")


@dataclass
class Predictions:
    """What a model says of n photos: ids; maps float32 (n, h, w); scores float32 (n, C), logits, or None; sizes (W, H)
    of the photos."""

    ids: list[str]
    maps: np.ndarray
    scores: np.ndarray | None
    sizes: list[tuple[int, int]]


@torch.inference_mode()
def predict_maps(
    model: nn.Module | Callable[[Tensor], dict[str, Tensor]],
    data: LocalizationDataset,
    rules: Protocol | str = "sat",
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    ten_crop: bool = False,
    indices: Sequence[int] | None = None,
) -> Predictions:
    """Maps and class scores of the photos in the protocol's view.

    Args:
        model: (B, 3, S, S) -> {"map": (B, h, w), "logits": (B, C) or None}, in evaluation mode.
        data: photos.
        rules: gives resize and crop.
        ten_crop: scores are the logarithm of the mean softmax over ten crops; maps always come from the central view.
        indices: of the photos, e.g. this rank's share; None for all.
    """
    rules = protocol(rules) if isinstance(rules, str) else rules
    view = TestView(rules.resize, rules.crop)
    chosen = list(range(len(data)) if indices is None else indices)
    maps, scores, sizes = [], [], []
    for start in range(0, len(chosen), batch_size):
        images = [open_image(data.photos[i].path).convert("RGB") for i in chosen[start : start + batch_size]]
        sizes += [image.size for image in images]
        out = model(torch.stack([view(image) for image in images]).to(device))
        maps.append(out["map"].float().cpu().numpy())
        if out.get("logits") is not None:
            logits = out["logits"].float()
            if ten_crop:
                logits = torch.stack([_ten_crop_scores(model, image, rules, device) for image in images])
            scores.append(logits.cpu().numpy())
    return Predictions(
        [data.photos[i].id for i in chosen],
        np.concatenate(maps) if maps else np.zeros((0, 1, 1), np.float32),
        np.concatenate(scores) if scores else None,
        sizes,
    )


def _ten_crop_scores(model: Callable, image: Image.Image, rules: Protocol, device: torch.device | str) -> Tensor:
    logits = model(ten_crops(image, rules.resize, rules.crop).to(device))["logits"].float()
    return logits.softmax(dim=1).mean(dim=0).log()


@dataclass
class MapReport:
    """Accuracy of maps under one protocol.

    threshold: the one that `metrics` are at. selection: how it was chosen. metrics: see `LocalizationAccuracy.compute`.
    fixed: the same at other thresholds. curves: percent of photos per threshold and IoU. accuracy: holds the records.
    """

    rules: Protocol
    threshold: float
    selection: str
    metrics: dict[str, float]
    fixed: dict[float, dict[str, float]]
    curves: dict[str, np.ndarray]
    accuracy: LocalizationAccuracy


def evaluate_maps(
    predictions: Predictions,
    data: LocalizationDataset,
    rules: Protocol | str = "sat",
    *,
    thresholds: Sequence[float] | None = None,
    selection: str = "oracle_sum",
    threshold: float | None = None,
    fixed: Sequence[float] = (0.3, 0.4),
    iou_set: Sequence[float] = (0.5, 0.7, 0.9),
    single_precision: bool = False,
) -> MapReport:
    """Boxes of maps, and how often they are right.

    Args:
        predictions: of all photos of `data`.
        thresholds: the sweep; None is 0, 0.01, ... 0.99.
        selection: "oracle_sum" takes the threshold with the highest GT-known + Top-1 localisation on these very photos,
            as the published evaluators do: an upper bound. "fixed" and "val_split" take `threshold`, the latter
            saying that it was chosen on other photos.
        fixed: thresholds to report beside it.
        single_precision: see `transform_boxes`.

    Raises:
        DataError: photos are missing, twice, or without box.
        ConfigError: options don't fit.
    """
    rules = protocol(rules) if isinstance(rules, str) else rules
    if selection not in SELECTIONS:
        raise ConfigError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}")
    if (selection == "oracle_sum") != (threshold is None):
        raise ConfigError("give a threshold with the selections fixed and val_split, and with no other")
    grid = np.arange(100) / 100 if thresholds is None else np.asarray(thresholds, dtype=np.float64)
    named = [t for t in (*fixed, threshold) if t is not None]
    grid = np.unique(np.concatenate([grid, named]))
    by_id = {photo.id: photo for photo in data.photos}
    if unknown := [i for i in predictions.ids if i not in by_id]:
        raise DataError(f"{len(unknown)} predicted photos aren't in the data set, the first is {unknown[0]!r}.")
    if bare := [i for i in predictions.ids if not by_id[i].boxes]:
        raise DataError(f"{len(bare)} photos have no annotated box, the first is {bare[0]!r}.")
    boxes = [
        transform_boxes(by_id[i].boxes, size, rules, single_precision)
        for i, size in zip(predictions.ids, predictions.sizes, strict=True)
    ]
    iou, found = sweep_maps(predictions.maps, boxes, grid, rules)
    labels = np.array([by_id[i].label for i in predictions.ids])
    if threshold is None:
        right = np.zeros(len(labels), bool) if predictions.scores is None else predictions.scores.argmax(1) == labels
        located = iou >= 0.5
        threshold = float(grid[int((located.mean(0) + (located & right[:, None]).mean(0)).argmax())])

    def at(t: float) -> LocalizationAccuracy:
        k = int(np.searchsorted(grid, t))
        accuracy = LocalizationAccuracy(rules)
        for n, key in enumerate(predictions.ids):
            scores = None if predictions.scores is None else predictions.scores[n]
            accuracy.update(key, int(labels[n]), boxes[n], found[n, k], scores, ious=iou[n])
        accuracy.require(by_id)
        return accuracy

    accuracy = at(threshold)
    return MapReport(
        rules,
        threshold,
        selection,
        accuracy.compute(iou_set),
        {float(t): at(t).compute(iou_set) for t in fixed},
        {"threshold": grid, **{f"box_acc@{t:g}": 100 * (iou >= t).mean(0) for t in iou_set}},
        accuracy,
    )
