"""The sweeps of the mask decoder and its fused upscaling: every back end against the plain references."""

import pytest
import torch

from pro2sam_fast import _cpu
from pro2sam_fast.errors import BackendError, ConfigError
from pro2sam_fast.ops.decode_example import Arguments
from pro2sam_fast.ops.pixel_tiles import pack_pixels, pack_values, unpack_pixels, unpack_values
from pro2sam_fast.testing import BackendCase, assert_matches, backend_cases, forced_isa

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
# images, prompts, tokens, (heads, width), grid, channels after the convolutions
SHAPES = {
    "nothing": (1, 0, 7, (8, 16), (8, 8), (64, 32)),
    "one": (1, 1, 7, (8, 16), (8, 8), (64, 32)),
    "odd grid": (2, 3, 7, (8, 16), (3, 5), (64, 32)),
    "wide": (1, 9, 7, (8, 16), (4, 64), (64, 32)),
    "square": (3, 7, 7, (8, 16), (32, 32), (64, 32)),
    "two tokens": (1, 2, 2, (8, 16), (5, 17), (64, 32)),
    "six tokens": (1, 5, 6, (8, 16), (9, 9), (64, 32)),
    "eight tokens": (2, 6, 8, (8, 16), (9, 9), (64, 32)),
    "many tokens": (1, 2, 17, (8, 16), (7, 19), (64, 32)),
    "small model": (2, 5, 7, (8, 4), (8, 8), (16, 8)),
    "few heads": (1, 3, 9, (2, 24), (1, 70), (12, 5)),
}


OPS = ("sweep0", "sweep1", "sweep2", "upscale")


def arguments_of(op, shape="odd grid", dtype="float32", seed=0):
    return getattr(Arguments(SHAPES[shape], DTYPES[dtype], seed), op)()


def without_padding(result, pixels):
    out, *rest = result if isinstance(result, tuple) else (result,)
    return out, *(r[:, :pixels] for r in rest)


@pytest.fixture(params=[case for case in backend_cases() if case.problem is None], ids=str)
def case(request):
    with forced_isa(request.param.isa):
        yield request.param


def skip_unless_taken(case, dtype, shape="one"):
    """What a back end doesn't take has tests of its own."""
    if case.backend == "cpu" and dtype == "float16":
        pytest.skip("the CPU kernels take no float16")
    if case.backend != "triton":
        return
    if shape in ("many tokens", "few heads"):
        pytest.skip("the Triton kernels take at most 8 tokens, heads and channels in powers of two")
    if case.device == "cuda" and dtype == "float32":
        pytest.skip("the Triton kernels take operands of 16 bits on a GPU")
    if case.device == "cpu" and shape == "square":
        pytest.skip("many pixels take the interpreter minutes")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.filterwarnings("ignore:decode_.*a slower one is used")
def test_parity(case, op, shape, dtype):
    skip_unless_taken(case, dtype, shape)
    function, arguments = arguments_of(op, shape, dtype)
    expected = function(*arguments, backend="reference")
    moved = (x.to(case.device) if isinstance(x, torch.Tensor) else x for x in arguments)
    actual = function(*moved, backend=case.backend)
    height, width = SHAPES[shape][4]
    pair = zip(*(without_padding(x, height * width) for x in (actual, expected)), strict=True)
    for a, b in pair:
        assert a.device.type == case.device
        assert_matches(a, b, f"decode {dtype}")


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("pixels", [1, 15, 64, 130])
def test_packing_loses_nothing(pixels, dtype):
    x = torch.randn(2, 6, pixels).to(dtype).float()
    assert_matches(unpack_pixels(pack_pixels(x, dtype), pixels), x, "exact")
    v = torch.randn(2, 3, 4, 20, pixels).to(dtype).float()
    assert_matches(unpack_values(pack_values(v, dtype), 20, pixels), v, "exact")


