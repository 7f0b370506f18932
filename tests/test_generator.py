"""MaskGenerator against SamAutomaticMaskGenerator: once with a stand-in network whose masks make every filter bite and
whose arithmetic is the same for both (exact equality), once with real modules and random weights."""

import copy
import functools
import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from original import records, small_vit_sam
from segment_anything.utils import amg
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pro2sam_fast import memory
from pro2sam_fast.decoding import PointDecoder
from pro2sam_fast.errors import ConfigError, ImageReadError
from pro2sam_fast.gallery import MaskGallery
from pro2sam_fast.generator import MaskGenerator, crop_boxes, point_grid
from pro2sam_fast.models.sam import DecodedTokens, GridDecoder, MaskDecoder, Sam
from pro2sam_fast.models.sam.build import build_vit_sam, to_segment_anything
from pro2sam_fast.ops import mask_measure, mask_pack
from pro2sam_fast.ops.decode_sweeps import fast_operands
from pro2sam_fast.predictor import encode_images
from pro2sam_fast.transfer import Reading

SIDE = 64
GRID = 8


class BlobEncoder(nn.Module):
    """Mean colour of each patch: (B, 3, 64, 64) -> (B, 3, 8, 8)."""

    img_size = SIDE

    def forward(self, x):
        return x.unflatten(-1, (GRID, -1)).unflatten(-3, (GRID, -1)).sum(dim=(-1, -3)) / 64


class BlobPrompts(nn.Module):
    """Passes the coordinates on as the sparse embedding (B, 1, 2)."""

    embed_dim = 3
    image_embedding_size = (GRID, GRID)
    mask_input_size = (4 * GRID, 4 * GRID)

    def get_dense_pe(self):
        return torch.zeros(1, 3, GRID, GRID)

    def forward(self, points, boxes, masks):
        return (points[0] / SIDE).float(), torch.zeros(len(points[0]), 3, GRID, GRID)


class BlobDecoder(nn.Module):
    """Three blobs around each prompt, from a spot to most of the photo, with holes and speckles.

    Sums, products and comparisons only, so that the values do not depend on how many prompts come together.
    """

    def __init__(self, levels):
        super().__init__()
        self.levels = levels
        noise = torch.rand(4 * GRID, 4 * GRID, generator=torch.Generator().manual_seed(3))
        self.register_buffer("noise", (noise - 0.5) * (noise > 0.93) * 40)

    def forward(self, image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, multimask_output):
        decoded = self.decode_tokens(image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings)
        return self.upscale(decoded, slice(1, None)), decoded.iou[:, 1:]

    def decode_tokens(self, image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings):
        at = sparse_prompt_embeddings[:, 0]
        cell = (at * GRID).long().clamp(0, GRID - 1)
        colour = image_embeddings[0, :, cell[:, 1], cell[:, 0]].T
        mix = torch.stack([colour[:, 0], colour[:, 1], colour[:, 2], colour[:, 0] + at[:, 0]], dim=1) * 3.7
        iou = mix - mix.floor()
        if self.levels:
            iou = (iou * self.levels).floor() / self.levels
        image = image_embeddings.mean(1).flatten(1).expand(len(at), -1)
        return DecodedTokens(torch.cat([at, iou], dim=1), image, iou, (GRID, GRID))

    def upscale(self, decoded, masks):
        x, y = decoded.mask_tokens[:, 0], decoded.mask_tokens[:, 1]
        radius = torch.tensor([0.05, 0.1, 0.27, 0.6])[masks] * (0.5 + decoded.mask_tokens[:, 2:][:, masks])
        at = (torch.arange(4 * GRID) + 0.5) / (4 * GRID)
        distance = ((at[None, :] - y[:, None]) ** 2)[:, :, None] + ((at[None, :] - x[:, None]) ** 2)[:, None, :]
        image = decoded.image.unflatten(1, (GRID, GRID)).repeat_interleave(4, 1).repeat_interleave(4, 2)
        inside = (radius[:, :, None, None] ** 2 - distance[:, None]) * 60
        near = distance[:, None] < 3 * radius[:, :, None, None] ** 2
        return inside + image[:, None] * 0.5 + self.noise * near


def blob_sam(levels=8):
    return Sam(BlobEncoder(), BlobPrompts(), BlobDecoder(levels))


