"""The CUDA kernels of filtering and writing masks, run on the host thread by thread: index maps, barriers, rounding."""

import fractions
import importlib

import numpy as np
import on_host
import pytest
import torch

from pro2sam_fast.ops import compact, mask_measure, mask_pack, nms, pack_masks
from pro2sam_fast.testing import assert_matches

MODULE = importlib.import_module("pro2sam_fast.ops.mask_measure")

needs_fused_reference = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="without fused instructions PyTorch rounds the reference otherwise",
)


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 255, 256, 257, 8191, 8192, 8193, 20001])
def test_compact(n):
    keep = torch.rand(n, generator=torch.Generator().manual_seed(n))
    for density in (0.0, 0.3, 1.0):
        assert_matches(on_host.compact(keep < density), compact(keep < density, backend="reference"), "exact")


def boxes_and_scores(count, seed=0):
    """Corners on a coarse grid, many boxes without area, tied scores."""
    generator = np.random.default_rng(seed)
    corners = np.sort(generator.integers(0, 7, (count, 2, 2)) * (3 if count > 200 else 10), axis=1)
    scores = generator.integers(0, 5, count) / 5
    return torch.from_numpy(corners.reshape(count, 4)).float(), torch.from_numpy(scores)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 0.7, 2 / 3, 1.0])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 130, 700])
def test_nms(count, threshold):
    boxes, scores = boxes_and_scores(count, count)
    order = scores.sort(descending=True, stable=True).indices
    expected = nms(boxes, scores, threshold, backend="reference")
    for words_at_once in (None, 1, 3):
        assert_matches(on_host.nms(boxes, order, threshold, words_at_once=words_at_once), expected, "exact")


@pytest.mark.parametrize("part", [0, 1, 64, 129, 199, 200])
def test_nms_of_the_first_boxes(part):
    boxes, scores = boxes_and_scores(200)
    count = torch.tensor(part)
    order = scores[:part].sort(descending=True, stable=True).indices
    order = torch.cat([order, torch.arange(part, 200)])
    boxes[part:] = float("nan")
    for words_at_once in (None, 1):
        actual = on_host.nms(boxes, order, 0.5, count, words_at_once)
        assert_matches(actual, nms(boxes, scores, 0.5, count, backend="reference"), "exact")


def test_nms_of_many_boxes():
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand((3072, 2), generator=generator) * 600
    boxes = torch.cat([corner, corner + torch.rand((3072, 2), generator=generator) * 200], 1)
    scores = torch.randint(50, (3072,), generator=generator)
    order = scores.sort(descending=True, stable=True).indices
    assert_matches(on_host.nms(boxes, order, 0.5), nms(boxes, scores, 0.5), "exact")


