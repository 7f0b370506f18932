"""Evaluation of coarse maps on a data set with boxes: predict once, then sweep thresholds under a protocol."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..boxes import iou_exact
from ..data.localization import LabelledPhoto, LocalizationDataset, class_key
from ..data.tables import open_image
from ..data.views import TestView, ten_crops
from ..errors import ConfigError, DataError
from .baselines import Baseline
from .box_accuracy import MaxBoxAcc, sweep_maps
from .localization import LocalizationAccuracy
from .protocols import Protocol, prepare_score_maps, protocol, transform_boxes
from .pxap import PxAP, ground_truth_pixels
from .ranks import gathered, ranks

__all__ = [
    "SELECTIONS",
    "MapReport",
    "PixelReport",
    "Predictions",
    "count_pixels",
    "evaluate_maps",
    "evaluate_pixels",
    "likeliest_label",
    "pixel_report",
    "predict_maps",
    "predict_on_all_ranks",
    "shared_classes",
    "squeezed",
]

SELECTIONS = ("fixed", "oracle_sum", "val_split")


@dataclass
class Predictions:
    """What a model says of n photos: ids; maps float32 or float64 (n, h, w); scores float32 (n, C), logits of the
    data's classes, or None; sizes (W, H) of the photos."""

    ids: list[str]
    maps: np.ndarray
    scores: np.ndarray | None
    sizes: list[tuple[int, int]]


def shared_classes(model: Sequence[str], data: Sequence[str]) -> list[int]:
    """The model's class of each of the data's classes, by their names; empty if the model lacks one.

    Names that begin with a WordNet id are compared by it. Where one side's names are but numbers, as for metadata of
    wsolevaluation, as many classes are the same ones.
    """
    if any(list(names) == [str(i) for i in range(len(names))] for names in (model, data)):
        return list(range(len(data))) if len(model) == len(data) else []
    place = {class_key(name): i for i, name in enumerate(model)}
    found = [place.get(class_key(name)) for name in data]
    return [] if None in found else found


@torch.inference_mode()
def predict_maps(
    model: nn.Module | Callable[[Tensor], dict[str, Tensor]],
    data: LocalizationDataset,
    rules: Protocol | str = "sat",
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    ten_crop: bool = False,
    ten_crop_resize: int = 256,
    indices: Sequence[int] | None = None,
    classes: Sequence[int] | None = None,
) -> Predictions:
    """Maps and class scores of the photos in the protocol's view.

    Args:
        model: (B, 3, S, S) -> {"map": (B, h, w), "logits": (B, C) or None}, in evaluation mode. A `Baseline` of the
            data's classes gives the map of the annotated class, as GT-known and Top-5 localisation want it; where
            Top-1 is right, it is that of the predicted class. One of other classes gives that of its predicted class.
        data: photos.
        rules: gives resize and crop.
        ten_crop: scores are the logarithm of the mean softmax over ten crops of the photo at ``ten_crop_resize``
            squared; maps always come from the central view.
        indices: of the photos, e.g. this rank's share; None for all.
        classes: the model's class of each of the data's, see `shared_classes`; empty if they differ, and then there
            are no scores. None: the same, if there are as many.
    """
    rules = protocol(rules) if isinstance(rules, str) else rules
    view = TestView(rules.resize, rules.crop)
    chosen = list(range(len(data)) if indices is None else indices)
    of_data = len(data.class_names)
    if isinstance(model, Baseline) and classes is None and model.num_classes != of_data:
        classes = ()
    of_label = isinstance(model, Baseline) and (classes is None or len(classes) > 0)
    columns = list(range(of_data) if classes is None else classes)
    maps, scores, sizes = [], [], []
    for start in range(0, len(chosen), batch_size):
        photos = [data.photos[i] for i in chosen[start : start + batch_size]]
        images = [open_image(photo.path).convert("RGB") for photo in photos]
        sizes += [image.size for image in images]
        labels = (torch.tensor([columns[photo.label] for photo in photos], device=device),) if of_label else ()
        out = model(torch.stack([view(image) for image in images]).to(device), *labels)
        maps.append(out["map"].float().cpu().numpy())
        logits = out.get("logits")
        if logits is not None and columns and (classes is not None or logits.shape[1] == of_data):
            if ten_crop:
                logits = torch.stack([_ten_crop_scores(model, image, ten_crop_resize, device) for image in images])
            scores.append(logits.float()[:, columns].cpu().numpy())
    return Predictions(
        [data.photos[i].id for i in chosen],
        np.concatenate(maps) if maps else np.zeros((0, 1, 1), np.float32),
        np.concatenate(scores) if scores else None,
        sizes,
    )


