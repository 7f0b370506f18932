import math

import pytest
import torch

from pro2sam_fast import _cpu
from pro2sam_fast.errors import BackendError, ConfigError
from pro2sam_fast.ops import gated_attention, query_maps
from pro2sam_fast.ops._backends import interpreting
from pro2sam_fast.ops.gated_attention import _gated_attention
from pro2sam_fast.testing import BackendCase, assert_matches, backend_cases, forced_isa

# batch, tokens, dim, heads, queries
SHAPES = [
    (1, 1, 64, 1, 1),
    (3, 2, 16, 1, 2),
    (2, 7, 48, 1, 3),
    (1, 33, 66, 2, 33),
    (2, 50, 15, 3, 5),
    (1, 197, 144, 3, 1),
    (2, 198, 384, 6, 1),
    (2, 201, 384, 6, 4),
    (1, 257, 128, 1, 9),
    (2, 65, 96, 3, 2),
]
ISAS = ("scalar", "avx2", "avx512", "avx512bf16")


@pytest.fixture(params=[case for case in backend_cases() if case.problem is None], ids=str)
def case(request):
    with forced_isa(request.param.isa):
        yield request.param


@pytest.mark.parametrize("absent", [case for case in backend_cases() if case.problem], ids=str)
def test_back_ends_not_tested_here(absent):
    pytest.skip(absent.problem)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def naive(q, k, v, num_heads, num_queries, gate=True, query_rows=slice(None)):
    """The method in float64, one image, one head and one query token at a time."""
    q, k, v = q.double(), k.double(), v.double()
    batch, tokens, dim = q.shape
    d = dim // num_heads
    outs, maps = [], []
    for b in range(batch):
        logits = [
            q[b, :, h * d : (h + 1) * d] @ k[b, :, h * d : (h + 1) * d].T / math.sqrt(d) for h in range(num_heads)
        ]
        mean_logits = sum(logits) / num_heads
        mu = [1 / (1 + torch.exp(-mean_logits[tokens - num_queries + g])) for g in range(num_queries)]
        m = sum(mu) / num_queries if gate else torch.ones(tokens, dtype=torch.float64)
        heads = []
        for h in range(num_heads):
            e = torch.exp(logits[h] - logits[h].amax(1, keepdim=True))
            heads.append((e / e.sum(1, keepdim=True) * m) @ v[b, :, h * d : (h + 1) * d])
        outs.append(torch.cat(heads, 1)[query_rows])
        maps.append(torch.stack(mu) if mu else torch.empty(0, tokens, dtype=torch.float64))
    return torch.stack(outs), torch.stack(maps)


def with_gradients(function, qkv, grad_out, grad_maps, *options, **named):
    """out, maps and the gradient of (out * grad_out).sum() + (maps * grad_maps).sum(); None leaves a term out."""
    qkv = qkv.detach().clone().requires_grad_()
    out, maps = function(*qkv.chunk(3, -1), *options, **named)
    terms = [(x, grad.to(x)) for x, grad in ((out, grad_out), (maps, grad_maps)) if grad is not None]
    torch.autograd.backward([x for x, _ in terms], [grad for _, grad in terms])
    return out.detach(), maps.detach(), qkv.grad


def check(case, shape, dtype, tolerance, *, gate=True, grads="both", **named):
    batch, tokens, dim, heads, queries = shape
    if interpreting() and case.backend == "triton" and dim > 300:
        batch = 1  # the interpreter takes seconds for a head
    qkv = random(batch, tokens, 3 * dim, dtype=dtype, seed=tokens)
    rows = tokens if "query_rows" not in named else len(range(tokens)[named["query_rows"]])
    grad_out = random(batch, rows, dim, dtype=dtype, seed=1) if grads != "maps" else None
    grad_maps = random(batch, queries, tokens, seed=2) if grads != "out" else None
    there = [None if t is None else t.to(case.device) for t in (qkv, grad_out, grad_maps)]
    actual = with_gradients(gated_attention, *there, heads, queries, gate=gate, backend=case.backend, **named)
    expected = with_gradients(naive, qkv.double(), grad_out, grad_maps, heads, queries, gate=gate, **named)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [t.dtype for t in actual] == [dtype, wide, dtype]
    assert all(t.device.type == case.device for t in actual)
    assert_matches(tuple(t.double() for t in actual), expected, tolerance)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_the_method_written_out(shape, gate):
    check(BackendCase("reference", "cpu"), shape, torch.float64, torch.float64, gate=gate)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_parity_in_float32(case, shape, gate):
    check(case, shape, torch.float32, torch.float32, gate=gate)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_parity_in_bfloat16(case, shape, gate):
    check(case, shape, torch.bfloat16, "bfloat16 products", gate=gate)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("shape", [(2, 201, 384, 6, 4), (2, 65, 96, 3, 2)])