def their_blob_sam(levels=8):
    from segment_anything.modeling import Sam as TheirSam

    return TheirSam(BlobEncoder(), BlobPrompts(), BlobDecoder(levels))


def photo(height, width, seed=0):
    generator = np.random.default_rng(seed)
    image = np.empty((height, width, 3), np.uint8)
    image[:] = generator.integers(0, 255, 3)
    for _ in range(8):
        y0, y1 = np.sort(generator.integers(0, height + 1, 2))
        x0, x1 = np.sort(generator.integers(0, width + 1, 2))
        image[y0:y1, x0:x1] = generator.integers(0, 255, 3)
    return image


def assert_same_records(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert list(a) == list(b)
        a, b = dict(a), dict(b)
        mask_a, mask_b = a.pop("segmentation"), b.pop("segmentation")
        if isinstance(mask_b, np.ndarray):
            assert mask_a.dtype == mask_b.dtype
            np.testing.assert_array_equal(mask_a, mask_b)
        else:
            assert mask_a == mask_b
        np.testing.assert_equal(a, b)  # NaN equals NaN
        assert [type(v) for v in a.values()] == [type(v) for v in b.values()]


LOOSE = {"pred_iou_thresh": 0.3, "stability_score_thresh": 0.7, "points_per_side": 6}
CASES = {
    "defaults": ({"points_per_side": 12}, (71, 96)),
    "loose": (LOOSE, (71, 96)),
    "tall": (LOOSE, (100, 30)),
    "input size": (LOOSE, (SIDE, SIDE)),
    "no filters": ({"pred_iou_thresh": 0.0, "stability_score_thresh": -1.0, "points_per_side": 5}, (60, 90)),
    "no nms": ({**LOOSE, "box_nms_thresh": 1.0}, (60, 90)),
    "offset": ({**LOOSE, "stability_score_offset": 4.0}, (60, 90)),
    "crops": ({**LOOSE, "crop_n_layers": 1}, (120, 170)),
    "small crops": ({**LOOSE, "crop_n_layers": 2, "crop_n_points_downscale_factor": 2}, (120, 170)),
    "crop overlap": ({**LOOSE, "crop_n_layers": 1, "crop_overlap_ratio": 0.1, "crop_nms_thresh": 0.3}, (150, 101)),
    "clean-up": ({**LOOSE, "min_mask_region_area": 30}, (71, 96)),
    "big clean-up": ({**LOOSE, "min_mask_region_area": 900, "box_nms_thresh": 0.9}, (71, 96)),
    "crops and clean-up": ({**LOOSE, "crop_n_layers": 1, "min_mask_region_area": 50}, (120, 170)),
    "one point": ({"points_per_side": 1, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.1}, (50, 70)),
    "grids": (
        {
            **LOOSE,
            "points_per_side": None,
            "point_grids": [np.array([[0.2, 0.9], [0.5, 0.5], [1.0, 0.0]]), np.array([[0.5, 0.4]])],
            "crop_n_layers": 1,
        },
        (150, 200),
    ),
    "one pixel high": ({**LOOSE, "stability_score_thresh": 0.1}, (1, 90)),
    "one pixel": ({**LOOSE, "stability_score_thresh": 0.1}, (1, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_same_masks_as_segment_anything(case):
    options, size = CASES[case]
    image = photo(*size)
    gallery = MaskGenerator(blob_sam(), **options).generate(image)[0]
    theirs = records(their_blob_sam(), image, points_per_batch=1000, **options)
    if case != "defaults":
        assert len(theirs) > 0
    assert_same_records(gallery.to_records(), theirs)


def test_cases_exercise_every_filter():
    image = photo(71, 96)

    def count(**options):
        return len(MaskGenerator(blob_sam(), **{**LOOSE, **options}).generate(image)[0])

    full = count()
    assert count(pred_iou_thresh=0.0) > full
    assert count(stability_score_thresh=0.0) > full
    assert count(box_nms_thresh=1.0) > full
    generator = MaskGenerator(blob_sam(), **LOOSE, min_mask_region_area=30)
    plain = MaskGenerator(blob_sam(), **LOOSE).generate(image)[0]
    cleaned = generator.generate(image)[0]
    assert sorted(plain.areas.tolist()) != sorted(cleaned.areas.tolist())
    cropped = MaskGenerator(blob_sam(), **LOOSE, crop_n_layers=1).generate(photo(120, 170))[0]
    assert len(cropped.crop_boxes.unique(dim=0)) > 2


@pytest.mark.parametrize("mode", ["binary_mask", "uncompressed_rle", "coco_rle"])
def test_output_modes(mode):
    image = photo(71, 96)
    theirs = records(their_blob_sam(), image, points_per_batch=1000, output_mode=mode, **LOOSE)
    gallery = MaskGenerator(blob_sam(), **LOOSE).generate(image)[0]
    assert_same_records(gallery.to_records(mode), theirs)


def test_more_than_a_thousand_candidates():
    options = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "points_per_side": 20, "box_nms_thresh": 0.9}
    image = photo(40, 50)
    theirs = records(their_blob_sam(0), image, **options)
    ours = MaskGenerator(blob_sam(0), **options).generate(image)[0].to_records()
    # torchvision leaves the order of tied scores open for this many boxes
    assert [r["predicted_iou"] for r in ours] == [r["predicted_iou"] for r in theirs]

    def by_point(r):
        return -r["predicted_iou"], r["point_coords"], r["area"], r["bbox"]

    assert_same_records(sorted(ours, key=by_point), sorted(theirs, key=by_point))


@pytest.mark.parametrize("crop_n_layers", [0, 1])
def test_no_survivors_give_an_empty_gallery(crop_n_layers):
    generator = MaskGenerator(blob_sam(), pred_iou_thresh=2.0, crop_n_layers=crop_n_layers, points_per_side=4)
    gallery = generator.generate(photo(60, 80))[0]
    assert len(gallery) == 0 and gallery.size == (60, 80) and gallery.to_records() == []
    unstable = MaskGenerator(
        blob_sam(), stability_score_thresh=2.0, crop_n_layers=crop_n_layers, points_per_side=4, min_mask_region_area=9
    )
    assert len(unstable.generate(photo(60, 80))[0]) == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (3000, 1), (2, 3)])
@pytest.mark.parametrize("crop_n_layers", [0, 2])
def test_tiny_and_thin_photos(size, crop_n_layers):
    generator = MaskGenerator(
        blob_sam(), points_per_side=4, pred_iou_thresh=0.0, stability_score_thresh=0.0, crop_n_layers=crop_n_layers
    )
    gallery = generator.generate(photo(*size))[0]
    assert gallery.size == size and len(gallery) > 0
    assert gallery.dense().shape == (len(gallery), *size)


def test_rows_longer_than_int16():
    # the reference counts a row in 16 bits
    generator = MaskGenerator(
        blob_sam(), points_per_side=2, pred_iou_thresh=0.0, stability_score_thresh=0.0, box_nms_thresh=1.0
    )
    stability = generator.generate(photo(2, 40000))[0].stability
    assert len(stability) and float(stability[~stability.isnan()].max()) <= 1.0


def same(a: MaskGallery, b: MaskGallery) -> bool:
    names = ("masks", "boxes", "areas", "predicted_iou", "points", "crop_boxes")
    return (
        a.size == b.size
        and all(torch.equal(getattr(a, n), getattr(b, n)) for n in names)
        and torch.equal(a.stability.nan_to_num(-1), b.stability.nan_to_num(-1))
    )


@pytest.fixture(scope="module")
def small_sam():
    sam = small_vit_sam()
    with torch.no_grad():
        sam.image_encoder.pos_embed.normal_(std=0.5)
        for name, p in sam.mask_decoder.named_parameters():
            # sharper attention and bolder logits, so that prompts differ
            if "_proj.weight" in name:
                p.mul_(3)
        for mlp in sam.mask_decoder.output_hypernetworks_mlps:
            mlp.layers[-1].weight.mul_(20)
    return sam


SMALL = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.5, "stability_score_offset": 0.1, "box_nms_thresh": 1.0}


