"""Products for inference against torch's modules, with oneDNN and without."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pro2sam_fast.models import cpu
from pro2sam_fast.testing import assert_matches

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=[True, False], ids=["onednn", "plain"])
def onednn(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(cpu, "_onednn", lambda x: False)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (65, 63, 33), (7, 129, 1)])
def test_linear(onednn, dtype, shape):
    n, k, m = shape
    torch.manual_seed(0)
    x, weight, bias, add = (torch.randn(s, dtype=dtype) for s in ((n, k), (m, k), (m,), (n, m)))
    exact = x.double() @ weight.double().T
    acts = nn.GELU(), nn.GELU("tanh"), nn.ReLU()
    cases = [
        (cpu.linear(x, weight), exact),
        (cpu.linear(x, weight, bias), exact + bias.double()),
        (cpu.linear(x, weight, add=add), exact + add.double()),
        (cpu.linear(x, weight, bias, add=add), exact + bias.double() + add.double()),
        *((cpu.linear(x, weight, bias, act=act), act(exact + bias.double())) for act in acts),
    ]
    scale = 1 if onednn else 2  # rounded twice
    for found, expected in cases:
        assert found.dtype == dtype and found.shape == (n, m)
        row = 2**-8 * scale if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found.double(), expected, rtol=row, atol=row * k**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (65, 63, 33), (7, 129, 1), (0, 3, 2)])
def test_packed_linear(onednn, dtype, shape):
    n, k, m = shape
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s, dtype=dtype) for s in ((n, 2, k), (m, k), (m,)))
    exact = x.double() @ weight.double().T + bias.double()
    layer = cpu.PackedLinear(weight, bias)
    cases = [
        (layer(x), exact),
        (layer(x.float()), exact),
        (layer(x.transpose(0, 1)).transpose(0, 1), exact),
        (layer(x, "relu"), exact.relu()),
        (layer(x, "relu6"), F.relu6(exact)),
    ]
    row = 2**-7 if dtype == torch.bfloat16 else 1e-5
    for found, expected in cases:
        assert found.dtype == dtype and found.shape == expected.shape
        torch.testing.assert_close(found.double(), expected, rtol=row, atol=row * k**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_linear_does_not_depend_on_threads(dtype):
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    for n, k, m in ((448, 2048, 256), (448, 256, 2048), (64, 256, 4), (49, 1152, 320)):
        weight, bias, x = (torch.randn(s, dtype=dtype) for s in ((m, k), (m,), (n, k)))
        layer = cpu.PackedLinear(weight, bias)
        expected = layer(x)
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            try:
                assert torch.equal(layer(x), expected), (n, k, m, count)
            finally:
                torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_takes_any_strides(dtype):
    torch.manual_seed(0)
    x, weight, add = torch.randn(9, 3, 20, dtype=dtype)[:, 1], torch.randn(20, 11, dtype=dtype).T, torch.randn(11, 9).T
    expected = cpu.linear(x.clone(), weight.contiguous(), add=add.to(dtype).contiguous())
    assert torch.equal(cpu.linear(x, weight, add=add.to(dtype)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu6", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "groups"), [(1, 1, 1), (3, 2, 1), (5, 1, 12)])
def test_convolution(onednn, dtype, relu6, kernel, stride, groups):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s) for s in ((2, 12, 9, 7), (24, 12 // groups, kernel, kernel), (24,)))
    x, weight, bias = (t.to(dtype) for t in (x, 3 * weight, bias))
    found = cpu.convolution(x, weight, bias, stride, kernel // 2, groups, relu6)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), stride, kernel // 2, groups=groups)
    expected = F.relu6(expected) if relu6 else expected
    assert found.dtype == dtype
    row = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=row, atol=10 * row)


def test_apply_linear_keeps_gradients_and_autocast():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(2, 3, 6)
    expected = F.gelu(layer(x))
    found = cpu.apply_linear(layer, x, nn.GELU())
    assert found.requires_grad and torch.equal(found, expected)
    with torch.no_grad():
        assert_matches(cpu.apply_linear(layer, x, nn.GELU()), expected.detach(), torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = cpu.apply_linear(layer, x), layer(x)
        assert found.dtype == torch.bfloat16
        assert_matches(found, expected, torch.bfloat16)
        assert_matches(cpu.apply_linear(layer.double(), x.double()), layer(x.double()).detach(), torch.float64)


def test_where_modules_stay():
    x, weight = torch.ones(1, 4), torch.ones(4)
    assert cpu.compute_dtype(x, weight) is None  # gradients are on
    with torch.no_grad():
        assert cpu.compute_dtype(x, weight) == torch.float32
        assert cpu.compute_dtype(x.double(), weight.double()) is None
        assert cpu.compute_dtype(x, weight.bfloat16()) is None
        assert cpu.compute_dtype(x[:0], weight) is None
        assert cpu.compute_dtype(x.to("meta"), weight) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert cpu.compute_dtype(x.bfloat16(), weight) == torch.bfloat16
        with torch.autocast("cpu", torch.float16):
            assert cpu.compute_dtype(x, weight) is None
