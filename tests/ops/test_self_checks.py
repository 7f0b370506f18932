"""The small cases that every op declares: `doctor` runs them, a GPU back end must pass them before its first call."""

import pytest
import torch

from pro2sam_fast import ops
from pro2sam_fast.errors import BackendError
from pro2sam_fast.ops._backends import CHECKED, REGISTRATIONS
from pro2sam_fast.testing import TOLERANCES, backend_cases, forced_isa

NAMES = list(REGISTRATIONS)
CASES = [case for case in backend_cases() if case.problem is None and case.backend not in ("auto", "reference")]


@pytest.mark.parametrize("op", NAMES)
def test_every_op_declares_a_case_that_is_always_the_same(op):
    op, device = REGISTRATIONS[op], torch.device("cpu")
    assert op.examples and set(op.examples) <= set(TOLERANCES)
    random = torch.get_rng_state()
    for example in op.examples.values():
        assert isinstance(example(device)[0], torch.Tensor)
        for one, other in zip(example(device), example(device), strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert torch.equal(torch.get_rng_state(), random)
    assert op.self_check("reference", device) is None, "some of its results are undefined"


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_passes(case, op):
    op, device = REGISTRATIONS[op], torch.device(case.device, 0 if case.device == "cuda" else None)
    if case.backend not in op.implementations:
        pytest.skip(f"no {case.backend} kernel")
    with forced_isa(case.isa):
        assert op.self_check(case.backend, device) is None


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_notices_one_wrong_number(case, op, monkeypatch):
    op, device = REGISTRATIONS[op], torch.device(case.device, 0 if case.device == "cuda" else None)
    reference = op.implementations["reference"]

    def wrong(*arguments):
        first, *rest = result = reference(*arguments)
        first = result if isinstance(result, torch.Tensor) else first
        first = first.clone()
        first.view(-1)[-1] += 1
        return first if isinstance(result, torch.Tensor) else (first, *rest)

    monkeypatch.setitem(op.implementations, case.backend, wrong)
    assert "1 / " in op.self_check(case.backend, device)


@pytest.mark.cuda
@pytest.mark.parametrize("backend", CHECKED)
def test_capture_before_the_first_call(backend, monkeypatch):
    op, device = REGISTRATIONS["mask_match"], torch.device("cuda", 0)
    words = torch.arange(12, device=device).view(3, 4)
    try:
        ops.mask_match(words, words[1], backend=backend)  # loads modules and compiles, which a capture must not
    except BackendError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(op, "verdicts", {})
    monkeypatch.setattr(op, "announced", set())
    graph = torch.cuda.CUDAGraph()
    with pytest.warns(RuntimeWarning, match="goes unchecked into the CUDA graph"), torch.cuda.graph(graph):
        _, best = ops.mask_match(words, words[1], backend=backend)
    graph.replay()
    assert best == 1 and op.verdicts == {}
    ops.mask_match(words, words[1], backend=backend)
    assert op.verdicts == {(backend, device): None}
