"""The modules of `benchmarks`, imported for these tests alone: their short names don't stay behind for other tests."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    """bench("rows") is benchmarks/rows.py."""
    if not (FOLDER / "run.py").exists():
        pytest.skip("no benchmarks beside the tests")
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
        if str(FOLDER) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]
