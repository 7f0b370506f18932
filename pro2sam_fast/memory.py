"""One bound on what a step holds at a time, and what is done where even that is too much."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["CHUNK_BYTES", "in_chunks", "is_out_of_memory", "items_per_chunk", "joined"]

# What one step may hold besides its arguments and results; results do not depend on it.
CHUNK_BYTES = 64 << 20

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
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
    return results


def joined(parts: list[Tensor]) -> Tensor:
    """Tensors joined along their first dimension; a single one isn't copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
