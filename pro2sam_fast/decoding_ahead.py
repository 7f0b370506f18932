"""Masks of `GridDecoder` on a device that works through a queue: nothing waits for it until logits are on their way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .memory import in_chunks, joined
from .models.sam import GridDecoder
from .models.sam.grid_decoder import DecodedGrid, ImageBases
from .transfer import Reading

__all__ = ["MasksAhead", "masks_ahead"]


class MasksAhead(NamedTuple):
    """The wanted masks of some prompts.

    part: which of the parts. index: int64 (K,), ascending, positions in (G, M). logits: float32 (K, 4e, 4e). iou:
    float32 (K,). alive: how many prompts have a mask.
    """

    part: int
    index: Tensor
    logits: Tensor
    iou: Tensor
    alive: int


def masks_ahead(
    grid: GridDecoder, bases: ImageBases, decoded: DecodedGrid, keep: Tensor, parts: Sequence[tuple[int, int]]
) -> Iterator[MasksAhead]:
    """The wanted masks in the order of (G, M), a part of the prompts at a time; parts where nothing is wanted left out.

    How many masks are wanted is read while those of the first part are being made, into room for all of them; later
    ones get the room that they need.

    Args:
        grid, bases, decoded: that made ``decoded`` for G prompts.
        keep: bool (G, M), masks that are wanted; the first of no prompt.
        parts: consecutive ranges of prompts, (start, stop).

    Yields:
        With operands of float16, an IoU of NaN where a number was beyond their range.
    """
    if not len(keep):
        return
    most = keep.shape[1] - 1
    reading, counts = Reading(keep.sum(dim=1)), []

    def upscale(start: int, stop: int) -> tuple[Tensor, Tensor, int, int]:
        room = sum(counts[start:stop]) if counts else (stop - start) * most
        logits, index, _ = grid.upscale_padded(bases, decoded.select(slice(start, stop)), keep[start:stop], room)
        return logits, index + start * keep.shape[1], start, stop

    for part, (first, last) in enumerate(parts):
        if counts and not any(counts[first:last]):
            continue
        made = in_chunks(lambda a, b, first=first: upscale(first + a, first + b), last - first, last - first)
        counts = counts or reading.result().tolist()
        logits = joined([logits[: sum(counts[a:b])] for logits, _, a, b in made])
        index = joined([index[: sum(counts[a:b])] for _, index, a, b in made])
        if not len(index):
            continue
        iou = decoded.iou.flatten()[index]
        if grid.dtype == torch.float16:
            # a number that is out of range makes all pixels of a prompt NaN somewhere in their 4 x 4 blocks
            iou = iou.masked_fill(logits[:, :4, :4].isnan().flatten(1).any(dim=1), torch.nan)
        yield MasksAhead(part, index, logits, iou, sum(count > 0 for count in counts[first:last]))
