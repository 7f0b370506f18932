"""Work shared by the ranks of torchrun; in an evaluation each takes every world-th photo, none is counted twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["gathered", "ranks", "under_torchrun"]


@contextmanager
def under_torchrun(device: torch.device) -> Iterator[torch.device]:
    """Joins the other processes if torchrun started this one; gives its own device."""
    if "RANK" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def ranks() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) outside torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gathered(mine: Any) -> list[Any]:
    """What every rank has, on every rank, in the order of ranks. All must call it."""
    _, world = ranks()
    if world == 1:
        return [mine]
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, mine)
    return parts