def predict_on_all_ranks(model: Callable, data: LocalizationDataset, *arguments: Any, **options: Any) -> Predictions:
    """As `predict_maps` for all photos, in their order, each predicted by one rank of torchrun."""
    rank, world = ranks()
    mine = predict_maps(model, data, *arguments, **options, indices=range(rank, len(data), world))
    parts = [part for part in gathered(mine) if part.ids]
    place = {photo.id: i for i, photo in enumerate(data.photos)}
    ids = [key for part in parts for key in part.ids]
    order = np.argsort([place[key] for key in ids])
    sizes = [size for part in parts for size in part.sizes]
    scores = None if parts[0].scores is None else np.concatenate([part.scores for part in parts])[order]
    maps = np.concatenate([part.maps for part in parts])[order]
    return Predictions([ids[i] for i in order], maps, scores, [sizes[i] for i in order])


def _ten_crop_scores(model: Callable, image: Image.Image, resize: int, device: torch.device | str) -> Tensor:
    logits = model(ten_crops(image, resize).to(device))["logits"].float()
    return logits.softmax(dim=1).mean(dim=0).log()


@dataclass
class MapReport:
    """Accuracy of maps under one protocol.

    threshold: the one that `metrics` are at. selection: how it was chosen. metrics: see `LocalizationAccuracy.compute`.
    fixed: the same at other thresholds. curves: percent of photos per threshold and IoU. accuracy: holds the records.
    sweeps: under "wsoleval" MaxBoxAcc and MaxBoxAccV2 with what `MaxBoxAcc.compute` gives, each IoU at its own best
    threshold.
    """

    rules: Protocol
    threshold: float
    selection: str
    metrics: dict[str, float]
    fixed: dict[float, dict[str, float]]
    curves: dict[str, np.ndarray]
    accuracy: LocalizationAccuracy
    sweeps: dict[str, dict[str, float]] = field(default_factory=dict)


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
    iou: str = "plus1",
) -> MapReport:
    """Boxes of maps, and how often they are right.

    Args:
        predictions: of all photos of `data`.
        thresholds: the sweep; None is 0, 0.01, ... 0.99.
        selection: "oracle_sum" takes the threshold with the highest GT-known + Top-1 localisation on these very photos,
            as the published evaluators do: an upper bound. "fixed" and "val_split" take `threshold`, the latter
            saying that it was chosen on other photos.
        fixed: thresholds to report beside it.
        iou_set: IoUs of the box accuracies.
        iou: "plus1", as all reference evaluators, or "exact"; MaxBoxAcc keeps the former, which is part of it.

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
    photos = _photos(predictions, data)
    if bare := [photo.id for photo in photos if not photo.boxes]:
        raise DataError(f"{len(bare)} photos have no annotated box, the first is {bare[0]!r}.")
    boxes = [
        transform_boxes(photo.boxes, size, rules, data.single_precision and rules.name == "sat")
        for photo, size in zip(photos, predictions.sizes, strict=True)
    ]
    reached, found = sweep_maps(predictions.maps, boxes, grid, rules)
    if iou == "exact":
        # one box a map, so that it is the same box
        reached = np.stack([iou_exact(own[:, None], truth).max(1) for own, truth in zip(found, boxes, strict=True)])
    scores = [None] * len(photos) if predictions.scores is None else predictions.scores
    labels = np.array([likeliest_label(photo, own) for photo, own in zip(photos, scores, strict=True)])
    if threshold is None:
        right = np.zeros(len(labels), bool) if predictions.scores is None else predictions.scores.argmax(1) == labels
        located = reached >= 0.5
        threshold = float(grid[int((located.mean(0) + (located & right[:, None]).mean(0)).argmax())])

    def at(t: float) -> LocalizationAccuracy:
        k = int(np.searchsorted(grid, t))
        accuracy = LocalizationAccuracy(rules, iou)
        for n, key in enumerate(predictions.ids):
            accuracy.update(key, int(labels[n]), boxes[n], found[n, k], scores[n], ious=reached[n])
        return accuracy

    accuracy = at(threshold)
    return MapReport(
        rules,
        threshold,
        selection,
        accuracy.compute(iou_set),
        {float(t): at(t).compute(iou_set) for t in fixed},
        {"threshold": grid, **{f"box_acc@{t:g}": 100 * (reached >= t).mean(0) for t in iou_set}},
        accuracy,
        _max_box_acc(predictions.maps, boxes) if rules.name == "wsoleval" else {},
    )


def likeliest_label(photo: LabelledPhoto, scores: np.ndarray | None) -> int:
    """The photo's class; of several, the one with the highest score, so that Top-k is right if any of them is found."""
    if scores is None or not photo.labels:
        return photo.label
    return max(photo.labels, key=lambda label: scores[label])


