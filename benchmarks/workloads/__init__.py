"""What can be measured, one module a kind; each has `cases(options)`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from case import Case

__all__ = ["Options", "cases"]


@dataclass(frozen=True)
class Options:
    """What every kind is asked for: device, dtype of the networks, folder of photos (None: examples/images)."""

    device: torch.device
    dtype: str = "float32"
    images: Path | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def cases(kind: str, options: Options) -> Iterator[Case]:
    """The cases of one kind, in the order in which they are worth measuring."""
    return importlib.import_module(f"workloads.{kind}").cases(options)