@pytest.mark.parametrize(
    ("n_in", "n_out"), [(256, 1024), (683, 1500), (1024, 768), (1, 9), (9, 1), (768, 769), (1024, 33000)]
)
@pytest.mark.parametrize("fused", [False, True])
def test_taps_round_as_torch_does(n_in, n_out, fused):
    # exact arithmetic, rounded once or twice
    indices, weights = on_host.mask_taps(n_in, n_out, fused)
    ratio = fractions.Fraction(float(np.float32(n_in) / np.float32(n_out)))
    for at in {*range(0, n_out, 1 + n_out // 500), n_out - 1}:
        product = ratio * fractions.Fraction(2 * at + 1, 2)
        position = rounded(product - fractions.Fraction(1, 2) if fused else rounded(product) - fractions.Fraction(1, 2))
        position = max(position, 0)
        first = min(int(position), n_in - 1)
        assert indices[at].tolist() == [first, min(first + 1, n_in - 1)]
        w1 = np.float32(float(position - first))
        assert weights[at].tolist() == [np.float32(1) - w1, w1]


def rounded(x):
    """To the nearest float32, ties to even; x is of moderate size."""
    if x == 0:
        return x
    exponent = 0
    while abs(x) >= fractions.Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(x) < fractions.Fraction(2) ** exponent:
        exponent -= 1
    unit = fractions.Fraction(2) ** (exponent - 23)
    return round(x / unit) * unit


def frame(size, img_size=1024):
    scale = img_size / max(size)
    return img_size, tuple(max(1, int(n * scale + 0.5)) for n in size), size


def unkind(n=64, seed=0):
    """Noise, at the cutoffs, beside them, tiny, huge, constant, single pixels, a smooth blob, halves."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((n, n), generator=generator)
    steps = torch.randint(-1, 2, (n, n), generator=generator).float()
    blob = torch.nn.functional.interpolate(torch.randn((1, 1, 5, 5), generator=generator) * 4, (n, n), mode="bicubic")[
        0, 0
    ]
    pixel, corner = torch.full((2, n, n), -7.0)
    pixel[n // 2, n // 3], corner[-1, -1] = 3.0, 9.0
    halves = torch.where(torch.arange(n) < n // 2, 1e4, -1e4).expand(n, n)
    constants = [torch.full((n, n), value) for value in (0.0, -0.0, 1.0, -1.0, 1e4, -1e4)]
    others = [noise * 3, steps, 1 + noise.sign() * 1e-7, noise * 1e-44, noise * 1e-38, blob, blob * 1e4, pixel, corner]
    return torch.stack([*constants, *others, halves, halves.T])


def assert_kernel(logits, where, threshold=0.0, offset=1.0, **canvas):
    """The kernels with the positions of PyTorch's CPU kernel give what `_cpu` gives."""
    measures = mask_measure(logits, *where, threshold, offset, backend="cpu")
    assert_matches(on_host.mask_measure(logits, *where, threshold, offset, fused=False), measures, "exact")
    packed = mask_pack(logits, *where, threshold, *canvas.values(), backend="cpu")
    assert_matches(on_host.mask_pack(logits, *where, threshold, False, **canvas), packed, "exact")


@pytest.fixture
def cpu_kernel_always(monkeypatch):
    monkeypatch.setattr(MODULE, "_leave_to_torch", lambda *_: False)


EDGES = [(1, 1), (1, 31), (31, 1), (32, 32), (33, 31), (63, 65), (64, 64), (65, 63), (127, 33), (128, 32), (129, 257)]


@needs_fused_reference
@pytest.mark.parametrize("size", [*EDGES, (480, 640), (1, 1024), (700, 1), (24, 33000)], ids=str)
def test_masks_at_every_tile_edge(cpu_kernel_always, size):
    few = [8, 11] if max(size) > 1024 else [6, 7, 9, 11, 14] if size[0] * size[1] > 100_000 else slice(None)
    assert_kernel(unkind()[few], frame(size))


@needs_fused_reference
@pytest.mark.parametrize("n", [(1, 1), (4, 3), (31, 300)])
@pytest.mark.parametrize("img_size", [1, 65, 300])
def test_masks_of_other_sizes(cpu_kernel_always, n, img_size):
    logits = torch.randn((4, *n), generator=torch.Generator().manual_seed(3))
    logits[1] *= 1e-44
    for size in ((63, 65), (129, 40), (3, 300)):
        assert_kernel(logits, (img_size, (img_size, -(-img_size // 2)), size), offset=0.5)


@needs_fused_reference
@pytest.mark.parametrize(("threshold", "offset"), [(0.1, 0.0), (-2.0, 0.7), (3.0, -1.0), (1e30, 1.0)])
def test_cutoffs(threshold, offset):
    assert_kernel(unkind(), frame((90, 130), 256), threshold, offset)


@needs_fused_reference
def test_values_that_are_not_finite():
    logits, infinite = unkind()[:6].clone(), float("inf")
    logits[0, 3, 9], logits[1, 50, 50], logits[2, :, 7], logits[3, 50] = float("nan"), infinite, 3e38, -infinite
    for where in (frame((90, 130), 256), (256, (90, 130), (90, 130))):
        measures = mask_measure(logits, *where, 0.0, 1.0, backend="reference")
        assert_matches(on_host.mask_measure(logits, *where, 0.0, 1.0, fused=False), measures, "exact")
    same = (64, (64, 64), (64, 64))  # nothing to resize: copied
    for fused in (False, True):
        masks = on_host.mask_pack(logits, *same, 0.0, fused)
        assert_matches(masks, pack_masks(logits > 0), "exact")


@needs_fused_reference
@pytest.mark.parametrize("x", [0, 1, 31, 32, 63, 64, 130])
@pytest.mark.parametrize("width", [1, 63, 64, 65, 200])
def test_crops_of_an_image(x, width):
    logits = unkind()[[2, 3, 6, 11]]
    for y in (0, 6, 40):
        assert_kernel(logits, frame((140, width), 256), canvas=(290, 350), origin=(y, x))


@pytest.mark.parametrize("size", [(90, 130), (131, 61), (256, 200), (1, 300)])
def test_positions_rounded_once(size):
    # what PyTorch's CUDA kernel computes, in 64 bits of precision and rounded where it rounds
    logits, where = unkind()[[1, 6, 7, 8, 9, 11]], frame(size, 256)
    full = resized(resized(logits.numpy(), (256, 256))[:, : where[1][0], : where[1][1]], size)
    assert_matches(on_host.mask_pack(logits, *where, 0.0, True), pack_masks(torch.from_numpy(full > 0)), "exact")
    inner, outer, areas, _ = on_host.mask_measure(logits, *where, 0.0, 1.0, True)
    for counts, cut in ((inner, 1), (outer, -1), (areas, 0)):
        assert counts.tolist() == (full > cut).sum((1, 2)).tolist()


def resized(values, size):
    if values.shape[1:] == tuple(size):
        return values
    (rows, v), (columns, w) = (on_host.mask_taps(n, m, True) for n, m in zip(values.shape[1:], size, strict=True))
    along = lerp(values[:, :, columns[:, 0]], values[:, :, columns[:, 1]], w[:, 0], w[:, 1])
    return lerp(along[:, rows[:, 0]], along[:, rows[:, 1]], v[:, :1], v[:, 1:])


def lerp(a, b, w0, w1):
    return (a.astype(np.longdouble) * w0 + (b * w1)).astype(np.float32)
