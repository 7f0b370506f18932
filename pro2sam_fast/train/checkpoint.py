"""Checkpoints that survive a kill: written to a temporary file, synced, renamed; the newest two are kept."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from ..io import atomic_file

_NAME = re.compile(r"step_(\d+)\.pt$")


def _numbered(run: Path) -> list[tuple[int, Path]]:
    return sorted((int(m[1]), p) for p in run.glob("step_*.pt") if (m := _NAME.search(p.name)))


def save_checkpoint(run: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Writes ``run/step_<step>.pt`` atomically and deletes all but the newest ``keep``."""
    path = run / f"step_{step:08d}.pt"
    with atomic_file(path) as f:
        torch.save(state, f)
    for _, old in _numbered(run)[:-keep]:
        old.unlink()
    return path


def load_latest(run: Path) -> dict[str, Any] | None:
    """The newest readable checkpoint of a run, or None; an unreadable one is passed over."""
    for _, path in reversed(_numbered(run)):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError):
            continue
    return None
