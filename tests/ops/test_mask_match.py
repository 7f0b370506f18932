import itertools

import numpy as np
import pytest
import torch

from pro2sam_fast import _cpu, _cuda
from pro2sam_fast.errors import BackendError, ConfigError
from pro2sam_fast.ops import mask_iou, mask_match, pack_masks
from pro2sam_fast.testing import (
    UNKIND_COUNTS,
    UNKIND_SIZES,
    BackendCase,
    assert_matches,
    backend_cases,
    forced_isa,
    random_masks,
)

SHAPES = list(itertools.product(UNKIND_COUNTS, UNKIND_SIZES))


def packed(count, size, seed=0):
    return pack_masks(random_masks(count, *size, seed=seed)).flatten(1)


def naive_iou(a, b):
    """float32 (K, M) of bool (K, ...) and (M, ...), pixel by pixel."""
    out = np.zeros((len(a), len(b)), dtype=np.float32)
    for (i, x), (j, y) in itertools.product(enumerate(a.numpy()), enumerate(b.numpy())):
        union = np.float32((x | y).sum())
        out[i, j] = np.float32((x & y).sum()) / union if union else 0
    return torch.from_numpy(out)


@pytest.fixture(params=[case for case in backend_cases() if case.problem is None], ids=str)
def case(request):
    with forced_isa(request.param.isa):
        yield request.param


@pytest.mark.parametrize("absent", [case for case in backend_cases() if case.problem], ids=str)
def test_back_ends_not_tested_here(absent):
    pytest.skip(absent.problem)


@pytest.mark.parametrize(("count", "size"), SHAPES)
def test_reference_equals_pixel_arithmetic(count, size):
    masks, query = random_masks(count, *size, seed=1), random_masks(1, *size, seed=2)
    expected = naive_iou(masks, query)[:, 0]
    scores, best = mask_match(pack_masks(masks).flatten(1), pack_masks(query).flatten(), backend="reference")
    assert_matches(scores, expected, "exact")
    assert best == (np.argmax(expected.numpy()) if count else -1)
    others = random_masks(4, *size, seed=3)
    iou = mask_iou(pack_masks(masks).flatten(1), pack_masks(others).flatten(1), backend="reference")
    assert_matches(iou, naive_iou(masks, others), "exact")


@pytest.mark.parametrize(("count", "size"), SHAPES)
def test_mask_match_parity(case, count, size):
    masks, query = packed(count, size, seed=1), packed(1, size, seed=2)[0]
    expected = mask_match(masks, query, backend="reference")
    actual = mask_match(masks.to(case.device), query.to(case.device), backend=case.backend)
    assert all(out.device.type == case.device for out in actual)
    assert_matches(actual, expected, "exact")


@pytest.mark.parametrize(("count", "size"), SHAPES)
def test_mask_iou_parity(case, count, size):
    a = packed(count, size, seed=1)
    for others in (0, 1, 21):
        b = packed(others, size, seed=2)
        actual = mask_iou(a.to(case.device), b.to(case.device), backend=case.backend)
        assert actual.shape == (count, others) and actual.device.type == case.device
        assert_matches(actual, mask_iou(a, b, backend="reference"), "exact")


@pytest.mark.parametrize("words", [1, 2, 3, 4, 7, 8, 9, 1025])
def test_every_bit_counts(case, words):
    full = torch.full((3, words), -1, dtype=torch.int64)
    full[1:] = 0
    full[2, -1] = -(2**63)  # only the last pixel
    scores, best = mask_match(full.to(case.device), full[0].to(case.device), backend=case.backend)
    assert_matches(scores, torch.tensor([1, 0, 1 / (64 * words)]), "exact")
    assert best == 0


def test_ties_go_to_the_first(case):
    masks = packed(1, (63, 65), seed=5).repeat(2500, 1)
    query = masks[0].clone()
    masks[:700] = 0
    scores, best = mask_match(masks.to(case.device), query.to(case.device), backend=case.backend)
    assert best == 700
    assert scores.sum() == 1800


def test_nothing_matches(case):
    masks = torch.zeros((5, 3), dtype=torch.int64)
    scores, best = mask_match(masks.to(case.device), masks[0].to(case.device), backend=case.backend)
    assert_matches(scores, torch.zeros(5), "exact")
    assert best == 0


