import functools

import pytest
import torch

from pro2sam_fast.errors import BackendError, ConfigError
from pro2sam_fast.models.sam.image_encoder import relative_position_terms, window_partition, window_unpartition
from pro2sam_fast.ops import relative_attention
from pro2sam_fast.ops.relative_attention import _relative_attention_fused
from pro2sam_fast.testing import BackendCase, assert_matches, backend_cases

# images, height, width, heads, d, window: windows that divide the grid, leave over a row, a column or most of a window,
# or are wider than a tile of keys; heads of one power of two, of two, and of odd widths
SHAPES = {
    "window divides": (2, 8, 8, 2, 16, 4),
    "a row over": (1, 9, 8, 2, 16, 4),
    "a column over": (1, 6, 7, 1, 16, 3),
    "larger than the grid": (1, 3, 2, 2, 16, 5),
    "14 of 16, heads of 80": (2, 16, 16, 1, 80, 14),
    "window of one": (1, 3, 3, 1, 16, 1),
    "wide window": (1, 3, 40, 1, 16, 33),
    "global": (2, 6, 5, 3, 16, 0),
    "global, several tiles of queries": (1, 13, 11, 1, 64, 0),
    "global, wide": (1, 2, 70, 1, 16, 0),
    "global, high": (1, 70, 3, 1, 16, 0),
    "one token": (1, 1, 1, 1, 16, 0),
    "heads of 5": (1, 5, 6, 2, 5, 3),
    "heads of 33": (1, 4, 5, 2, 33, 3),
    "heads of 96": (1, 4, 5, 1, 96, 0),
    "heads wider than the kernel's": (1, 4, 5, 1, 128, 3),
    "no images": (0, 4, 4, 2, 16, 3),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=[case for case in backend_cases() if case.problem is None and case.backend != "cpu"], ids=str)
def case(request):
    wanted = request.param
    if wanted.backend == "cuda":
        pytest.skip("no such kernel")
    return wanted


@functools.cache
def inputs(shape, dtype=torch.float32, seed=0):
    b, h, w, heads, d, window = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(size, generator=generator).to(dtype)

    side_h, side_w = (window, window) if window else (h, w)
    q, k, v = random(b, h, w, 3, heads, d).unbind(3)
    scale = d**-0.5  # terms of size one, like the scores
    tables = [(random(2 * side - 1, d) * scale).to(dtype) for side in (side_h, side_w)]
    return q, k, v, *tables, random(heads, d), random(heads, d), window


def on(device, arguments):
    return [t.to(device) if isinstance(t, torch.Tensor) else t for t in arguments]


def tolerance(dtype):
    return f"{'TF32' if dtype == torch.float32 else str(dtype).removeprefix('torch.')} products"


def materialised(q, k, v, table_h, table_w, pad_k, pad_v, window):
    """Token by token, in float64, as the formula says."""
    q, k, v, table_h, table_w, pad_k, pad_v = (t.double() for t in (q, k, v, table_h, table_w, pad_k, pad_v))
    b, h, w, _, d = q.shape
    side_h, side_w = (window, window) if window else (h, w)
    out = torch.empty_like(q)
    for y in range(h):
        for x in range(w):
            y0, x0 = y // side_h * side_h, x // side_w * side_w
            logits, values = [], []
            for yy in range(y0, y0 + side_h):
                for xx in range(x0, x0 + side_w):
                    real = yy < h and xx < w
                    key, value = (k[:, yy, xx], v[:, yy, xx]) if real else (pad_k.expand(b, -1, -1), pad_v)
                    offset = table_h[y - yy + side_h - 1] + table_w[x - xx + side_w - 1]
                    logits.append((q[:, y, x] * (key * d**-0.5 + offset)).sum(-1))
                    values.append(value.expand(b, -1, -1))
            weights = torch.stack(logits).softmax(0)
            out[:, y, x] = (weights[..., None] * torch.stack(values)).sum(0)
    return out


@pytest.mark.parametrize("absent", [case for case in backend_cases() if case.problem], ids=str)
def test_back_ends_not_tested_here(absent):
    pytest.skip(absent.problem)


@pytest.mark.parametrize("shape", [(2, 5, 4, 2, 6, 3), (1, 3, 5, 1, 4, 0), (1, 2, 3, 2, 3, 4)])
def test_reference_equals_the_formula(shape):
    arguments = inputs(shape)
    expected = materialised(*arguments)
    assert_matches(relative_attention(*arguments, backend="reference").double(), expected, torch.float32)
    assert_matches(_relative_attention_fused(*arguments).double(), expected, torch.float32)


