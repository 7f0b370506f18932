import pytest
import torch

from pro2sam_fast.errors import ConfigError
from pro2sam_fast.ops import add_layer_norm
from pro2sam_fast.testing import BackendCase, assert_matches, backend_cases

SHAPES = ((0, 7), (1, 1), (3, 5), (2, 3, 48), (2, 2, 2, 129), (3, 1280))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(
    params=[c for c in backend_cases() if c.problem is None and c.backend not in ("cpu", "cuda")], ids=str
)
def case(request):
    return request.param


def inputs(shape, dtype=torch.float32, device="cpu", scale=1.0):
    generator = torch.Generator().manual_seed(0)
    x, delta = (torch.randn(shape, generator=generator) * scale + 1 for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=generator) for _ in range(2))
    return x.to(device), delta.to(device, dtype), weight.to(device), bias.to(device)


@pytest.mark.parametrize("absent", [case for case in backend_cases() if case.problem], ids=str)
def test_back_ends_not_tested_here(absent):
    pytest.skip(absent.problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(case, shape, dtype):
    x, delta, weight, bias = inputs(shape, dtype)
    total = x.double() + delta.double()
    centred = total - total.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias
    found = add_layer_norm(*inputs(shape, dtype, case.device), backend=case.backend)
    assert all(t.device.type == case.device and t.is_contiguous() for t in found)
    assert_matches(found[0], total.float(), torch.float32)
    assert_matches(found[1], normed.to(dtype), dtype)


def test_values_beyond_float16(case):
    x, delta, weight, bias = inputs((4, 96), torch.float16, case.device, scale=100.0)
    total, normed = add_layer_norm(x * 1e4, delta, weight, bias, backend=case.backend)
    assert total.abs().max() > 65504 and normed.isfinite().all()


def test_strided_inputs(case):
    x, delta, weight, bias = inputs((6, 40), torch.float16, case.device)
    expected = add_layer_norm(x, delta, weight, bias, backend="reference")
    strided = x.t().contiguous().t(), torch.stack([delta, delta], -1)[..., 0], weight.repeat(2)[:40], bias
    for actual, wanted in zip(add_layer_norm(*strided, backend=case.backend), expected):
        assert_matches(actual, wanted, actual.dtype)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("rows", [0, 3])
def test_opcheck(backend, rows):
    arguments = (*inputs((rows, 8), torch.bfloat16), 1e-6)
    torch.library.opcheck(torch.ops.pro2sam_fast.add_layer_norm.default, arguments, {"backend": backend})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, TypeError, "x must be a tensor"),
        ({"x": torch.zeros(3, 4).half()}, TypeError, "x must be float32"),
        ({"delta": torch.zeros(3, 4).double()}, TypeError, "delta must be float32, bfloat16 or float16"),
        ({"delta": torch.zeros(3, 5)}, ValueError, r"alike, got \(3, 4\) and \(3, 5\)"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight must be \(4,\)"),
        ({"bias": torch.zeros(4, device="meta")}, ValueError, "on one device"),
        ({"backend": "gpu"}, ConfigError, "not 'gpu'"),
    ],
)
def test_says_what_is_wrong(change, error, message):
    good = dict(zip(("x", "delta", "weight", "bias"), inputs((3, 4))))
    with pytest.raises(error, match=message):
        add_layer_norm(**{**good, **change})


@pytest.mark.cuda
def test_cuda_graph_capture():
    problem = BackendCase("triton", "cuda").problem
    if problem:
        pytest.skip(problem)
    arguments = inputs((64, 1280), torch.float16, "cuda")
    expected = add_layer_norm(*arguments, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = add_layer_norm(*arguments, backend="triton")
    for tensor in actual:
        tensor.zero_()
    graph.replay()
    assert_matches(actual, expected, "exact")
