"""Masks decoded ahead of a device's queue: those of the plain grid decoder, also by the Triton kernels."""

import warnings

import pytest
import torch

from pro2sam_fast.decoding import PointDecoder
from pro2sam_fast.decoding_ahead import OutOfRangeError, masks_ahead
from pro2sam_fast.models.sam.grid_decoder import GridDecoder
from pro2sam_fast.models.sam.lite import make_sam_lite
from pro2sam_fast.testing import BackendCase

SIDE = 64
BACKENDS = (
    BackendCase("auto", "cpu"),
    BackendCase("triton", "cpu"),
    pytest.param(BackendCase("triton", "cuda"), marks=pytest.mark.cuda),
)


@pytest.fixture(scope="module")
def sam():
    torch.manual_seed(0)
    return make_sam_lite(img_size=SIDE).eval()


@pytest.fixture(params=BACKENDS, ids=lambda case: f"{case.backend}-{case.device}")
def backend(request):
    if request.param.problem:
        pytest.skip(request.param.problem)
    return request.param


@pytest.fixture
def there(sam, backend):
    """The model on the back end's device."""
    yield sam.to(backend.device)
    sam.to("cpu")


def points(count):
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * SIDE


def embedding(images=1):
    return torch.randn(images, 256, SIDE // 16, SIDE // 16, generator=torch.Generator().manual_seed(2))


def decoder(sam, dtype, threshold=-1.0, backend="auto"):
    made = PointDecoder(sam, dtype, threshold)
    made.__dict__["_grid"] = GridDecoder(sam, dtype, backend=backend)
    return made


def collected(batches):
    columns = list(zip(*batches, strict=True))
    return (*(torch.cat(column).cpu() for column in columns[:3]), sum(columns[3]))


@torch.no_grad()
def test_the_masks_of_the_grid_decoder_in_their_order(sam):
    coords = points(70)
    plain = decoder(sam, torch.float32)
    iou = plain._grid.tokens(plain._grid.bases(embedding()), plain._sparse(coords)[0]).iou[:, 1:]
    plain = decoder(sam, torch.float32, float(iou.quantile(0.6)))
    expected = collected(plain._decode_grid(embedding(), coords, 16))
    for size in (16, 7, 100):
        actual = collected(plain._decode_ahead(embedding(), coords, size))
        assert actual[3] == expected[3]
        assert all(torch.equal(a, b) for a, b in zip(actual[:3], expected[:3], strict=True))
    assert 0 < len(expected[0]) < iou.numel()


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "most"), [("float32", 2e-6), ("bfloat16", 1e-2), ("float16", 1.2e-3)])
def test_the_whole_chain(there, backend, dtype, most):
    if (backend.backend, dtype) == ("auto", "float16"):
        pytest.skip("the CPU kernels take no float16")
    if backend.device == "cuda" and dtype == "float32":
        pytest.skip("the Triton kernels take operands of 16 bits on a GPU")
    image, coords = embedding().to(backend.device), points(5).to(backend.device)
    expected = collected(decoder(there, torch.float32, backend="reference")._decode_ahead(image, coords, 16))
    actual = collected(decoder(there, getattr(torch, dtype), backend=backend.backend)._decode_ahead(image, coords, 3))
    assert torch.equal(actual[0], expected[0]) and actual[3] == expected[3] == 5
    for a, b in zip(actual[1:3], expected[1:3], strict=True):
        assert float((a - b).norm() / b.norm()) < most


@torch.no_grad()
def test_prompts_of_several_images(there, backend):
    grid = GridDecoder(there, torch.bfloat16, backend=backend.backend)
    images = embedding(2).to(backend.device)
    sparse, _ = decoder(there, torch.bfloat16)._sparse(points(4).to(backend.device))
    image = torch.tensor([1, 0, 0, 1], device=backend.device)
    wanted = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 1, 1]], device=backend.device).bool()
    both = grid.bases(images)
    logits, index, count = grid.upscale_padded(both, grid.tokens(both, sparse, image), wanted, 12)
    assert count == 6 and index.tolist() == [1, 3, 10, 13, 14, 15, *[-1] * 6]
    for i in range(2):
        one, own = grid.bases(images[i : i + 1]), wanted & (image == i)[:, None]
        alone, which, count = grid.upscale_padded(one, grid.tokens(one, sparse), own, 12)
        chosen = image[index[:6] // 4] == i
        assert torch.equal(which[: int(count)], index[:6][chosen])
        torch.testing.assert_close(alone[: int(count)], logits[:6][chosen], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_numbers_beyond_float16_are_decoded_with_bfloat16(sam):
    if BackendCase("triton", "cpu").problem:
        pytest.skip(BackendCase("triton", "cpu").problem)
    coords, large = points(3), embedding() * 1e5
    with pytest.warns(RuntimeWarning, match="beyond float16"):
        actual = collected(decoder(sam, torch.float16, backend="triton")._decode_ahead(large, coords, 2))
    expected = collected(decoder(sam, torch.bfloat16, backend="triton")._decode_ahead(large, coords, 2))
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@torch.no_grad()
def test_a_constant_beyond_float16(sam):
    assert GridDecoder(sam, torch.float16).dtype == torch.float16
    weight = sam.mask_decoder.transformer.layers[0].mlp.lin1.weight
    before = weight[0, 0].item()
    weight[0, 0] = 1e5
    try:
        assert GridDecoder(sam, torch.float16).dtype == torch.bfloat16
    finally:
        weight[0, 0] = before


@torch.no_grad()
def test_logits_that_are_no_numbers_are_not_given(sam, monkeypatch):
    grid = GridDecoder(sam)
    bases = grid.bases(embedding())
    decoded = grid.tokens(bases, torch.zeros(2, 2, 256))
    grid.dtype = torch.float16
    keep = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1]]).bool()
    made = GridDecoder.upscale_padded

    def broken(self, *arguments):
        logits, *others = made(self, *arguments)
        logits[1, 3, 3] = float("nan")
        return logits, *others

    assert len(list(masks_ahead(grid, bases, decoded, keep, 2))) == 1
    monkeypatch.setattr(GridDecoder, "upscale_padded", broken)
    with pytest.raises(OutOfRangeError):
        list(masks_ahead(grid, bases, decoded, keep, 2))


@torch.no_grad()
def test_nothing_is_wanted(sam):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(decoder(sam, torch.float32, 1e9)._decode_ahead(embedding(), points(5), 2)) == []
        assert list(decoder(sam, torch.float32)._decode_ahead(embedding(), points(0), 2)) == []


@pytest.mark.cuda
@torch.no_grad()
def test_tokens_and_masks_in_a_cuda_graph(sam):
    """No step waits for the device, and a replay works on what is in the buffers then."""
    if BackendCase("triton", "cuda").problem:
        pytest.skip(BackendCase("triton", "cuda").problem)
    grid = GridDecoder(sam.to("cuda"), torch.float16, 256)
    sparse, image = torch.zeros(256, 2, 256, device="cuda"), embedding().cuda()

    def chain():
        bases = grid.bases(image)
        decoded = grid.tokens(bases, sparse)
        return decoded.iou, *grid.upscale_padded(bases, decoded, decoded.iou > 0, 1024)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        chain()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = chain()
    sparse.copy_(decoder(sam, torch.float16)._sparse(points(256).cuda())[0])
    graph.replay()
    torch.cuda.synchronize()
    iou, logits, index, count = chain()
    sam.to("cpu")
    assert torch.equal(captured[0], iou) and torch.equal(captured[2], index) and int(captured[3]) == int(count)
    assert torch.equal(captured[1][: int(count)], logits[: int(count)])
