import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from types import ModuleType

import pytest
import torch

import pro2sam_fast
from pro2sam_fast import _native
from pro2sam_fast.errors import BackendError
from pro2sam_fast.ops import _backends, mask_match

WORDS = torch.arange(12).view(3, 4)


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=os.sep,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def without_cpu(monkeypatch):
    """`_cpu` as on a machine where it wasn't built; ops announce afresh."""
    monkeypatch.setattr(_native, "_cpu", _native.MissingModule("pro2sam_fast._cpu", "made up for a test"))


def test_states():
    states = pro2sam_fast.backends()
    assert list(states) == ["reference", "cpu", "triton", "cuda"]
    for name, state in states.items():
        assert state.name == name and state.reason
        assert state.state in ("ready", "loaded", "missing")
        assert state.available == (state.state == "ready") == bool(state)
    assert states["reference"].available
    assert states["cuda"].available <= torch.cuda.is_available()


def test_cpu_state_names_the_instruction_set():
    state = pro2sam_fast.backends()["cpu"]
    if not state.loaded:
        pytest.skip(state.reason)
    assert state.details["isa"] == pro2sam_fast._cpu.isa_active()
    assert state.details["isa_available"][0] == "scalar"
    assert state.details["isa"] in state.details["isa_available"]


def test_backends_is_a_mapping_and_a_function():
    backends = pro2sam_fast.backends
    assert isinstance(backends, Mapping) and isinstance(backends, ModuleType)
    assert backends["cpu"] == backends()["cpu"] == backends.get("cpu")
    assert list(backends) == list(backends.keys()) == list(backends())
    assert len(backends) == len(backends.values()) == 4
    assert "cuda" in backends and "mps" not in backends
    assert dict(backends.items()) == dict(backends())
    assert backends.get("mps") is None
    with pytest.raises(KeyError, match="mps"):
        backends["mps"]
    assert backends == backends.backends and backends != backends() and hash(backends)


@pytest.mark.parametrize("first", ["import pro2sam_fast", "import pro2sam_fast.backends"])
def test_backends_is_one_object_however_it_is_imported(first):
    code = f"""{first}
import sys
from pro2sam_fast import backends
from pro2sam_fast.backends import backends as inner
assert backends is inner is pro2sam_fast.backends is sys.modules["pro2sam_fast.backends"]
print(len(backends), "cuda" in backends, backends and "torch" in sys.modules)"""
    assert run(code) == "4 True False"


def test_module_prints_every_state():
    text = run("import runpy; runpy.run_module('pro2sam_fast', run_name='__main__')")
    assert pro2sam_fast.__version__ in text and torch.__version__ in text
    for name, state in pro2sam_fast.backends().items():
        assert f"{name:<10} {state.state:<8} {state.reason}" in text


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512bf16"])
def test_environment_forces_the_instruction_set(isa):
    state = pro2sam_fast.backends()["cpu"]
    if isa not in state.details.get("isa_available", ()):
        pytest.skip(f"no {isa} here")
    code = "import pro2sam_fast; print(pro2sam_fast.backends()['cpu'].details['isa'])"
    assert run(code, PRO2SAM_CPU_ISA=isa) == isa


def test_environment_with_an_unknown_instruction_set_is_told():
    if not pro2sam_fast.backends()["cpu"].loaded:
        pytest.skip(pro2sam_fast.backends()["cpu"].reason)
    reason = run("import pro2sam_fast; print(pro2sam_fast.backends()['cpu'])", PRO2SAM_CPU_ISA="mmx")
    assert reason == "missing: PRO2SAM_CPU_ISA=mmx: unknown instruction set; choose scalar, avx2, avx512 or avx512bf16"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module", name="triton"), "the package triton isn't installed here"),
        (ImportError("libtriton.so: undefined symbol"), "triton.language doesn't load: libtriton.so: undefined symbol"),
        (OSError("no ptxas"), "triton.language doesn't load: no ptxas"),
    ],
)
def test_triton_that_does_not_load_is_a_reason(monkeypatch, error, reason):
    def broken(*args):
        raise error

    monkeypatch.setattr(_backends.importlib, "import_module", broken)
    monkeypatch.setattr(_backends, "triton_problem", _backends.triton_problem.__wrapped__)
    assert _backends.triton_problem() == reason
    monkeypatch.undo()
    monkeypatch.setattr(_backends, "triton_missing", lambda: reason)
    assert pro2sam_fast.backends["triton"].state == "missing"


def test_a_missing_module_explains_itself(without_cpu):
    with pytest.raises(BackendError, match=r"_cpu\.mask_match can't run: made up for a test"):
        _native._cpu.mask_match(0, 0)
    assert "made up" in repr(_native._cpu)
    assert not hasattr(_native._cpu, "__wrapped__")


def test_auto_falls_back_and_says_so_once(without_cpu):
    registration = _backends.Registration("some_op", {"reference": "slow", "cpu": "fast"})
    with pytest.warns(RuntimeWarning, match="some_op on cpu: the cpu back end can't run .made up for a test"):
        assert registration.pick("auto", "cpu") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registration.pick("auto", "cpu") == "reference"


def test_a_named_back_end_works_or_raises(without_cpu):
    with pytest.raises(BackendError, match="mask_match: back end 'cpu' can't run: made up for a test"):
        mask_match(WORDS, WORDS[0], backend="cpu")


def test_an_op_without_that_kernel():
    registration = _backends.Registration("some_op", {"reference": "slow"})
    with pytest.raises(BackendError, match="some_op: back end 'cuda' can't run"):
        registration.pick("cuda", "cuda")
    assert registration.pick("auto", "cpu") == "reference"


def test_kernels_are_registered_by_dispatch_key():
    for key in ("CompositeExplicitAutograd", "CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("pro2sam_fast::mask_match", key), key
