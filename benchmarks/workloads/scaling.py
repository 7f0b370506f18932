"""How cost grows with points, images, resolution and threads; one call is a whole series."""

from __future__ import annotations

import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from case import Case, Runs, Skip
from peers import attempt, segment_anything

from pro2sam_fast.api import load
from pro2sam_fast.generator import MaskGenerator

from . import Options, shared
from .pipeline import generator_options

__all__ = ["cases"]

TESTS = ("tests/test_generator.py", "tests/test_api.py")
POINTS = {True: (16, 64, 256), False: (64, 256, 1024, 4096)}  # by default or not
IMAGES = {True: (1, 2, 4), False: (1, 2, 4, 8, 16, 32)}
SIZES = {True: ((240, 320), (480, 640), (960, 1280)), False: ((480, 640), (960, 1280), (1920, 2560), (3000, 4000))}
FEW_POINTS = 64  # where the axis is another one


def cases(options: Options) -> Iterator[Case]:
    def case(what: str, name: str, build: Callable, *arguments: object, default: bool = True) -> Case:
        return Case(what, name, options.dtype, TESTS, functools.partial(build, options, *arguments), default=default)

    for default, counts in POINTS.items():
        yield case("points", f"masks lite G={counts[0]}..{counts[-1]} 480x640", _points, counts, default=default)
    for default, counts in IMAGES.items():
        name = f"localize lite G={FEW_POINTS} batch={counts[0]}..{counts[-1]} 480x640"
        yield case("images", name, _images, counts, default=default)
    for default, sizes in SIZES.items():
        first, last = (f"{height}x{width}" for height, width in (sizes[0], sizes[-1]))
        yield case("resolution", f"masks lite G={FEW_POINTS} {first}..{last}", _resolution, sizes, default=default)
    if options.device.type == "cpu":
        cores = len(os.sched_getaffinity(0))
        threads = sorted({*(2**i for i in range(cores.bit_length()) if 2**i <= cores), cores})
        yield case("threads", f"masks lite G={FEW_POINTS} 1..{cores} threads 480x640", _threads, threads)


def _points(options: Options, counts: Sequence[int]) -> Runs:
    photo = shared.photo(options, 480, 640)
    return _runs(options, "points", {count: (photo, _makers(options, count)) for count in counts})


def _resolution(options: Options, sizes: Sequence[tuple[int, int]]) -> Runs:
    made = _makers(options, FEW_POINTS)
    photos = (shared.photo(options, *size) for size in sizes)
    return _runs(options, "pixels", {math.prod(photo.shape[:2]): (photo, made) for photo in photos})


def _threads(options: Options, counts: Sequence[int]) -> Runs:
    photo, made = shared.photo(options, 480, 640), _makers(options, FEW_POINTS)
    return _runs(options, "threads", dict.fromkeys(counts, (photo, made)), _with_threads)


def _images(options: Options, counts: Sequence[int]) -> Runs:
    localizer = load(device=options.device, dtype=options.dtype, points_per_side=shared.grid(FEW_POINTS))
    photos = [shared.photo(options, 480, 640, index) for index in range(max(counts))]
    series = _Series("images", options)
    calls = {count: functools.partial(localizer.localize_batch, photos[:count]) for count in counts}
    return Runs({"auto": series.sweep("ours", calls)}, {}, series.facts, ("photos", sum(counts)))


def _makers(options: Options, points: int) -> dict[str, Callable[[np.ndarray], object] | Skip]:
    """Calls from an RGB photo to its masks: ours and segment_anything's, with equal weights and settings."""
    settings = {**generator_options("lite"), "points_per_side": shared.grid(points)}
    ours = MaskGenerator(shared.sam("lite", options.device), dtype=options.dtype, **settings)
    theirs = attempt(functools.partial(segment_anything.generator, "lite", options.device, **settings))

    def peer(rgb: np.ndarray) -> None:
        with shared.in_dtype(options):
            theirs.generate(rgb)

    return {
        "ours": lambda rgb: ours.generate([rgb]),
        "segment_anything": theirs if isinstance(theirs, Skip) else peer,
    }


def _runs(options: Options, axis: str, inputs: Mapping[int, tuple[np.ndarray, dict]], around: Callable | None = None):
    """inputs: x -> the photo and what `_makers` made. around(x, call) runs the call at x in its own way."""
    series = _Series(axis, options)

    def sweep(provider: str) -> Callable[[], None] | Skip:
        calls = {x: made[provider] for x, (_, made) in inputs.items()}
        if any(isinstance(call, Skip) for call in calls.values()):
            return next(iter(calls.values()))
        calls = {x: functools.partial(call, inputs[x][0]) for x, call in calls.items()}
        return series.sweep(provider, {x: functools.partial(around, x, calls[x]) for x in calls} if around else calls)

    return Runs({"auto": sweep("ours")}, {"segment_anything": sweep("segment_anything")}, series.facts)


def _with_threads(count: int, call: Callable[[], object]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        call()
    finally:
        torch.set_num_threads(before)


class _Series:
    """Times of calls along an axis. Facts: "axis"; "series": provider -> [[x, median ms], ...]; "exponent": provider ->
    the slope of log(ms) over log(x), least squares."""

    def __init__(self, axis: str, options: Options):
        self.facts: dict[str, object] = {"axis": axis, "series": {}, "exponent": {}}
        self.options = options
        self._samples: dict[str, dict[int, list[float]]] = {}

    def sweep(self, provider: str, calls: Mapping[int, Callable[[], object]]) -> Callable[[], None]:
        """One call of each, in order. The first sweep warms up and leaves the facts alone."""
        samples = self._samples[provider] = {}

        def run() -> None:
            times = {x: self._milliseconds(call) for x, call in calls.items()}
            if not samples:
                samples.update({x: [] for x in calls})
                return
            for x, ms in times.items():
                samples[x].append(ms)
            points = [[x, round(statistics.median(values), 3)] for x, values in samples.items()]
            self.facts["series"][provider] = points
            self.facts["exponent"][provider] = round(_slope(points), 3)

        return run

    def _milliseconds(self, call: Callable[[], object]) -> float:
        self._wait()
        started = time.perf_counter()
        call()
        self._wait()
        return 1e3 * (time.perf_counter() - started)

    def _wait(self) -> None:
        if self.options.device.type == "cuda":
            torch.cuda.synchronize(self.options.device)


def _slope(points: Sequence[tuple[int, float]]) -> float:
    if len(points) < 2:
        return math.nan
    x, ms = np.log(np.array(points, float)).T
    return float(np.polyfit(x, ms, 1)[0])
