"""The measures of the `lite` weights on masks and boxes that are made up here."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("scipy", reason="needs scipy: pip install .[bench]")

from pro2sam_fast.data.segments import SegmentedPhoto
from pro2sam_fast.eval import lite_accuracy


def square(x, y, side, size=(100, 100)):
    mask = np.zeros(size, bool)
    mask[y : y + side, x : x + side] = True
    return mask


def test_boundary_f_counts_boundary_pixels_within_reach():
    # a diagonal of 141 pixels reaches 1.06 pixels: one pixel beside, but not two
    assert lite_accuracy.boundary_f(square(20, 20, 40), square(20, 20, 40)) == 1
    assert lite_accuracy.boundary_f(square(21, 20, 40), square(20, 20, 40)) == 1
    assert lite_accuracy.boundary_f(square(20, 20, 40), square(24, 24, 32)) == 0
    # two pixels to the right: 156 boundary pixels each; the vertical sides miss, the ends of the horizontal ones too
    top, side = 2 * (40 - 2), 2 * 2
    near = lite_accuracy.boundary_f(square(22, 20, 40), square(20, 20, 40))
    assert near == pytest.approx((top + side) / 156, abs=4 / 156) and near < 0.56


def test_boundary_f_of_half_a_boundary():
    both = square(5, 5, 20) | square(60, 60, 20)
    one = square(5, 5, 20)
    assert lite_accuracy.boundary_f(one, both) == lite_accuracy.boundary_f(both, one) == pytest.approx(2 / 3)


def test_the_frame_is_no_boundary():
    everything = np.ones((100, 100), bool)
    assert lite_accuracy.boundary_f(everything, everything) == 0
    half = np.zeros((100, 100), bool)
    half[:, :50] = True
    assert lite_accuracy.boundary_f(half, ~half) == 1  # one line, its two sides a pixel apart


def test_clicks_are_scored_by_the_best_and_by_the_chosen_mask(monkeypatch):
    truth = square(10, 10, 40)
    masks = np.stack([square(10, 10, 20), truth, square(60, 60, 20)])

    class Predictor:
        def __init__(self, sam):
            assert sam == "sam"

        def set_image(self, image):
            self.image = image

        def predict(self, point_coords, point_labels, multimask_output):
            assert truth[int(point_coords[0, 1]), int(point_coords[0, 0])]
            return masks, np.array([0.9, 0.5, 0.1]), None

    monkeypatch.setattr(lite_accuracy, "SamPredictor", Predictor)
    photo = SegmentedPhoto(np.zeros((100, 100, 3), np.uint8), truth[None].astype(np.uint8) * 7, "coco", (7,))
    found = lite_accuracy.click_accuracy("sam", [(photo, [7]), (photo, [])])
    assert found["clicks"] == 1 and found["best_iou"] == 1 and found["picked_iou"] == 0.25
    assert found["best_boundary_f"] == 1 and 0 < found["picked_boundary_f"] < 1
    assert found["iou_rank_correlation"] == pytest.approx(0.5)


def test_a_box_hits_any_thing():
    photo = SegmentedPhoto(np.zeros((100, 100, 3), np.uint8), square(10, 10, 40)[None].astype(np.uint8), "coco", (1,))
    hit, miss = SimpleNamespace(box=(10, 10, 50, 50)), SimpleNamespace(box=(50, 50, 90, 90))
    assert lite_accuracy.things_hit([hit, miss], [(photo, [1])] * 2) == 50