@pytest.mark.parametrize("op", OPS)
def test_arguments_that_a_back_end_does_not_take(op):
    native, triton = BackendCase("cpu", "cpu"), BackendCase("triton", "cpu")
    function, halves = arguments_of(op, dtype="float16")
    _, tokens = arguments_of(op, "many tokens")
    for case, arguments, message in ((native, halves, "pairs of bfloat16"), (triton, tokens, "at most 8 tokens")):
        if case.problem is None:
            with pytest.raises(BackendError, match=message):
                function(*arguments, backend=case.backend)


@pytest.mark.parametrize("op", OPS)
def test_numbers_beyond_float16_spread(op):
    """No infinity is taken for a large number: what depends on it is NaN."""
    if BackendCase("triton", "cpu").problem:
        pytest.skip(BackendCase("triton", "cpu").problem)
    arguments = Arguments(SHAPES["odd grid"], torch.float16)
    getattr(arguments, {"sweep0": "q", "sweep1": "v0", "sweep2": "k1", "upscale": "k0"}[op])[1] *= 1e8
    function, everything = getattr(arguments, op)()
    out = function(*everything, backend="triton")
    out = out[0] if isinstance(out, tuple) else out
    first, last = (arguments.first[1], arguments.first[2]) if op == "upscale" else (1, 2)
    assert out[first:last].isnan().all()
    assert out[:first].isfinite().all() and out[last:].isfinite().all()


def test_no_masks_beyond_the_last(case):
    """Rows of `hyper` that no prompt has cost nothing and change nothing."""
    skip_unless_taken(case, "bfloat16")
    function, arguments = arguments_of("upscale", dtype="bfloat16")
    expected = function(*arguments, backend="reference")
    arguments = replaced(arguments, 9, torch.cat([arguments[9], torch.full((3, 32), float("nan"))]))
    moved = [x.to(case.device) if isinstance(x, torch.Tensor) else x for x in arguments]
    for backend in ("reference", case.backend):
        actual = function(*moved, backend=backend)
        assert actual.shape[0] == len(expected) + 3
        assert_matches(actual[: len(expected)], expected, "decode bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_independent_of_threads_and_of_other_prompts(op, dtype):
    if BackendCase("cpu", "cpu").problem:
        pytest.skip(BackendCase("cpu", "cpu").problem)
    arguments = Arguments(SHAPES["square"], DTYPES[dtype])
    function, everything = getattr(arguments, op)()
    expected = function(*everything)
    threads = torch.get_num_threads()
    try:
        for n in (1, 3, 16):  # 16 share out the tiles of few prompts
            torch.set_num_threads(n)
            assert_matches(function(*everything), expected, "exact")
    finally:
        torch.set_num_threads(threads)
    chosen = torch.tensor([5, 1, 2])
    counts = arguments.first.diff()[chosen]
    masks = torch.cat([torch.arange(arguments.first[i], arguments.first[i + 1]) for i in chosen])
    for name in ("image", "k0", "v0", "k1", "v1", "q", "r1", "r2"):
        setattr(arguments, name, getattr(arguments, name)[chosen])
    arguments.hyper = arguments.hyper[masks]
    arguments.first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    _, some = getattr(arguments, op)()
    index = masks if op == "upscale" else chosen
    expected = expected if isinstance(expected, tuple) else (expected,)
    actual = function(*some)
    assert_matches(actual if isinstance(actual, tuple) else (actual,), tuple(x[index] for x in expected), "exact")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:decode_.*a slower one is used")
def test_scores_of_any_size(case, dtype):
    """Late pixels that outshine everything before them, and tokens that take everything."""
    skip_unless_taken(case, dtype, "square")
    arguments = Arguments(SHAPES["square"], DTYPES[dtype])
    growing = torch.linspace(0, 3, arguments.pixels)
    rows = unpack_pixels(arguments.bases, arguments.pixels) * growing
    arguments.bases = pack_pixels(rows, DTYPES[dtype])
    arguments.q, arguments.k0 = arguments.q * 8, arguments.k0 * 30
    for op in ("sweep0", "sweep1"):
        function, everything = getattr(arguments, op)()
        expected = function(*everything, backend="reference")
        actual = function(*(x.to(case.device) if isinstance(x, torch.Tensor) else x for x in everything))
        actual, expected = (x[0] if isinstance(x, tuple) else x for x in (actual, expected))
        assert float((actual.cpu() - expected).norm() / expected.norm()) < (1e-4 if dtype == "float32" else 3e-2)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512bf16"])
def test_the_forced_instruction_set_is_the_one_that_runs(isa):
    if BackendCase("cpu", "cpu", isa).problem:
        pytest.skip(BackendCase("cpu", "cpu", isa).problem)
    a = Arguments(SHAPES["odd grid"], torch.float32)
    shape = (1, 1, 15, a.bases.shape[2], a.prompts, 8, 7, 16, 0, 0, 0)
    image = (a.bases.data_ptr(), a.values.data_ptr(), 0, 0, a.image.data_ptr())
    out = torch.empty_like(a.q)
    with forced_isa(isa):
        assert _cpu.decode_sweep0(shape, image, a.q.data_ptr(), out.data_ptr(), 2) == isa


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    _, arguments = arguments_of(op)
    packet = getattr(torch.ops.pro2sam_fast, "decode_" + op)
    # r1 and r2 beyond the pixels are undefined and poisoned, which opcheck's comparison doesn't take for equal
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for backend in ("auto", "reference"):
        torch.library.opcheck(packet.default, arguments, {"backend": backend}, test_utils=tests)


@pytest.mark.parametrize("op", OPS)
def test_compiles_without_graph_breaks(op):
    function, arguments = arguments_of(op, "wide")
    compiled = torch.compile(lambda *x: function(*x), fullgraph=True, backend="aot_eager")
    first = [x[0] if isinstance(x, tuple) else x for x in (compiled(*arguments), function(*arguments))]
    assert_matches(*first, "exact")


@pytest.mark.parametrize("op", OPS)
def test_meta_tensors(op):
    function, arguments = arguments_of(op)
    expected = function(*arguments, backend="reference")
    actual = function(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments))
    pair = ((x if isinstance(x, tuple) else (x,)) for x in (actual, expected))
    for a, b in zip(*pair, strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "meta")


