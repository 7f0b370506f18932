"""Boxes and IoU against golden numbers and plain forms written with scipy, OpenCV and scikit-image."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from pro2sam_fast.boxes import (
    close3x3,
    components,
    iou_exact,
    iou_plus1,
    largest_component,
    largest_component_box,
    map_box,
    map_foreground,
    otsu_threshold,
    otsu_union,
    tight_box,
)
from pro2sam_fast.errors import ConfigError

SQUARE = np.ones((3, 3), bool)


@st.composite
def masks(draw, max_side=24):
    """Masks of three kinds: noise of any density, a few rectangles, rectangles that may touch every border."""
    height, width = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        return rng.random((height, width)) < draw(st.floats(0, 1))
    mask = np.zeros((height, width), bool)
    for _ in range(draw(st.integers(0, 4))):
        y, x = rng.integers(0, height), rng.integers(0, width)
        mask[y : y + rng.integers(1, height + 1), x : x + rng.integers(1, width + 1)] = True
    return mask


def plain_close(mask):
    grown = ndimage.binary_dilation(mask, SQUARE, border_value=0)
    return ndimage.binary_erosion(grown, SQUARE, border_value=1)


def plain_union(mask, min_region):
    """The steps one by one on the whole frame; a constant mask has no foreground."""
    height, width = mask.shape
    mask = mask & (not mask.all())
    labels, count = ndimage.label(plain_close(mask), SQUARE)
    kept = np.zeros_like(mask)
    for i in range(1, count + 1):
        if (labels == i).sum() >= min_region:
            kept |= labels == i
    rows, columns = np.nonzero(kept)
    if not len(rows):
        return 0, 0, width, height
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


class TestOtsu:
    @settings(max_examples=60, deadline=None)
    @given(hnp.arrays(st.sampled_from([np.uint8, np.int16]), hnp.array_shapes(min_dims=1, max_dims=2, max_side=12)))
    def test_integers_equal_an_exhaustive_search(self, image):
        threshold = otsu_threshold(image)
        values = image.ravel().astype(object)
        if values.min() == values.max():
            assert threshold == values.min()
            return

        def variance(level):
            below, above = values[values <= level], values[values > level]
            n, m = len(below), len(above)
            return (int(below.sum()) * m - int(above.sum()) * n) ** 2 / (n * m)

        best = {level: variance(level) for level in sorted(set(values))[:-1]}
        assert best[threshold] == pytest.approx(max(best.values()), rel=1e-12)
        assert all(value < best[threshold] * (1 + 1e-12) for level, value in best.items() if level < threshold)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int32])
    def test_equals_scikit_image(self, dtype):
        filters = pytest.importorskip("skimage.filters")
        rng = np.random.default_rng(0)
        for _ in range(20):
            parts = rng.normal(60, 10, 300), rng.normal(rng.uniform(80, 200), 15, 300)
            image = np.clip(np.concatenate(parts), 0, 255).astype(dtype).reshape(20, 30)
            assert otsu_threshold(image) == pytest.approx(filters.threshold_otsu(image), rel=1e-6)

    def test_ties_take_the_lowest_level(self):
        assert otsu_threshold(np.array([0, 255], np.uint8)) == 0
        assert otsu_threshold(np.array([-3, -3, 7])) == -3
        assert otsu_threshold(np.array([0, 1, 2], np.uint8)) == 0
        assert otsu_threshold(np.array([False, True])) == 0

    def test_constant_and_bad_images(self):
        assert otsu_threshold(np.full((2, 2), 7)) == 7
        for image in (np.zeros((0, 3)), np.array([1.0, np.nan]), np.array([1j]), np.array(["a"])):
            with pytest.raises(ConfigError):
                otsu_threshold(image)


class TestClosing:
    @settings(max_examples=100, deadline=None)
    @given(masks())
    def test_equals_scipy(self, mask):
        before = mask.copy()
        assert np.array_equal(close3x3(mask), plain_close(mask))
        assert np.array_equal(mask, before)

    def test_border(self):
        mask = np.zeros((5, 5), bool)
        mask[2, 1] = True
        expected = mask.copy()
        expected[2, 0] = True  # outside is foreground for the erosion
        assert np.array_equal(close3x3(mask), expected)

    def test_equals_scikit_image(self):
        morphology = pytest.importorskip("skimage.morphology")
        rng = np.random.default_rng(0)
        for density in (0.05, 0.2, 0.5):
            mask = rng.random((17, 23)) < density
            assert np.array_equal(close3x3(mask), morphology.closing(mask, SQUARE))


class TestComponents:
    @settings(max_examples=60, deadline=None)
    @given(masks())
    def test_equal_opencv_and_come_in_raster_order(self, mask):
        labels, areas, boxes = components(mask)
        count, other = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        assert len(areas) == len(boxes) == count - 1
        firsts = []
        for i, (area, (x0, y0, x1, y1)) in enumerate(zip(areas, boxes, strict=True)):
            inside = labels == i + 1
            assert inside.sum() == area
            assert len(np.unique(other[inside])) == 1
            assert tight_box(inside) == (x0, y0, x1, y1)
            firsts.append(int(np.flatnonzero(inside)[0]))
        assert firsts == sorted(firsts)
        assert np.array_equal(labels > 0, mask)

    def test_diagonal_pixels_are_connected(self):
        assert components(np.eye(4, dtype=bool))[1].tolist() == [4]

    def test_largest_takes_the_first_on_ties(self):
        mask = np.zeros((6, 9), bool)
        mask[0, 5:7] = mask[3, 0:2] = mask[5, 8] = True
        assert largest_component_box(mask) == (5, 0, 7, 1)
        assert largest_component(mask).sum() == 2
        mask[5, 7] = mask[5, 6] = True
        assert largest_component_box(mask) == (6, 5, 9, 6)

    def test_empty(self):
        empty = np.zeros((4, 7), bool)
        assert largest_component_box(empty) == (0, 0, 7, 4)
        assert not largest_component(empty).any()
        assert tight_box(empty) is None


class TestOtsuUnion:
    @settings(max_examples=200, deadline=None)
    @given(masks(), st.integers(0, 30))
    def test_equals_the_plain_form(self, mask, min_region):
        expected = tuple(plain_union(mask, min_region))
        assert otsu_union(mask, min_region) == expected
        assert otsu_union(mask.astype(np.uint8) * 255, min_region) == expected
        assert otsu_union(mask.astype(np.float32), min_region) == expected

    def test_regions_below_the_minimum_do_not_count(self):
        mask = np.zeros((40, 50), bool)
        mask[5:15, 10:20] = True  # 100 pixels
        mask[26:35, 30:41] = True  # 99 pixels
        assert otsu_union(mask) == (10, 5, 20, 15)
        assert otsu_union(mask, 99) == (10, 5, 41, 35)
        mask[5, 10] = False  # a convex corner stays open
        assert otsu_union(mask) == (0, 0, 50, 40)

    def test_closing_joins_regions(self):
        mask = np.zeros((40, 40), bool)
        mask[10:20, 10:16] = mask[10:20, 17:22] = True  # 60 and 50 pixels, one column apart
        assert otsu_union(mask) == (10, 10, 22, 20)

    def test_constant_images_give_the_frame(self):
        for value in (0, 1, 255):
            assert otsu_union(np.full((5, 8), value, np.uint8)) == (0, 0, 8, 5)

    def test_grey_images_are_thresholded(self):
        image = np.full((30, 30), 20, np.uint8)
        image[4:20, 6:22] = 200
        image[10, 10] = 90
        assert otsu_union(image) == (6, 4, 22, 20)

    def test_bad_shapes(self):
        for mask in (np.zeros((2, 2, 2), bool), np.zeros((0, 4), bool), np.zeros(4, bool)):
            with pytest.raises(ConfigError):
                otsu_union(mask)


class TestMapBox:
    @pytest.fixture
    def score_map(self):
        score_map = np.full((14, 14), 0.05)
        score_map[3:9, 4:11] = 0.85
        score_map[5, 6] = 0.95
        score_map[11:13, 1:3] = 0.7
        return score_map

    @pytest.mark.parametrize(
        ("threshold", "box"),
        [(0.3, (61, 45, 179, 147)), (0.4, (63, 47, 177, 145)), (0.5, (65, 49, 175, 143)), (0.9, (90, 74, 118, 102))],
    )
    def test_golden(self, score_map, threshold, box):
        assert map_box(score_map, threshold) == box
        assert map_box(torch.from_numpy(score_map).float(), threshold) == box

    def test_constant_map_gives_the_frame(self):
        for threshold in (0.0, 0.3):
            assert map_box(np.full((14, 14), 0.3), threshold) == (0, 0, 224, 224)

    def test_equals_opencv_resize(self, score_map):
        normal = (score_map - score_map.min()) / (score_map.max() - score_map.min() + 1e-5)
        for width, height in ((224, 224), (333, 97), (9, 20)):
            expected = cv2.resize(normal, (width, height)) > 0.4123
            assert np.array_equal(map_foreground(score_map, 0.4123, (height, width)), expected)

    def test_bad_maps(self):
        for score_map in (np.full((14, 14), np.nan), np.zeros((1, 14, 14)), np.zeros((0, 14))):
            with pytest.raises(ConfigError):
                map_box(score_map, 0.4)


class TestIou:
    @pytest.mark.parametrize(
        ("a", "b", "expected"),
        [
            ([1, 2, 5, 6], [3, 1, 4, 5], 8 / 27),
            ([57, 42, 183, 151], [60, 40, 175, 150], 0.8902971),
            ([0, 0, 224, 224], [0, 0, 223, 223], 0.9911309),
            ([0, 0, 0, 0], [0, 0, 0, 0], 1),
            ([1, 1, 6, 6], [1, 1, 5, 5], 25 / 36),
            ([10, 10, 5, 20], [0, 0, 30, 30], 0),
            ([10, 10, 5, 20], [10, 10, 5, 20], 0),
        ],
    )
    def test_plus1_golden(self, a, b, expected):
        assert iou_plus1(a, b) == pytest.approx(expected, abs=5e-8)
        assert iou_plus1(b, a) == pytest.approx(expected, abs=5e-8)

    def test_exact(self):
        assert iou_exact([0, 0, 2, 2], [1, 1, 3, 3]) == pytest.approx(1 / 7)
        assert iou_exact([0, 0, 2, 2], [2, 0, 4, 2]) == 0
        assert iou_exact([1, 1, 1, 5], [1, 1, 1, 5]) == 0
        assert iou_exact([3, 0, 1, 2], [0, 0, 9, 9]) == 0

    def test_broadcasts_to_matrices(self):
        boxes = np.array([[0, 0, 4, 4], [2, 2, 6, 6], [9, 9, 12, 12]])
        matrix = iou_exact(boxes[:, None], boxes[None])
        assert matrix.shape == (3, 3)
        assert np.allclose(matrix, matrix.T) and np.allclose(np.diag(matrix), 1)
        with pytest.raises(ConfigError):
            iou_plus1(boxes[:, :3], boxes)

    @settings(max_examples=60, deadline=None)
    @given(masks(12), masks(12))
    def test_exact_is_the_iou_of_pixels(self, one, two):
        canvas = np.zeros((2, 24, 24), bool)
        boxes = [tight_box(mask) or (0, 0, 0, 0) for mask in (one, two)]
        for layer, (x0, y0, x1, y1) in zip(canvas, boxes, strict=True):
            layer[y0:y1, x0:x1] = True
        union = (canvas[0] | canvas[1]).sum()
        expected = (canvas[0] & canvas[1]).sum() / union if union else 0
        assert iou_exact(*boxes) == pytest.approx(expected, abs=1e-12)