def test_strided_inputs(case):
    masks, query = packed(12, (9, 200), seed=1), packed(1, (9, 200), seed=2)[0]
    wide = masks.repeat(1, 2).to(case.device)
    strided, backwards = wide[::2, : masks.shape[1]], query.flip(0).to(case.device)
    expected = mask_match(masks[::2].contiguous(), query.flip(0).contiguous(), backend="reference")
    assert_matches(mask_match(strided, backwards, backend=case.backend), expected, "exact")
    iou = mask_iou(strided, wide.T[: masks.shape[1]].T, backend=case.backend)
    assert_matches(iou, mask_iou(masks[::2], masks, backend="reference"), "exact")


def test_unaligned_words(case):
    masks, query = packed(5, (8, 128), seed=1), packed(1, (8, 128), seed=2)[0]
    shifted = torch.cat([query[:1], masks.flatten()]).to(case.device)[1:].view_as(masks)
    actual = mask_match(shifted, query.to(case.device), backend=case.backend)
    assert_matches(actual, mask_match(masks, query, backend="reference"), "exact")


@pytest.mark.parametrize("offset", [1, 4])
def test_words_at_any_byte(case, offset):
    if case.device != "cpu":
        pytest.skip("torch hands out aligned device memory only")
    masks, query = packed(70, (9, 640), seed=1), packed(1, (9, 640), seed=2)[0]
    shifted = bytearray(offset) + masks.numpy().tobytes()
    odd = torch.frombuffer(shifted, dtype=torch.int64, offset=offset).view_as(masks)
    assert odd.data_ptr() % 4 == offset % 4 and odd.data_ptr() % 8
    expected = mask_match(masks, query, backend="reference")
    assert_matches(mask_match(odd, query, backend=case.backend), expected, "exact")
    expected = mask_iou(masks, masks[:9], backend="reference")
    assert_matches(mask_iou(odd, odd[:9], backend=case.backend), expected, "exact")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_the_forced_instruction_set_is_the_one_that_runs(isa, threads):
    case = BackendCase("cpu", "cpu", isa)
    if case.problem:
        pytest.skip(case.problem)
    a, b = packed(300, (40, 640), seed=1), packed(70, (40, 640), seed=2)
    scores, best = torch.empty(300), torch.empty((), dtype=torch.int64)
    iou, areas = torch.empty(300, 70), torch.empty(370, dtype=torch.int64)
    with forced_isa(isa):
        assert _cpu.isa_active() == isa
        addresses = (t.data_ptr() for t in (a, b, scores, best))
        assert _cpu.mask_match(*addresses, *a.shape, threads) == isa
        addresses = (t.data_ptr() for t in (a, b, iou, areas))
        assert _cpu.mask_iou(*addresses, 300, 70, a.shape[1], threads) == isa
    assert_matches((scores, best), mask_match(a, b[0], backend="reference"), "exact")
    assert_matches(iou, mask_iou(a, b, backend="reference"), "exact")


def test_unknown_instruction_set():
    if BackendCase("cpu", "cpu").problem:
        pytest.skip(BackendCase("cpu", "cpu").problem)
    before = _cpu.isa_active()
    with pytest.raises(RuntimeError, match="sse9: unknown instruction set"):
        _cpu.isa_force("sse9")
    assert _cpu.isa_active() == before


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("count", [0, 3])
def test_opcheck(backend, count):
    masks, query = packed(count, (5, 70)), packed(1, (5, 70))[0]
    torch.library.opcheck(torch.ops.pro2sam_fast.mask_match.default, (masks, query), {"backend": backend})
    torch.library.opcheck(torch.ops.pro2sam_fast.mask_iou.default, (masks, masks[:2]), {"backend": backend})