def _photos(predictions: Predictions, data: LocalizationDataset) -> list[LabelledPhoto]:
    # those of the predictions, which must be all of the data, each once
    by_id = {photo.id: photo for photo in data.photos}
    if unknown := [key for key in predictions.ids if key not in by_id]:
        raise DataError(f"{len(unknown)} predicted photos aren't in the data set, the first is {unknown[0]!r}.")
    if len(set(predictions.ids)) != len(predictions.ids):
        twice = Counter(predictions.ids).most_common(1)[0][0]
        raise DataError(f"photo {twice!r} was predicted twice.")
    if missing := by_id.keys() - set(predictions.ids):
        raise DataError(f"{len(missing)} photos are missing in the predictions, the first is {min(missing)!r}.")
    return [by_id[key] for key in predictions.ids]


def _max_box_acc(maps: np.ndarray, boxes: Sequence[np.ndarray]) -> dict[str, dict[str, float]]:
    metrics = {"MaxBoxAcc": MaxBoxAcc(), "MaxBoxAccV2": MaxBoxAcc((0.3, 0.5, 0.7), multi_contour=True)}
    for start in range(0, len(maps), 64):
        part = slice(start, start + 64)
        prepared = prepare_score_maps(torch.from_numpy(maps[part]))
        for metric in metrics.values():
            metric.update(prepared, boxes[part])
    return {name: metric.compute() for name, metric in metrics.items()}


@dataclass
class PixelReport:
    """Accuracy of maps against masks.

    pxap: percent. curves: see `PxAP.curves`. foreground, background: int32 (n, bins), every photo's scores counted in
    the bins of `PxAP`, from which the rest can be computed again.
    """

    pxap: float
    curves: dict[str, np.ndarray]
    foreground: np.ndarray
    background: np.ndarray


def evaluate_pixels(predictions: Predictions, data: LocalizationDataset, step: float = 0.001) -> PixelReport:
    """PxAP of maps on photos with masks, all in 224 x 224 pixels.

    Args:
        predictions: of all photos of `data`, in the view of "wsoleval".
        step: of the thresholds.

    Raises:
        DataError: photos are missing, twice, or without mask; a mask can't be read.
    """
    photos = _photos(predictions, data)
    maps = (prepare_score_maps(torch.from_numpy(coarse)[None])[0].numpy() for coarse in predictions.maps)
    return pixel_report([count_pixels(photo, scores, step) for photo, scores in zip(photos, maps, strict=True)])


def count_pixels(photo: LabelledPhoto, scores: np.ndarray, step: float = 0.001) -> PxAP:
    """A photo's scores (S, S) in [0, 1] counted against its masks, all squeezed to S x S."""
    if not photo.masks:
        raise DataError(f"photo {photo.id!r} has no annotated mask.")

    def read(path: Path) -> np.ndarray:
        return squeezed(np.asarray(open_image(path).convert("L")), len(scores))

    one = PxAP(step)
    ignore = None if photo.ignore is None else read(photo.ignore)
    one.update(scores, ground_truth_pixels([read(path) for path in photo.masks], ignore))
    return one


def pixel_report(counted: Sequence[PxAP]) -> PixelReport:
    """The report over photos that `count_pixels` counted one by one."""
    foreground, background = (np.stack([getattr(one, n) for one in counted]) for n in ("foreground", "background"))
    total = copy(counted[0])
    total.foreground, total.background = foreground.sum(0), background.sum(0)
    return PixelReport(total.compute(), total.curves(), foreground.astype(np.int32), background.astype(np.int32))


def squeezed(mask: np.ndarray, side: int) -> np.ndarray:
    """A mask (H, W) at side x side: the nearest pixel as OpenCV takes it, at or before the place."""
    rows, columns = (np.arange(side) * n // side for n in mask.shape)
    return mask[rows[:, None], columns]