def test_reference_equals_the_modules_of_the_encoder():
    q, k, v, *tables, pad_k, pad_v, window = inputs((2, 9, 8, 2, 16, 4))
    pads = torch.zeros_like(pad_k), pad_k, pad_v
    padded = torch.stack([torch.nn.functional.pad(t, (0, 0, 0, 0, 0, 0, 0, 3)) for t in (q, k, v)], dim=3)
    padded[:, 9:] = torch.stack(pads)
    windows, size = window_partition(padded.flatten(3), window)
    q_, k_, v_ = windows.view(-1, window**2, 3, 2, 16).permute(2, 0, 3, 1, 4)
    bias_h, bias_w = relative_position_terms(q_, *tables, (window, window))
    bias = (bias_h[..., :, None] + bias_w[..., None, :]).flatten(-2)
    expected = torch.nn.functional.scaled_dot_product_attention(q_, k_, v_, attn_mask=bias).transpose(1, 2)
    expected = window_unpartition(expected.reshape(-1, window, window, 32), window, size, (9, 8)).unflatten(-1, (2, 16))
    actual = relative_attention(q, k, v, *tables, pad_k, pad_v, window, backend="reference")
    assert_matches(actual, expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(case, shape, dtype):
    arguments = inputs(SHAPES[shape], dtype)
    expected = relative_attention(*(t.float() if isinstance(t, torch.Tensor) else t for t in arguments))
    actual = relative_attention(*on(case.device, arguments), backend=case.backend)
    assert actual.device.type == case.device and actual.is_contiguous()
    assert_matches(actual, expected.to(dtype), tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_parity(shape, dtype):
    arguments = inputs(SHAPES[shape], dtype)
    expected = relative_attention(*(t.float() if isinstance(t, torch.Tensor) else t for t in arguments))
    assert_matches(_relative_attention_fused(*arguments), expected.to(dtype), tolerance(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["14 of 16, heads of 80", "global, wide", "heads of 5"])
def test_the_launch_for_wgmma(shape, dtype, monkeypatch):
    """Its tiles are others; the interpreter takes them too."""
    if BackendCase("triton", "cpu").problem:
        pytest.skip(BackendCase("triton", "cpu").problem)
    from pro2sam_fast.kernels import relative_attention as kernels

    monkeypatch.setattr(kernels, "_wgmma", lambda device: True)
    arguments = inputs(SHAPES[shape], dtype)
    expected = relative_attention(*(t.float() if isinstance(t, torch.Tensor) else t for t in arguments))
    assert_matches(relative_attention(*arguments, backend="triton"), expected.to(dtype), tolerance(dtype))


def test_strided_inputs(case):
    q, k, v, *others, window = inputs((2, 5, 7, 2, 16, 3))
    expected = relative_attention(q, k, v, *others, window, backend="reference")
    for unlike in (q.contiguous(), q.transpose(-1, -2).contiguous().transpose(-1, -2), q.flip(1).contiguous().flip(1)):
        actual = relative_attention(*on(case.device, [unlike, k, v, *others, window]), backend=case.backend)
        assert_matches(actual, expected, torch.float32)
    pads = torch.stack(others[2:], dim=-1).unbind(-1)
    assert_matches(
        relative_attention(*on(case.device, [q, k, v, *others[:2], *pads, window]), backend=case.backend),
        expected,
        torch.float32,
    )


def test_large_scores(case):
    """A running maximum that grows from tile to tile, and weights that vanish."""
    q, k, v, *others, window = inputs((1, 9, 35, 1, 16, 0))
    q, k = q.round(), (k * torch.linspace(0, 6, 9)[:, None, None, None]).round()  # exact products
    arguments = [q, k, v.contiguous(), *(torch.zeros_like(t) for t in others), window]
    actual = relative_attention(*on(case.device, arguments), backend=case.backend)
    assert_matches(actual, relative_attention(*arguments, backend="reference"), torch.float32)


def test_images_do_not_depend_on_each_other(case):
    q, k, v, *others, window = on(case.device, inputs((3, 6, 7, 2, 16, 4)))
    whole = relative_attention(q, k, v, *others, window, backend=case.backend)
    parts = [
        relative_attention(*(t[i : i + 1] for t in (q, k, v)), *others, window, backend=case.backend) for i in range(3)
    ]
    assert_matches(torch.cat(parts), whole, "exact" if case.backend == "triton" else torch.float32)


def test_only_the_rows_of_a_window_are_seen(case):
    q, k, v, *others, window = inputs((1, 8, 8, 1, 16, 4))
    before = relative_attention(*on(case.device, [q, k, v, *others, window]), backend=case.backend)
    k, v = k.clone(), v.clone()
    k[:, 4:, 4:], v[:, 4:, 4:] = 7, float("nan")
    after = relative_attention(*on(case.device, [q, k, v, *others, window]), backend=case.backend)
    assert after[:, 4:, 4:].isnan().all()
    assert torch.equal(after[:, :4], before[:, :4]) and torch.equal(after[:, :, :4], before[:, :, :4])


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("shape", ["a column over", "global"])
def test_opcheck(backend, shape):
    torch.library.opcheck(
        torch.ops.pro2sam_fast.relative_attention.default, inputs(SHAPES[shape]), {"backend": backend}
    )


def test_meta_tensors():
    out = relative_attention(*on("meta", inputs(SHAPES["global"], torch.float16)))
    assert (out.shape, out.dtype, out.device.type) == ((2, 6, 5, 3, 16), torch.float16, "meta")


def test_compiles_without_graph_breaks():
    def twice(q, *others):
        return 2 * relative_attention(q, *others)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ("a column over", "window divides"):
        assert_matches(compiled(*inputs(SHAPES[shape])), twice(*inputs(SHAPES[shape])), "exact")


GOOD = inputs((1, 3, 4, 2, 16, 2))


def replaced(index, value):
    return [*GOOD[:index], value, *GOOD[index + 1 :]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (replaced(0, None), TypeError, "q must be a tensor, got NoneType"),
        (replaced(0, GOOD[0].int()), TypeError, "q must be floating point"),
        (replaced(3, GOOD[3].double()), TypeError, "table_h must be floating point like q, .*float32, got .*float64"),
        (replaced(1, GOOD[1].to_sparse()), TypeError, "k must be dense"),
        (replaced(5, GOOD[5].to("meta")), ValueError, "on one device"),
        (replaced(1, GOOD[1][:, :2]), ValueError, r"must all be \(B, h, w, H, d\)"),
        (replaced(0, GOOD[0][0]), ValueError, r"must all be \(B, h, w, H, d\)"),
        (replaced(3, GOOD[3][:-1]), ValueError, r"table_h must be \(3, 16\), got \(2, 16\)"),
        (replaced(6, GOOD[6][:1]), ValueError, r"pad_v must be \(2, 16\), got \(1, 16\)"),
        (replaced(7, -1), ValueError, "window must be 0"),
        ([*GOOD, "gpu"], ConfigError, "one of auto, reference, cpu, cuda, triton, not 'gpu'"),
        ([*GOOD, "cpu"], BackendError, "'cpu' can't run: the op has no cpu kernel|'cpu' can't run"),
    ],
)
def test_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        relative_attention(*arguments)


@pytest.fixture
def on_a_gpu():
    problem = BackendCase("triton", "cuda").problem
    if problem:
        pytest.skip(problem)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 80])
