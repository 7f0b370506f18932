"""Greedy non-maximum suppression of boxes (`nms`), with the results of torchvision's CPU kernel."""

from __future__ import annotations

import torch

from .. import _native
from ._backends import check_call, register

__all__ = ["nms"]


def _nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference. boxes (K, 4), scores (K) -> keep (K), kept ()."""
    order = _order(scores)
    x0, y0, x1, y1 = boxes[order].unbind(1)
    areas = (x1 - x0) * (y1 - y0)
    alive = torch.ones_like(order, dtype=torch.bool)
    for i in range(len(order)):
        if not alive[i]:
            continue
        rest = slice(i + 1, None)
        width = (torch.minimum(x1[i], x1[rest]) - torch.maximum(x0[i], x0[rest])).clamp(min=0)
        height = (torch.minimum(y1[i], y1[rest]) - torch.maximum(y0[i], y0[rest])).clamp(min=0)
        inter = width * height
        iou = inter / (areas[i] + areas[rest] - inter)
        alive[rest] &= ~(iou.double() > iou_threshold)
    kept = alive.sum()
    return torch.cat([order[alive], torch.full_like(order[~alive], -1)]), kept


def _order(scores: torch.Tensor) -> torch.Tensor:
    return scores.sort(descending=True, stable=True).indices


def nms(
    boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes that no better box overlaps too much.

    Boxes are visited by descending score, equal scores by ascending index. A visited box removes every later one whose
    float32 IoU with it is greater than `iou_threshold`, compared in double. Areas are (x1 - x0) * (y1 - y0); two boxes
    without area have the IoU 0 / 0 and do not remove each other.

    Args:
        boxes: float32 (K, 4), XYXY, finite.
        scores: (K,), on the same device.
        iou_threshold: at least 0; 1 or more removes nothing.
        backend: "auto" takes the fastest that can run and warns once if that isn't the device's first choice;
            "reference" or "cpu" work or raise.

    Returns:
        keep: int64 (K,), indices of the boxes kept in the order of the visit, then -1.
        kept: int64 (), their number.

    Raises:
        TypeError: `boxes` isn't a dense float32 tensor.
        ValueError: shapes or devices don't fit.
        ConfigError: unknown back end.
        BackendError: the back end can't run here or not on this device; the message carries the reason.
    """
    check_call("nms", backend, boxes=boxes, scores=scores)
    return torch.ops.pro2sam_fast.nms(boxes, scores, iou_threshold, backend=backend)


def _check_nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> None:
    if boxes.dtype != torch.float32 or boxes.layout != torch.strided:
        raise TypeError(f"nms: boxes must be a dense float32 tensor, got {boxes.dtype}, {boxes.layout}")
    if boxes.dim() != 2 or boxes.shape[1] != 4 or scores.dim() != 1 or len(boxes) != len(scores):
        raise ValueError(
            f"nms: boxes must be (K, 4) and scores (K,), got {tuple(boxes.shape)} and {tuple(scores.shape)}"
        )
    if boxes.device != scores.device:
        raise ValueError(f"nms: all inputs must be on one device, got {boxes.device} and {scores.device}")


def _empty_nms(boxes, scores, iou_threshold) -> tuple[torch.Tensor, torch.Tensor]:
    keep = torch.empty((boxes.shape[0],), dtype=torch.int64, device=boxes.device)
    return keep, torch.empty((), dtype=torch.int64, device=boxes.device)


def _nms_cpu(boxes, scores, iou_threshold):
    boxes, order = boxes.contiguous(), _order(scores)
    keep, kept = _empty_nms(boxes, scores, iou_threshold)
    _native._cpu.nms(boxes.data_ptr(), order.data_ptr(), keep.data_ptr(), kept.data_ptr(), len(boxes), iou_threshold)
    return keep, kept


def _example(device):
    """Forty boxes, half of which overlap a better one by more than half; two scores are equal."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(100, (20, 2), generator=generator).float().repeat(2, 1)
    sizes = torch.randint(20, 60, (40, 2), generator=generator).float()
    scores = torch.rand(40, generator=generator)
    scores[7] = scores[30]
    return torch.cat([corners, corners + sizes], dim=1).to(device), scores.to(device), 0.5


register(
    'nms(Tensor boxes, Tensor scores, float iou_threshold, *, str backend="auto") -> (Tensor keep, Tensor kept)',
    _check_nms,
    {"reference": _nms, "cpu": _nms_cpu},
    _empty_nms,
    {"exact": _example},
)
