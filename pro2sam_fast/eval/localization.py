"""Localization accuracy from one record a photo: Top-1, Top-5, GT-known, box accuracy, CorLoc, error taxonomy.

Every metric is a function of the records alone, so a saved table (see `eval.table`) gives all of them again.
Percentages are over all photos.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..boxes import iou_exact, iou_plus1
from ..errors import ConfigError, DataError
from .protocols import Protocol, protocol

__all__ = ["ERROR_TYPES", "LocalizationAccuracy", "Record", "box_accuracy", "corloc", "error_taxonomy", "error_type"]

IOUS = {"plus1": iou_plus1, "exact": iou_exact}
ERROR_TYPES = ("Correct", "Cls", "M-Ins", "Part", "More", "Other")


@dataclass
class Record:
    """What an evaluation keeps of a photo.

    id: unique. label: annotated class. top5: predicted classes, likeliest first; empty without a classifier.
    boxes: float64 (n, 4), annotated, in the view's pixels. box: (4,), predicted. iou: the highest IoU of `box` with
    `boxes`. ious: float (K,), the same at every threshold of a sweep, or None. source: what made the box.
    class_boxes: predicted boxes by class where the method's maps depend on the class, else empty.
    """

    id: str
    label: int
    boxes: np.ndarray
    box: tuple[float, float, float, float]
    iou: float
    top5: tuple[int, ...] = ()
    source: str = "map"
    ious: np.ndarray | None = None
    class_boxes: dict[int, tuple[float, float, float, float]] = field(default_factory=dict)

    def best_iou(self, label: int, convention: str = "plus1") -> float:
        """The highest IoU of the box for that class with any annotated box; 0 if the method gave none for it."""
        if not self.class_boxes:
            return self.iou
        if label not in self.class_boxes:
            return 0.0
        return float(IOUS[convention](np.array(self.class_boxes[label], dtype=np.float64), self.boxes).max())


def box_accuracy(records: Sequence[Record], iou_set: Sequence[float] = (0.5, 0.7, 0.9)) -> dict[str, float]:
    """Percent of photos whose box reaches each IoU (>=), and their mean as "mean"."""
    values = np.array([r.iou for r in records])
    result = {f"box_acc@{t:g}": 100 * float((values >= t).mean()) for t in iou_set}
    return {**result, "mean": float(np.mean(list(result.values())))}


def corloc(records: Sequence[Record], iou_threshold: float = 0.5) -> dict[str, float]:
    """PASCAL's CorLoc: IoU > threshold, averaged over classes ("macro") and over photos ("micro")."""
    hits: dict[int, list[bool]] = {}
    for r in records:
        hits.setdefault(r.label, []).append(r.best_iou(r.label) > iou_threshold)
    per_class = [100 * float(np.mean(h)) for h in hits.values()]
    return {"macro": float(np.mean(per_class)), "micro": 100 * float(np.mean(np.concatenate(list(hits.values()))))}


def error_type(box: Sequence[float], boxes: np.ndarray, right_class: bool = True) -> str:
    """Where a localization went wrong, one of `ERROR_TYPES` (TS-CAM, ICCV 2021), with the +1 convention.

    In this order: wrong class; Correct, IoU > 0.5; M-Ins, two annotated boxes are covered by more than 0.3; Part, more
    than half of the prediction lies inside the best annotated box; More, it covers 0.7 of that one or more; Other.
    """
    if not right_class:
        return "Cls"
    box, boxes = np.asarray(box, dtype=np.float64), np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    ious = iou_plus1(box, boxes)
    if ious.max() > 0.5:
        return "Correct"
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2]) + 1
    inter = np.maximum(sides, 0).prod(-1)
    areas = np.maximum(boxes[:, 2:] - boxes[:, :2] + 1, 0).prod(-1)
    covered = np.where(areas > 0, inter / np.where(areas > 0, areas, 1), 0.0)
    if (covered > 0.3).sum() >= 2:
        return "M-Ins"
    nearest = int(ious.argmax())
    own = float((box[2:] - box[:2] + 1).prod())
    if inter[nearest] / own > 0.5:
        return "Part"
    return "More" if covered[nearest] >= 0.7 else "Other"


