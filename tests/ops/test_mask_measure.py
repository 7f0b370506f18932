import functools
import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pro2sam_fast import _cpu, memory
from pro2sam_fast.errors import BackendError, ConfigError
from pro2sam_fast.ops import mask_measure, mask_pack, pack_masks, unpack_masks
from pro2sam_fast.ops.mask_measure import upsample_logits
from pro2sam_fast.testing import BackendCase, assert_matches, backend_cases, forced_isa

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="without fused instructions PyTorch rounds the reference otherwise",
)

MODULE = importlib.import_module("pro2sam_fast.ops.mask_measure")
CASES = [case for case in backend_cases() if case.problem is None]
ISAS = [case for case in CASES if case.isa]

SMALL = [(480, 640), (427, 640), (333, 500), (224, 224), (150, 200), (64, 64), (64, 65), (1, 1), (1, 1024), (700, 1)]
LARGE = [(1024, 768), (1024, 1024), (1500, 2250), (3006, 4013), (24, 33000)]


def frame(size, img_size=1024):
    """(S, (h, w), (H, W)) of a photo."""
    scale = img_size / max(size)
    return img_size, tuple(max(1, int(n * scale + 0.5)) for n in size), size


def smooth(count, n=256, scale=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn((count, 1, 9, 9), generator=generator) * scale
    return F.interpolate(coarse, (n, n), mode="bicubic")[:, 0]


@functools.cache
def unkind_logits():
    """float32 (K, 256, 256): at the cutoffs, beside them, signed zeros, constant, single pixels, empty, full, huge."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn((256, 256), generator=generator)
    steps = torch.randint(-1, 2, (256, 256), generator=generator).float()
    pixel, first, corner = torch.full((3, 256, 256), -7.0)
    pixel[100, 37], first[0, 0], corner[-1, -1] = 3.0, 2.5, 9.0
    halves = torch.where(torch.arange(256) < 101, 1e4, -1e4).expand(256, 256)
    blob, tied = smooth(2)
    constants = [torch.full((256, 256), value) for value in (0.0, -0.0, 1.0, -1.0, -9.0, 1e4, -1e4)]
    near = [value + noise.sign() * 1e-7 for value in (1.0, -1.0)] + [noise * 1e-44, noise * 1e-38]
    others = [noise * 3, steps, steps * 1e4, halves, halves.T, blob, tied.round(), blob * 1e4, pixel, first, corner]
    return torch.stack([*constants, *near, *others])


@functools.cache
def expected(size, count=None, threshold=0.0, offset=1.0):
    logits, where = unkind_logits() if count is None else smooth(count, seed=2), frame(size)
    measures = mask_measure(logits, *where, threshold, offset, backend="reference")
    return logits, where, measures, mask_pack(logits, *where, threshold, backend="reference")


@pytest.fixture(params=CASES, ids=str)
def case(request):
    with forced_isa(request.param.isa):
        yield request.param


@pytest.mark.parametrize("absent", [case for case in backend_cases() if case.problem], ids=str)
def test_back_ends_not_tested_here(absent):
    pytest.skip(absent.problem)


def fit_for_the_interpreter(case, where):
    """Whether Triton's interpreter is what runs; skips what it would take long for."""
    if case.backend != "triton" or case.device == "cuda":
        return False
    if MODULE._leave_to_torch(where[0], where[2]):
        pytest.skip("for few pixels PyTorch's CPU kernel rounds in another order")
    if where[2][0] > 150 or where[2][0] * where[2][1] > 12_000:
        pytest.skip("slow in the interpreter")
    return True


def assert_same(case, logits, where, measures, packed, threshold=0.0, offset=1.0):
    logits = logits.to(case.device)
    if fit_for_the_interpreter(case, where):
        logits, packed = logits[::5], packed[::5]
        measures = tuple(x[::5] for x in measures)
    if case.device == "cuda":  # whose resize finds positions in another way
        measures = tuple(x.cpu() for x in mask_measure(logits, *where, threshold, offset, backend="reference"))
        packed = mask_pack(logits, *where, threshold, backend="reference").cpu()
    assert_matches(mask_measure(logits, *where, threshold, offset, backend=case.backend), measures, "exact")
    assert_matches(mask_pack(logits, *where, threshold, backend=case.backend), packed, "exact")


@pytest.mark.parametrize("threads", [1, 2])
def test_reference_equals_pixel_arithmetic(threads, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(memory, "CHUNK_BYTES", 12 * (1024**2 + 90 * 130))
    torch.set_num_threads(threads)
    try:
        logits, where = unkind_logits(), frame((90, 130))
        inner, outer, areas, boxes = mask_measure(logits, *where, 0.25, 1.5, backend="reference")
        full = upsample_logits(logits, *where).numpy()
        packed = mask_pack(logits, *where, 0.25, (100, 150), (7, 20), backend="reference")
    finally:
        torch.set_num_threads(before)
    for counts, cut in ((inner, 1.75), (outer, -1.25), (areas, 0.25)):
        assert counts.tolist() == (full > np.float32(cut)).sum((1, 2)).tolist()
    inside = unpack_masks(packed, 150).numpy()
    np.testing.assert_array_equal(inside[:, 7:97, 20:], full > np.float32(0.25))
    inside[:, 7:97, 20:] = False
    assert not inside.any()
    for box, mask in zip(boxes.tolist(), full > np.float32(0.25), strict=True):
        y, x = mask.nonzero()
        assert box == ([x.min(), y.min(), x.max(), y.max()] if len(x) else [0, 0, 0, 0])


@pytest.mark.parametrize("size", SMALL, ids=str)
def test_parity(case, size):
    assert_same(case, *expected(size))


@pytest.mark.parametrize("size", LARGE, ids=str)
def test_parity_on_large_photos(case, size):
    if case.backend == "reference":
        pytest.skip("the expected result is the reference's")
    assert_same(case, *expected(size, 2))


@pytest.mark.parametrize(("threshold", "offset"), [(0.1, 0.0), (-2.0, 0.7), (3.0, -1.0), (1e30, 1.0)])
def test_cutoffs(case, threshold, offset):
    assert_same(case, *expected((60, 90), None, threshold, offset), threshold, offset)


def test_values_that_are_not_finite(case):
    logits = torch.cat([smooth(4), unkind_logits()[-1:]])
    infinite = float("inf")
    logits[0, 3, 9], logits[1, 200, 200], logits[2, :, 7], logits[3, 50] = float("nan"), infinite, 3e38, -infinite
    logits[4] *= float("nan")
    where = frame((90, 130))
    measures = mask_measure(logits, *where, 0.0, 1.0, backend="reference")
    assert_same(case, logits, where, measures, mask_pack(logits, *where, 0.0, backend="reference"))


@pytest.mark.parametrize("n", [(1, 1), (4, 3), (16, 16), (64, 64), (31, 300)])
@pytest.mark.parametrize("img_size", [1, 64, 65, 257])
def test_low_resolutions_and_frames_of_other_sizes(case, n, img_size):
    logits = torch.randn((5, *n), generator=torch.Generator().manual_seed(3))
    logits[1:3] = 0.5 + logits[1:3].sign() * 1e-7
    logits[3] *= 1e-44
    for size in ((63, 65), (129, 40), (3, 300)):
        where = (img_size, (img_size, -(-img_size // 2)), size)
        measures = mask_measure(logits, *where, 0.0, 0.5, backend="reference")
        packed = mask_pack(logits, *where, 0.0, backend="reference")
        assert_same(case, logits, where, measures, packed, offset=0.5)


@pytest.mark.parametrize("count", [0, 1, 3, 66])
def test_counts_of_masks(case, count):
    logits, where = smooth(count, 64), frame((66, 70), 256)
    measures = mask_measure(logits, *where, 0.0, 1.0, backend="reference")
    assert [x.shape for x in measures] == [(count,)] * 3 + [(count, 4)]
    assert_same(case, logits, where, measures, mask_pack(logits, *where, 0.0, backend="reference"))


@pytest.mark.parametrize("x", [0, 1, 63, 64, 130])
@pytest.mark.parametrize("width", [1, 63, 64, 65, 200])
def test_crops_of_an_image(case, x, width):
    logits, where = smooth(4, 64).to(case.device), frame((140, width), 256)
    logits[0], logits[1] = 5.0, -5.0
    logits = logits[1:3] if fit_for_the_interpreter(case, where) else logits
    expected = torch.zeros((len(logits), 150, 350), dtype=torch.bool)
    expected[:, 6:146, x : x + width] = upsample_logits(logits, *where) > 0
    packed = mask_pack(logits, *where, 0.0, (150, 350), (6, x), backend=case.backend)
    assert_matches(packed, pack_masks(expected), "exact")


def test_strided_and_unaligned_logits(case):
    logits, where = smooth(6, 64), frame((60, 90), 256)
    wide = torch.cat([logits, logits], 2).to(case.device)
    shifted = torch.cat([logits.new_zeros(1), logits.flatten()]).to(case.device)[1:].view_as(logits)
    for expect, given in ((logits[::2].mT, wide[::2, :, :64].mT), (logits, shifted)):
        measures = mask_measure(expect.contiguous().to(case.device), *where, 0.0, 1.0, backend="reference")
        assert_matches(mask_measure(given, *where, 0.0, 1.0, backend=case.backend), measures, "exact")


def test_logits_at_any_byte(case):
    if case.device != "cpu":
        pytest.skip("torch hands out aligned device memory only")
    logits, where = smooth(3, 64), frame((60, 90), 256)
    odd = torch.frombuffer(bytearray(1) + logits.numpy().tobytes(), dtype=torch.float32, offset=1).view_as(logits)
    measures = mask_measure(logits, *where, 0.0, 1.0, backend="reference")
    assert_same(case, odd, where, measures, mask_pack(logits, *where, 0.0, backend="reference"))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("case", ISAS, ids=str)
def test_the_forced_instruction_set_is_the_one_that_runs(case, threads):
    logits, where, measures, packed = expected((480, 640))
    shape = (*logits.shape[1:], where[0], *where[1], *where[2])
    out, masks = [torch.empty_like(x) for x in measures], torch.empty_like(packed)
    isa = case.isa.removesuffix("bf16")  # nothing here is done in bfloat16
    with forced_isa(case.isa):
        addresses = (x.data_ptr() for x in (logits, *out))
        assert _cpu.mask_measure(*addresses, len(logits), shape, 1.0, -1.0, 0.0, threads) == isa
        addresses = (logits.data_ptr(), masks.data_ptr())
        assert _cpu.mask_pack(*addresses, len(logits), shape, 0.0, *masks.shape[1:], 0, 0, threads) == isa
    assert_matches((*out, masks), (*measures, packed), "exact")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("count", [0, 2])
def test_opcheck(backend, count):
    logits, options = smooth(count, 16), {"backend": backend}
    where = frame((69, 70), 80)
    torch.library.opcheck(torch.ops.pro2sam_fast.mask_measure.default, (logits, *where, 0.0, 1.0), options)
    canvas = ((80, 90), (3, 5))
    torch.library.opcheck(torch.ops.pro2sam_fast.mask_pack.default, (logits, *where, 0.0, *canvas), options)


def test_meta_tensors():
    logits = torch.empty((7, 16, 16), device="meta")
    measures = mask_measure(logits, *frame((69, 70), 80), 0.0, 1.0)
    assert [(x.shape, x.dtype) for x in measures] == [((7,), torch.int64)] * 3 + [((7, 4), torch.int64)]
    packed = mask_pack(logits, *frame((69, 70), 80), 0.0)
    assert (packed.shape, packed.dtype, packed.device.type) == ((7, 69, 2), torch.int64, "meta")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_without_graph_breaks(backend):
    def areas(logits):
        measures = mask_measure(logits * 2, *frame((69, 70), 80), 0.0, 1.0, backend=backend)
        return measures[2] + 1, mask_pack(logits, *frame((69, 70), 80), 0.0, backend=backend).sum()

    compiled = torch.compile(areas, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (3, 5):
        assert_matches(compiled(smooth(count, 16)), areas(smooth(count, 16)), "exact")


LOGITS = torch.zeros((2, 16, 16))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"low_res": LOGITS.tolist()}, TypeError, "low_res must be a tensor, got list"),
        ({"low_res": LOGITS.double()}, TypeError, "dense float32 tensor, got torch.float64"),
        ({"low_res": LOGITS.to_sparse()}, TypeError, "dense float32 tensor, got torch.float32, torch.sparse_coo"),
        ({"low_res": LOGITS[0]}, ValueError, r"must be \(K, n, m\) .*\(16, 16\)"),
        ({"low_res": LOGITS[:, :0]}, ValueError, r"n and m positive, got \(2, 0, 16\)"),
        ({"input_size": (65, 64)}, ValueError, r"from 1 to img_size 64, got \(65, 64\)"),
        ({"input_size": (0, 64)}, ValueError, "from 1 to img_size 64"),
        ({"size": (9, 0)}, ValueError, r"both positive, got \(9, 0\)"),
        ({"size": (9,)}, ValueError, r"size must be \(H, W\)"),
        ({"backend": "gpu"}, ConfigError, "not 'gpu'"),
        ({"backend": "cuda"}, BackendError, "'cuda' can't run"),
    ],
)
def test_says_what_is_wrong(changes, error, message):
    arguments = {"low_res": LOGITS, "img_size": 64, "input_size": (64, 48), "size": (9, 7), "threshold": 0.0, **changes}
    with pytest.raises(error, match=message):
        mask_measure(**arguments, offset=1.0)
    with pytest.raises(error, match=message):
        mask_pack(**arguments)


@pytest.mark.parametrize(
    ("canvas", "origin", "message"),
    [((8, 9), (0, 0), "don't fit"), ((20, 20), (0, 14), "don't fit"), ((20, 20), (-1, 0), "canvas and origin")],
)
def test_a_crop_outside_its_image(canvas, origin, message):
    with pytest.raises(ValueError, match=message):
        mask_pack(LOGITS, 64, (64, 48), (9, 7), 0.0, canvas, origin)


@pytest.fixture(params=["cuda", "triton"])
def device_backend(request):
    problem = BackendCase(request.param, "cuda").problem
    if problem:
        pytest.skip(problem)
    return request.param


def both(logits, where, backend):
    measures = mask_measure(logits, *where, 0.0, 1.0, backend=backend)
    return *measures, mask_pack(logits, *where, 0.0, backend=backend)


@pytest.mark.cuda
def test_opcheck_on_a_gpu(device_backend):
    logits, options, where = smooth(2, 16).cuda(), {"backend": device_backend}, frame((69, 70), 80)
    torch.library.opcheck(torch.ops.pro2sam_fast.mask_measure.default, (logits, *where, 0.0, 1.0), options)
    arguments = (logits, *where, 0.0, (80, 90), (3, 5))
    torch.library.opcheck(torch.ops.pro2sam_fast.mask_pack.default, arguments, options)


@pytest.mark.cuda
def test_cuda_graph_capture(device_backend):
    logits, where = smooth(7).cuda(), frame((480, 640))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both(logits, where, device_backend)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        actual = both(logits, where, device_backend)
    logits.copy_(smooth(7, seed=5))
    graph.replay()
    assert_matches(actual, both(logits, where, "reference"), "exact")


@pytest.mark.cuda
def test_waits_for_nothing(device_backend):
    logits, where = smooth(7).cuda(), frame((480, 640))
    both(logits, where, device_backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = both(logits, where, device_backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_matches(actual, both(logits, where, "reference"), "exact")


@pytest.mark.cuda
def test_cuda_copies_what_keeps_its_size(device_backend):
    logits = unkind_logits().cuda()
    logits[0, 3, 9], logits[1, 200, 200], logits[2, 50] = float("nan"), float("inf"), -float("inf")
    for where in ((256, (256, 256), (256, 256)), (256, (200, 256), (200, 256)), (256, (200, 256), (200, 300))):
        assert_matches(both(logits, where, device_backend), both(logits, where, "reference"), "exact")
