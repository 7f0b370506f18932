"""Copies between the host and a GPU, from and to pinned memory: neither waits for the other more than it must."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Generator, Iterable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Reading", "Upload", "in_step", "packed", "queues", "to_device", "to_host", "unpacked"]

Result = TypeVar("Result")

_ALIGNED = 8  # bytes, the largest element


def queues(device: torch.device) -> bool:
    """Whether a device works through a queue of launches, so that waiting for it makes it idle."""
    return device.type != "cpu"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on ``device``; the host doesn't wait for what is queued there."""
    pinned = device.type == "cuda" and not tensor.is_cuda
    return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=pinned)


@functools.cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    # Streams come from a pool of each priority, in turn: no graph is recorded on this one, of another priority.
    return torch.cuda.Stream(device, priority=-1)


class Upload:
    """A tensor of the host on its way to a device, beside what that works on. May be made in any thread."""

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self._event = None
        if device.type != "cuda":
            self._there = tensor.to(device)
            return
        # a stream alone would make the thread's own device current again, with a context on it
        with torch.cuda.device(device), torch.cuda.stream(_copies(device)):
            self._there = to_device(tensor, device)
            self._event = torch.cuda.Event()
            self._event.record()

    def result(self) -> Tensor:
        """It, on the device; what is launched on the current stream from now on waits for it, the host doesn't."""
        if self._event is not None:
            stream = torch.cuda.current_stream(self._there.device)
            stream.wait_event(self._event)
            self._there.record_stream(stream)  # its memory isn't given to other copies before the stream is done
        return self._there


class Reading:
    """A tensor on its way to the host, as soon as the current stream gets there."""

    def __init__(self, tensor: Tensor) -> None:
        self._there, self._event = tensor, None
        if tensor.is_cuda:
            self._there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._there.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def result(self) -> Tensor:
        """It, pinned if it comes from a GPU. Waits for it, not for what was queued later."""
        if self._event is not None:
            self._event.synchronize()
        return self._there


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors on the host: those of a GPU (one and the same) all in one copy, those of the CPU themselves."""
    there = [x for x in tensors if x.device.type != "cpu"]
    copies = iter(unpacked(Reading(packed(there)).result(), there) if there else ())
    return [x if x.device.type == "cpu" else next(copies) for x in tensors]


def in_step(tasks: Iterable[Generator[list[Tensor], list[Tensor], Result]]) -> list[Result]:
    """What generators return that yield tensors and are sent them on the host: those that all of them ask for at a time
    come in one copy."""
    tasks = list(tasks)
    results: list[Result | None] = [None] * len(tasks)
    sent: dict[int, list[Tensor] | None] = dict.fromkeys(range(len(tasks)))
    while sent:
        asked = {}
        for i, tensors in sent.items():
            try:
                asked[i] = tasks[i].send(tensors)
            except StopIteration as end:
                results[i] = end.value
        there = iter(to_host([x for tensors in asked.values() for x in tensors]))
        sent = {i: list(itertools.islice(there, len(tensors))) for i, tensors in asked.items()}
    return results


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors one after the other, uint8 (n,)."""
    parts = (x.contiguous().flatten().view(torch.uint8) for x in tensors)
    return torch.cat([F.pad(part, (0, -len(part) % _ALIGNED)) for part in parts])


def unpacked(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What was :func:`packed`, each in memory of its own: results may be kept for long, pinned memory is short."""
    tensors, start = [], 0
    for x in like:
        part = buffer[start : start + x.nbytes]
        tensors.append(part.view(x.dtype).view(x.shape).clone())
        start += x.nbytes + -x.nbytes % _ALIGNED
    return tensors
