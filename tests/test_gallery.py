"""MaskGallery, run-length encoding and post-processing against the functions of segment_anything and torchvision."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pro2sam_fast.errors import ConfigError
from pro2sam_fast.gallery import MaskGallery
from pro2sam_fast.ops.mask_measure import boxes_of_packed
from pro2sam_fast.postprocess import (
    Frame,
    boxes_of_masks,
    measure_masks,
    near_crop_edge,
    nms,
    remove_small_regions,
    upsample_logits,
)
from pro2sam_fast.rle import coco_rle, mask_to_rle, rle_to_mask

pytest.importorskip("segment_anything")
from segment_anything.utils import amg

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 70))
MASKS = SHAPES.flatmap(lambda shape: hnp.arrays(bool, shape))


def blobs(count, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, max(2, height // 5), max(2, width // 5), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[:, 0]
    return smooth > torch.linspace(-3, 3, count)[:, None, None]


@settings(deadline=None)
@given(mask=MASKS)
def test_rle_equals_the_original(mask):
    theirs = amg.mask_to_rle_pytorch(torch.from_numpy(mask)[None])[0]
    assert mask_to_rle(mask) == theirs
    assert coco_rle(mask) == amg.coco_encode_rle(theirs)
    np.testing.assert_array_equal(rle_to_mask(theirs), mask)


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (480, 640)])
def test_rle_of_empty_and_full(fill, shape):
    mask = np.full(shape, fill)
    assert mask_to_rle(mask)["counts"] == ([0, mask.size] if fill else [mask.size])
    assert coco_rle(mask) == amg.coco_encode_rle(mask_to_rle(mask))


@settings(deadline=None)
@given(
    masks=st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(1, 130)).flatmap(lambda s: hnp.arrays(bool, s))
)
def test_gallery_holds_the_masks(masks):
    masks = torch.from_numpy(masks)
    gallery = MaskGallery.from_dense(masks)
    assert len(gallery) == len(masks) and gallery.size == masks.shape[1:]
    assert torch.equal(gallery.dense(), masks)
    assert torch.equal(gallery.areas, masks.sum(dim=(1, 2)))
    assert torch.equal(gallery.boxes, amg.batched_mask_to_box(masks).long())
    assert torch.equal(boxes_of_packed(gallery.masks, masks.shape[2]), gallery.boxes)
    assert torch.equal(gallery.packed_flat(), gallery.masks.flatten(1))
    for record, mask in zip(gallery.to_records(), masks.numpy(), strict=True):
        np.testing.assert_array_equal(record["segmentation"], mask)


def test_gallery_dtypes():
    gallery = MaskGallery.from_dense(blobs(3, 20, 70))
    kinds = {name: getattr(gallery, name).dtype for name in ("masks", "boxes", "areas", "crop_boxes")}
    assert set(kinds.values()) == {torch.int64}
    assert gallery.predicted_iou.dtype == gallery.stability.dtype == torch.float32
    assert gallery.points.dtype == torch.float64
    assert gallery.masks.shape == (3, 20, 2)
    assert repr(gallery) == "MaskGallery(3 masks of 20 x 70 pixels, device='cpu')"


def test_select_and_cat():
    masks = blobs(5, 12, 33)
    gallery = MaskGallery.from_dense(masks, predicted_iou=torch.arange(5.0))
    assert gallery.select([3, 0, 3]).predicted_iou.tolist() == [3, 0, 3]
    assert gallery.select(slice(1, 3)).predicted_iou.tolist() == [1, 2]
    assert gallery.select(gallery.predicted_iou > 2).predicted_iou.tolist() == [3, 4]
    assert torch.equal(gallery.select(torch.tensor([4])).dense(), masks[4:])
    assert len(gallery.select([])) == 0
    both = MaskGallery.cat([gallery.select([1]), MaskGallery.empty((12, 33)), gallery])
    assert both.predicted_iou.tolist() == [1, 0, 1, 2, 3, 4]
    assert torch.equal(both.to("cpu").dense()[1:], masks)
    with pytest.raises(ConfigError, match="different image sizes"):
        MaskGallery.cat([gallery, MaskGallery.empty((12, 34))])


def test_fields_must_fit_together():
    gallery = MaskGallery.from_dense(blobs(2, 4, 5))
    with pytest.raises(ConfigError, match="boxes of 2 masks of 4 x 5 pixels"):
        MaskGallery(gallery.size, *(getattr(gallery, n) for n in ("masks", "points", "areas")), *[gallery.areas] * 4)
    with pytest.raises(ConfigError, match="output_mode must be one of"):
        gallery.to_records("png")


SIZES = [(48, 64), (427, 640), (100, 333), (256, 256), (1, 300), (300, 2), (700, 512), (17, 900)]


def their_upsampling(low_res, img_size, input_size, size):
    # The original's resizing, by two threads: with one, three channels are rounded in another order.
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = torch.nn.functional.interpolate(low_res, (img_size, img_size), mode="bilinear", align_corners=False)
        x = x[..., : input_size[0], : input_size[1]]
        return torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_upsampling_has_the_bits_of_the_original(size, threads):
    img_size = 256
    scale = img_size / max(size)
    input_size = tuple(max(1, int(n * scale + 0.5)) for n in size)
    low_res = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 5
    low_res[0, 0], low_res[0, 1, ::2] = 0.0, 1e4
    expected = their_upsampling(low_res, img_size, input_size, size)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for count in (1, 3, 6):
            found = upsample_logits(low_res.flatten(0, 1)[:count], img_size, input_size, size)
            assert torch.equal(found, expected.flatten(0, 1)[:count])
    finally:
        torch.set_num_threads(before)


def test_measures_have_the_values_of_the_original():
    logits = torch.randn(6, 3, 40, 50, generator=torch.Generator().manual_seed(1)).flatten(0, 1)
    # exactly at the cutoffs, signed zeros, constant, single pixels, huge
    logits[0], logits[1], logits[2], logits[3] = 0.0, 1.0, -1.0, -0.0
    logits[4], logits[5] = -9.0, 1e4
    logits[4, 3, 4] = 2.0
    logits[6] = -1e4
    square = torch.nn.functional.pad(logits, (0, 0, 0, 10))
    frame = Frame(50, (40, 50), (0, 0, 50, 40), (40, 50))
    kept, found, boxes, areas = measure_masks(square, frame, 0.0, 1.0, 0.0)
    assert kept.tolist() == list(range(18))
    theirs = amg.calculate_stability_score(logits, 0.0, 1.0)
    np.testing.assert_array_equal(found.numpy(), theirs.numpy())
    assert found.dtype == theirs.dtype and bool(found.isnan().any())
    masks = logits > 0
    assert torch.equal(areas, masks.sum(dim=(1, 2)))
    assert torch.equal(boxes, amg.batched_mask_to_box(masks))
    assert torch.equal(boxes_of_masks(masks), amg.batched_mask_to_box(masks))
    assert boxes_of_masks(masks)[4].tolist() == [4, 3, 4, 3]
    assert boxes_of_masks(masks)[6].tolist() == [0, 0, 0, 0]


def test_measuring_nothing():
    frame = Frame(64, (64, 48), (0, 0, 60, 80), (80, 60))
    kept, stability, boxes, areas = measure_masks(torch.zeros(0, 16, 16), frame, 0.0, 1.0, 0.95)
    assert kept.shape == stability.shape == areas.shape == (0,) and boxes.shape == (0, 4)
    assert kept.dtype == boxes.dtype == areas.dtype == torch.int64


@settings(max_examples=50, deadline=None)
@given(
    boxes=hnp.arrays(np.int64, (20, 4), elements=st.integers(0, 100)),
    crop=st.sampled_from([(0, 0, 200, 100), (10, 0, 120, 100), (90, 40, 200, 100)]),
)
def test_crop_edges(boxes, crop):
    boxes = torch.from_numpy(boxes)
    theirs = amg.is_box_near_crop_edge(boxes, list(crop), [0, 0, 200, 100])
    assert torch.equal(near_crop_edge(boxes, Frame(64, (32, 64), crop, (100, 200))), theirs)


def random_boxes(count, seed, side=60, grid=1):
    generator = np.random.default_rng(seed)
    corners = generator.integers(0, side // grid, (count, 2, 2)) * grid
    return torch.from_numpy(np.sort(corners, axis=1).reshape(count, 4)[:, [0, 1, 2, 3]])


def their_nms(boxes, scores, threshold):
    from torchvision.ops import batched_nms

    return batched_nms(boxes.float(), scores, torch.zeros(len(boxes)), threshold)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 40),
    seed=st.integers(0, 1000),
    levels=st.sampled_from([1, 3, 1000]),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 0.6, 0.7, 1.0]),
    grid=st.sampled_from([1, 10]),
)
def test_nms_equals_torchvision(count, seed, levels, threshold, grid):
    boxes = random_boxes(count, seed, grid=grid)
    scores = torch.randint(levels, (count,), generator=torch.Generator().manual_seed(seed)).float() / levels
    assert torch.equal(nms(boxes, scores, threshold), their_nms(boxes, scores, threshold))


@pytest.mark.parametrize("count", [1001, 5200])
def test_nms_of_many_boxes(count):
    boxes = random_boxes(count, 7, side=400)
    scores = torch.randperm(count, generator=torch.Generator().manual_seed(0)) / count
    assert torch.equal(nms(boxes, scores, 0.7), their_nms(boxes, scores, 0.7))
    # torchvision keeps the same set for tied scores, in an order of its own; ours is by index
    tied = (scores * 5).floor()
    kept = nms(boxes, tied, 0.7)
    assert torch.equal(kept.sort().values, their_nms(boxes, tied, 0.7).sort().values)
    assert kept.tolist() == sorted(kept.tolist(), key=lambda i: (-float(tied[i]), i))


def test_nms_of_ties_thresholds_and_lines():
    same = torch.tensor([[0, 0, 10, 10]] * 3)
    assert nms(same, torch.tensor([0.5, 0.5, 0.5]), 0.7).tolist() == [0]
    assert nms(same, torch.tensor([0.5, 0.9, 0.5]), 0.7).tolist() == [1]
    # IoU exactly 0.6, compared in double: 0.6000000238 > 0.6
    overlapping = torch.tensor([[0, 0, 8, 1], [2, 0, 10, 1]])
    assert nms(overlapping, torch.tensor([0.9, 0.8]), 0.6).tolist() == [0]
    # 0/0: boxes without area stay
    lines = torch.tensor([[3, 3, 3, 9]] * 2)
    assert nms(lines, torch.tensor([0.9, 0.8]), 0.0).tolist() == [0, 1]
    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.7).dtype == torch.int64


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    density=st.sampled_from([0.1, 0.4, 0.6, 0.9]),
    area=st.sampled_from([1, 2, 3, 5, 20, 100, 1000]),
    mode=st.sampled_from(["holes", "islands"]),
    margins=st.tuples(*[st.sampled_from([0, 0, 1, 2, 5, 30])] * 4),
)
def test_small_regions_equal_the_original(seed, shape, density, area, mode, margins):
    pytest.importorskip("cv2")
    mask = np.pad(np.random.default_rng(seed).random(shape) < density, (margins[:2], margins[2:]))
    theirs, their_change = amg.remove_small_regions(mask, area, mode)
    ours, change = remove_small_regions(mask, area, mode)
    assert change == their_change
    np.testing.assert_array_equal(ours, theirs)


def test_the_first_of_equal_largest_regions_is_kept():
    mask = np.zeros((2, 8), bool)
    mask[0, 7] = mask[1, 0] = True
    kept, changed = remove_small_regions(mask, 5, "islands")
    assert changed and kept.tolist() == [[False] * 8, [True] + [False] * 7]