def test_parity_in_float16(case, shape, gate):
    check(case, shape, torch.float16, "float16 products", gate=gate)


# Of a head: only the CPU's and Triton's kernels, and all of them.
WIDTHS = pytest.mark.parametrize("width", [16, 32])


@WIDTHS
@pytest.mark.parametrize("grads", ["out", "maps"])
def test_gradients_through_one_output(case, grads, width):
    check(case, (2, 50, 3 * width, 3, 4), torch.float32, torch.float32, grads=grads)
    check(case, (2, 50, 3 * width, 3, 4), torch.bfloat16, "bfloat16 products", grads=grads)


@WIDTHS
@pytest.mark.parametrize("rows", [slice(1, -4), slice(3), slice(45, None), slice(50, 60), slice(7, 8)], ids=str)
def test_some_rows(case, rows, width):
    check(case, (2, 55, 3 * width, 3, 4), torch.float32, torch.float32, query_rows=rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_take_the_reference(case, dtype):
    check(case, (2, 13, 48, 3, 4), dtype, dtype if dtype == torch.float64 else "bfloat16 products")


@WIDTHS
def test_no_query_tokens_is_plain_attention(case, width):
    check(case, (2, 37, 3 * width, 3, 0), torch.float32, torch.float32, gate=False, grads="out")


def test_empty_batch(case):
    qkv, grads = torch.zeros(0, 7, 48, device=case.device), (torch.zeros(0, 7, 16), torch.zeros(0, 2, 7))
    out, maps, grad = with_gradients(gated_attention, qkv, *grads, 2, 2, backend=case.backend)
    assert (out.shape, maps.shape, grad.shape) == ((0, 7, 16), (0, 2, 7), (0, 7, 48))


@WIDTHS
def test_large_logits(case, width):
    q, k, v = (random(1, 40, 2 * width, seed=i) for i in range(3))
    out, maps = gated_attention(*(t.to(case.device) for t in (40 * q, 40 * k, v)), 2, 4, backend=case.backend)
    expected_out, expected_maps = naive(40 * q, 40 * k, v, 2, 4)
    assert (out.cpu() - expected_out).abs().max() < 1e-3 and (maps.cpu() - expected_maps).abs().max() < 1e-3


@WIDTHS
def test_nan_is_not_hidden(case, width):
    q, k, v = (random(1, 20, 2 * width, seed=i).to(case.device) for i in range(3))
    k[0, 3, 5] = math.nan
    out, maps = gated_attention(q, k, v, 2, 4, backend=case.backend)
    assert out[..., :width].isnan().all() and maps[:, :, 3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs(case, dtype):
    tokens, dim = 29, 96
    tensors = [random(2, tokens, dim, dtype=dtype, seed=i).to(case.device) for i in range(3)]
    layouts = {
        "slices of one projection": torch.cat(tensors, -1).chunk(3, -1),
        "tokens first": [t.transpose(0, 1).contiguous().transpose(0, 1) for t in tensors],
        "channels first": [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors],
        "one for all": [tensors[0][:1].expand(2, -1, -1)] * 3,
        "every second token": [t.repeat_interleave(2, 1)[:, ::2] for t in tensors],
    }
    for layout in layouts.values():
        leaves = [t.detach().requires_grad_() for t in layout]
        copies = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in layout]
        results = []
        for inputs in (leaves, copies):
            out, maps = gated_attention(*inputs, 3, 4, backend=case.backend)
            grads = torch.autograd.grad(out.float().square().sum() + maps.square().sum(), inputs)
            results.append((out, maps, *grads))
        assert_matches(results[0], results[1], "exact")


@pytest.mark.parametrize("isa", ISAS)
def test_results_do_not_depend_on_threads_and_the_forced_instruction_set_runs(isa):
    case = BackendCase("cpu", "cpu", isa)
    if case.problem:
        pytest.skip(case.problem)
    batch, tokens, dim, heads, queries = 2, 67, 96, 3, 4
    qkv = random(batch, tokens, 3 * dim)
    grads = random(batch, tokens, dim, seed=1), random(batch, queries, tokens, seed=2)
    before, results = torch.get_num_threads(), []
    with forced_isa(isa):
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(with_gradients(gated_attention, qkv, *grads, heads, queries, backend="cpu"))
        finally:
            torch.set_num_threads(before)
        out, maps, lse = torch.empty(1, 1, 16), torch.empty(1, 1, 1), torch.empty(1, 1, 1)
        scratch = torch.empty(_cpu.gated_attention_workspace(1, 16, 1, 1))
        addresses = [t.data_ptr() for t in (qkv, qkv, qkv, out, maps, lse)]
        sizes = [1, 1, 16, 1, 1, 0, 1]
        assert _cpu.gated_attention(addresses, [0] * 6, sizes, True, 0, scratch.data_ptr(), 1) == isa
    for other in results[1:]:
        assert_matches(other, results[0], "exact")


def test_query_maps_are_the_maps():
    q, k, v = (random(2, 20, 48, seed=i) for i in range(3))
    assert_matches(query_maps(q[:, -4:], k, 3), gated_attention(q, k, v, 3, 4)[1], torch.float32)


def test_under_autocast(case):
    q, k, v = (random(2, 20, 48, seed=i).to(case.device) for i in range(3))
    with torch.autocast(case.device, torch.bfloat16):
        actual = gated_attention(q, k, v, 3, 4, backend=case.backend)
        halves = gated_attention(*(t.bfloat16() for t in (q, k, v)), 3, 4, backend=case.backend)
    if case.device == "cpu":
        assert_matches(actual, gated_attention(q, k, v, 3, 4, backend=case.backend), "exact")
    assert halves[0].dtype == torch.bfloat16 and halves[1].dtype == torch.float32


@pytest.mark.parametrize("gate", [True, False])
def test_gradcheck(gate):
    leaves = [random(2, 5, 6, seed=i).double().requires_grad_() for i in range(3)]

    def function(*tensors):
        return gated_attention(*tensors, 2, 2, gate=gate, query_rows=slice(1, 4))

    assert torch.autograd.gradcheck(function, leaves)


def test_no_second_derivatives(case):
    q = random(1, 5, 16).to(case.device).requires_grad_()
    out, _ = gated_attention(q, q, q, 2, 1, backend=case.backend)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, dtype):
    inputs = tuple(random(2, 11, 48, dtype=dtype, seed=i).requires_grad_() for i in range(3))
    op = torch.ops.pro2sam_fast.gated_attention.default
    tolerances = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(op, (*inputs, 3, 4, True, 2, 7), {"backend": backend}, **tolerances)
    out, maps, lse = op(*(t.detach() for t in inputs), 3, 4, True, 0, 11)
    saved = (*(t.detach() for t in inputs), out, maps, lse)
    op = torch.ops.pro2sam_fast.gated_attention_backward.default
    torch.library.opcheck(op, (out, maps, *saved, 3, True, 0), {"backend": backend})