def test_groups_of_prompts_without_survivors(small_sam):
    # 100 prompts go in groups of 64; the threshold is so high that the second group, or both, lose all of theirs
    options = SMALL | {"points_per_side": 10, "stability_score_thresh": 0.0}
    gallery = MaskGenerator(small_sam, **options).generate(photo(90, 120))[0]
    second = gallery.predicted_iou[gallery.points[:, 1] > 0.65 * 90].max()
    for thresh, left in ((float(second), True), (float(gallery.predicted_iou.max()), False)):
        found = MaskGenerator(small_sam, **options | {"pred_iou_thresh": thresh}).generate(photo(90, 120))[0]
        assert torch.equal(found.predicted_iou, gallery.predicted_iou[gallery.predicted_iou > thresh])
        assert left or len(found) == 0


def test_real_modules_against_segment_anything(small_sam):
    theirs = to_segment_anything(small_sam)
    image = photo(80, 120)
    options = {**SMALL, "points_per_side": 6}
    ours = MaskGenerator(small_sam, **options).generate(image)[0].to_records()
    theirs = records(theirs, image, **options)
    assert len(ours) == len(theirs) > 10
    assert [r["point_coords"] for r in ours] == [r["point_coords"] for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["predicted_iou"] == pytest.approx(b["predicted_iou"], abs=2e-6)
        assert a["stability_score"] == pytest.approx(b["stability_score"], abs=1e-3)
        assert (a["segmentation"] != b["segmentation"]).mean() < 1e-3


def test_prompts_are_judged_before_masks_are_upscaled(small_sam, monkeypatch):
    image = photo(80, 120)
    everything = MaskGenerator(small_sam, points_per_side=7, **{**SMALL, "pred_iou_thresh": -9.0})
    every = everything.generate(image)[0]
    threshold = float(every.predicted_iou.quantile(0.9))
    upscaled = []
    decoder = GridDecoder if fast_operands("cpu", torch.float32) else MaskDecoder
    upscale = decoder.upscale

    def counted(self, *arguments):
        upscaled.append(len(arguments[-1] if decoder is GridDecoder else arguments[0].iou))
        return upscale(self, *arguments)

    monkeypatch.setattr(decoder, "upscale", counted)
    some = MaskGenerator(small_sam, points_per_side=7, **{**SMALL, "pred_iou_thresh": threshold}).generate(image)[0]
    assert 0 < sum(upscaled) < 49
    kept = every.select(every.predicted_iou > threshold)
    torch.testing.assert_close(some.predicted_iou, kept.predicted_iou)
    assert (some.dense() != kept.dense()).float().mean() < 1e-3


IMAGES = [photo(80, 120), photo(33, 70, seed=1), photo(90, 41, seed=2)]


@settings(max_examples=8, deadline=None)
@given(points_per_batch=st.integers(1, 80), order=st.permutations(range(3)), count=st.integers(1, 3))
def test_independent_of_points_per_batch_and_of_the_other_photos(small_sam, points_per_batch, order, count):
    alone = small_galleries(small_sam)
    chosen = order[:count]
    generator = MaskGenerator(small_sam, points_per_side=5, points_per_batch=points_per_batch, **SMALL)
    together = generator.generate([IMAGES[i] for i in chosen])
    assert all(same(gallery, alone[i]) for gallery, i in zip(together, chosen, strict=True))


@pytest.fixture
def in_passes(small_sam, monkeypatch):
    """As on a GPU, three crops at a time."""
    small_galleries(small_sam)  # not so
    for module in ("decoding", "generator"):
        monkeypatch.setattr(f"pro2sam_fast.{module}.queues", lambda device: True)
        monkeypatch.setattr(f"pro2sam_fast.{module}.photos_per_pass", lambda device: 3)


@pytest.mark.parametrize("points_per_batch", [3, "auto", 1000])
def test_photos_of_a_pass_are_as_if_alone(small_sam, in_passes, points_per_batch):
    generator = MaskGenerator(small_sam, points_per_side=5, points_per_batch=points_per_batch, **SMALL)
    galleries = generator.generate([*IMAGES, IMAGES[1]])
    expected = small_galleries(small_sam)
    assert all(map(same, galleries, [*expected, expected[1]]))


def pass_of(small_sam, thresh, **options):
    options = {**SMALL, "stability_score_thresh": 0.0, "box_nms_thresh": 0.9, "pred_iou_thresh": thresh, **options}
    generator = MaskGenerator(small_sam, points_per_side=9, crop_n_points_downscale_factor=2, **options)
    return generator.generate


@pytest.mark.parametrize("crop_n_layers", [0, 1])
def test_a_photo_of_a_pass_keeps_no_mask(small_sam, monkeypatch, crop_n_layers, request):
    images = [IMAGES[0], IMAGES[2], photo(50, 61, seed=4), IMAGES[1]]
    generate = pass_of(small_sam, 0.0, crop_n_layers=crop_n_layers)
    best = [float(generate([image])[0].predicted_iou.max()) for image in images]
    images = [images[i] for i in (1, int(np.argmin(best)), 3, 0, 2)]
    generate = pass_of(small_sam, min(best), crop_n_layers=crop_n_layers)
    alone = [generate([image])[0] for image in images]
    assert 0 < sum(not len(gallery) for gallery in alone) < len(alone)
    request.getfixturevalue("in_passes")
    assert all(map(same, generate(images), alone))
    # grids of several ranges, in several rounds, that wait for the filters
    monkeypatch.setattr("pro2sam_fast.decoding._PROMPTS_AHEAD", 64)
    monkeypatch.setattr("pro2sam_fast.decoding._RANGES_AHEAD", 2)
    monkeypatch.setattr("pro2sam_fast.generator._POINTS_WITHOUT_WAITING", 50)
    assert all(map(same, generate(images), alone))


@pytest.mark.parametrize("options", [{}, {"crop_n_layers": 1, "crop_n_points_downscale_factor": 2}])
def test_crops_of_several_photos_in_one_pass(in_passes, options):
    options = {**LOOSE, "min_mask_region_area": 30, **options}
    images = [photo(71, 96), photo(120, 50, seed=1), photo(30, 33), photo(40, 45, seed=2)]
    theirs = [records(their_blob_sam(), image, points_per_batch=1000, **options) for image in images]
    for found, wanted in zip(MaskGenerator(blob_sam(), **options).generate(images), theirs, strict=True):
        assert_same_records(found.to_records(), wanted)


def test_a_pass_waits_for_numbers_of_masks_only(small_sam, in_passes, monkeypatch):
    waits, readings = [], []

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.__name__
            chosen_by_flags = "index" in name and any(
                isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in (args[1] if len(args) > 1 else ()) or ()
            )
            if chosen_by_flags or name.startswith(("_local_scalar", "nonzero", "masked_select", "equal", "unique")):
                waits.append(name)
            return function(*args, **(kwargs or {}))

    result = Reading.result
    monkeypatch.setattr(Reading, "result", lambda self: readings.append(self) or result(self))
    generator = MaskGenerator(small_sam, points_per_side=5, **SMALL, points_per_batch=100)
    crops = [generator._crops(image.shape[:2])[0] for image in IMAGES]
    (embeddings,) = generator._decoder.encode([generator.prepare(image)[0] for image in IMAGES])
    if generator._decoder._grid is None:
        pytest.skip("the decoder in groups of fixed size waits")
    with torch.no_grad(), Waits():
        galleries = generator._crop_galleries(embeddings, crops)
    assert waits == [] and len(readings) == 2
    assert all(map(same, galleries, small_galleries(small_sam)))


def test_only_photos_beyond_float16_are_decoded_again(small_sam, in_passes, monkeypatch):
    call = PointDecoder.__call__
    asked = []

    def narrow(self, embeddings, coords, size, wide=False):
        asked.append((len(embeddings), wide))
        for part in call(self, embeddings, coords, size):
            beyond = not wide and bool((embeddings[part.image] == second).all())
            yield part._replace(iou=part.iou * torch.nan) if beyond else part

    monkeypatch.setattr(PointDecoder, "__call__", narrow)
    monkeypatch.setattr(PointDecoder, "narrow", True)
    generator = MaskGenerator(small_sam, points_per_side=5, **SMALL)
    second = next(generator._decoder.encode([generator.prepare(image)[0] for image in IMAGES]))[1]
    with pytest.warns(RuntimeWarning, match="beyond float16") as told:
        galleries = generator.generate(IMAGES)
    assert asked == [(3, False), (1, True)] and len(told) == 1
    assert all(map(same, galleries, small_galleries(small_sam)))


def test_a_pass_goes_on_in_halves_where_memory_ends(small_sam, in_passes, monkeypatch):
    limited, halved = scarce(MaskGenerator._crop_galleries, 1, lambda _, embeddings, crops: len(crops), "device")
    monkeypatch.setattr(MaskGenerator, "_crop_galleries", limited)
    galleries = MaskGenerator(small_sam, points_per_side=5, **SMALL).generate(IMAGES)
    assert halved and all(map(same, galleries, small_galleries(small_sam)))


@pytest.mark.cuda
def test_gallery_on_a_gpu(small_sam):
    """From the same embeddings: photos that are encoded together may round otherwise."""
    sam = copy.deepcopy(small_sam).cuda()
    generator = MaskGenerator(sam, points_per_side=5, **SMALL)
    embeddings, _ = encode_images(sam, IMAGES, generator.transform)
    sizes = [image.shape[:2] for image in IMAGES]
    together = generator.generate_from_embeddings(embeddings, sizes)
    for points_per_batch in (7, 64):
        alone = MaskGenerator(sam, points_per_side=5, points_per_batch=points_per_batch, **SMALL)
        for e, size, gallery in zip(embeddings.split(1), sizes, together, strict=True):
            assert same(alone.generate_from_embeddings(e, [size])[0].to("cpu"), gallery.to("cpu"))
    assert all(len(gallery) > 3 for gallery in generator.generate(IMAGES))


_ALONE = {}


def small_galleries(sam):
    if sam not in _ALONE:
        generator = MaskGenerator(sam, points_per_side=5, **SMALL)
        _ALONE[sam] = [generator.generate(image)[0] for image in IMAGES]
        assert all(len(g) > 3 for g in _ALONE[sam])
    return _ALONE[sam]


@settings(max_examples=20, deadline=None)
@given(
    points_per_batch=st.integers(1, 80),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    layers=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_any_size_equals_the_reference(points_per_batch, height, width, layers, seed):
    image = photo(height, width, seed)
    options = {**LOOSE, "points_per_side": 5, "crop_n_layers": layers}
    gallery = MaskGenerator(blob_sam(), points_per_batch=points_per_batch, **options).generate(image)[0]
    try:
        theirs = records(their_blob_sam(), image, points_per_batch=1000, **options)
    except (IndexError, ZeroDivisionError, ValueError):
        # no survivor at all, or a side that is rounded to no pixel
        return
    ours = gallery.to_records()
    for b in theirs:
        # a crop without survivors turns the reference's integers into floats of the same value
        b["bbox"], b["crop_box"] = [int(v) for v in b["bbox"]], [int(v) for v in b["crop_box"]]
    assert_same_records(ours, theirs)


@settings(max_examples=6, deadline=None)
@given(order=st.permutations(range(21)))
def test_order_of_the_prompts_only_permutes_the_masks(small_sam, order):
    points = np.random.default_rng(0).random((21, 2))
    options = {**SMALL, "points_per_side": None, "stability_score_thresh": 0.0, "pred_iou_thresh": 0.0}
    found = []
    for grid in (points, points[order]):
        gallery = MaskGenerator(small_sam, point_grids=[grid], **options).generate(IMAGES[0])[0]
        keys = torch.cat([gallery.predicted_iou[:, None].double(), gallery.points], dim=1)
        found.append(gallery.select(np.lexsort(keys.numpy().T)))
    assert len(found[0]) == 63
    assert torch.equal(found[0].points, found[1].points)
    torch.testing.assert_close(found[0].predicted_iou, found[1].predicted_iou, rtol=0, atol=2e-6)
    assert (found[0].dense() != found[1].dense()).float().mean() < 1e-4


def test_independent_of_the_number_of_threads():
    image = photo(71, 96)
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(MaskGenerator(blob_sam(), **LOOSE).generate(image)[0])
    finally:
        torch.set_num_threads(threads)
    assert same(*found)


def test_real_modules_independent_of_the_number_of_threads(small_sam):
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(MaskGenerator(small_sam, points_per_side=9, **SMALL).generate(IMAGES[0])[0])
    finally:
        torch.set_num_threads(threads)
    assert len(found[0]) > 100 and all(same(found[0], other) for other in found[1:])


OUT_OF_MEMORY = {
    "allocator": lambda: torch.empty(1 << 60, dtype=torch.uint8),
    "device": lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")),
    "python": lambda: np.empty(1 << 60, np.uint8),
}


def scarce(function, most, size, error):
    """`function` where there is memory for `most` items; `size` counts them in its arguments."""
    halved = []

    def call(*args, **kwargs):
        if size(*args, **kwargs) > most:
            halved.append(True)
            OUT_OF_MEMORY[error]()
        return function(*args, **kwargs)

    return call, halved


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("most", [1, 3])
def test_goes_on_in_halves_where_memory_ends(monkeypatch, error, most):
    image, options = photo(71, 96), {**LOOSE, "min_mask_region_area": 30}
    expected = MaskGenerator(blob_sam(), **options).generate(image)[0]
    sam = blob_sam()
    places = (
        (sam.mask_decoder, "decode_tokens", lambda image, pe, sparse, dense: len(sparse)),
        (sam.mask_decoder, "upscale", lambda decoded, masks: len(decoded.iou)),
        ("pro2sam_fast.postprocess", "mask_measure", lambda low_res, *_: len(low_res)),
        ("pro2sam_fast.generator", "mask_pack", lambda low_res, *_: len(low_res)),
    )
    all_halved = []
    for place, name, size in places:
        owner = importlib.import_module(place) if isinstance(place, str) else place
        limited, halved = scarce(getattr(owner, name), most, size, error)
        monkeypatch.setattr(owner, name, limited)
        all_halved.append(halved)
    assert same(expected, MaskGenerator(sam, **options).generate(image)[0])
    assert all(all_halved)


def test_grids_go_on_in_halves_where_memory_ends(small_sam, monkeypatch):
    expected = MaskGenerator(small_sam, points_per_side=6, **SMALL).generate(IMAGES[0])[0]
    all_halved = []
    for name, size in (("tokens", lambda *args: len(args[2])), ("upscale", lambda *args: len(args[-1]))):
        limited, halved = scarce(getattr(GridDecoder, name), 3, size, "allocator")
        monkeypatch.setattr(GridDecoder, name, limited)
        all_halved.append(halved)
    generator = MaskGenerator(small_sam, points_per_side=6, **SMALL)
    assert same(expected, generator.generate(IMAGES[0])[0])
    assert all(all_halved) or generator._decoder._grid is None


def test_a_single_mask_that_does_not_fit_is_an_error(monkeypatch):
    limited, _ = scarce(mask_pack, 0, lambda low_res, *_: len(low_res), "allocator")
    monkeypatch.setattr("pro2sam_fast.generator.mask_pack", limited)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        MaskGenerator(blob_sam(), **LOOSE).generate(photo(71, 96))


def test_chunks_of_full_resolution_logits_do_not_matter(monkeypatch):
    generator = MaskGenerator(blob_sam(), **LOOSE, crop_n_layers=1)
    image = photo(71, 96)
    base = generator.generate(image)[0]
    for name, op in (("postprocess.mask_measure", mask_measure), ("generator.mask_pack", mask_pack)):
        monkeypatch.setattr(f"pro2sam_fast.{name}", functools.partial(op, backend="reference"))
    assert same(base, generator.generate(image)[0])
    monkeypatch.setattr(memory, "CHUNK_BYTES", 1)
    assert same(base, generator.generate(image)[0])


def test_from_embeddings(small_sam):
    generator = MaskGenerator(small_sam, points_per_side=5, **SMALL)
    from pro2sam_fast.predictor import encode_image

    embeddings = torch.cat([encode_image(small_sam, image, generator.transform)[0] for image in IMAGES])
    galleries = generator.generate_from_embeddings(embeddings, [image.shape[:2] for image in IMAGES])
    assert all(same(a, b) for a, b in zip(galleries, small_galleries(small_sam), strict=True))


def test_bad_embeddings(small_sam):
    generator = MaskGenerator(small_sam, points_per_side=2)
    good = torch.zeros(1, 64, 8, 8)
    for embeddings, sizes in (
        (good, [(4, 4), (4, 4)]),
        (good[:, :5], [(4, 4)]),
        (good.numpy(), [(4, 4)]),
        (good.long(), [(4, 4)]),
        (good / 0, [(4, 4)]),
    ):
        with pytest.raises(ConfigError, match="embeddings"):
            generator.generate_from_embeddings(embeddings, sizes)
    with pytest.raises(ConfigError, match="original_sizes"):
        generator.generate_from_embeddings(good, [(4, 0)])
    with pytest.raises(ConfigError, match="crop_n_layers"):
        MaskGenerator(small_sam, crop_n_layers=1).generate_from_embeddings(good, [(4, 4)])


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_reduced_precision(small_sam, dtype):
    image = photo(80, 120)
    options = {
        **SMALL,
        "points_per_side": 4,
        "stability_score_thresh": 0.0,
        "box_nms_thresh": 1.0,
        "pred_iou_thresh": -9,
    }
    full = MaskGenerator(small_sam, **options).generate(image)[0]
    half = MaskGenerator(small_sam, **options, dtype=dtype).generate(image)[0]
    assert len(full) == len(half) == 48 and half.predicted_iou.dtype == torch.float32
    assert not torch.equal(full.predicted_iou, half.predicted_iou)
    torch.testing.assert_close(full.predicted_iou.sort().values, half.predicted_iou.sort().values, atol=0.05, rtol=0)


BAD_ARGUMENTS = [
    {"points_per_side": 0},
    {"points_per_side": 2.5},
    {"points_per_side": None},
    {"points_per_side": 4, "point_grids": [np.zeros((1, 2))]},
    {"points_per_batch": 0},
    {"points_per_batch": "many"},
    {"points_per_batch": True},
    {"pred_iou_thresh": float("nan")},
    {"pred_iou_thresh": "0.5"},
    {"stability_score_thresh": None},
    {"stability_score_offset": -1.0},
    {"box_nms_thresh": -0.1},
    {"crop_nms_thresh": float("inf")},
    {"crop_n_layers": -1},
    {"crop_n_layers": 1.0},
    {"crop_overlap_ratio": 1.0},
    {"crop_n_points_downscale_factor": 0},
    {"crop_n_points_downscale_factor": 8, "crop_n_layers": 2, "points_per_side": 4},
    {"point_grids": [np.zeros((3, 3))], "points_per_side": None},
    {"point_grids": [np.full((1, 2), 1.5)], "points_per_side": None},
    {"point_grids": [np.full((1, 2), np.nan)], "points_per_side": None},
    {"point_grids": [np.zeros((1, 2))], "points_per_side": None, "crop_n_layers": 1},
    {"min_mask_region_area": -1},
    {"dtype": "float64"},
    {"dtype": torch.int32},
]


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS, ids=str)
def test_bad_arguments_are_named(arguments):
    with pytest.raises(ConfigError) as caught:
        MaskGenerator(blob_sam(), **arguments)
    assert any(name in str(caught.value) for name in arguments)


def test_a_model_of_another_kind():
    with pytest.raises(ConfigError, match="sam"):
        MaskGenerator(their_blob_sam())
    with pytest.raises(ConfigError, match="float32"):
        MaskGenerator(build_vit_sam(embed_dim=16, depth=0, num_heads=2, global_attn_indexes=(), img_size=16).half())


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 5), np.uint8),
        np.zeros((4, 5, 4), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((4, 5, 3), np.float32),
        np.full((4, 5, 3), np.nan),
        np.full((4, 5, 3), 300),
        np.zeros((4, 5, 3), bool),
        np.array([["a"]]),
        torch.zeros(4, 5, 3, dtype=torch.uint8),
        None,
    ],
    ids=lambda image: f"{type(image).__name__} {getattr(image, 'dtype', '')} {getattr(image, 'shape', '')}",
)
def test_bad_images(image):
    generator = MaskGenerator(blob_sam(), points_per_side=1)
    with pytest.raises(ImageReadError, match=r"images\[1\] must be an RGB array") as caught:
        generator.generate([photo(4, 5), image])
    assert caught.value.path == "images[1]" and "\n" not in str(caught.value)


