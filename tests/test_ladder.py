"""Which back end serves a call when some fail: made-up back ends on the CPU, in the place of CUDA and Triton."""

import os
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch

from pro2sam_fast import backends, cli
from pro2sam_fast.errors import BackendError
from pro2sam_fast.ops import _backends, mask_match
from pro2sam_fast.ops._backends import Registration

X = torch.arange(3.0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """CPU tensors go to "cuda", then "triton", then the reference."""
    monkeypatch.setitem(_backends.PREFERENCE, "cpu", ("cuda", "triton"))
    monkeypatch.setattr(_backends, "unavailable", lambda backend, device_type: None)


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def double(x):
    return x * 2


def wrong(x):
    return x * 2 + (x == 1)


def raising(error):
    def kernel(x):
        raise error

    return kernel


def later(error, after=1):
    """Works in the self-check and then raises."""
    calls = []

    def kernel(x):
        calls.append(x)
        if len(calls) > after:
            raise error
        return x * 2

    return kernel


def registration(**kernels):
    return Registration("some_op", {"reference": double, **kernels}, {"exact": lambda device: (X.to(device),)})


def test_the_first_that_passes_serves_and_is_checked_once(quiet):
    calls = []
    op = registration(cuda=lambda x: calls.append(len(x)) or x * 2, triton=raising(RuntimeError("never asked")))
    for _ in range(3):
        assert torch.equal(op("auto", torch.ones(5)), torch.full((5,), 2.0))
    assert calls == [3, 5, 5, 5]
    assert op.verdicts == {("cuda", CPU): None} and op.failures() == {}


@pytest.mark.parametrize("bad", [wrong, raising(RuntimeError("no kernel image")), raising(ValueError("bad tile"))])
def test_one_that_fails_its_self_check_is_passed_over_with_one_warning(bad):
    calls = []
    op = registration(cuda=bad, triton=lambda x: calls.append(x) or x * 2)
    with pytest.warns(RuntimeWarning, match=r"some_op on cpu: the cuda back end can't run .its self-check failed") as w:
        for _ in range(3):
            assert torch.equal(op("auto", X), X * 2)
    assert len(w) == 1 and len(calls) == 4
    assert list(op.failures()) == [("cuda", CPU)]


def test_the_last_rung_is_the_reference():
    op = registration(cuda=wrong, triton=wrong)
    with pytest.warns(RuntimeWarning, match="some_op on cpu: the (cuda|triton) back end") as told:
        assert torch.equal(op("auto", X), X * 2)
    assert len(told) == 2


def test_a_named_back_end_that_fails_its_self_check_raises():
    op = registration(cuda=wrong)
    for _ in range(2):
        with pytest.raises(BackendError, match="some_op: back end 'cuda' can't run: its self-check failed.*1 / 3"):
            op("cuda", X)


def test_tolerances_are_those_of_the_table(quiet):
    op = Registration(
        "some_op",
        {"reference": double, "cuda": lambda x: x * 2 * (1 + 1e-3)},
        {torch.bfloat16: lambda device: (X,), torch.float32: lambda device: (X,)},
    )
    assert "Tensor-likes are not close" in op.first_use("cuda", CPU)
    op.verdicts.clear()
    op.examples = {torch.bfloat16: lambda device: (X,)}
    assert op.first_use("cuda", CPU) is None


def test_a_kernel_that_fails_later_is_left_for_the_next():
    op = registration(cuda=later(RuntimeError("out of resource: shared memory")), triton=double)
    with pytest.warns(
        RuntimeWarning, match="the cuda back end can't run .it failed: RuntimeError: out of resource"
    ) as w:
        for _ in range(3):
            assert torch.equal(op("auto", X), X * 2)
    assert len(w) == 1 and "shared memory" in op.failures()["cuda", CPU]


def test_a_named_kernel_that_fails_later_raises_what_it_raised():
    op = registration(cuda=later(RuntimeError("launch failed")), triton=double)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="^launch failed$"):
            op("cuda", X)
    assert op.failures() == {}