def test_meta_tensors():
    q = torch.empty((7, 20, 48), dtype=torch.bfloat16, device="meta")
    out, maps = gated_attention(q, q, q, 3, 4, query_rows=slice(1, -4))
    assert (out.shape, out.dtype, out.device.type) == ((7, 15, 48), torch.bfloat16, "meta")
    assert (maps.shape, maps.dtype) == ((7, 4, 20), torch.float32)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_without_graph_breaks(backend):
    def loss(qkv):
        out, maps = gated_attention(*qkv.chunk(3, -1), 3, 4, query_rows=slice(1, -4), backend=backend)
        return out.square().sum() + maps.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, tokens in ((2, 20), (3, 31)):
        one, other = (random(batch, tokens, 144).requires_grad_() for _ in range(2))
        loss(one).backward()
        compiled(other).backward()
        assert_matches(other.grad, one.grad, torch.float32)


Q = torch.zeros(2, 8, 12)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Q.tolist(), Q, Q, 3, 2), {}, TypeError, "q must be a tensor, got list"),
        ((Q.int(), Q.int(), Q.int(), 3, 2), {}, TypeError, "q must be floating point"),
        ((Q, Q.double(), Q, 3, 2), {}, TypeError, "k must be floating point like q, torch.float32, got torch.float64"),
        ((Q, Q, Q.to_sparse(), 3, 2), {}, TypeError, "v must be dense"),
        ((Q, Q, Q.to("meta"), 3, 2), {}, ValueError, "on one device"),
        ((Q[0], Q[0], Q[0], 3, 2), {}, ValueError, r"\(B, N, D\)"),
        ((Q, Q[:, :7], Q, 3, 2), {}, ValueError, r"got \(2, 8, 12\), \(2, 7, 12\) and \(2, 8, 12\)"),
        ((Q[:, :0], Q[:, :0], Q[:, :0], 3, 0), {"gate": False}, ValueError, "at least 1"),
        ((Q, Q, Q, 5, 2), {}, ValueError, "num_heads must divide D = 12, got 5"),
        ((Q, Q, Q, 0, 2), {}, ValueError, "num_heads must divide D = 12, got 0"),
        ((Q, Q, Q, 3, 9), {}, ValueError, "num_queries must be 1 to N = 8"),
        ((Q, Q, Q, 3, 0), {}, ValueError, "num_queries must be 1 to N = 8 with gate=True, got 0"),
        ((Q, Q, Q, 3, -1), {"gate": False}, ValueError, "num_queries must be 0 to N = 8"),
        ((Q, Q, Q, 3, 2), {"query_rows": slice(0, 8, 2)}, ValueError, "no step"),
        ((Q, Q, Q, 3, 2), {"backend": "gpu"}, ConfigError, "one of auto"),
        ((Q, Q, Q, 3, 2), {"backend": "cuda"}, BackendError, "'cuda' can't run"),
    ],
)
def test_says_what_is_wrong(arguments, options, error, message):
    with pytest.raises(error, match=message):
        gated_attention(*arguments, **options)


