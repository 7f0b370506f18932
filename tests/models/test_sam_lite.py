"""The bundled `lite` weights on real photos: both generators give the same masks in the same order."""

import numpy as np
import pytest
from original import records, segment_anything

from pro2sam_fast.generator import MaskGenerator
from pro2sam_fast.models.lite import WEIGHTS, load_lite
from pro2sam_fast.models.sam.build import build_sam, to_segment_anything
from pro2sam_fast.ops import mask_iou
from pro2sam_fast.predictor import SamPredictor

data = pytest.importorskip("skimage.data")

pytestmark = pytest.mark.skipif(not WEIGHTS.is_file(), reason="no bundled weights: train them first")

PHOTOS = {"astronaut": (0, 260), "chelsea": (20, 320), "coffee": (40, 400)}


def photo(name):
    start, stop = PHOTOS[name]
    return np.ascontiguousarray(getattr(data, name)()[start:stop, start:stop])


@pytest.fixture(scope="module")
def lite():
    model = load_lite()
    options = {k: v for k, v in model.defaults.items() if k in MaskGenerator.__init__.__annotations__}
    sam = build_sam("lite")
    return sam, to_segment_anything(sam), {**options, "points_per_side": 6}


@pytest.mark.parametrize("name", PHOTOS)
def test_same_masks_in_the_same_order(lite, name):
    sam, theirs, options = lite
    image = photo(name)
    ours = MaskGenerator(sam, **options).generate(image)[0].to_records()
    expected = records(theirs, image, **options)
    assert len(ours) == len(expected) > 0
    for a, b in zip(ours, expected, strict=True):
        assert a["point_coords"] == b["point_coords"]
        # sums in another order: a pixel right at the cutoff may differ
        assert (a["segmentation"] != b["segmentation"]).sum() <= 2
        assert a["predicted_iou"] == pytest.approx(b["predicted_iou"], rel=1e-4)


def test_predictor(lite):
    sam, theirs, _ = lite
    prompt = {"point_coords": np.array([[130, 130]]), "point_labels": np.array([1])}
    found = []
    for predictor in (SamPredictor(sam), segment_anything.SamPredictor(theirs)):
        predictor.set_image(photo("chelsea"))
        found.append(predictor.predict(**prompt))
    (masks, iou, logits), (their_masks, their_iou, their_logits) = found
    assert (masks != their_masks).sum() <= 6
    np.testing.assert_allclose(iou, their_iou, rtol=1e-4)
    assert np.linalg.norm(logits - their_logits) < 1e-4 * np.linalg.norm(their_logits)


def test_masks_are_sensible(lite):
    """A point in the middle of the cat's face gives one region around it, neither a speck nor the photo."""
    predictor = SamPredictor(lite[0])
    image = data.chelsea()
    predictor.set_image(image)
    masks, iou, _ = predictor.predict(np.array([[250, 150]]), np.array([1]))
    best = masks[iou.argmax()]
    assert best[150, 250]
    assert 0.02 < best.mean() < 0.9


def test_bfloat16_leaves_the_encoder_alone(lite):
    sam, _, options = lite
    image = photo("coffee")
    full, mixed = (MaskGenerator(sam, **options, dtype=dtype) for dtype in ("float32", "bfloat16"))
    expected, found = (next(x._decoder.encode(x.prepare(image))) for x in (full, mixed))
    assert expected.equal(found)
    expected, found = full.generate(image)[0], mixed.generate(image)[0]
    assert len(found) == len(expected) > 0
    twins = mask_iou(expected.masks.flatten(1), found.masks.flatten(1)).max(dim=1).values
    assert (twins >= 0.95).float().mean() >= 0.95 and twins.min() >= 0.9
