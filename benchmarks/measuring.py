"""Time and memory of calls: interleaved rounds, medians, ceilings of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

__all__ = ["ceilings", "interleaved", "peak_bytes", "percentiles"]

SHORTEST_SAMPLE_S = 2e-3
LONG_CALL_S = 2.0  # is warm after one
MOST_ROUNDS = 200
FLUSH_BYTES = 256 << 20  # more than any L2


def interleaved(
    calls: Mapping[str, Callable[[], object]], device: torch.device, seconds: float, least_rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of every call, in rounds A B C A B C ..., so that a drift of the machine meets all alike.

    Args:
        calls: name -> call. A CPU sample is the mean of so many calls in a row that it takes 2 ms; a CUDA sample is
            one call between two events, after the L2 cache was overwritten.
        device: where the work happens.
        seconds: budget; no new round begins after it.
        least_rounds: rounds that are measured even beyond the budget.
    """
    sample = _cuda_sampler(device) if device.type == "cuda" else _cpu_sample
    repeats = {}
    for name, call in calls.items():
        for _ in range(2):  # the first compiles and fills caches, on a GPU the second records graphs
            started = time.perf_counter()
            call()
            _wait(device)
            took = time.perf_counter() - started
            if took > LONG_CALL_S and device.type != "cuda":
                break
        repeats[name] = 1 if device.type == "cuda" else max(1, round(SHORTEST_SAMPLE_S / max(took, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    with _no_collection():
        for done in range(MOST_ROUNDS):
            if done >= least_rounds and time.perf_counter() - begin > seconds:
                break
            for name, call in calls.items():
                samples[name].append(sample(call, repeats[name]))
    return samples


def percentiles(samples: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    return {f"p{q}": float(np.percentile(samples, q)) for q in (20, 50, 80)}


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call needs at most, on top of what was there before; None where it can't be known."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process still holds would hide the need
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return max(_status("VmHWM") - before, 0)
    except OSError:
        return None


@functools.cache
def ceilings(device: torch.device, dtypes: tuple[str, ...]) -> dict[str, float]:
    """What this machine reaches: GB/s of a large copy (read and write counted), GFLOP/s of a large product by dtype."""
    on_gpu = device.type == "cuda"
    source = torch.empty((1 << 30 if on_gpu else 1 << 28), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    side = 8192 if on_gpu else 2048
    calls: dict[str, Callable[[], object]] = {"copy_gb_s": lambda: target.copy_(source)}
    for name in dtypes:
        a, b = (torch.randn((side, side), device=device).to(getattr(torch, name)) for _ in range(2))
        calls[f"{name}_gflop_s"] = functools.partial(torch.matmul, a, b)
        onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # often faster than matmul's library
        if onednn and not on_gpu:
            calls[f"{name}_gflop_s oneDNN"] = functools.partial(onednn, a, b, None, "none", [], "")
    samples = interleaved(calls, device, 1.0, 5)
    best: dict[str, float] = {}
    for name, values in samples.items():
        figure = name.removesuffix(" oneDNN")
        best[figure] = min(best.get(figure, math.inf), min(values) / 1e3)
    copied = 2 * source.numel() / best.pop("copy_gb_s") / 1e9
    return {"copy_gb_s": copied, **{name: 2 * side**3 / seconds / 1e9 for name, seconds in best.items()}}


def _cpu_sample(call: Callable[[], object], repeats: int) -> float:
    started = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    return (time.perf_counter_ns() - started) / repeats / 1e6


def _cuda_sampler(device: torch.device) -> Callable[[Callable[[], object], int], float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(call: Callable[[], object], repeats: int) -> float:
        stream = torch.cuda.current_stream(device)
        flush.zero_()  # also keeps the GPU busy until the launches of the call are queued
        start.record(stream)
        for _ in range(repeats):
            call()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / repeats

    return sample


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


@contextlib.contextmanager
def _no_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