def test_the_dispatcher_checks_too():
    with pytest.raises(ValueError, match="no rows 5 to 9 in 8 tokens"):
        torch.ops.pro2sam_fast.gated_attention(Q, Q, Q, 3, 2, True, 5, 4)
    out, maps, lse = _gated_attention(Q, Q, Q, 3, 2, True, 0, 8)
    with pytest.raises(ValueError, match="grad_out must be"):
        torch.ops.pro2sam_fast.gated_attention_backward(out[:, 1:], maps, Q, Q, Q, out, maps, lse, 3, True, 0)


@pytest.fixture(params=["cuda", "triton"])
def device_backend(request):
    problem = BackendCase(request.param, "cuda").problem
    if problem:
        pytest.skip(problem)
    return request.param


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def on_gpu(request):
    """Makes q, k and v side by side and gradients of out and of the maps, which are float32."""

    def make(batch=2, tokens=201, dim=384, queries=4):
        shapes = (batch, tokens, 3 * dim), (batch, tokens, dim), (batch, queries, tokens)
        qkv, grad_out, grad_maps = (random(*shape, seed=i).cuda() for i, shape in enumerate(shapes))
        return qkv.to(request.param), grad_out.to(request.param), grad_maps

    return make


@pytest.mark.cuda
def test_opcheck_on_a_gpu(device_backend, on_gpu):
    q, k, v = (t.requires_grad_() for t in on_gpu(2, 11, 64)[0].chunk(3, -1))
    options = {"backend": device_backend}
    op = torch.ops.pro2sam_fast.gated_attention.default
    torch.library.opcheck(op, (q, k, v, 2, 4, True, 2, 7), options, rtol=2e-2, atol=2e-2)


@pytest.mark.cuda
def test_the_same_bits_every_time(device_backend, on_gpu):
    inputs = on_gpu(batch=64)
    results = [with_gradients(gated_attention, *inputs, 6, 4, backend=device_backend) for _ in range(5)]
    for other in results[1:]:
        assert_matches(other, results[0], "exact")


@pytest.mark.cuda
def test_cuda_graph_capture(device_backend, on_gpu):
    def step():
        q, k, v = qkv.chunk(3, -1)
        ops = torch.ops.pro2sam_fast
        saved = ops.gated_attention(q, k, v, 6, 4, True, 0, 201, backend=device_backend)
        above = (grad_out, grad_maps, q, k, v, *saved)
        grads = ops.gated_attention_backward(*above, 6, True, 0, backend=device_backend)
        return (*saved[:2], torch.cat(grads, -1))

    qkv, grad_out, grad_maps = on_gpu()
    values = qkv.clone()
    qkv.zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        actual = step()
    qkv.copy_(values)
    graph.replay()
    assert_matches(actual, step(), "exact")


@pytest.mark.cuda
def test_the_tensors_device_is_the_one_that_runs(device_backend, on_gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    inputs = on_gpu()
    expected = with_gradients(gated_attention, *inputs, 6, 4, backend=device_backend)
    with torch.cuda.device(1):
        actual = with_gradients(gated_attention, *inputs, 6, 4, backend=device_backend)
    there = [t.to("cuda:1") for t in inputs]
    assert_matches(actual, expected, "exact")
    assert_matches(with_gradients(gated_attention, *there, 6, 4, backend=device_backend), expected, "exact")
