"""Accuracy of a localizer and of its SAM on annotated photos: CUB boxes, COCO things, BSDS regions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import binary_erosion, distance_transform_edt
from scipy.stats import spearmanr

from ..boxes import iou_exact, map_box
from ..data.cub import CubPhoto, load_cub
from ..data.segments import SegmentedPhoto, bsds, coco_panoptic
from ..io import read_image
from ..models.sam import Sam
from ..pipelines.pro2sam import Localizer, PhotoNet
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


def bsds_segments(root: str | Path, split: str = "val") -> list[tuple[SegmentedPhoto, list[int]]]:
    """Photos with the ids of the first annotator's segments of more than 32 x 32 pixels."""
    photos = bsds(Path(root), split, long_side=10**9)
    return [(p, [int(s) for s in np.unique(p.maps[0]) if s and (p.maps[0] == s).sum() > 32 * 32]) for p in photos]


def clicks(
    sam: Sam, photos: Sequence[tuple[SegmentedPhoto, list[int]]]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """One click at the centre of each segment (its pixel nearest to the centroid).

    Yields the segment bool (h, w), three masks bool (3, h, w) and their predicted IoU float (3,).
    """
    predictor = SamPredictor(sam)
    for photo, segments in photos:
        if not segments:
            continue
        predictor.set_image(photo.image)
        for segment in segments:
            truth = photo.maps[0] == segment
            ys, xs = np.nonzero(truth)
            k = np.argmin((xs - xs.mean()) ** 2 + (ys - ys.mean()) ** 2)
            point, label = np.array([[xs[k], ys[k]]], float), np.array([1])
            masks, scores, _ = predictor.predict(point_coords=point, point_labels=label, multimask_output=True)
            yield truth, masks, scores


@torch.inference_mode()
def click_accuracy(sam: Sam, photos: Sequence[tuple[SegmentedPhoto, list[int]]]) -> dict[str, float]:
    """Of the masks of :func:`clicks`: mean IoU of the best of three and of the one with the highest predicted IoU, mean
    boundary F-score of both, and the rank correlation of predicted and true IoU over all masks."""
    best, picked, predicted, true = [], [], [], []
    for truth, masks, scores in clicks(sam, photos):
        ious = (masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2))
        chosen = ious.argmax(), scores.argmax()
        measured = {index: (ious[index], boundary_f(masks[index], truth)) for index in set(chosen)}
        for found, index in zip((best, picked), chosen):
            found.append(measured[index])
        predicted += scores.tolist()
        true += ious.tolist()
    (best_iou, best_f), (picked_iou, picked_f) = (np.mean(found, axis=0) for found in (best, picked))
    return {
        "clicks": len(best),
        "best_iou": float(best_iou),
        "picked_iou": float(picked_iou),
        "best_boundary_f": float(best_f),
        "picked_boundary_f": float(picked_f),
        "iou_rank_correlation": float(spearmanr(predicted, true)[0]),
    }


def boundary_f(mask: np.ndarray, truth: np.ndarray, tolerance: float = 0.0075) -> float:
    """F-score of the boundary pixels of two bool (h, w) masks: those within ``tolerance`` image diagonals (BSDS500's;
    Martin et al., PAMI 2004) of the other boundary count as found. The frame is no boundary; 0 if one mask has none."""
    edges = [m & ~binary_erosion(m, np.ones((3, 3)), border_value=1) for m in (mask, truth)]
    if not (edges[0].any() and edges[1].any()):
        return 0.0
    reach = tolerance * np.hypot(*mask.shape)
    precision, recall = (
        float((distance_transform_edt(~other)[edge] <= reach).mean()) for edge, other in (edges, edges[::-1])
    )
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


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
def label_accuracy(classifier: PhotoNet, paths: Sequence[Path]) -> float:
    """Percent of photos whose label is their index in ``paths``; the label head alone, without a gallery."""
    right = 0
    for index, path in enumerate(paths):
        right += int(classifier(classifier.prepare(read_image(path)).unsqueeze(0)).argmax()) == index
    return 100 * right / len(paths)
