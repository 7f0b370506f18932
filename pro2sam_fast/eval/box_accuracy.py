"""Box accuracy of score maps over a sweep of thresholds: MaxBoxAcc, MaxBoxAccV2 and the single-threshold reports.

Sources: Choe et al., Evaluating Weakly Supervised Object Localization Methods Right (CVPR 2020); the evaluators of SAT
(ICCV 2023) and Pro2SAM (ECCV 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..errors import ConfigError, DataError
from ..ops import contour_sweep
from .protocols import Protocol, level_maps, protocol, score_levels

__all__ = ["MaxBoxAcc", "sweep_maps"]

_AT_ONCE = 256


def sweep_maps(
    maps: np.ndarray | torch.Tensor,
    boxes: Sequence[np.ndarray],
    thresholds: Sequence[float],
    rules: Protocol | str = "sat",
    multi_contour: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Best IoU and box of every map at every threshold.

    Args:
        maps: (B, h, w) coarse maps, or score maps at the view's size.
        boxes: for each map the annotated boxes (n, 4) in the view's pixels, see `protocols.transform_boxes`.
        thresholds: rising, in the protocol's normalised range.
        rules: a protocol with a map, or its name.
        multi_contour: every contour is a box, holes too, and the best one counts ("wsoleval" only).

    Returns:
        iou: float64 (B, K), the highest IoU (+1 convention) with any annotated box.
        found: int64 (B, K, 4), the box that has it.

    Raises:
        ConfigError: the protocol has no map, or arguments don't fit it.
        DataError: a map that the protocol can't take.
    """
    rules = protocol(rules) if isinstance(rules, str) else rules
    if rules.map is None:
        raise ConfigError(f"the {rules.name} protocol scores masks, not maps")
    if multi_contour and rules.name != "wsoleval":
        raise ConfigError(f"the {rules.name} protocol has one box a map; multi_contour needs wsoleval")
    if len(maps) != len(boxes):
        raise ConfigError(f"{len(maps)} maps but annotated boxes for {len(boxes)}")
    # a few hundred levels of 224 x 224 in memory, not those of a whole data set
    parts = [
        _sweep(*level_maps(maps[i : i + _AT_ONCE], thresholds, rules), boxes[i : i + _AT_ONCE], rules, multi_contour)
        for i in range(0, max(1, len(maps)), _AT_ONCE)
    ]
    return tuple(np.concatenate(part) for part in zip(*parts))


def _sweep(levels, index, boxes, rules, multi_contour):
    counts = [len(b) for b in boxes]
    truth = np.concatenate([np.asarray(b, dtype=np.float64).reshape(-1, 4) for b in boxes] or [np.zeros((0, 4))])
    first = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int64)
    iou, found = contour_sweep(
        levels,
        torch.from_numpy(truth),
        first,
        int(index.max()) + 1 if index.numel() else 1,
        "all" if multi_contour else rules.rule,
        torch.tensor(rules.empty),
        rules.clamp,
    )
    return iou.gather(1, index).numpy(), found.gather(1, index[..., None].expand(-1, -1, 4)).numpy()


class MaxBoxAcc:
    """Percent of photos whose box reaches an IoU, at the best of all thresholds (Choe et al. 2020, section 3).

    With the default arguments `compute` gives MaxBoxAcc; `MaxBoxAcc((0.3, 0.5, 0.7), multi_contour=True)` is
    MaxBoxAccV2, whose IoUs pick their thresholds one by one.

    Args:
        iou_thresholds: IoUs in (0, 1], met by >=.
        step: of the threshold sweep 0, step, 2 step, ... below 1.
        multi_contour: every contour of a map is a box, and the best one counts; else the largest contour alone.

    Example:
        metric = MaxBoxAcc()
        metric.update(scoremap, gt_boxes)   # for every photo
        metric.compute()["MaxBoxAcc"]
    """

    def __init__(
        self, iou_thresholds: Sequence[float] = (0.5,), step: float = 0.001, multi_contour: bool = False
    ) -> None:
        if not iou_thresholds or not all(0 < t <= 1 for t in iou_thresholds):
            raise ConfigError(f"iou_thresholds must lie in (0, 1], got {tuple(iou_thresholds)}")
        if not 0 < step <= 1:
            raise ConfigError(f"step must lie in (0, 1], got {step!r}")
        self.iou_thresholds = tuple(iou_thresholds)
        self.multi_contour = multi_contour
        self.thresholds = np.arange(0, 1, step)
        self.reset()

    def reset(self) -> None:
        """Forgets all photos."""
        self.hits = np.zeros((len(self.iou_thresholds), len(self.thresholds)), dtype=np.int64)
        self.count = 0

    def update(self, scoremap: np.ndarray | torch.Tensor, gt_boxes: np.ndarray) -> np.ndarray:
        """Counts one photo, or a batch of them.

        Args:
            scoremap: float (H, W), or (B, H, W), in [0, 1] without NaN, at the size that is evaluated, see
                `protocols.prepare_score_maps`.
            gt_boxes: (n, 4) XYXY in the map's pixels; for a batch a list of B of them.

        Returns:
            Best IoU at every threshold, float64 (K,) or (B, K).

        Raises:
            DataError: values outside [0, 1], NaN, or a photo without boxes.
        """
        maps = torch.as_tensor(scoremap)
        single = maps.ndim == 2
        maps, boxes = (maps[None], [gt_boxes]) if single else (maps, list(gt_boxes))
        for i, m in enumerate(maps):
            if not (torch.isfinite(m).all() and m.min() >= 0 and m.max() <= 1):
                raise DataError(f"score map {i} must hold values from 0 to 1 without NaN.")
        for i, b in enumerate(boxes):
            if np.asarray(b).size == 0:
                raise DataError(f"photo {i} has no annotated box.")
        levels, index = score_levels(maps, torch.from_numpy(self.thresholds))
        iou, _ = _sweep(levels, index, boxes, protocol("wsoleval"), self.multi_contour)
        for row, threshold in zip(self.hits, self.iou_thresholds):
            row += (iou >= threshold).sum(0)
        self.count += len(maps)
        return iou[0] if single else iou

    def merge(self, other: MaxBoxAcc) -> None:
        """Adds the photos that another one counted, e.g. on another machine."""
        if (other.iou_thresholds, other.multi_contour) != (self.iou_thresholds, self.multi_contour) or len(
            other.thresholds
        ) != len(self.thresholds):
            raise ConfigError("only metrics with the same options can be merged")
        self.hits += other.hits
        self.count += other.count

    def curves(self) -> dict[str, np.ndarray]:
        """Percent of photos at every threshold: {"threshold": (K,), "box_acc@IoU": (K,), ...}."""
        if self.count == 0:
            raise DataError("no photo was counted.")
        curves = {f"box_acc@{t:g}": 100 * row / self.count for t, row in zip(self.iou_thresholds, self.hits)}
        return {"threshold": self.thresholds, **curves}

    def compute(self) -> dict[str, float]:
        """Percent at the best threshold of every IoU, that threshold, and their mean under "MaxBoxAcc"."""
        curves = self.curves()
        result = {}
        for t in self.iou_thresholds:
            curve = curves[f"box_acc@{t:g}"]
            best = int(curve.argmax())
            result[f"box_acc@{t:g}"] = float(curve[best])
            result[f"threshold@{t:g}"] = float(self.thresholds[best])
        result["MaxBoxAcc"] = float(np.mean([result[f"box_acc@{t:g}"] for t in self.iou_thresholds]))
        return result
