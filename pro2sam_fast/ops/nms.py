"""Greedy non-maximum suppression of boxes (`nms`), with the results of torchvision's CPU kernel."""

from __future__ import annotations

import torch

from .. import _native
from ..memory import CHUNK_BYTES
from ._backends import check_call, register, triton_kernels

__all__ = ["nms"]

# The kernels of a GPU compare boxes in words of so many.
_WORD = 64


def _nms(
    boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, count: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference. boxes (K, 4), scores (K), count () -> keep (K), kept ()."""
    order = _order(scores, count)
    x0, y0, x1, y1 = boxes[order].unbind(1)
    areas = (x1 - x0) * (y1 - y0)
    count = len(order) if count is None else count
    alive = torch.arange(len(order), device=boxes.device) < count
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


def _order(scores: torch.Tensor, count: torch.Tensor | None) -> torch.Tensor:
    """The visit (K); the boxes that don't take part come last."""
    order = scores.sort(descending=True, stable=True).indices
    return order if count is None else order[(order >= count).sort(stable=True).indices]


def nms(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    iou_threshold: float,
    count: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes that no better box overlaps too much.

    Boxes are visited by descending score, equal scores by ascending index. A visited box removes every later one whose
    float32 IoU with it is greater than `iou_threshold`, compared in double. Areas are (x1 - x0) * (y1 - y0); two boxes
    without area have the IoU 0 / 0 and do not remove each other.

    Args:
        boxes: float32 (K, 4), XYXY, finite.
        scores: (K,), on the same device.
        iou_threshold: at least 0; 1 or more removes nothing.
        count: int64 (), on the same device, as `compact` returns it: only the first so many boxes take part; all if
            None. The others may have any values.
        backend: "auto" takes the fastest that can run and warns once if that isn't the device's first choice;
            "reference", "cpu", "cuda" or "triton" work or raise.

    Returns:
        keep: int64 (K,), indices of the boxes kept in the order of the visit, then -1.
        kept: int64 (), their number.

    Raises:
        TypeError: `boxes` isn't a dense float32 tensor, or `count` no int64 tensor.
        ValueError: shapes or devices don't fit.
        ConfigError: unknown back end.
        BackendError: the back end can't run here or not on this device; the message carries the reason.
    """
    check_call("nms", backend, boxes=boxes, scores=scores)
    return torch.ops.pro2sam_fast.nms(boxes, scores, iou_threshold, count, backend=backend)


def _check_nms(
    boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, count: torch.Tensor | None = None
) -> None:
    if boxes.dtype != torch.float32 or boxes.layout != torch.strided:
        raise TypeError(f"nms: boxes must be a dense float32 tensor, got {boxes.dtype}, {boxes.layout}")
    if boxes.dim() != 2 or boxes.shape[1] != 4 or scores.dim() != 1 or len(boxes) != len(scores):
        raise ValueError(
            f"nms: boxes must be (K, 4) and scores (K,), got {tuple(boxes.shape)} and {tuple(scores.shape)}"
        )
    if count is not None and (count.dtype != torch.int64 or count.layout != torch.strided):
        raise TypeError(f"nms: count must be a dense int64 tensor, got {count.dtype}, {count.layout}")
    if count is not None and count.dim():
        raise ValueError(f"nms: count must be (), got {tuple(count.shape)}")
    for other in (scores, boxes if count is None else count):
        if boxes.device != other.device:
            raise ValueError(f"nms: all inputs must be on one device, got {boxes.device} and {other.device}")


def _empty_nms(boxes, scores, iou_threshold, count=None) -> tuple[torch.Tensor, torch.Tensor]:
    keep = torch.empty((boxes.shape[0],), dtype=torch.int64, device=boxes.device)
    return keep, torch.empty((), dtype=torch.int64, device=boxes.device)


def _nms_cpu(boxes, scores, iou_threshold, count=None):
    if count is not None:
        keep = torch.full((len(boxes),), -1)
        first = slice(min(max(0, int(count)), len(boxes)))
        keep[first], kept = _nms_cpu(boxes[first], scores[first], iou_threshold)
        return keep, kept
    boxes, order = boxes.contiguous(), _order(scores, count)
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


def _scratch(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernels of a GPU work on, within the bound on memory: which boxes are kept, int64 (n) words of one bit
    each, and overlaps, int64 (w, n * 64), of all boxes with those of w words at a time."""
    words = -(-len(boxes) // _WORD)
    at_once = max(1, min(words, CHUNK_BYTES // max(1, 8 * _WORD * words)))
    alive = torch.empty((words,), dtype=torch.int64, device=boxes.device)
    return alive, torch.empty((at_once, words * _WORD), dtype=torch.int64, device=boxes.device)


def _nms_cuda(boxes, scores, iou_threshold, count=None):
    boxes, order = boxes.contiguous(), _order(scores, count)
    keep, kept = _empty_nms(boxes, scores, iou_threshold)
    alive, overlaps = _scratch(boxes)
    _native._cuda.nms(
        boxes.data_ptr(),
        order.data_ptr(),
        0 if count is None else count.data_ptr(),
        *(x.data_ptr() for x in (keep, kept, alive, overlaps)),
        len(boxes),
        len(overlaps),
        iou_threshold,
        boxes.device.index,
        torch.cuda.current_stream(boxes.device).cuda_stream,
    )
    return keep, kept


def _nms_triton(boxes, scores, iou_threshold, count=None):
    keep, kept = _empty_nms(boxes, scores, iou_threshold)
    if count is None:
        count = torch.full((), len(boxes), dtype=torch.int64, device=boxes.device)
    triton_kernels("nms").nms(
        boxes.contiguous(), _order(scores, count), count, keep, kept, *_scratch(boxes), iou_threshold
    )
    return keep, kept


register(
    "nms(Tensor boxes, Tensor scores, float iou_threshold, Tensor? count=None, *, "
    'str backend="auto") -> (Tensor keep, Tensor kept)',
    _check_nms,
    {"reference": _nms, "cpu": _nms_cpu, "cuda": _nms_cuda, "triton": _nms_triton},
    _empty_nms,
    {"exact": _example},
)