def test_what_the_reference_raises_is_raised():
    op = Registration("some_op", {"reference": raising(RuntimeError("really"))})
    with pytest.raises(RuntimeError, match="^really$"):
        op("auto", X)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("image must be in 0..1"),
        TypeError("not a number"),
        torch.OutOfMemoryError("too much"),
        MemoryError(),
        RuntimeError("some_op: out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_callers_errors_are_the_callers(error, quiet):
    op = registration(cuda=later(error), triton=double)
    for _ in range(2):
        with pytest.raises(type(error)):
            op("auto", X)
    assert op.failures() == {}


def test_a_self_check_without_memory_is_no_verdict(quiet):
    op = registration(cuda=raising(torch.OutOfMemoryError("too much")), triton=double)
    with pytest.raises(torch.OutOfMemoryError):
        op("auto", X)
    assert op.verdicts == {}


def test_nothing_is_checked_while_a_graph_is_captured(monkeypatch):
    calls = []
    op = registration(cuda=lambda x: calls.append(len(x)) or x * 2)
    monkeypatch.setattr(_backends, "capturing", lambda device: True)
    with pytest.warns(RuntimeWarning, match="the cuda back end goes unchecked into the CUDA graph") as told:
        for _ in range(2):
            op("auto", torch.ones(5))
    assert len(told) == 1 and calls == [5, 5] and op.verdicts == {}
    monkeypatch.undo()
    assert op.first_use("cuda", CPU) is None and calls == [5, 5, 3]


def test_a_failure_while_a_graph_is_captured_is_no_verdict(monkeypatch, quiet):
    op = registration(cuda=later(RuntimeError("operation not permitted when stream is capturing")), triton=double)
    assert op.first_use("cuda", CPU) is None
    with monkeypatch.context() as patch:
        patch.setattr(_backends, "capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="^operation not permitted"):
            op("auto", X)
    assert op.failures() == {} and op.pick("auto", CPU) == "cuda"


def test_capturing_is_asked_of_gpus_alone():
    assert _backends.capturing(CPU) is False


def test_threads_share_one_self_check():
    calls = []

    def slow(x):
        calls.append(len(x))
        time.sleep(0.05)
        return x * 2

    op = registration(cuda=slow)
    threads = [threading.Thread(target=op, args=("auto", torch.ones(5))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(calls) == [3, 5, 5, 5, 5]


def test_each_device_has_its_verdict(quiet):
    op = registration(cuda=double)
    op("auto", X)
    assert op.first_use("cuda", torch.device("cpu", 0)) is None
    assert len(op.verdicts) == 2


def test_the_self_check_is_apart_from_what_the_caller_does():
    seen = []

    def kernel(x):
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), (x @ x).dtype))
        return x * 2

    op = registration(cuda=kernel)
    random = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        op("auto", X)
    assert seen == [(False, False, torch.float32), (True, True, torch.bfloat16)]
    assert torch.equal(torch.get_rng_state(), random)


NEWER = """import torch
from pro2sam_fast.ops._backends import full_precision
products = torch.backends.cuda.matmul
products.fp32_precision = "tf32"
with full_precision():
    print(products.fp32_precision)
print(products.fp32_precision)"""


def test_products_are_exact_in_the_self_check():
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            with _backends.full_precision():
                assert torch.get_float32_matmul_precision() == "highest"
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return
    done = subprocess.run([sys.executable, "-c", NEWER], capture_output=True, text=True, cwd=os.sep, timeout=120)
    assert done.stdout.split() == ["ieee", "tf32"], done.stderr


WORDS = torch.arange(12).view(3, 4)


@pytest.fixture
def broken_mask_match(monkeypatch):
    op = _backends.REGISTRATIONS["mask_match"]
    for name in ("cuda", "triton"):
        monkeypatch.setitem(op.implementations, name, lambda masks, query: (masks[:, 0].float(), query[0]))
    for name, fresh in (("verdicts", {}), ("dropped", {}), ("announced", set())):
        monkeypatch.setattr(op, name, fresh)
    return op


def test_an_op_called_through_the_dispatcher(broken_mask_match):
    with pytest.warns(RuntimeWarning, match="mask_match on cpu: the (cuda|triton) back end can't run .its self-check"):
        scores, best = mask_match(WORDS, WORDS[1])
    assert best == 1 and scores[1] == 1
    with pytest.raises(BackendError, match="mask_match: back end 'triton' can't run: its self-check failed"):
        mask_match(WORDS, WORDS[1], backend="triton")
    assert "mask_match, cuda on cpu: its self-check failed: AssertionError" in backends.report()


def test_doctor_tells_of_a_failure(broken_mask_match, monkeypatch, capsys):
    found = [backends.SelfCheck("mask_match", "triton", "cpu", broken_mask_match.self_check("triton", CPU))]
    monkeypatch.setattr(backends, "self_checks", lambda: found)
    assert cli.main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "triton on cpu\n  mask_match                FAILED\n" in output
    assert "FAILED mask_match, triton on cpu: its self-check failed" in output


def test_the_table_of_self_checks():
    def check(op, backend, device, reason=None):
        return backends.SelfCheck(op, backend, device, reason)

    checks = [check("a", "cpu", "cpu"), check("b", "cpu", "cpu", "off"), check("b", "cuda", "cuda:1")]
    lines = backends.self_check_table(checks).splitlines()
    assert lines[1].split() == ["cpu", "cuda", "on", "cuda:1"]
    assert lines[2].split() == ["a", "passed", "no", "kernel"] and lines[3].split() == ["b", "FAILED", "passed"]
    assert lines[4:] == ["  FAILED b, cpu on cpu: off"]
    assert "nothing but the reference" in backends.self_check_table([])
