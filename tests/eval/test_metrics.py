"""Metrics against the golden numbers of the reference evaluators and against plain transcriptions with OpenCV."""

import cv2
import numpy as np
import pytest
import torch

from pro2sam_fast.boxes import iou_plus1, map_box
from pro2sam_fast.errors import ConfigError, DataError
from pro2sam_fast.eval.box_accuracy import MaxBoxAcc, sweep_maps
from pro2sam_fast.eval.localization import LocalizationAccuracy, corloc, error_taxonomy, error_type
from pro2sam_fast.eval.protocols import PROTOCOLS, level_maps, prepare_score_maps, transform_boxes
from pro2sam_fast.eval.pxap import PxAP, ground_truth_pixels


@pytest.mark.parametrize(
    ("name", "box", "size", "wanted"),
    [
        ("sat", (60, 27, 385, 331), (500, 335), (14, 4, 181, 223)),
        ("direct224", (60, 27, 385, 331), (500, 335), (26, 18, 172, 221)),
        ("wsoleval", (60, 27, 385, 331), (500, 335), (26, 18, 172, 221)),
        ("sat", (111, 108, 441, 193), (500, 375), (40, 57, 209, 115)),
        ("wsoleval", (111, 108, 441, 193), (500, 375), (49, 64, 197, 115)),
    ],
)
@pytest.mark.parametrize("single_precision", [False, True])
def test_annotated_boxes_follow_the_view(name, box, size, wanted, single_precision):
    assert tuple(transform_boxes([box], size, PROTOCOLS[name], single_precision)[0]) == wanted


def test_wsoleval_boxes_end_at_the_last_pixel():
    # int(334 * 224 / 335) and not int(335 * 224 / 335)
    assert transform_boxes([(0, 9, 500, 335)], (500, 335), PROTOCOLS["wsoleval"]).tolist() == [[0, 6, 223, 223]]


def test_a_box_outside_the_crop_is_inverted():
    box = transform_boxes([(0, 0, 10, 300)], (500, 375), PROTOCOLS["sat"])[0]
    assert box[2] < box[0]
    assert iou_plus1(np.array([0, 0, 224, 224.0]), box) == 0


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ((1, 2, 5, 6), (3, 1, 4, 5), 8 / 27),
        ((57, 42, 183, 151), (60, 40, 175, 150), 0.8902971),
        ((0, 0, 224, 224), (0, 0, 223, 223), 0.9911309),
        ((0, 0, 0, 0), (0, 0, 0, 0), 1),
    ],
)
def test_iou_with_one_added(a, b, wanted):
    assert iou_plus1(np.array(a, float), np.array(b, float)) == pytest.approx(wanted, abs=1e-7)


@pytest.fixture
def score_map():
    m = np.zeros((8, 10))
    m[1:6, 1:6] = 0.9
    m[3, 3], m[1, 1] = 0.1, 1.0
    m[2:4, 7:10] = 0.6
    m[7, 0:3] = 0.3
    return m


@pytest.mark.parametrize("multi_contour", [False, True])
def test_golden_contours(score_map, multi_contour):
    metric = MaxBoxAcc((0.5, 0.69, 0.7), 0.05, multi_contour)
    iou = metric.update(score_map, np.array([[1, 1, 5, 5], [7, 2, 9, 3]]))
    for tau in (0, 0.25, 0.5, 0.75):
        assert iou[round(tau * 20)] == pytest.approx(0.694444, abs=1e-6)
    assert iou[19] == pytest.approx(0.16)
    assert metric.compute()["box_acc@0.69"] == 100 and metric.compute()["box_acc@0.7"] == 0


def test_golden_levels(score_map):
    _, index = level_maps(score_map[None], [0, 0.25, 0.5, 0.75, 0.95], PROTOCOLS["wsoleval"])
    assert index.tolist() == [[0, 63, 127, 191, 242]]


def test_a_map_of_zeros_has_a_box_of_one_pixel():
    iou, found = sweep_maps(np.zeros((1, 8, 8)), [np.array([[0, 0, 0, 0]])], [0, 0.5], "wsoleval")
    assert found.tolist() == [[[0, 0, 0, 0]] * 2] and iou.tolist() == [[1, 1]]


def reference_sweep(values, truth, multi, step):
    """wsolevaluation's loop with OpenCV."""
    gray = (values * 255).astype(np.uint8)
    height, width = gray.shape
    out = []
    for tau in np.arange(0, 1, step):
        _, binary = cv2.threshold(gray, int(tau * np.max(gray)), 255, cv2.THRESH_BINARY)
        contours, _ = cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
        if contours and not multi:
            contours = [max(contours, key=cv2.contourArea)]
        boxes = [
            (x, y, min(x + w, width - 1), min(y + h, height - 1)) for x, y, w, h in map(cv2.boundingRect, contours)
        ]
        pairs = iou_plus1(np.array(boxes or [(0, 0, 0, 0)], float)[:, None], np.array(truth, float)[None])
        out.append(pairs.max())
    return np.array(out)


