"""PxAP: pixel-wise average precision of score maps against masks (Choe et al., CVPR 2020, section 3)."""

from __future__ import annotations

import numpy as np

from ..errors import ConfigError, DataError

__all__ = ["PxAP", "ground_truth_pixels"]

IGNORE = 255


def ground_truth_pixels(masks: list[np.ndarray], ignore: np.ndarray | None = None) -> np.ndarray:
    """Labels of pixels: 1 foreground, 0 background, 255 ignored.

    Args:
        masks: of the instances, float or bool (H, W), foreground above 0.5.
        ignore: a region that counts neither way except where it is foreground, or None.
    """
    if not masks:
        raise ConfigError("a photo needs one mask or more")
    foreground = np.any([np.asarray(m) > 0.5 for m in masks], axis=0)
    labels = foreground.astype(np.uint8)
    if ignore is not None:
        labels[(np.asarray(ignore) > 0.5) & ~foreground] = IGNORE
    return labels


class PxAP:
    """Average precision over all pixels of a split; photos are pooled, not averaged.

    Args:
        step: of the threshold sweep 0, step, 2 step, ... below 1.
    """

    def __init__(self, step: float = 0.001) -> None:
        if not 0 < step <= 1:
            raise ConfigError(f"step must lie in (0, 1], got {step!r}")
        self.thresholds = np.arange(0, 1, step)
        # left-closed bins; a score of exactly 1 falls into the one behind 1.0
        self._edges = np.append(self.thresholds, [1.0, 2.0, 3.0])
        self.reset()

    def reset(self) -> None:
        """Forgets all photos."""
        self.foreground = np.zeros(len(self._edges) - 1, dtype=np.int64)
        self.background = np.zeros_like(self.foreground)

    def update(self, scoremap: np.ndarray, labels: np.ndarray) -> None:
        """Counts a photo: scores (H, W) in [0, 1], labels (H, W) as `ground_truth_pixels` gives them.

        Raises:
            DataError: scores outside [0, 1] or NaN, or shapes differ.
        """
        scores, labels = np.asarray(scoremap, dtype=np.float64), np.asarray(labels)
        if scores.shape != labels.shape:
            raise DataError(f"scores {scores.shape} and labels {labels.shape} must have one shape.")
        if not (scores >= 0).all() or not (scores <= 1).all():
            raise DataError("scores must lie in [0, 1] without NaN.")
        self.foreground += np.histogram(scores[labels == 1], self._edges)[0]
        self.background += np.histogram(scores[labels == 0], self._edges)[0]

    def merge(self, other: PxAP) -> None:
        """Adds the photos that another one counted."""
        if len(other.thresholds) != len(self.thresholds):
            raise ConfigError("only metrics with the same step can be merged")
        self.foreground += other.foreground
        self.background += other.background

    def curves(self) -> dict[str, np.ndarray]:
        """Precision and recall at every threshold, "threshold" falling from 1.

        Raises:
            DataError: the split has no foreground pixel.
        """
        if self.foreground.sum() == 0:
            raise DataError("no foreground pixel in the split.")
        tp, fp = self.foreground[::-1].cumsum(), self.background[::-1].cumsum()
        some = tp + fp > 0
        return {
            "threshold": self._edges[:-1][::-1][some],
            "precision": tp[some] / (tp + fp)[some],
            "recall": tp[some] / tp[-1],
        }

    def compute(self) -> float:
        """PxAP in percent."""
        curves = self.curves()
        rises = np.diff(curves["recall"], prepend=0.0)
        return float(100 * (curves["precision"] * rises).sum())
