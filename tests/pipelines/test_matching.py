"""Mask matching against the formulas written out here on dense masks."""

import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pro2sam_fast.boxes import iou_exact, otsu_union, tight_box
from pro2sam_fast.errors import ConfigError, Pro2SamError
from pro2sam_fast.gallery import MaskGallery
from pro2sam_fast.ops import pack_masks
from pro2sam_fast.pipelines.matching import NoMaskError, fills_frame, grid_masks, match


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def gallery_of(*masks):
    return MaskGallery.from_dense(torch.from_numpy(np.stack(masks)))


def rectangle(y0, y1, x0, x1, size=(224, 224)):
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def coarse_of(*cells, value=0.9):
    coarse = torch.full((14, 14), 0.1)
    for rows, columns in cells:
        coarse[rows, columns] = value
    return coarse


BLOB = coarse_of((slice(4, 9), slice(5, 10)))


@st.composite
def galleries(draw):
    height, width = draw(st.integers(1, 40)), draw(st.sampled_from([1, 2, 3, 7, 30, 63, 64, 65, 100]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    masks = []
    for _ in range(draw(st.integers(0, 8))):
        kind = rng.integers(4)
        if kind == 0:
            mask = rng.random((height, width)) < rng.random()
        else:
            mask = np.zeros((height, width), bool)
            for _ in range(rng.integers(0, 4)):
                y, x = rng.integers(0, height), rng.integers(0, width)
                h, w = (height, width) if kind == 1 else (5, 12)
                mask[y : y + rng.integers(1, h + 1), x : x + rng.integers(1, w + 1)] = True
            if kind == 3:
                mask = ~mask
        masks.append(mask)
    return np.stack(masks) if masks else np.zeros((0, height, width), bool)


class TestFilter:
    @settings(max_examples=200, deadline=None)
    @given(galleries(), st.sampled_from([0, 1, 2, 9, 10, 11, 33, 64, 65, 200]))
    def test_equals_the_plain_form(self, masks, min_region):
        frame = (0, 0, masks.shape[2], masks.shape[1])
        expected = [otsu_union(mask, min_region) == frame for mask in masks]
        packed = pack_masks(torch.from_numpy(masks))
        assert fills_frame(packed, masks.shape[2], min_region).tolist() == expected
        with pytest.MonkeyPatch.context() as patch:  # as on a GPU, where the filter waits for nothing
            patch.setattr("pro2sam_fast.pipelines.matching.queues", lambda device: True)
            assert fills_frame(packed, masks.shape[2], min_region).tolist() == expected

    def test_runs_over_word_boundaries_and_the_sign_bit(self):
        for start in range(50, 70):
            mask = rectangle(10, 11, start, start + 10, (40, 140))
            packed = pack_masks(torch.from_numpy(mask[None]))
            assert not fills_frame(packed, 140, 10).any()
            assert fills_frame(packed, 140, 11).all()

    @pytest.mark.parametrize(
        ("mask", "dropped"),
        [
            (rectangle(50, 53, 50, 53), True),  # 9 px
            (rectangle(50, 52, 50, 55), False),  # 10 px
            (rectangle(0, 224, 0, 224), True),
            (~rectangle(80, 150, 80, 150), True),
            (rectangle(0, 0, 0, 0), True),
            (rectangle(0, 224, 100, 120) | rectangle(100, 120, 0, 224), True),
            (rectangle(1, 223, 1, 223), True),  # the closing reaches the border
            (rectangle(2, 224, 0, 224), False),
            (rectangle(0, 224, 0, 222), False),
        ],
    )
    def test_examples(self, mask, dropped):
        result = match(gallery_of(mask), BLOB, min_score=-1.0)
        assert result.kept.tolist() == [not dropped]
        assert result.source == ("coarse" if dropped else "sam")
        assert match(gallery_of(mask), BLOB, min_score=-1.0, drop_full_frame=False).index == 0

    def test_minimum_region_is_an_option(self):
        tiny = gallery_of(rectangle(100, 103, 100, 103))
        assert match(tiny, BLOB, min_region_gallery=9).source == "sam"


class TestGrid:
    def test_224_to_14_is_the_or_of_the_central_pixels(self):
        rng = np.random.default_rng(0)
        masks = rng.random((6, 224, 224)) < np.array([0.001, 0.01, 0.1, 0.3, 0.9, 0])[:, None, None]
        got = grid_masks(pack_masks(torch.from_numpy(masks)), 224, (14, 14)).numpy()
        cells = masks.reshape(6, 14, 16, 14, 16)[:, :, 7:9, :, 7:9]
        assert np.array_equal(got, cells.any((2, 4)))
        dense = torch.from_numpy(masks).float()[:, None]
        resized = F.interpolate(dense, size=(14, 14), mode="bilinear", align_corners=False)[:, 0] != 0
        assert np.array_equal(got, resized.numpy())
        by_cv2 = np.stack([cv2.resize(mask.astype(np.float32), (14, 14)) != 0 for mask in masks])
        assert np.array_equal(got, by_cv2)

    @pytest.mark.parametrize("size", [(448, 112), (98, 42), (14, 14), (7, 28), (140, 70), (100, 224), (1, 56)])
    def test_other_sizes_equal_bilinear_resize(self, size):
        rng = np.random.default_rng(1)
        masks = torch.from_numpy(rng.random((20, *size)) < 0.2)
        resized = F.interpolate(masks.double()[:, None], size=(14, 14), mode="bilinear", align_corners=False)[:, 0]
        assert torch.equal(grid_masks(pack_masks(masks), size[1], (14, 14)), resized > 1e-9)


def dense_scores(masks, coarse, threshold, resolution, similarity):
    if resolution == "mask":
        size = masks.shape[1:]
        binary = (F.interpolate(coarse[None, None], size=size, mode="bilinear")[0, 0] > threshold).numpy()
    else:
        binary = (coarse > threshold).numpy()
        masks = masks.reshape(len(masks), 14, 16, 14, 16)[:, :, 7:9, :, 7:9].any((2, 4))
    scores = np.zeros(len(masks))
    for i, mask in enumerate(masks):
        union = (mask | binary).sum()
        if "mask" in similarity and union:
            scores[i] += (mask & binary).sum() / union
        if "bbox" in similarity:
            scores[i] += iou_exact(tight_box(mask) or (0, 0, 0, 0), tight_box(binary) or (0, 0, 0, 0))
    return scores


class TestMatch:
    @pytest.mark.parametrize("resolution", ["mask", "official14"])
    @pytest.mark.parametrize("similarity", ["mask", "bbox", "mask+bbox"])
    def test_scores_equal_the_dense_formula(self, resolution, similarity):
        rng = np.random.default_rng(7)
        masks = np.stack(
            [rectangle(*np.sort(rng.integers(0, 225, 2)), *np.sort(rng.integers(0, 225, 2))) for _ in range(30)]
            + [rectangle(0, 0, 0, 0)]
        )
        coarse = F.interpolate(torch.rand(1, 1, 4, 4), size=(14, 14), mode="bicubic")[0, 0].clamp(0, 1)
        result = match(
            gallery_of(*masks), coarse, prompt_threshold=0.5, match_resolution=resolution, similarity=similarity
        )
        expected = dense_scores(masks, coarse, 0.5, resolution, similarity)
        assert result.scores.dtype == np.float32
        assert np.allclose(result.scores, expected, atol=1e-6)
        assert result.index == np.where(result.kept, result.scores, -1).argmax()
        assert result.score == result.scores[result.index]
        assert np.array_equal(result.mask, masks[result.index])

    def test_photos_of_any_shape(self):
        masks = np.stack([rectangle(10, 60, 20, 80, (97, 131)), rectangle(40, 50, 50, 90, (97, 131))])
        coarse = torch.rand(9, 5)
        binary = cv2.resize(coarse.numpy(), (131, 97)) > 0.55
        result = match(gallery_of(*masks), coarse, prompt_threshold=0.55)
        expected = [(mask & binary).sum() / (mask | binary).sum() for mask in masks]
        assert np.allclose(result.scores, expected, atol=2e-3)

    def test_the_best_mask_wins_and_is_described(self):
        gallery = gallery_of(rectangle(0, 50, 0, 50), rectangle(64, 144, 80, 160), rectangle(60, 200, 60, 200))
        gallery.predicted_iou.copy_(torch.tensor([0.99, 0.91, 0.9]))
        result = match(gallery, BLOB)
        assert (result.index, result.source) == (1, "sam")
        assert result.predicted_iou == pytest.approx(0.91)
        assert result.mask.dtype == bool and np.array_equal(result.mask, gallery.dense()[1].numpy())
        assert result.box() == result.box("largest") == (80, 64, 160, 144)

    def test_the_first_of_identical_masks_wins(self):
        mask = rectangle(64, 144, 80, 160)
        for resolution in ("mask", "official14"):
            other = rectangle(0, 10, 0, 10)
            assert match(gallery_of(other, mask, mask), BLOB, match_resolution=resolution).index == 1

    def test_threshold_is_strict_and_on_the_raw_map(self):
        mask = rectangle(64, 144, 80, 160)
        coarse = coarse_of((slice(4, 9), slice(5, 10)), value=0.5)
        assert match(gallery_of(mask), coarse, prompt_threshold=0.5, match_resolution="official14").source != "sam"
        assert match(gallery_of(mask), coarse, prompt_threshold=0.49, match_resolution="official14").source == "sam"

    def test_a_dropped_mask_is_scored_but_not_chosen(self):
        everywhere, small = rectangle(0, 224, 0, 224), rectangle(0, 30, 0, 30)
        coarse = torch.ones(14, 14)
        result = match(gallery_of(everywhere, small), coarse)
        assert result.kept.tolist() == [False, True]
        assert result.index == 1 and result.scores[0] == 1
        assert match(gallery_of(everywhere, small), coarse, drop_full_frame=False).index == 0

    @pytest.mark.parametrize("size", [(97, 131), (2, 3), (64, 64), (1, 129)])
    def test_border_sigma_discounts_masks_along_the_borders(self, size):
        rng = np.random.default_rng(4)
        spans = [[np.sort(rng.integers(0, n + 1, 2)) for n in size] for _ in range(30)]
        masks = np.stack([rectangle(*rows, *columns, size) for rows, columns in spans])
        coarse, sigma = torch.rand(14, 14), 0.8
        along = sum(
            mask.any(axis).sum(1)
            for axis, ends in ((1, (masks[:, :3], masks[:, -3:])), (2, (masks[:, :, :3], masks[:, :, -3:])))
            for mask in ends
        )
        factor = np.exp(-((along / np.sqrt(np.maximum(masks.sum((1, 2)), 1))) ** 2) / (2 * sigma**2))
        plain = match(gallery_of(*masks), coarse)
        result = match(gallery_of(*masks), coarse, border_sigma=sigma)
        assert np.allclose(result.scores, plain.scores * factor, rtol=1e-6)
        assert np.array_equal(result.kept, plain.kept)

    def test_border_sigma_prefers_the_object_to_its_surroundings(self):
        behind, object_ = rectangle(20, 224, 0, 224), rectangle(80, 144, 80, 160)
        behind &= ~object_
        coarse = coarse_of((slice(3, 14), slice(3, 12)))
        assert match(gallery_of(behind, object_), coarse).index == 0
        assert match(gallery_of(behind, object_), coarse, border_sigma=1.5).index == 1


class TestFallbacks:
    def test_empty_gallery_takes_the_largest_region_of_the_map(self):
        coarse = coarse_of((slice(4, 9), slice(5, 10)), (slice(12, 14), slice(0, 2)))
        result = match(MaskGallery.empty((224, 300)), coarse)
        assert (result.index, result.score, result.source) == (-1, 0.0, "coarse")
        assert math.isnan(result.predicted_iou) and result.scores.shape == result.kept.shape == (0,)
        assert result.mask.shape == (224, 300)
        normal = (coarse - coarse.min()) / (coarse.max() - coarse.min() + 1e-5)
        up = F.interpolate(normal[None, None], size=(224, 300), mode="bilinear")[0, 0].numpy() > 0.4
        up[180:] = False
        assert np.array_equal(result.mask, up)
        assert match(MaskGallery.empty((224, 300)), coarse, coarse_threshold=0.9).mask.sum() < up.sum()

    @pytest.mark.parametrize("value", [0.0, 1.0])
    def test_constant_map_without_masks_gives_the_frame(self, value):
        result = match(MaskGallery.empty((50, 70)), torch.full((14, 14), value))
        assert result.source == "full" and result.mask.all() and result.mask.shape == (50, 70)
        assert result.box() == (0, 0, 70, 50)

    def test_all_zero_map(self):
        result = match(gallery_of(rectangle(64, 144, 80, 160)), torch.zeros(14, 14))
        assert (result.index, result.source) == (-1, "full")
        assert result.scores.tolist() == [0]

    def test_zero_over_zero_is_zero(self):
        result = match(gallery_of(rectangle(0, 0, 0, 0)), torch.zeros(14, 14), drop_full_frame=False)
        assert result.scores.tolist() == [0] and result.source == "full"

    def test_min_score_is_strict(self):
        mask = rectangle(64, 144, 80, 160)
        score = match(gallery_of(mask), BLOB).score
        assert match(gallery_of(mask), BLOB, min_score=score).source == "coarse"
        assert match(gallery_of(mask), BLOB, min_score=score - 1e-3).source == "sam"

    def test_raise_reproduces_the_released_code(self):
        far, near = rectangle(0, 20, 0, 20), rectangle(200, 220, 0, 20)
        with pytest.raises(NoMaskError) as info:
            match(gallery_of(rectangle(0, 224, 0, 224)), BLOB, on_empty="raise")
        assert isinstance(info.value, Pro2SamError)
        result = match(gallery_of(rectangle(0, 224, 0, 224), far, near), BLOB, on_empty="raise")
        assert (result.index, result.score, result.source) == (1, 0.0, "sam")

    def test_small_masks_stay_but_their_box_is_the_frame(self):
        mask = rectangle(90, 99, 100, 110)  # 90 px
        result = match(gallery_of(mask), BLOB)
        assert result.source == "sam" and np.array_equal(result.mask, mask)
        assert result.box() == (0, 0, 224, 224)
        assert result.box(min_region=90) == (100, 90, 110, 99)
        with pytest.raises(ConfigError):
            result.box("square")


@pytest.mark.parametrize(
    "options",
    [
        {"match_resolution": "14"},
        {"similarity": "iou"},
        {"on_empty": "skip"},
        {"prompt_threshold": math.nan},
        {"min_score": "high"},
        {"border_sigma": 0},
        {"border_sigma": "wide"},
        {"coarse_threshold": math.inf},
        {"min_region_gallery": -1},
        {"min_region_gallery": 2.5},
    ],
)
def test_bad_options(options):
    with pytest.raises(ConfigError):
        match(MaskGallery.empty((8, 8)), BLOB, **options)


@pytest.mark.parametrize("coarse", [torch.zeros(1, 14, 14), torch.full((14, 14), math.nan), torch.zeros(0, 14)])
def test_bad_maps(coarse):
    with pytest.raises(ConfigError):
        match(MaskGallery.empty((8, 8)), coarse)


@pytest.mark.cuda
def test_same_result_on_a_gpu():
    rng = np.random.default_rng(3)
    masks = [
        rectangle(*np.sort(rng.integers(0, 97, 2)), *np.sort(rng.integers(0, 131, 2)), (97, 131)) for _ in range(20)
    ]
    gallery, coarse = gallery_of(*masks), torch.rand(14, 14)
    resolution, both = {"match_resolution": "official14"}, {"similarity": "mask+bbox"}
    for options in ({}, resolution, both, {"border_sigma": 1.0}, {"min_score": 2.0}):
        one, other = match(gallery, coarse, **options), match(gallery.to("cuda"), coarse.cuda(), **options)
        assert (one.index, one.source) == (other.index, other.source)
        assert np.array_equal(one.scores, other.scores) and np.array_equal(one.kept, other.kept)
        assert np.array_equal(one.mask, other.mask)