@pytest.mark.parametrize("multi", [False, True])
def test_max_box_acc_is_the_reference_loop(multi):
    rng = np.random.default_rng(0)
    metric = MaxBoxAcc((0.3, 0.5, 0.7), 0.01, multi)
    rows = []
    for _ in range(6):
        coarse = torch.from_numpy(rng.random((1, 14, 14)))
        values = prepare_score_maps(coarse)[0].numpy()
        upsampled = cv2.resize(coarse[0].numpy(), (224, 224), interpolation=cv2.INTER_CUBIC)
        wanted = (upsampled - upsampled.min()) / (upsampled.max() - upsampled.min())
        np.testing.assert_allclose(values, wanted, atol=1e-6)
        truth = [[20, 30, 150, 140], [0, 0, 40, 50]]
        rows.append(reference_sweep(values, truth, multi, 0.01))
        np.testing.assert_allclose(metric.update(values, truth), rows[-1], atol=1e-12)
    curves = metric.curves()
    for t in (0.3, 0.5, 0.7):
        np.testing.assert_allclose(curves[f"box_acc@{t}"], 100 * (np.array(rows) >= t).mean(0))
    best = [100 * (np.array(rows) >= t).mean(0).max() for t in (0.3, 0.5, 0.7)]
    assert metric.compute()["MaxBoxAcc"] == pytest.approx(np.mean(best))


def test_parts_merge_to_the_whole():
    rng = np.random.default_rng(1)
    whole, parts = MaxBoxAcc(step=0.1), [MaxBoxAcc(step=0.1), MaxBoxAcc(step=0.1)]
    maps, boxes = rng.random((4, 20, 20)), [np.array([[2, 2, 17, 18]])] * 4
    whole.update(maps, boxes)
    for i, part in enumerate(parts):
        part.update(maps[2 * i : 2 * i + 2], boxes[:2])
    parts[0].merge(parts[1])
    assert parts[0].compute() == whole.compute()
    with pytest.raises(ConfigError, match="same options"):
        whole.merge(MaxBoxAcc(step=0.2))


@pytest.mark.parametrize("value", [np.nan, -0.1, 1.1])
def test_score_maps_must_be_probabilities(value):
    with pytest.raises(DataError, match="values from 0 to 1"):
        MaxBoxAcc().update(np.full((4, 4), value), np.array([[0, 0, 1, 1]]))
    with pytest.raises(DataError, match="no annotated box"):
        MaxBoxAcc().update(np.zeros((4, 4)), np.zeros((0, 4)))


def test_golden_boxes_of_sat():
    m = np.full((14, 14), 0.05)
    m[3:9, 4:11], m[5, 6], m[11:13, 1:3] = 0.85, 0.95, 0.7
    thresholds = [0.3, 0.4, 0.5, 0.9]
    wanted = [[61, 45, 179, 147], [63, 47, 177, 145], [65, 49, 175, 143], [90, 74, 118, 102]]
    _, found = sweep_maps(m[None], [np.array([[0, 0, 9, 9]])], thresholds, "sat")
    assert found[0].tolist() == wanted
    assert [list(map_box(m, t)) for t in thresholds] == wanted
    _, found = sweep_maps(np.full((1, 14, 14), 0.3), [np.array([[0, 0, 9, 9]])], thresholds, "sat")
    assert found[0].tolist() == [[0, 0, 224, 224]] * 4


def test_maps_that_a_protocol_cannot_use():
    boxes = [np.array([[0, 0, 1, 1]])]
    with pytest.raises(DataError, match="score map 0 is constant"):
        sweep_maps(np.ones((1, 14, 14)), boxes, [0.5], "tscam")
    with pytest.raises(DataError, match="NaN"):
        sweep_maps(np.full((1, 14, 14), np.nan), boxes, [0.5], "sat")
    with pytest.raises(ConfigError, match="scores masks"):
        sweep_maps(np.ones((1, 14, 14)), boxes, [0.5], "mask")
    with pytest.raises(ConfigError, match="multi_contour"):
        sweep_maps(np.ones((1, 14, 14)), boxes, [0.5], "sat", multi_contour=True)


