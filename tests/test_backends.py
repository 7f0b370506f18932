import os
import subprocess
import sys
import warnings

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
    assert {"reference", "cpu", "cuda", "triton"} <= set(states)
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


def test_backends_stays_callable_after_its_module_is_imported():
    assert run("import pro2sam_fast.backends; print(sorted(pro2sam_fast.backends()))") == str(
        ["cpu", "cuda", "reference", "triton"]
    )


def test_module_prints_every_state():
    text = run("import runpy; runpy.run_module('pro2sam_fast', run_name='__main__')")
    assert pro2sam_fast.__version__ in text and torch.__version__ in text
    for name, state in pro2sam_fast.backends().items():
        assert f"{name:<10} {state.state:<8} {state.reason}" in text


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
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
    assert reason == "missing: PRO2SAM_CPU_ISA=mmx: unknown instruction set; choose scalar, avx2 or avx512"


def test_a_missing_module_explains_itself(without_cpu):
    with pytest.raises(BackendError, match=r"_cpu\.mask_match can't run: made up for a test"):
        _native._cpu.mask_match(0, 0)
    assert "made up" in repr(_native._cpu)
    assert not hasattr(_native._cpu, "__wrapped__")


def test_auto_falls_back_and_says_so_once(without_cpu):
    registration = _backends.Registration("some_op", {"reference": "slow", "cpu": "fast"})
    with pytest.warns(RuntimeWarning, match="some_op on cpu: the cpu back end can't run .made up for a test"):
        assert registration.pick("auto", "cpu") == "slow"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registration.pick("auto", "cpu") == "slow"


def test_a_named_back_end_works_or_raises(without_cpu):
    with pytest.raises(BackendError, match="mask_match: back end 'cpu' can't run: made up for a test"):
        mask_match(WORDS, WORDS[0], backend="cpu")


def test_an_op_without_that_kernel():
    registration = _backends.Registration("some_op", {"reference": "slow"})
    with pytest.raises(BackendError, match="some_op: back end 'cuda' can't run"):
        registration.pick("cuda", "cuda")
    assert registration.pick("auto", "cpu") == "slow"


def test_kernels_are_registered_by_dispatch_key():
    for key in ("CompositeExplicitAutograd", "CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("pro2sam_fast::mask_match", key), key
