"""`pytest benchmarks --benchmark-only`: the cases of run.py under pytest-benchmark."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser, pluginmanager):
    group = parser.getgroup("pro2sam_fast")
    group.addoption("--device", default="cpu", help="cpu or cuda[:N]")
    group.addoption("--call", metavar="NAME", help="back end or peer to time (default: the last of ours)")
    if not pluginmanager.hasplugin("benchmark"):
        group.addoption("--benchmark-only", action="store_true", help="needs pytest-benchmark")


def pytest_configure(config):
    if not config.pluginmanager.hasplugin("benchmark"):
        config.pluginmanager.register(NoPlugin())


class NoPlugin:
    """Stands in for pytest-benchmark where it's missing."""

    @pytest.fixture
    def benchmark(self):
        pytest.skip("needs pytest-benchmark: pip install .[bench]")


def pytest_generate_tests(metafunc):
    """A test for every case that run.py measures by default."""
    import run
    import workloads

    options = workloads.Options(device=torch.device(metafunc.config.getoption("--device")))
    chosen = [(kind, case) for kind in run.KINDS for case in workloads.cases(kind, options) if case.default]
    names = [f"{kind} {case.what} {case.name} {case.dtype}" for kind, case in chosen]
    metafunc.parametrize("case", [case for _, case in chosen], ids=names)