def error_taxonomy(records: Sequence[Record], given_class: bool = False) -> dict[str, float]:
    """Percent of photos of each `error_type`; ``given_class`` leaves the class out, as suits class-free maps."""
    types = Counter()
    for r in records:
        right = given_class or (len(r.top5) > 0 and r.top5[0] == r.label)
        wanted = r.label if given_class else (r.top5[0] if r.top5 else r.label)
        types[error_type(r.class_boxes.get(wanted, r.box), r.boxes, right)] += 1
    return {name: 100 * types[name] / len(records) for name in ERROR_TYPES}


class LocalizationAccuracy:
    """Collects one record a photo and gives the numbers of a report.

    Args:
        rules: a protocol or its name; its Top-k localisation is strict (> 0.5) under "tscam".
        iou: "plus1", as all reference evaluators, or "exact".
    """

    def __init__(self, rules: Protocol | str = "sat", iou: str = "plus1") -> None:
        self.rules = protocol(rules) if isinstance(rules, str) else rules
        if iou not in IOUS:
            raise ConfigError(f"iou must be one of {', '.join(IOUS)}, got {iou!r}")
        self.iou = iou
        self.records: dict[str, Record] = {}

    def update(
        self,
        id: str,
        label: int,
        boxes: np.ndarray,
        box: Sequence[float],
        scores: np.ndarray | None = None,
        **others: object,
    ) -> Record:
        """Adds a photo.

        Args:
            id: unique in the run.
            label: annotated class.
            boxes: (n, 4) annotated boxes in the view's pixels.
            box: (4,) the predicted box.
            scores: (C,) logits or probabilities, or None without a classifier.
            others: `Record`'s ``source``, ``ious``, ``class_boxes``.

        Raises:
            DataError: the id was added before, or there is no annotated box, or values are NaN.
        """
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        if id in self.records:
            raise DataError(f"photo {id!r} was evaluated twice.")
        if len(boxes) == 0:
            raise DataError(f"photo {id!r} has no annotated box.")
        box = tuple(float(v) for v in box)
        if not (np.isfinite(boxes).all() and np.isfinite(box).all()):
            raise DataError(f"photo {id!r} has a box with NaN or infinite values.")
        top5: tuple[int, ...] = ()
        if scores is not None:
            scores = np.asarray(scores)
            if not np.isfinite(scores).all():
                raise DataError(f"photo {id!r} has class scores with NaN or infinite values.")
            top5 = tuple(np.argsort(-scores, kind="stable")[:5].tolist())
        best = float(IOUS[self.iou](np.array(box), boxes).max())
        record = Record(id, int(label), boxes, box, best, top5, **others)
        self.records[id] = record
        return record

    def merge(self, records: Iterable[Record]) -> None:
        """Adds the records of another process; an id that is here already is an error."""
        for record in records:
            if record.id in self.records:
                raise DataError(f"photo {record.id!r} was evaluated twice.")
            self.records[record.id] = record

    def require(self, ids: Iterable[str]) -> None:
        """DataError unless exactly the photos ``ids`` were evaluated."""
        wanted = set(ids)
        for what, some in (("missing", wanted - self.records.keys()), ("unknown", self.records.keys() - wanted)):
            if some:
                raise DataError(f"{len(some)} photos are {what} in the evaluation, the first is {min(some)!r}.")

    def compute(self, iou_set: Sequence[float] = (0.5, 0.7, 0.9)) -> dict[str, float]:
        """GT-known, Top-1 and Top-5 localisation and classification, box accuracies, CorLoc; in percent."""
        records = list(self.records.values())
        if not records:
            raise DataError("no photo was evaluated.")
        known = np.array([r.best_iou(r.label, self.iou) for r in records])
        result = {"GT-known": 100 * float((known >= 0.5).mean())}
        if all(r.top5 for r in records):
            right1 = np.array([r.top5[0] == r.label for r in records])
            right5 = np.array([r.label in r.top5 for r in records])
            located = known > 0.5 if self.rules.loc_strict else known >= 0.5
            result |= {
                "Top-1 Loc": 100 * float((right1 & located).mean()),
                "Top-5 Loc": 100 * float((right5 & located).mean()),
                "Top-1 Cls": 100 * float(right1.mean()),
                "Top-5 Cls": 100 * float(right5.mean()),
            }
        result |= box_accuracy(records, iou_set)
        return {**result, **{f"CorLoc {k}": v for k, v in corloc(records).items()}}
