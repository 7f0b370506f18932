"""SamPredictor against the original's, with small random weights."""

import numpy as np
import pytest
import torch
from original import segment_anything, small_vit_sam

from pro2sam_fast.errors import ConfigError, ImageReadError
from pro2sam_fast.models.sam.build import to_segment_anything
from pro2sam_fast.predictor import ImageNotSetError, SamPredictor

CENTRE = {"point_coords": np.array([[40, 30]]), "point_labels": np.array([1])}
PROMPTS = {
    "point": CENTRE,
    "points": {"point_coords": np.array([[40, 30], [3.5, 60.2], [0, 0]]), "point_labels": np.array([1, 0, 1])},
    "box": {"box": np.array([10, 12, 60, 70])},
    "box of rank 2": {"box": np.array([[10.5, 12, 60, 70]])},
    "point and box": {**CENTRE, "box": np.array([10, 12, 60, 70])},
    "mask": {"mask_input": np.linspace(-5, 5, 32 * 32).reshape(1, 32, 32)},
    "everything": {
        **CENTRE,
        "box": np.array([10, 12, 60, 70]),
        "mask_input": np.linspace(-5, 5, 32 * 32).reshape(1, 32, 32),
        "multimask_output": False,
    },
    "single": {**CENTRE, "multimask_output": False},
    "point and mask": {**CENTRE, "mask_input": np.linspace(5, -5, 32 * 32).reshape(1, 32, 32)},
    "very many points": {"point_coords": np.arange(80).reshape(40, 2), "point_labels": np.arange(40) % 2},
    "nothing": {},
}


