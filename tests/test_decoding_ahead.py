"""Masks decoded ahead of a device's queue: those of the plain grid decoder, also by the Triton kernels."""

import contextlib
import copy
import warnings

import pytest
import recorded_graphs
import torch

from pro2sam_fast.decoding import PointDecoder, _embedded, _image_tokens
from pro2sam_fast.decoding_ahead import masks_ahead
from pro2sam_fast.generator import MaskGenerator
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


def ahead(made, image, coords, size, grid=None):
    return [part[1:] for part in made._decode_ahead(grid or made._grid, image, [coords], size)]


def collected(batches):
    columns = list(zip(*batches, strict=True))
    return (*(torch.cat(column).cpu() for column in columns[:3]), sum(columns[3]))


@torch.no_grad()
def test_the_masks_of_the_grid_decoder_in_their_order(sam):
    coords = points(70)
    plain = decoder(sam, torch.float32)
    iou = plain._grid.tokens(plain._grid.bases(embedding()), _embedded(sam.prompt_encoder, coords)[0]).iou[:, 1:]
    plain = decoder(sam, torch.float32, float(iou.quantile(0.6)))
    expected = collected(plain._decode_grid(embedding(), coords, 16))
    for size in (16, 7, 100):
        actual = collected(ahead(plain, embedding(), coords, size))
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
    expected = collected(ahead(decoder(there, torch.float32, backend="reference"), image, coords, 16))
    actual = collected(ahead(decoder(there, getattr(torch, dtype), backend=backend.backend), image, coords, 3))
    assert torch.equal(actual[0], expected[0]) and actual[3] == expected[3] == 5
    for a, b in zip(actual[1:3], expected[1:3], strict=True):
        assert float((a - b).norm() / b.norm()) < most


@torch.no_grad()
def test_prompts_of_several_images(there, backend):
    grid = GridDecoder(there, torch.bfloat16, backend=backend.backend)
    images = embedding(2).to(backend.device)
    sparse, _ = _embedded(there.prompt_encoder, points(4).to(backend.device))
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
def test_numbers_beyond_float16_are_told(sam):
    if BackendCase("triton", "cpu").problem:
        pytest.skip(BackendCase("triton", "cpu").problem)
    coords, both = points(3), torch.cat([embedding(), embedding() * 1e5])
    made = decoder(sam, torch.float16, 0.5, backend="triton")
    assert made.narrow
    for part in made._decode_ahead(made._grid, both, [coords, coords], 2):
        assert bool(part.iou.isnan().all()) == bool(part.image)
    everything = decoder(sam, torch.bfloat16, backend="triton")
    wide = collected(ahead(everything, both[1:], coords, 2, made._wide_grid))
    expected = collected(ahead(everything, both[1:], coords, 2))
    assert torch.equal(wide[0], expected[0]) and torch.equal(wide[1], expected[1])


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
def test_logits_that_are_no_numbers_are_told(sam, monkeypatch):
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

    (whole,) = masks_ahead(grid, bases, decoded, keep, [(0, 2)])
    assert not whole.iou.isnan().any() and whole.alive == 2
    monkeypatch.setattr(GridDecoder, "upscale_padded", broken)
    (whole,) = masks_ahead(grid, bases, decoded, keep, [(0, 2)])
    assert whole.iou.isnan().tolist() == [False, True]


@torch.no_grad()
def test_nothing_is_wanted(sam):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ahead(decoder(sam, torch.float32, 1e9), embedding(), points(5), 2) == []
        assert ahead(decoder(sam, torch.float32), embedding(), points(0), 2) == []


def tokens_of(made, images, coords):
    """Of the same points on each image, by the graphs if there are any."""
    bases, tokens = made._grid.bases(images), made._tokens(made._grid)
    return [_image_tokens(tokens, bases, i, coords) for i in range(len(images))]