@pytest.mark.parametrize("window", [0, 14])
def test_sizes_of_sam_on_a_gpu(on_a_gpu, window, d, dtype):
    arguments = on("cuda", inputs((2, 64, 64, 2, d, window), dtype))
    wide = [t.double() if isinstance(t, torch.Tensor) else t for t in arguments]
    expected = relative_attention(*wide, backend="reference").to(dtype)
    assert_matches(relative_attention(*arguments, backend="triton"), expected, tolerance(dtype))
    assert_matches(_relative_attention_fused(*arguments), expected, tolerance(dtype))


@pytest.mark.cuda
def test_opcheck_on_a_gpu(on_a_gpu):
    arguments = on("cuda", inputs(SHAPES["a column over"]))
    torch.library.opcheck(torch.ops.pro2sam_fast.relative_attention.default, arguments, {"backend": "triton"})


@pytest.mark.cuda
def test_cuda_graph_capture(on_a_gpu):
    first, second = (on("cuda", inputs(SHAPES["14 of 16, heads of 80"], torch.float16, seed)) for seed in (0, 1))
    expected = relative_attention(*second, backend="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        relative_attention(*first, backend="triton")
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        actual = relative_attention(*first, backend="triton")
    for old, new in zip(first[:-1], second[:-1]):
        old.copy_(new)
    graph.replay()
    assert_matches(actual, expected, "exact")


@pytest.mark.cuda
def test_the_tensors_device_is_the_one_that_runs(on_a_gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    arguments = inputs(SHAPES["a column over"])
    expected = relative_attention(*arguments, backend="reference")
    with torch.cuda.device(0):
        assert_matches(relative_attention(*on("cuda:1", arguments), backend="triton"), expected, torch.float32)
