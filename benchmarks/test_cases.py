"""The default cases of run.py under pytest-benchmark, for those who compare with its tools.

    pytest benchmarks --benchmark-only -k "mask_match" --benchmark-save=ours
    pytest benchmarks --benchmark-only -k "mask_match" --call "dense torch" --benchmark-compare

On a GPU the time includes the wait for the device; run.py measures with events and a cold cache.
"""

import functools

import pytest
import run
import torch
from case import Skip


@functools.cache
def green(tests):
    return run.parity(tests)


def test_case(case, benchmark, request):
    if not green(case.tests):
        pytest.fail("red tests, nothing is measured")
    runs = case.build()
    name = request.config.getoption("--call") or [*runs.ours][-1]
    call = {**runs.peers, **runs.ours}.get(name, Skip(f"{name} isn't part of this case"))
    if isinstance(call, Skip):
        pytest.skip(call.reason)
    on_gpu = request.config.getoption("--device") != "cpu"
    benchmark.group = case.name
    benchmark.extra_info |= {"what": case.what, "back_end": name, **runs.facts}
    benchmark((lambda: (call(), torch.cuda.synchronize())) if on_gpu else call)
