import importlib

import numpy as np
import pytest
import torch

from pro2sam_fast import _cpu
from pro2sam_fast.errors import BackendError, ConfigError
from pro2sam_fast.ops import nms
from pro2sam_fast.testing import BackendCase, assert_matches, backend_cases, forced_isa

CASES = [case for case in backend_cases() if case.problem is None]
THRESHOLDS = [0.0, 0.3, 0.5, 0.6, 0.7, 1.0]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    with forced_isa(request.param.isa):
        yield request.param


@pytest.mark.parametrize("absent", [case for case in backend_cases() if case.problem], ids=str)
def test_back_ends_not_tested_here(absent):
    pytest.skip(absent.problem)


def boxes_and_scores(count, seed=0, grid=10, levels=5):
    """Boxes with corners on a coarse grid, many without area, and tied scores."""
    generator = np.random.default_rng(seed)
    corners = np.sort(generator.integers(0, 7, (count, 2, 2)) * grid, axis=1).reshape(count, 4)
    scores = generator.integers(0, levels, count) / levels
    return torch.from_numpy(corners).float(), torch.from_numpy(scores).float()


def naive(boxes, scores, threshold):
    """Positions kept, pair by pair."""
    boxes, kept = boxes.numpy(), []
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for i in sorted(range(len(boxes)), key=lambda i: -float(scores[i])):
        for j in kept:
            low, high = np.maximum(boxes[i, :2], boxes[j, :2]), np.minimum(boxes[i, 2:], boxes[j, 2:])
            inter = np.maximum(high - low, np.float32(0)).prod()
            union = areas[i] + areas[j] - inter
            if union != 0 and float(inter / union) > threshold:
                break
        else:
            kept.append(i)
    return torch.tensor(kept + [-1] * (len(boxes) - len(kept)), dtype=torch.int64), torch.tensor(len(kept))


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 130])
def test_reference_equals_pairs(count, threshold):
    boxes, scores = boxes_and_scores(count, seed=count)
    assert_matches(nms(boxes, scores, threshold, backend="reference"), naive(boxes, scores, threshold), "exact")


@pytest.mark.parametrize("threshold", [*THRESHOLDS, 0.1 + 0.2, 2 / 3, 1e-50])
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 130, 700])
def test_parity(case, count, threshold):
    boxes, scores = boxes_and_scores(count, seed=count + 1, grid=3 if count > 200 else 10)
    expected = nms(boxes, scores, threshold, backend="reference")
    actual = nms(boxes.to(case.device), scores.to(case.device), threshold, backend=case.backend)
    assert_matches(actual, expected, "exact")


@pytest.mark.parametrize("count", [1001, 5200])
def test_many_boxes(case, count):
    torchvision = pytest.importorskip("torchvision")
    if case.backend == "reference":
        pytest.skip("slow, and equal on fewer boxes")
    generator = torch.Generator().manual_seed(count)
    corner = torch.rand((count, 2), generator=generator) * 600
    boxes = torch.cat([corner, corner + torch.rand((count, 2), generator=generator) * 200], 1)
    scores = torch.randint(50, (count,), generator=generator).double()
    keep, kept = nms(boxes.to(case.device), scores.to(case.device), 0.5, backend=case.backend)
    assert keep[:kept].tolist() == torchvision.ops.nms(boxes, scores.float(), 0.5).tolist()
    assert (keep[kept:] == -1).all()


def test_thresholds_are_compared_in_double(case):
    # the IoU 0.6 is 0.6000000238 in float32; 0.7 is 0.6999999881
    for last, threshold, kept in ((8, 0.6, 1), (8, 0.6000000238418579, 2), (7, 0.7, 2), (7, 0.6999999, 1)):
        first = [0, 0, 8, 1] if last == 8 else [0, 0, 10, 1]
        second = [2, 0, 10, 1] if last == 8 else [0, 0, 7, 1]
        boxes, scores = torch.tensor([first, second], dtype=torch.float32), torch.tensor([0.9, 0.8])
        assert nms(boxes.to(case.device), scores.to(case.device), threshold, backend=case.backend)[1] == kept


@pytest.mark.parametrize("part", [0, 1, 64, 99, 150, 190, 1000])
def test_only_the_first_boxes_take_part(case, part):
    boxes, scores = boxes_and_scores(150, seed=part)
    keep, kept = nms(boxes[:part], scores[:part], 0.5, backend="reference")
    expected = torch.cat([keep, torch.full((150 - len(keep),), -1)]), kept
    boxes[part:], scores[part::2] = float("nan"), 2.0
    arguments = (x.to(case.device) for x in (boxes, scores))
    count = torch.tensor(part, device=case.device)
    assert_matches(nms(*arguments, 0.5, count, backend=case.backend), expected, "exact")


