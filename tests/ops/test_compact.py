import pytest
import torch

from pro2sam_fast.errors import BackendError, ConfigError
from pro2sam_fast.ops import compact
from pro2sam_fast.testing import BackendCase, assert_matches, backend_cases

# a CPU has no kernel of its own
ALL = [case for case in backend_cases() if case.backend != "cpu"]
CASES = [case for case in ALL if case.problem is None]
COUNTS = [0, 1, 2, 31, 32, 33, 255, 256, 257, 2047, 2048, 2049, 8191, 8192, 8193, 20001]


def flags(n, density, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed + n)) < density


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


@pytest.mark.parametrize("absent", [case for case in ALL if case.problem], ids=str)
def test_back_ends_not_tested_here(absent):
    pytest.skip(absent.problem)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("n", COUNTS)
def test_parity(case, n, density):
    keep = flags(n, density)
    expected = keep.nonzero().squeeze(1)
    index, count = compact(keep.to(case.device), backend=case.backend)
    assert index.device.type == case.device and (index.dtype, count.dtype) == (torch.int64, torch.int64)
    assert (count.shape, index.shape, int(count)) == ((), (n,), len(expected))
    assert_matches(index[: len(expected)], expected, "exact")
    assert (index[len(expected) :] == -1).all()


@pytest.mark.parametrize("at", [0, 31, 32, 1023, 8191, 8192, 8999])
def test_one_flag(case, at):
    keep = torch.zeros(9000, dtype=torch.bool)
    keep[at] = True
    index, count = compact(keep.to(case.device), backend=case.backend)
    assert count == 1 and index[0] == at and (index[1:] == -1).all()


def test_strided_and_unaligned_flags(case):
    keep = flags(3001, 0.4).to(case.device)
    for given in (keep[1:], keep[::3], keep[5:1000]):
        assert_matches(compact(given, backend=case.backend), compact(given.cpu(), backend="reference"), "exact")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("n", [0, 5])
def test_opcheck(backend, n):
    torch.library.opcheck(torch.ops.pro2sam_fast.compact.default, (flags(n, 0.5),), {"backend": backend})


def test_meta_tensors():
    index, count = compact(torch.empty(7, dtype=torch.bool, device="meta"))
    assert (index.shape, index.dtype, count.shape, count.dtype) == ((7,), torch.int64, (), torch.int64)


def test_compiles_without_graph_breaks():
    compiled = torch.compile(lambda x: compact(x > 0.5)[0] + 1, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (30, 50):
        values = torch.rand(n, generator=torch.Generator().manual_seed(n))
        assert_matches(compiled(values), compact(values > 0.5)[0] + 1, "exact")


FLAGS = torch.zeros(3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((FLAGS.tolist(),), TypeError, "keep must be a tensor, got list"),
        ((FLAGS.float(),), TypeError, "dense bool tensor, got torch.float32"),
        ((FLAGS.to_sparse(),), TypeError, "dense bool tensor, got torch.bool, torch.sparse_coo"),
        ((FLAGS[:, None],), ValueError, r"must be \(N,\), got \(3, 1\)"),
        ((FLAGS, "gpu"), ConfigError, "not 'gpu'"),
        ((FLAGS, "cpu"), BackendError, "'cpu' can't run: the op has no cpu kernel"),
        ((FLAGS, "cuda"), BackendError, "'cuda' can't run: the cuda back end takes cuda tensors"),
    ],
)
def test_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        compact(*arguments)


@pytest.fixture(params=["cuda", "triton", "reference"])
def device_backend(request):
    problem = BackendCase(request.param, "cuda").problem
    if problem:
        pytest.skip(problem)
    return request.param


@pytest.mark.cuda
def test_cuda_graph_capture(device_backend):
    keep = flags(12288, 0.0).cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        compact(keep, backend=device_backend)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        actual = compact(keep, backend=device_backend)
    keep.copy_(flags(12288, 0.3))
    graph.replay()
    assert_matches(actual, compact(flags(12288, 0.3), backend="reference"), "exact")


@pytest.mark.cuda
def test_waits_for_nothing(device_backend):
    keep = flags(12288, 0.3).cuda()
    compact(keep, backend=device_backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = compact(keep, backend=device_backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_matches(actual, compact(keep.cpu(), backend="reference"), "exact")
