"""Masks of `GridDecoder` on a device that works through a queue: nothing waits for it until logits are on their way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .memory import in_chunks, joined
from .models.sam import GridDecoder
from .models.sam.grid_decoder import DecodedGrid, ImageBases

__all__ = ["MasksAhead", "OutOfRangeError", "masks_ahead"]


class OutOfRangeError(ArithmeticError):
    """A number of this image or of one of its prompts is beyond the range of float16."""


class MasksAhead(NamedTuple):
    """The wanted masks of consecutive prompts.

    stop: the first prompt that isn't among them. prompts: int64 (K,). logits: float32 (K, 4e, 4e). iou: float32 (K,).
    alive: how many prompts have a mask.
    """

    stop: int
    prompts: Tensor
    logits: Tensor
    iou: Tensor
    alive: int


def masks_ahead(
    grid: GridDecoder, bases: ImageBases, decoded: DecodedGrid, keep: Tensor, size: int
) -> Iterator[MasksAhead]:
    """The wanted masks in the order of (G, M), those of ``size`` prompts at a time; none where nothing is wanted.

    How many masks are wanted is read while those of the first prompts are being made, into room for all of them; later
    ones get the room that they need.

    Args:
        grid, bases, decoded: that made ``decoded`` for G prompts.
        keep: bool (G, M), masks that are wanted; the first of no prompt.
        size: prompts.

    Raises:
        OutOfRangeError: an IoU or a logit isn't a number, and the operands are float16.
    """
    if not len(keep):
        return
    halves = grid.dtype == torch.float16
    reading = _Reading(torch.cat([keep.sum(dim=1), decoded.iou.isnan().sum().view(1)]))

    def upscale(start: int, stop: int) -> tuple[Tensor, Tensor, int, int]:
        most = reading.total(start, stop) if reading.done else (stop - start) * (keep.shape[1] - 1)
        logits, index, _ = grid.upscale_padded(bases, decoded.select(slice(start, stop)), keep[start:stop], most)
        return logits, index + start * keep.shape[1], start, stop

    for first in range(0, len(keep), size):
        last = min(first + size, len(keep))
        if reading.done and not reading.total(first, last):
            continue
        parts = in_chunks(lambda a, b, first=first: upscale(first + a, first + b), last - first, last - first)
        if halves and reading.total(len(keep), len(keep) + 1):
            raise OutOfRangeError
        counts = [reading.total(start, stop) for *_, start, stop in parts]
        logits = joined([part[0][:count] for part, count in zip(parts, counts, strict=True)])
        index = joined([part[1][:count] for part, count in zip(parts, counts, strict=True)])
        # a number that is out of range makes all pixels of a prompt NaN somewhere in their 4 x 4 blocks
        if halves and bool(logits[:, :4, :4].isnan().any()):
            raise OutOfRangeError
        if len(index):
            yield MasksAhead(
                last, index // keep.shape[1], logits, decoded.iou.flatten()[index], reading.positive(first, last)
            )


class _Reading:
    """Integers on their way to the host."""

    def __init__(self, numbers: Tensor) -> None:
        self._event = torch.cuda.Event() if numbers.is_cuda else None
        self._numbers: Tensor | list[int] = numbers
        self.done = False
        if self._event is not None:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event.record(torch.cuda.current_stream(numbers.device))

    def _list(self) -> list[int]:
        if not self.done:
            if self._event is not None:
                self._event.synchronize()
            self._numbers, self.done = self._numbers.tolist(), True
        return self._numbers

    def total(self, start: int, stop: int) -> int:
        return sum(self._list()[start:stop])

    def positive(self, start: int, stop: int) -> int:
        return sum(n > 0 for n in self._list()[start:stop])
