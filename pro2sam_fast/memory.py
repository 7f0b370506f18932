"""One bound on what a step holds at a time, and what is done where even that is too much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .errors import Pro2SamError

__all__ = ["CHUNK_BYTES", "in_chunks", "is_out_of_memory", "items_per_chunk", "joined", "results_or_reasons"]

# What one step may hold besides its arguments and results; results do not depend on it.
CHUNK_BYTES = 64 << 20

Item = TypeVar("Item")
T = TypeVar("T")


def items_per_chunk(bytes_each: int) -> int:
    """How many items of so many bytes fit the bound, at least one."""
    return max(1, CHUNK_BYTES // max(1, bytes_each))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is short: that of a device, of Python, or of PyTorch's CPU allocator.

    A launch that finds no room for its stack is told by the CUDA driver in words only, "out of memory".
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "out of memory")
    )


def in_chunks(call: Callable[[int, int], T], count: int, size: int) -> list[T]:
    """The results of ``call(start, stop)`` for consecutive parts of ``range(count)``.

    Args:
        call: works on the items of ``[start, stop)``; must be repeatable.
        count: number of items; none gives no results.
        size: items a part. Where they don't fit the memory, the part is halved, and so are those after it.

    Raises:
        What ``call`` raises; running out of memory only with a single item.
    """
    results, start = [], 0
    while start < count:
        stop = min(start + size, count)
        try:
            results.append(call(start, stop))
            start = stop
        except Exception as error:
            if stop - start == 1 or not is_out_of_memory(error):
                raise
            size = (stop - start) // 2
            torch.cuda.empty_cache()
    return results


def results_or_reasons(
    call: Callable[[Sequence[Item]], list[T]],
    photos: Sequence[Item],
    strict: bool,
    halves: bool = True,
    short: Callable[[int], None] = lambda size: None,
) -> list[T | str]:
    """The results of ``call(photos)``, a photo each; why there is none for a photo with which it fails alone.

    Args:
        call: must be repeatable: photos that don't fit the memory, or one of which fails, are taken in halves.
        photos: any number of them.
        strict: what ``call`` raises is raised, but for a lack of memory where there are halves.
        halves: whether there are any if ``strict``.
        short: is told of a lack of memory, and a size that may fit.

    Raises:
        What ``call`` raises that is neither a `Pro2SamError` nor a lack of memory.
    """
    if not photos:
        return []
    half = len(photos) // 2
    try:
        return call(photos)
    except (Pro2SamError, MemoryError, RuntimeError) as error:
        lacking = is_out_of_memory(error)
        if not (lacking or isinstance(error, Pro2SamError)) or (strict and not (lacking and halves and half)):
            raise
        reason = "the photo doesn't fit the memory" if lacking else str(error)
    if lacking:
        torch.cuda.empty_cache()  # by now nobody holds what the failed call did
        short(max(half, 1))
    if not half:
        return [reason]
    parts = photos[:half], photos[half:]
    return [result for part in parts for result in results_or_reasons(call, part, strict, halves, short)]


def joined(parts: list[Tensor]) -> Tensor:
    """Tensors joined along their first dimension; a single one isn't copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
