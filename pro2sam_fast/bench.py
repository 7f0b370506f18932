"""What this machine does with the bundled model, in two minutes: photos/s, where the time goes, peak memory."""

from __future__ import annotations

import itertools
import os
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from . import __version__
from .api import load
from .backends import backends
from .errors import ConfigError
from .io import Source, iter_sources
from .pipelines.pro2sam import Localizer

__all__ = ["generated_photo", "measure", "stage_times", "text"]

HEIGHT, WIDTH = 480, 640
_GENERATED = 8
_MOST_PHOTOS = 1000
_PHOTOS_A_PASS = {"cpu": 4}
_PHOTOS_A_PASS_ELSEWHERE = 16


def measure(
    folder: str | None = None, *, device: str = "auto", dtype: str | None = None, seconds: float = 20.0
) -> dict[str, Any]:
    """Localize photos with `lite` until `seconds` have passed, at least one pass after the first photo.

    folder: photos (path, folder or glob, as `iter_sources` takes them); None for generated photos of 480 x 640.
    dtype: precision of SAM; None for the model's default.

    Returns "version", "back_ends" (state and reason by name), "device", "threads", "dtype", "photos" (what was
    measured: "source", "files", "megapixels" of the mean photo), "load_s", "first_photo_s", "measured" photos,
    "photos_per_s", "stages_ms" (a photo's mean milliseconds by stage), "peak_bytes" (of the process on a CPU, of the
    GPU's memory else). Raises ConfigError if no photo can be used.
    """
    with _photos(folder) as sources:
        started = time.perf_counter()
        localizer = load("lite", device=device, candidates=0, **({} if dtype is None else {"dtype": dtype}))
        loaded = time.perf_counter()
        localizer(sources[:1], on_error="skip")
        warm = time.perf_counter()
        size = _PHOTOS_A_PASS.get(localizer.device.type, _PHOTOS_A_PASS_ELSEWHERE)
        endless = itertools.cycle(sources)
        spent, tried, photos, pixels, stages = 0.0, 0, 0, 0, {}
        while spent < seconds if photos else tried < len(sources):
            results, times, wall = stage_times(localizer, list(itertools.islice(endless, size)), size)
            spent, tried = spent + wall, tried + size
            photos += len(results)
            pixels += sum(height * width for height, width in (result.orig_shape for result in results))
            stages = {stage: stages.get(stage, 0.0) + len(results) * ms for stage, ms in times.items()}
    if not photos:
        raise ConfigError(f"no photo of '{folder}' can be used")
    return {
        "version": __version__,
        "back_ends": {state.name: str(state) for state in backends.values()},
        "device": str(localizer.device),
        "threads": torch.get_num_threads(),
        "dtype": str(localizer.generator.dtype).removeprefix("torch."),
        "photos": {
            "source": "generated" if folder is None else folder,
            "files": len(sources),
            "megapixels": round(pixels / photos / 1e6, 3),
        },
        "load_s": round(loaded - started, 3),
        "first_photo_s": round(warm - loaded, 3),
        "measured": photos,
        "photos_per_s": round(photos / spent, 4),
        "stages_ms": {stage: round(ms / photos, 3) for stage, ms in stages.items()},
        "peak_bytes": _peak_bytes(localizer.device),
    }


def text(found: dict[str, Any]) -> str:
    """What `measure` returned, for people."""
    photos, stages = found["photos"], found["stages_ms"]
    what = f"generated photos of {HEIGHT} x {WIDTH}" if photos["source"] == "generated" else photos["source"]
    total = sum(stages.values())
    memory = "process" if found["device"] == "cpu" else "GPU"
    lines = [f"pro2sam-fast {found['version']}", "", "back ends"]
    lines += [f"  {name:<10} {state}" for name, state in found["back_ends"].items()]
    lines += [
        "",
        f"localize with lite in {found['dtype']} on {found['device']}, {found['threads']} threads, {what} "
        f"({photos['megapixels']:.2f} megapixels), files read included",
        f"  {found['photos_per_s']:.2f} photos/s, {found['measured']} photos measured",
        f"  {found['load_s']:.1f} s to load, {found['first_photo_s']:.1f} s for the first photo",
        f"  {found['peak_bytes'] / 2**20:.0f} MiB at the peak ({memory})",
        "",
        "where the time of a photo goes",
    ]
    lines += [f"  {stage:<14} {ms:9.1f} ms {100 * ms / total:5.1f} %" for stage, ms in stages.items()]
    return "\n".join(lines)


def stage_times(
    localizer: Localizer, sources: Sequence[str | Source], batch_size: int
) -> tuple[list, dict[str, float], float]:
    """One call: the results without an error, a photo's mean milliseconds by stage, and the seconds of the call.

    Stages: "read", "coarse" (map and label), "encode" (SAM's image encoder), "masks" (the rest of the gallery),
    "match".
    """
    started = time.perf_counter()
    with _clock(localizer.sam.image_encoder, localizer.device) as encode:
        results = localizer(sources, batch_size=batch_size, on_error="skip")
    wall = time.perf_counter() - started
    results = [result for result in results if result.error is None]
    if not results:
        return results, {}, wall
    encoding = sum(encode) / len(results)
    mean = {stage: sum(r.speed[stage] for r in results) / len(results) for stage in results[0].speed}
    stages = {"read": mean["read"], "coarse": mean["coarse"], "encode": encoding}
    return results, {**stages, "masks": mean["gallery"] - encoding, "match": mean["match"]}, wall


def generated_photo(seed: int) -> np.ndarray:
    """uint8 (480, 640, 3): coloured ellipses over a gradient, with noise; the same for the same seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    photo = rng.uniform(40, 200, 3) + (x[..., None] / WIDTH - 0.5) * rng.uniform(-80, 80, 3)
    for _ in range(12):
        (cy, cx), (ry, rx) = rng.uniform((0, 0), (HEIGHT, WIDTH)), rng.uniform(20, 150, 2)
        photo[((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1] = rng.uniform(0, 255, 3)
    return (photo + rng.normal(0, 6, photo.shape)).clip(0, 255).astype(np.uint8)


@contextmanager
def _photos(folder: str | None) -> Iterator[list[Source]]:
    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            for seed in range(_GENERATED):
                Image.fromarray(generated_photo(seed)).save(os.path.join(temporary, f"{seed}.jpg"), quality=90)
        sources = list(itertools.islice(iter_sources(temporary if folder is None else folder), _MOST_PHOTOS))
        if sources[0].error is not None:
            raise ConfigError(str(sources[0].error))
        yield sources


@contextmanager
def _clock(module: nn.Module, device: torch.device) -> Iterator[list[float]]:
    """Milliseconds of every call of `module` inside the block."""
    started, spent = [], []

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * time.perf_counter()

    before = module.register_forward_pre_hook(lambda *_: started.append(now()))
    after = module.register_forward_hook(lambda *_: spent.append(now() - started.pop()))
    try:
        yield spent
    finally:
        before.remove()
        after.remove()


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