def test_meta_tensors():
    masks, query = (
        torch.empty((7, 4), dtype=torch.int64, device="meta"),
        torch.empty(4, dtype=torch.int64, device="meta"),
    )
    scores, best = mask_match(masks, query)
    assert (scores.shape, scores.dtype, best.shape, best.dtype) == ((7,), torch.float32, (), torch.int64)
    iou = mask_iou(masks, masks[:3])
    assert (iou.shape, iou.dtype, iou.device.type) == ((7, 3), torch.float32, "meta")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_without_graph_breaks(backend):
    def nearest(masks, query):
        scores, best = mask_match(masks, query, backend=backend)
        return scores * 2, masks.index_select(0, best.view(1)), mask_iou(masks, masks, backend=backend).sum()

    compiled = torch.compile(nearest, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (3, 5):
        masks, query = packed(count, (5, 70), seed=count), packed(1, (5, 70))[0]
        assert_matches(compiled(masks, query), nearest(masks, query), "exact")


WORDS = torch.zeros((3, 4), dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((WORDS.tolist(), WORDS[0]), TypeError, "masks must be a tensor, got list"),
        ((WORDS.int(), WORDS[0]), TypeError, "masks must be int64 .*int32"),
        ((WORDS, WORDS[0].bool()), TypeError, "query must be int64 .*bool"),
        ((WORDS.to_sparse(), WORDS[0]), TypeError, "masks must be dense, got torch.sparse_coo"),
        ((WORDS, WORDS[0].to_sparse()), TypeError, "query must be dense, got torch.sparse_coo"),
        ((WORDS, WORDS), ValueError, r"\(K, n\) and query \(n,\), got \(3, 4\) and \(3, 4\)"),
        ((WORDS, WORDS[0, :3]), ValueError, r"got \(3, 4\) and \(3,\)"),
        ((WORDS, WORDS[0].to("meta")), ValueError, "on one device"),
        ((WORDS, WORDS[0], "gpu"), ConfigError, "one of auto, reference, cpu, cuda, triton, not 'gpu'"),
        ((WORDS, WORDS[0], "cuda"), BackendError, "'cuda' can't run: the cuda back end takes cuda tensors"),
    ],
)
def test_mask_match_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        mask_match(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((WORDS, None), TypeError, "b must be a tensor, got NoneType"),
        ((WORDS, WORDS.double()), TypeError, "b must be int64 .*float64"),
        ((WORDS, WORDS[0]), ValueError, r"got \(3, 4\) and \(4,\)"),
        ((WORDS, WORDS[:, :2]), ValueError, r"got \(3, 4\) and \(3, 2\)"),
    ],
)
def test_mask_iou_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        mask_iou(*arguments)


def test_the_dispatcher_checks_too():
    with pytest.raises(ValueError, match=r"got \(3, 4\) and \(3,\)"):
        torch.ops.pro2sam_fast.mask_match(WORDS, WORDS[0, :3])


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
def test_follows_the_current_stream(backend):
    problem = BackendCase(backend, "cuda").problem
    if problem:
        pytest.skip(problem)
    masks, query = packed(2000, (480, 640)).cuda(), packed(1, (480, 640), seed=9)[0].cuda()
    expected = mask_match(masks, query, backend="reference")
    stream = torch.cuda.Stream()
    late = torch.zeros_like(masks)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(masks)
        actual = mask_match(late, query, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    assert_matches(actual, expected, "exact")


@pytest.fixture(params=["cuda", "triton"])
def device_backend(request):
    problem = BackendCase(request.param, "cuda").problem
    if problem:
        pytest.skip(problem)
    return request.param


@pytest.mark.cuda
def test_opcheck_on_a_gpu(device_backend):
    masks = packed(3, (5, 70)).cuda()
    options = {"backend": device_backend}
    torch.library.opcheck(torch.ops.pro2sam_fast.mask_match.default, (masks, masks[0]), options)
    torch.library.opcheck(torch.ops.pro2sam_fast.mask_iou.default, (masks, masks[:2]), options)


@pytest.mark.cuda
def test_cuda_graph_capture(device_backend):
    def both():
        return *mask_match(masks, query, backend=device_backend), mask_iou(masks, masks, backend=device_backend)

    masks, query = torch.zeros((7, 64), dtype=torch.int64, device="cuda"), packed(1, (64, 64), seed=9)[0].cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        actual = both()
    masks.copy_(packed(7, (64, 64), seed=1))
    graph.replay()
    expected = (*mask_match(masks, query, backend="reference"), mask_iou(masks, masks, backend="reference"))
    assert_matches(actual, expected, "exact")


@pytest.mark.cuda
def test_the_tensors_device_is_the_one_that_runs(device_backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    masks = packed(5, (63, 65))
    expected = mask_match(masks, masks[3], backend="reference")
    for current, device in ((0, "cuda:1"), (1, "cuda:0"), (1, "cuda:1")):
        with torch.cuda.device(current):
            there = masks.to(device)
            assert_matches(mask_match(there, there[3], backend=device_backend), expected, "exact")
            assert torch.cuda.current_device() == current
            assert torch.ones(3, device="cuda").sum() == 3


@pytest.mark.cuda
def test_a_failed_launch_does_not_fail_the_next():
    problem = BackendCase("cuda", "cuda").problem
    if problem:
        pytest.skip(problem)
    with pytest.raises(RuntimeError, match="mask_match: invalid device"):
        _cuda.mask_match(0, 0, 0, 0, 1, 1, 10_000, 0)
    masks = packed(5, (63, 65)).cuda()
    assert mask_match(masks, masks[3], backend="cuda")[1] == 3
