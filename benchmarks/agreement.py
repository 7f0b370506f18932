"""How far two galleries, or the logits of two decoders, are from each other."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from pro2sam_fast.gallery import MaskGallery
from pro2sam_fast.ops import mask_iou

__all__ = ["Decoded", "Metrics", "distance", "twins"]

Metrics = dict[str, float]
Decoded = tuple[Tensor, Tensor]  # logits (G, 3, 4e, 4e), predicted IoU (G, 3)


def twins(pairs: Iterable[tuple[MaskGallery, MaskGallery]], least: float) -> Metrics:
    """How two galleries of each photo differ.

    Args:
        pairs: galleries to judge, and those to judge them by.
        least: IoU from which on the most similar mask of the other gallery is a twin.

    Returns:
        masks, masks_there: in all galleries. other_count: photos with another number of masks. twinless,
        twinless_there: masks without a twin. twins, twins_there: percent of the masks that have one. iou_min, iou_mean:
        of every mask (of both sides) with its most similar one. same_order: percent of the neighbours among the masks
        with twins whose twins follow each other in the same order. rating_gap: largest difference of predicted IoU
        between twins.
    """
    there, back, order, gaps, other_count = [], [], [], [0.0], 0
    for a, b in pairs:
        iou = mask_iou(a.packed_flat(), b.packed_flat()).cpu()
        best, twin = pad(iou, (0, 1)).max(dim=1)  # an empty gallery has IoU 0 with everything
        there.append(best)
        back.append(pad(iou, (0, 0, 0, 1)).amax(dim=0))
        matched = best >= least
        order.append(twin[matched].diff() > 0)
        gap = a.predicted_iou.cpu()[matched] - b.predicted_iou.cpu()[twin[matched]]
        gaps += gap.abs().tolist()
        other_count += len(a) != len(b)
    there, back, order = map(torch.cat, (there, back, order))
    both = torch.cat([there, back])
    return {
        "masks": len(there),
        "masks_there": len(back),
        "other_count": other_count,
        "twinless": int((there < least).sum()),
        "twinless_there": int((back < least).sum()),
        "twins": _percent(there >= least),
        "twins_there": _percent(back >= least),
        "iou_min": both.min().item() if len(both) else 1.0,
        "iou_mean": both.double().mean().item() if len(both) else 1.0,
        "same_order": _percent(order),
        "rating_gap": max(gaps),
    }


def distance(pairs: Iterable[tuple[Decoded, Decoded]]) -> Metrics:
    """Relative RMS of logits, the largest of all photos and over all of them, and the largest difference of IoU."""
    squares, total, worst, gap = 0.0, 0.0, 0.0, 0.0
    for (logits, iou), (wanted, wanted_iou) in pairs:
        wrong = (logits.double() - wanted.double()).square().sum().item()
        size = wanted.double().square().sum().item()
        squares, total, worst = squares + wrong, total + size, max(worst, wrong / size)
        gap = max(gap, (iou.double() - wanted_iou.double()).abs().max().item())
    return {"logits_rms": (squares / total) ** 0.5, "worst_photo_rms": worst**0.5, "iou_gap": gap}


def _percent(flags: Tensor) -> float:
    return 100 * flags.double().mean().item() if len(flags) else 100.0
