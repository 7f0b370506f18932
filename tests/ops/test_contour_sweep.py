"""Boxes at every threshold: both back ends against OpenCV's contours and against each other."""

import cv2
import numpy as np
import pytest
import torch

from pro2sam_fast.ops import contour_sweep

BACKENDS = ["reference", "cpu"]
RULES = ["pixels", "area", "all"]


def noise(rng, height, width, steps, smooth):
    values = rng.random((height, width)).astype(np.float32)
    if smooth:
        values = cv2.GaussianBlur(values, (0, 0), smooth)
    values = (values - values.min()) / (values.max() - values.min() + 1e-9)
    return (values * steps).astype(np.int32)


def sweep(levels, boxes, steps, rule, backend, clamp=True, empty=(0, 0, 0, 0)):
    """levels: a list of maps; boxes: for each map a list."""
    counts = [0, *np.cumsum([len(b) for b in boxes])]
    flat = torch.tensor([b for part in boxes for b in part], dtype=torch.float64).reshape(-1, 4)
    maps = torch.from_numpy(np.stack(levels))
    return contour_sweep(maps, flat, torch.tensor(counts), steps, rule, torch.tensor(empty), clamp, backend)


def opencv_boxes(mask, single):
    contours, _ = cv2.findContours(mask.astype(np.uint8) * 255, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        return [(0, 0, 0, 0)]
    if single:
        contours = [max(contours, key=cv2.contourArea)]
    height, width = mask.shape
    return [(x, y, min(x + w, width - 1), min(y + h, height - 1)) for x, y, w, h in map(cv2.boundingRect, contours)]


def plus1(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]) + 1, min(a[3], b[3]) - max(a[1], b[1]) + 1
    inter = max(w, 0) * max(h, 0)
    union = sum((x1 - x0 + 1) * (y1 - y0 + 1) for x0, y0, x1, y1 in (a, b)) - inter
    return inter / union


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smooth", [0, 0.7, 2.0])
@pytest.mark.parametrize("size", [(24, 31), (17, 64), (33, 65), (5, 130)])
def test_the_contours_of_opencv(size, smooth, backend):
    rng = np.random.default_rng(hash((size, smooth)) % 2**32)
    steps = 12
    levels = [noise(rng, *size, steps, smooth) for _ in range(4)]
    truth = [[(1, 1, 9, 3)], [(0, 0, 4, 4), (3, 1, size[1] - 1, size[0] - 1)], [(2, 0, 20, 4)], [(0, 2, 0, 2)]]
    for rule in ("area", "all"):
        iou, found = sweep(levels, truth, steps, rule, backend)
        for i, one in enumerate(levels):
            for k in range(steps):
                wanted = opencv_boxes(one > k, single=rule == "area")
                best = max(plus1(a, b) for a in wanted for b in truth[i])
                assert iou[i, k] == pytest.approx(best, abs=1e-12)
                assert tuple(found[i, k].tolist()) in wanted


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2), (63, 65), (3, 64), (4, 128), (7, 63)])
def test_back_ends_agree(size, rule, clamp):
    rng = np.random.default_rng(3)
    levels = [noise(rng, *size, 9, s) for s in (0, 0, 1.0)]
    levels += [np.zeros(size, np.int32), np.full(size, 9, np.int32), np.full(size, 20000, np.int32)]
    truth = [[(0, 0, 3, 3)], [], [(5, 0, 2, 3)], [(0, 0, 0, 0)], [(0, 0, size[1], size[0])], [(0.5, 0, 3.5, 2)]]
    for steps in (1, 9, 300):
        a, b = (sweep(levels, truth, steps, rule, backend, clamp, (0, 0, 7, 7)) for backend in BACKENDS)
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_threads_do_not_matter():
    rng = np.random.default_rng(5)
    levels = [noise(rng, 40, 41, 30, 1.0) for _ in range(7)]
    truth = [[(3, 3, 20, 30)]] * 7
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(sweep(levels, truth, 30, "all", "cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_maps(backend):
    iou, found = contour_sweep(
        torch.zeros((0, 4, 4), dtype=torch.int32),
        torch.zeros((0, 4), dtype=torch.float64),
        torch.zeros(1, dtype=torch.int64),
        5,
        "all",
        torch.zeros(4, dtype=torch.int64),
        backend=backend,
    )
    assert iou.shape == (0, 5) and found.shape == (0, 5, 4)


def arguments():
    levels = torch.from_numpy(noise(np.random.default_rng(0), 12, 13, 6, 1.0))[None]
    return [levels, torch.tensor([[1.0, 1, 5, 6]]).double(), torch.tensor([0, 1]), torch.zeros(4, dtype=torch.int64)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    arguments_ = (*arguments(), 6, "all", True)
    torch.library.opcheck(torch.ops.pro2sam_fast.contour_sweep, arguments_, {"backend": backend})


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (0, torch.zeros(1, 4, 4), TypeError, "levels must be a dense torch.int32"),
        (0, torch.zeros(4, 4, dtype=torch.int32), ValueError, "levels must be"),
        (0, torch.full((1, 4, 4), -1, dtype=torch.int32), ValueError, "at least 0"),
        (1, torch.zeros(1, 3, dtype=torch.float64), ValueError, "boxes must be"),
        (2, torch.tensor([0, 5]), ValueError, "at most 1"),
        (2, torch.tensor([1, 0]), ValueError, "must rise"),
        (3, torch.zeros(3, dtype=torch.int64), ValueError, "empty"),
    ],
)
def test_wrong_arguments(place, value, error, message):
    levels, boxes, first, empty = [value if i == place else x for i, x in enumerate(arguments())]
    with pytest.raises(error, match=message):
        contour_sweep(levels, boxes, first, 6, "all", empty, backend="cpu")
    with pytest.raises(ValueError, match="rule must be"):
        contour_sweep(*arguments()[:3], 6, "largest", arguments()[3])