def test_golden_pxap():
    metric = PxAP(0.25)
    scores = np.array([[1.0, 0.8, 0.3, 0.6, 0.25, 0.1, 0, 0, 0.9]])
    labels = ground_truth_pixels([np.array([[1, 1, 1, 0, 0, 0, 0, 0, 0]])], np.array([[1, 0, 0, 0, 0, 0, 0, 0, 1]]))
    assert labels.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0, 255]]
    metric.update(scores, labels)
    assert metric.foreground.tolist() == [0, 1, 0, 1, 1, 0] and metric.background.tolist() == [3, 1, 1, 0, 0, 0]
    assert metric.compute() == pytest.approx(86.6667, abs=1e-4)


def test_pxap_of_a_constant_map_is_the_foreground_share():
    metric = PxAP()
    metric.update(np.full((10, 10), 0.4), (np.arange(100) < 30).reshape(10, 10).astype(np.uint8))
    assert metric.compute() == pytest.approx(30)
    with pytest.raises(DataError, match="no foreground pixel"):
        PxAP().compute()


GT = [[20, 20, 119, 119]]


@pytest.mark.parametrize(
    ("box", "boxes", "wanted"),
    [
        (GT[0], GT, "Correct"),
        ([20, 20, 119, 68], GT, "Part"),
        ([20, 20, 119, 69], GT, "Part"),
        ([30, 30, 69, 69], GT, "Part"),
        ([0, 0, 199, 159], GT, "More"),
        ([120, 120, 180, 180], GT, "Other"),
        ([0, 0, 199, 99], [[0, 0, 59, 99], [100, 0, 159, 99]], "M-Ins"),
    ],
)
def test_golden_errors(box, boxes, wanted):
    assert error_type(box, np.array(boxes)) == wanted
    assert error_type(box, np.array(boxes), right_class=False) == "Cls"


def accuracy(**options):
    metric = LocalizationAccuracy("sat", **options)
    whole, half = [0, 0, 99, 99], [0, 0, 99, 49]
    metric.update("a", 1, [whole], whole, np.array([0.1, 0.9, 0, 0, 0, 0]))
    metric.update("b", 1, [whole], half, np.array([0.9, 0.1, 0, 0, 0, 0]))
    metric.update("c", 5, [whole], [0, 0, 9, 9], np.array([6.0, 5, 4, 3, 2, 1]))
    metric.update("d", 0, [whole, [0, 0, 9, 9]], [0, 0, 9, 9], np.array([1.0, 0, 0, 0, 0, 0]))
    return metric


def test_localization_accuracy():
    result = accuracy().compute((0.5, 0.9))
    assert result["GT-known"] == 75
    assert (result["Top-1 Loc"], result["Top-5 Loc"]) == (50, 75)
    assert (result["Top-1 Cls"], result["Top-5 Cls"]) == (50, 75)
    assert (result["box_acc@0.5"], result["box_acc@0.9"], result["mean"]) == (75, 50, 62.5)
    # IoU of exactly one half is no CorLoc
    assert result["CorLoc micro"] == 50
    assert result["CorLoc macro"] == pytest.approx((50 + 0 + 100) / 3)
    records = list(accuracy().records.values())
    assert sum(error_taxonomy(records).values()) == pytest.approx(100)
    assert error_taxonomy(records)["Cls"] == 50 and error_taxonomy(records, given_class=True)["Cls"] == 0
    assert corloc(records)["micro"] == 50


def test_strict_protocols_want_more_than_half():
    metric = LocalizationAccuracy("tscam")
    metric.update("a", 0, [[0, 0, 99, 99]], [0, 0, 99, 49], np.array([1.0, 0]))
    assert metric.compute()["Top-1 Loc"] == 0 and metric.compute()["GT-known"] == 100


def test_class_specific_boxes():
    metric = LocalizationAccuracy("sat")
    boxes = {0: (0, 0, 9, 9), 1: (0, 0, 99, 99)}
    record = metric.update("a", 1, [[0, 0, 99, 99]], boxes[0], np.array([1.0, 0.5]), class_boxes=boxes)
    assert record.best_iou(1) == 1 and record.best_iou(0) == pytest.approx(0.01) and record.best_iou(7) == 0
    assert metric.compute()["GT-known"] == 100 and metric.compute()["Top-1 Loc"] == 0


def test_photos_count_once_and_all():
    metric = accuracy()
    with pytest.raises(DataError, match="'a' was evaluated twice"):
        metric.update("a", 1, GT, GT[0])
    with pytest.raises(DataError, match="twice"):
        metric.merge(list(accuracy().records.values()))
    with pytest.raises(DataError, match="1 photos are missing in the evaluation, the first is 'e'"):
        metric.require("abcde")
    with pytest.raises(DataError, match="1 photos are unknown"):
        metric.require("abc")
    with pytest.raises(DataError, match="NaN"):
        metric.update("n", 1, GT, (0, 0, np.nan, 1))
    with pytest.raises(DataError, match="no annotated box"):
        metric.update("n", 1, [], GT[0])