def replaced(arguments, index, value):
    return (*arguments[:index], value, *arguments[index + 1 :])


@pytest.mark.parametrize("op", OPS)
def test_says_what_is_wrong(op):
    function, arguments = arguments_of(op)
    for index, x in enumerate(arguments):
        if not isinstance(x, torch.Tensor):
            continue
        with pytest.raises(TypeError, match="must be a tensor, got list"):
            function(*replaced(arguments, index, x.tolist()))
        with pytest.raises(TypeError, match="must be"):
            function(*replaced(arguments, index, x.double()))
        with pytest.raises(ValueError, match="must be|must have"):
            function(*replaced(arguments, index, x.unsqueeze(0)))
        if index:
            with pytest.raises(ValueError, match="on one device"):
                function(*replaced(arguments, index, x.to("meta")))
    with pytest.raises(ConfigError, match="not 'gpu'"):
        function(*arguments, backend="gpu")
    with pytest.raises(BackendError, match="'cuda' can't run"):
        function(*arguments, backend="cuda")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("wrong", [-1, 2])
def test_images_that_are_not_there(op, wrong):
    if BackendCase("cpu", "cpu").problem:
        pytest.skip(BackendCase("cpu", "cpu").problem)
    function, arguments = arguments_of(op)
    index = next(i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor) and x.dtype == torch.int64)
    with pytest.raises(ValueError, match=f"image must be in 0..1, got {wrong}"):
        function(*replaced(arguments, index, torch.full_like(arguments[index], wrong)), backend="cpu")


@pytest.mark.parametrize("first", [[1, 1, 1, 2], [0, 5, 5, 6], [0, 2, 1, 3], [0, 0, 0, 99]])
def test_masks_that_do_not_add_up(first):
    if BackendCase("cpu", "cpu").problem:
        pytest.skip(BackendCase("cpu", "cpu").problem)
    function, arguments = arguments_of("upscale")
    arguments = replaced(arguments, 9, torch.zeros(max(first[-1] % 99, 0), 32))
    with pytest.raises(ValueError, match="runs of at most 4"):
        function(*replaced(arguments, 10, torch.tensor(first)), backend="cpu")