def test_words_a_few_at_a_time(case, monkeypatch):
    boxes, scores = boxes_and_scores(400, grid=3)
    expected = nms(boxes, scores, 0.4, backend="reference")
    monkeypatch.setattr(importlib.import_module("pro2sam_fast.ops.nms"), "CHUNK_BYTES", 2 * 8 * 64 * 7)
    actual = nms(boxes.to(case.device), scores.to(case.device), 0.4, backend=case.backend)
    assert_matches(actual, expected, "exact")


def test_strided_boxes(case):
    boxes, scores = boxes_and_scores(70)
    wide = torch.cat([boxes, boxes], 1).to(case.device)
    expected = nms(boxes[::2].contiguous(), scores[::2].contiguous(), 0.5, backend="reference")
    actual = nms(wide[::2, :4], scores.to(case.device)[::2], 0.5, backend=case.backend)
    assert_matches(actual, expected, "exact")


@pytest.mark.parametrize("case", [case for case in CASES if case.isa], ids=str)
def test_the_forced_instruction_set_is_the_one_that_runs(case):
    boxes, order, keep, kept = torch.zeros(3, 4), torch.arange(3), torch.empty(3, dtype=torch.int64), torch.tensor(0)
    with forced_isa(case.isa):
        assert _cpu.nms(*(x.data_ptr() for x in (boxes, order, keep, kept)), 3, 0.5) == case.isa.removesuffix("bf16")
    assert keep.tolist() == [0, 1, 2] and kept == 3


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("count", [0, 5])
def test_opcheck(backend, count):
    arguments = (*boxes_and_scores(count), 0.5)
    torch.library.opcheck(torch.ops.pro2sam_fast.nms.default, arguments, {"backend": backend})
    some = (*arguments, torch.tensor(count // 2))
    torch.library.opcheck(torch.ops.pro2sam_fast.nms.default, some, {"backend": backend})


def test_meta_tensors():
    keep, kept = nms(torch.empty((7, 4), device="meta"), torch.empty(7, device="meta"), 0.5)
    assert (keep.shape, keep.dtype, kept.shape, kept.dtype) == ((7,), torch.int64, (), torch.int64)


def test_compiles_without_graph_breaks():
    compiled = torch.compile(lambda *x: nms(*x, 0.5)[0] + 1, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (30, 50):
        arguments = boxes_and_scores(count)
        assert_matches(compiled(*arguments), nms(*arguments, 0.5)[0] + 1, "exact")


BOXES, SCORES = torch.zeros((3, 4)), torch.zeros(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((BOXES.tolist(), SCORES), TypeError, "boxes must be a tensor, got list"),
        ((BOXES.double(), SCORES), TypeError, "dense float32 tensor, got torch.float64"),
        ((BOXES[:, :3], SCORES), ValueError, r"got \(3, 3\) and \(3,\)"),
        ((BOXES, SCORES[:2]), ValueError, r"got \(3, 4\) and \(2,\)"),
        ((BOXES, SCORES.to("meta")), ValueError, "on one device"),
        ((BOXES, SCORES, torch.tensor(2.0)), TypeError, "count must be a dense int64 tensor, got torch.float32"),
        ((BOXES, SCORES, torch.tensor([2])), ValueError, r"count must be \(\), got \(1,\)"),
        ((BOXES, SCORES, torch.tensor(2, device="meta")), ValueError, "on one device"),
    ],
)
def test_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        nms(*arguments[:2], 0.5, *arguments[2:])


def test_unknown_and_unfit_back_ends():
    with pytest.raises(ConfigError, match="not 'gpu'"):
        nms(BOXES, SCORES, 0.5, backend="gpu")
    with pytest.raises(BackendError, match="'cuda' can't run"):
        nms(BOXES, SCORES, 0.5, backend="cuda")


@pytest.fixture(params=["cuda", "triton"])
def device_backend(request):
    problem = BackendCase(request.param, "cuda").problem
    if problem:
        pytest.skip(problem)
    return request.param


@pytest.mark.cuda
def test_cuda_graph_capture(device_backend):
    boxes, scores = (x.cuda() for x in boxes_and_scores(700, grid=3))
    count = torch.tensor(700, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        nms(boxes, scores, 0.5, count, backend=device_backend)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        actual = nms(boxes, scores, 0.5, count, backend=device_backend)
    others = boxes_and_scores(700, seed=8, grid=3)
    boxes.copy_(others[0])
    scores.copy_(others[1])
    count.fill_(300)
    graph.replay()
    assert_matches(actual, nms(*others, 0.5, torch.tensor(300), backend="reference"), "exact")


@pytest.mark.cuda
def test_waits_for_nothing(device_backend):
    boxes, scores = (x.cuda() for x in boxes_and_scores(700, grid=3))
    nms(boxes, scores, 0.5, backend=device_backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = nms(boxes, scores, 0.5, backend=device_backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_matches(actual, nms(boxes.cpu(), scores.cpu(), 0.5, backend="reference"), "exact")
