"""Set-up that workloads share: photos, models with equal weights, inputs, our back ends."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rows import ROOT

import pro2sam_fast
import pro2sam_fast.io
from pro2sam_fast.models.lite import load_sam_lite
from pro2sam_fast.testing import backend_cases, forced_isa

from . import Options

__all__ = [
    "back_ends",
    "grid",
    "in_dtype",
    "instruction_sets",
    "original",
    "photo",
    "photo_files",
    "sam",
]


def photo_files(options: Options) -> list[Path]:
    """The photos to measure on."""
    folder = options.images or ROOT / "examples" / "images"
    files = [source.path for source in pro2sam_fast.io.iter_sources(folder)]
    if not files:
        raise SystemExit(f"no photos in {folder}")
    return [Path(file) for file in files]


def photo(options: Options, height: int, width: int, index: int = 0) -> np.ndarray:
    """A real photo at this size: uint8 (height, width, 3)."""
    files = photo_files(options)
    image = Image.open(files[index % len(files)]).convert("RGB")
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


@functools.cache
def sam(name: str, device: torch.device):
    """`lite` with its weights, ViT-B/L/H with random ones (seed 0)."""
    if name == "lite":
        return load_sam_lite().to(device).eval()
    torch.manual_seed(0)
    return pro2sam_fast.build_sam(name).to(device).eval()


@functools.cache
def original(name: str, device: torch.device):
    """segment_anything's model with the weights of `sam(name)`."""
    return pro2sam_fast.to_segment_anything(sam(name, torch.device("cpu"))).to(device).eval()


def in_dtype(options: Options) -> torch.autocast:
    """Networks inside the block compute in the dtype asked for, ours and the peers' alike."""
    return torch.autocast(options.device.type, options.torch_dtype, enabled=options.dtype != "float32")


def grid(points: int) -> int:
    """Points a side of a grid with this many points."""
    side = round(points**0.5)
    if side * side != points:
        raise ValueError(f"{points} isn't a square")
    return side


def back_ends(device: torch.device, call: Callable[[str], object]) -> dict[str, Callable[[], object]]:
    """Our back ends that run on this device, each CPU instruction set among them: name -> call(back end)."""
    found = {}
    for case in backend_cases():
        if case.problem is None and case.device == device.type and case.backend != "auto":
            found[f"{case.backend}/{case.isa}" if case.isa else case.backend] = functools.partial(
                _forced, case.isa, call, case.backend
            )
    return found


def instruction_sets(device: torch.device, call: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """A call that chooses its back end itself: on the CPU once for each instruction set, elsewhere "auto"."""
    return back_ends(device, lambda _: call()) if device.type == "cpu" else {"auto": call}


def _forced(isa: str | None, call: Callable[[str], object], backend: str) -> object:
    with forced_isa(isa):
        return call(backend)


@contextlib.contextmanager
def replaced(owner: object, **attributes: object) -> Iterator[None]:
    """Attributes of a module or object for the duration of the block: to run a plain form inside the real program."""
    before = {name: getattr(owner, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