def test_a_single_array_is_a_list_of_one():
    generator = MaskGenerator(blob_sam(), **LOOSE)
    image = photo(40, 50)
    assert same(generator.generate(image)[0], generator.generate([image])[0])
    assert generator.generate([]) == []
    assert len(generator.generate(np.stack([image, image]))) == 2


def test_images_are_not_modified():
    image = photo(71, 96)
    before = image.copy()
    MaskGenerator(blob_sam(), **LOOSE, crop_n_layers=1, min_mask_region_area=30).generate(image)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("n", [1, 2, 3, 32])
def test_grid(n):
    np.testing.assert_array_equal(point_grid(n), amg.build_point_grid(n))


@pytest.mark.parametrize("size", [(480, 640), (1, 1), (33, 7), (1000, 37)])
def test_crops(size):
    boxes, layers = amg.generate_crop_boxes(size, 2, 512 / 1500)
    theirs = [(*b, i) for b, i in zip(boxes, layers, strict=True) if b[0] < b[2] and b[1] < b[3]]
    assert crop_boxes(size, 2, 512 / 1500) == theirs
    assert crop_boxes((480, 640), 1, 512 / 1500)[1:] == [
        (0, 0, 402, 322, 1),
        (0, 159, 402, 480, 1),
        (239, 0, 640, 322, 1),
        (239, 159, 640, 480, 1),
    ]