def same_tokens(found, expected):
    return all(torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_tokens_by_replays_are_the_same(sam, monkeypatch, mode):
    """For any images and points, of a part of a group and of several: nothing else in them depends on the call."""
    recorded_graphs.use(monkeypatch)
    made, encoder = decoder(sam, torch.float32), sam.prompt_encoder

    def check(coords):
        found = tokens_of(made, embedding(2), coords)
        monkeypatch.setattr(sam.mask_decoder, "cuda_graphs", False)
        assert same_tokens(found, tokens_of(made, embedding(2), coords))
        assert [x.image.unique().tolist() for x in found] == [[0], [1]]
        monkeypatch.setattr(sam.mask_decoder, "cuda_graphs", True)

    with mode():
        for coords in (*points(10).split(5), *points(140).split(70)):
            check(coords)
    graphs = made._recorded[made._grid][1]._graphs.values()
    assert [graph.graph.replays for graph in graphs] == [3, 3]
    before = copy.deepcopy(encoder.state_dict())
    try:
        with torch.no_grad():
            encoder.point_embeddings[1].weight.add_(1)
        with mode():
            check(points(5))
        encoder.load_state_dict(before, assign=True)
        with mode():
            check(points(5))
    finally:
        encoder.load_state_dict(before)
    assert len(made._recorded) == 1


@torch.no_grad()
def test_galleries_by_replays_are_the_same(sam, monkeypatch):
    options = {"points_per_side": 6, "pred_iou_thresh": -1.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
    sizes = ((40, 64), (64, 64), (100, 30))
    expected = MaskGenerator(sam, **options).generate_from_embeddings(embedding(3), sizes)
    recorded_graphs.use(monkeypatch)
    monkeypatch.setattr("pro2sam_fast.decoding.queues", lambda device: True)
    generator = MaskGenerator(sam, **options)
    tried, tokens = [], GridDecoder.tokens

    def scarce(grid, bases, sparse, image=None):
        tried.append(len(sparse))
        if len(sparse) > 20:
            raise torch.OutOfMemoryError
        return tokens(grid, bases, sparse, image)

    for short in (False, True):
        if short:
            monkeypatch.setattr(GridDecoder, "tokens", scarce)
            generator = MaskGenerator(sam, **options)
        with pytest.warns(RuntimeWarning, match="no CUDA graph") if short else contextlib.nullcontext():
            found = generator.generate_from_embeddings(embedding(3), sizes)
        for a, b in zip(found, expected, strict=True):
            assert len(a) == len(b) == 108 and torch.equal(a.masks, b.masks)
            assert torch.equal(a.predicted_iou, b.predicted_iou)
    graphs = generator._decoder._recorded[generator._decoder._grid][1]
    assert [graph is graphs.function for graph in graphs._graphs.values()] == [True, False]
    assert {36, 18} == set(tried)


@pytest.mark.cuda
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_tokens_by_cuda_graphs(sam, mode):
    """The bits of launches one by one, from any stream; two numbers of points share their memory; weights that change
    are seen; results stay."""
    if BackendCase("triton", "cuda").problem:
        pytest.skip(BackendCase("triton", "cuda").problem)
    before = copy.deepcopy(sam.prompt_encoder.state_dict())
    sam.to("cuda")
    try:
        with mode(), warnings.catch_warnings():
            warnings.filterwarnings("error", "no CUDA graph")
            made = PointDecoder(sam, torch.float16, -1.0)
            images, groups = embedding(3).cuda(), [points(n).cuda() for n in (1024, 300)]
            found = [tokens_of(made, images, coords) for _ in range(2) for coords in groups]
            stream, late = torch.cuda.Stream(), torch.zeros_like(images)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(50_000_000)
                late.copy_(images)
                found += [tokens_of(made, late, coords) for coords in groups]
            found += [tokens_of(made, images, coords) for coords in groups]
            torch.cuda.current_stream().wait_stream(stream)
            graphs = made._recorded[made._grid][1]._graphs
            assert len(graphs) == 2 and all(hasattr(graph, "graph") for graph in graphs.values())
            sam.mask_decoder.cuda_graphs = False
            for i, coords in enumerate(groups):
                expected = tokens_of(made, images, coords)
                assert all(same_tokens(ours, expected) for ours in found[i::2])
        sam.mask_decoder.cuda_graphs = True
        with torch.no_grad():
            sam.prompt_encoder.point_embeddings[1].weight.add_(1)
        with mode():
            changed = [tokens_of(made, images, groups[1]) for _ in range(2)]
        assert same_tokens(changed[0], changed[1]) and not torch.equal(changed[0][0].iou, expected[0].iou)
    finally:
        sam.mask_decoder.cuda_graphs = True
        sam.to("cpu").prompt_encoder.load_state_dict(before)


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
    sparse.copy_(_embedded(sam.prompt_encoder, points(256).cuda())[0])
    graph.replay()
    torch.cuda.synchronize()
    iou, logits, index, count = chain()
    sam.to("cpu")
    assert torch.equal(captured[0], iou) and torch.equal(captured[2], index) and int(captured[3]) == int(count)
    assert torch.equal(captured[1][: int(count)], logits[: int(count)])


@pytest.mark.cuda
@torch.no_grad()
def test_a_pass_of_photos_waits_for_nothing(sam):
    """But for the numbers of masks, which come through an event; and a gallery doesn't depend on the other photos."""
    if BackendCase("triton", "cuda").problem:
        pytest.skip(BackendCase("triton", "cuda").problem)
    options = {"points_per_side": 5, "pred_iou_thresh": -1.0, "stability_score_thresh": 0.0, "dtype": "float16"}
    generator = MaskGenerator(sam.to("cuda"), **options, box_nms_thresh=1.0)
    embeddings = embedding(3).cuda()
    crops = [generator._crops(size)[0] for size in ((40, 64), (64, 64), (100, 30))]
    alone = [generator._crop_galleries(embeddings[i : i + 1], crops[i : i + 1])[0].to("cpu") for i in range(3)]
    try:
        torch.cuda.set_sync_debug_mode("error")
        together = generator._crop_galleries(embeddings, crops)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        sam.to("cpu")
    for a, b in zip(alone, together, strict=True):
        b = b.to("cpu")
        assert len(a) == len(b) == 75 and not a.predicted_iou.isnan().any()
        assert torch.equal(a.masks, b.masks) and torch.equal(a.predicted_iou, b.predicted_iou)
