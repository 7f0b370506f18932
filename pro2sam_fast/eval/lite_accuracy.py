"""Accuracy of a localizer and of its SAM on annotated photos: CUB boxes, COCO things, BSDS regions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from ..boxes import iou_exact, map_box
from ..data.cub import CubPhoto, load_cub
from ..data.segments import SegmentedPhoto, coco_panoptic
from ..io import read_image
from ..models.sam import Sam
from ..pipelines.pro2sam import Localizer
from ..predictor import SamPredictor
from ..results import Localization
from ..train.lite_gtformer import class_activation_map

IOUS = (0.5, 0.7, 0.9)


def cub_photos(root: str | Path, split: str) -> list[CubPhoto]:
    """Photos of ``train`` or ``test``."""
    return [p for p in load_cub(root)[0] if p.train == (split == "train")]


def box_accuracy(found: Sequence, truth: Sequence, ious: Sequence[float] = IOUS) -> dict[str, float]:
    """Percent of photos whose box (x0, y0, x1, y1), half-open, reaches each IoU with the annotated one."""
    values = np.array([float(iou_exact(np.asarray(f, float), np.asarray(t, float))) for f, t in zip(found, truth)])
    return {f"box_acc@{t:g}": 100 * float((values >= t).mean()) for t in ious}


def localizer_accuracy(results: Sequence[Localization], photos: Sequence[CubPhoto]) -> dict[str, float]:
    """GT-known accuracy of final boxes on photos with one annotated box, clipped to the frame."""
    truth = []
    for result, photo in zip(results, photos, strict=True):
        h, w = result.orig_shape
        truth.append(np.clip(photo.box, 0, [w, h, w, h]))
    return box_accuracy([r.box for r in results], truth)


def map_accuracy(maps: np.ndarray, sizes: Sequence[tuple[int, int]], photos: Sequence[CubPhoto], threshold: float):
    """GT-known accuracy of coarse maps (n, h, w) alone: min-max, bilinear to 224, largest component above threshold."""
    boxes, truth = [], []
    for m, (h, w), photo in zip(maps, sizes, photos, strict=True):
        boxes.append(np.array(map_box(m, threshold)) * np.array([w, h, w, h]) / 224)
        truth.append(np.clip(photo.box, 0, [w, h, w, h]))
    return box_accuracy(boxes, truth)


@torch.inference_mode()
def cam_accuracy(localizer: Localizer, photos: Sequence[CubPhoto], threshold: float = 0.3) -> dict[str, float]:
    """The baseline: the trunk's class activation map of its likeliest class, box of the largest component."""
    head = localizer.classifier.model
    maps, sizes = [], []
    for photo in photos:
        image = read_image(photo.path)
        x = head.renormalise(localizer.classifier.prepare(image).unsqueeze(0))
        maps.append(class_activation_map(head.trunk, head.trunk.features(x)[-1], classes=1)[0].numpy())
        sizes.append(image.shape[:2])
    return map_accuracy(np.stack(maps), sizes, photos, threshold)


def coco_things(root: str | Path, split: str = "val") -> list[tuple[SegmentedPhoto, list[int]]]:
    """Photos at full resolution with the ids of their things of more than 32 x 32 pixels."""
    photos = coco_panoptic(Path(root), split, long_side=10**9)
    return [(p, [t for t in p.things if (p.maps[0] == t).sum() > 32 * 32]) for p in photos]


@torch.inference_mode()
def click_accuracy(sam: Sam, photos: Sequence[tuple[SegmentedPhoto, list[int]]]) -> dict[str, float]:
    """One click at a thing's centre (its pixel nearest to the centroid).

    Returns mean IoU of the best of three masks and of the one with the highest predicted IoU, and the rank correlation
    of predicted and true IoU over all masks.
    """
    predictor = SamPredictor(sam)
    best, picked, predicted, true = [], [], [], []
    for photo, things in photos:
        if not things:
            continue
        predictor.set_image(photo.image)
        for thing in things:
            mask = photo.maps[0] == thing
            ys, xs = np.nonzero(mask)
            k = np.argmin((xs - xs.mean()) ** 2 + (ys - ys.mean()) ** 2)
            point, label = np.array([[xs[k], ys[k]]], float), np.array([1])
            masks, scores, _ = predictor.predict(point_coords=point, point_labels=label, multimask_output=True)
            ious = (masks & mask).sum((1, 2)) / (masks | mask).sum((1, 2))
            best.append(ious.max())
            picked.append(ious[scores.argmax()])
            predicted += scores.tolist()
            true += ious.tolist()
    return {
        "clicks": len(best),
        "best_iou": float(np.mean(best)),
        "picked_iou": float(np.mean(picked)),
        "iou_rank_correlation": float(spearmanr(predicted, true)[0]),
    }


def things_hit(results: Sequence[Localization], photos: Sequence[tuple[SegmentedPhoto, list[int]]]) -> float:
    """Percent of photos whose box reaches IoU 0.5 with the box of some annotated thing."""
    hits = []
    for result, (photo, things) in zip(results, photos, strict=True):
        boxes = []
        for thing in things:
            ys, xs = np.nonzero(photo.maps[0] == thing)
            boxes.append((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
        hits.append(any(float(iou_exact(np.asarray(result.box, float), np.asarray(b, float))) >= 0.5 for b in boxes))
    return 100 * float(np.mean(hits))


@torch.inference_mode()
def label_accuracy(localizer: Localizer, paths: Sequence[Path]) -> float:
    """Percent of photos whose label is their index in ``paths``; the label head alone, without a gallery."""
    right = 0
    for index, path in enumerate(paths):
        x = localizer.classifier.prepare(read_image(path)).unsqueeze(0)
        right += int(localizer.classifier(x).argmax()) == index
    return 100 * right / len(paths)
