"""Work done ahead of whoever needs it, by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["attempted", "in_background"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_background(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int, workers: int = 8
) -> Iterator[Result]:
    """`map`, in order, with the results of the next ``ahead`` items being made by up to ``workers`` threads while the
    caller works on those before; 0 makes a result when it is asked for."""
    if ahead == 0:
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(min(workers, ahead), thread_name_prefix="pro2sam")
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def attempted(function: Callable[[Item], Result], item: Item) -> Result | None:
    """Work done ahead that may fail: what fails here fails again where it is needed, unless memory was short."""
    try:
        return function(item)
    except Exception:
        return None