def photo(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def sam():
    return small_vit_sam()


@pytest.fixture(scope="module")
def predictors(sam):
    pair = SamPredictor(sam), segment_anything.SamPredictor(to_segment_anything(sam))
    for predictor in pair:
        predictor.set_image(photo(80, 120))
    return pair


def assert_near(ours, theirs):
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("return_logits", [False, True])
def test_predict(predictors, kind, return_logits):
    ours, theirs = (p.predict(**PROMPTS[kind], return_logits=return_logits) for p in predictors)
    assert [(type(a), a.dtype, a.shape) for a in ours] == [(type(b), b.dtype, b.shape) for b in theirs]
    assert_near(ours[1], theirs[1])
    assert_near(ours[2], theirs[2])
    if return_logits:
        assert_near(ours[0], theirs[0])
    else:
        assert (ours[0] != theirs[0]).mean() < 1e-3


@pytest.mark.parametrize("multimask_output", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_predict_torch(predictors, masked, multimask_output):
    prompts = torch.tensor([[[40.0, 30.0]], [[3.0, 9.0]]]), torch.ones(2, 1, dtype=torch.int)
    boxes = torch.tensor([[5.0, 6, 70, 50], [1, 2, 30, 40]])
    masks = torch.linspace(-5, 5, 2 * 32 * 32).reshape(2, 1, 32, 32) if masked else None
    ours, theirs = (p.predict_torch(*prompts, boxes, masks, multimask_output) for p in predictors)
    assert ours[0].shape == theirs[0].shape == (2, 1 + 2 * multimask_output, 80, 120) and ours[0].dtype == torch.bool
    assert_near(ours[1], theirs[1])
    assert_near(ours[2], theirs[2])


def test_embedding_and_state(sam, predictors):
    ours, theirs = predictors
    assert_near(ours.get_image_embedding(), theirs.get_image_embedding())
    assert ours.original_size == theirs.original_size == (80, 120)
    assert ours.input_size == theirs.input_size
    assert ours.device == theirs.device and ours.is_image_set
    assert ours.transform.target_length == theirs.transform.target_length


@pytest.mark.parametrize("size", [(80, 120), (333, 77), (128, 128), (5, 3)])
def test_transform(sam, size):
    from segment_anything.utils.transforms import ResizeLongestSide

    ours, theirs = SamPredictor(sam).transform, ResizeLongestSide(128)
    image = photo(*size)
    np.testing.assert_array_equal(ours.apply_image(image), theirs.apply_image(image))
    coords, boxes = np.random.default_rng(0).random((4, 2)) * 50, np.random.default_rng(1).random((3, 4)) * 50
    np.testing.assert_array_equal(ours.apply_coords(coords, size), theirs.apply_coords(coords, size))
    np.testing.assert_array_equal(ours.apply_boxes(boxes, size), theirs.apply_boxes(boxes, size))
    for name, value in (("apply_coords_torch", coords), ("apply_boxes_torch", boxes)):
        value = torch.from_numpy(value)
        assert torch.equal(getattr(ours, name)(value, size), getattr(theirs, name)(value, size))
    tensor = torch.rand(1, 3, *size)
    assert ours.apply_image_torch(tensor).shape[-2:] == ours.get_preprocess_shape(*size, 128)


def test_very_thin_photos_keep_a_pixel(sam):
    predictor = SamPredictor(sam)
    predictor.set_image(photo(1, 1000))
    assert predictor.input_size == (1, 128)
    assert predictor.predict(np.array([[500, 0]]), np.array([1]))[0].shape == (3, 1, 1000)


def test_bgr(sam):
    rgb, bgr = SamPredictor(sam), SamPredictor(sam)
    rgb.set_image(photo(80, 120))
    bgr.set_image(photo(80, 120)[..., ::-1], image_format="BGR")
    assert torch.equal(rgb.features, bgr.features)


def test_set_torch_image(sam, predictors):
    predictor = SamPredictor(sam)
    resized = torch.from_numpy(predictor.transform.apply_image(photo(80, 120))).permute(2, 0, 1)[None]
    predictor.set_torch_image(resized, (80, 120))
    assert torch.equal(predictor.features, predictors[0].features)
    assert predictor.original_size == (80, 120)
    with pytest.raises(ConfigError, match=r"\(B, 3, h, w\) with long side 128"):
        predictor.set_torch_image(resized[..., :50, :50], (80, 120))


def test_several_photos(sam):
    photos = [photo(80, 120), photo(33, 40, 1), photo(90, 20, 2)]
    many, single = SamPredictor(sam), SamPredictor(sam)
    many.set_images(photos)
    assert many.features.shape[0] == 3
    for i, image in enumerate(photos):
        single.set_image(image)
        assert torch.equal(many.get_image_embedding(i), single.get_image_embedding())
        prompt = {"point_coords": np.array([[5, 6]]), "point_labels": np.array([1])}
        for a, b in zip(many.predict(**prompt, image_index=i), single.predict(**prompt), strict=True):
            np.testing.assert_array_equal(a, b)
    for index in (3, -1):
        with pytest.raises(ConfigError, match="image_index must be 0 to 2"):
            many.predict(image_index=index)


def test_no_image(sam):
    predictor = SamPredictor(sam)
    assert not predictor.is_image_set
    calls = [
        lambda: predictor.predict(**CENTRE),
        lambda: predictor.predict_torch(None, None),
        predictor.get_image_embedding,
        lambda: predictor.original_size,
    ]
    for call in calls:
        with pytest.raises(ImageNotSetError, match="set_image"):
            call()
    predictor.set_image(photo(9, 9))
    predictor.reset_image()
    with pytest.raises(RuntimeError):
        predictor.predict(**CENTRE)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ({"point_coords": np.zeros((2, 2))}, "point_labels"),
        ({"point_labels": np.zeros(2)}, "point_coords"),
        ({"point_coords": np.zeros((2, 3)), "point_labels": np.zeros(2)}, "point_coords"),
        ({"point_coords": np.zeros((2, 2)), "point_labels": np.zeros(3)}, "point_labels"),
        ({"point_coords": np.full((1, 2), np.nan), "point_labels": np.zeros(1)}, "point_coords"),
        ({"point_coords": np.array([["a", "b"]]), "point_labels": np.zeros(1)}, "point_coords"),
        ({"box": np.zeros(3)}, "box"),
        ({"box": np.zeros((2, 4))}, "box"),
        ({"box": np.array([0, 0, np.inf, 1])}, "box"),
        ({"mask_input": np.zeros((32, 32))}, "mask_input"),
        ({"mask_input": np.zeros((1, 64, 64))}, "mask_input"),
    ],
)
def test_bad_prompts(predictors, prompt, name):
    with pytest.raises(ConfigError, match=name):
        predictors[0].predict(**prompt)


def test_bad_images(sam):
    predictor = SamPredictor(sam)
    with pytest.raises(ConfigError, match="image_format"):
        predictor.set_image(photo(4, 5), image_format="HSV")
    for image in (photo(4, 5)[..., 0], photo(4, 5) / 255, "photo.jpg"):
        with pytest.raises(ImageReadError, match="image must be an RGB array"):
            predictor.set_image(image)
    with pytest.raises(ImageReadError, match=r"images\[1\]"):
        predictor.set_images([photo(4, 5), photo(4, 5)[0]])
    for images in ([], photo(4, 5)):
        with pytest.raises(ConfigError, match="images must be a list"):
            predictor.set_images(images)
