"""Results: records, COCO annotations, pictures, saving."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as coco

from pro2sam_fast.draw import draw_gallery, draw_localization
from pro2sam_fast.errors import ConfigError, ImageReadError, Pro2SamError
from pro2sam_fast.results import RECORD_KEYS, Localization, decode_rle, encode_rle

KEYS = ["path", "height", "width", "box", "score", "label", "label_name", "label_score"]
KEYS += ["source", "mask", "speed", "error"]
LONG = "an uncommonly long name of a class that won't fit anywhere 100%\n\t(really)"


def photo(height=60, width=80):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def result(path=None, height=60, width=80, **changes):
    mask = np.zeros((height, width), bool)
    mask[10:30, 20:50] = True
    values = {
        "orig_shape": (height, width),
        "box": (20.0, 10.0, 50.0, 30.0),
        "mask": mask,
        "score": 0.75,
        "label": 281,
        "label_name": "tabby cat",
        "label_score": 0.5,
        "source": "sam",
        "speed": {"read": 1.23456, "total": 2.0},
    }
    return Localization(None if path is None else str(path), **{**values, **changes})


def test_record():
    record = json.loads(json.dumps(result("a.jpg").to_dict()))
    assert list(record) == KEYS == list(RECORD_KEYS)
    assert (record["height"], record["width"]) == (60, 80)
    assert record["box"] == [20.0, 10.0, 50.0, 30.0]
    assert record["speed"]["read"] == 1.235
    assert record["mask"]["size"] == [60, 80] and isinstance(record["mask"]["counts"], str)
    assert coco.area({**record["mask"], "counts": record["mask"]["counts"].encode()}) == 20 * 30
    assert result("a.jpg").to_dict(mask=False)["mask"] is None


def test_record_round_trip():
    before = result("dir/a.jpg")
    after = Localization.from_dict(json.loads(json.dumps(before.to_dict())))
    np.testing.assert_array_equal(after.mask, before.mask)
    assert after.box == before.box and after.name == "a.jpg"
    assert after.to_dict() == {**before.to_dict(), "speed": after.speed}
    failed = Localization("b.jpg", error="cannot read 'b.jpg'")
    assert Localization.from_dict(failed.to_dict()).to_dict() == failed.to_dict()
    assert {key for key, value in failed.to_dict().items() if value is not None} == {"path", "speed", "error"}


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)))
@settings(max_examples=50, deadline=None)
def test_rle_round_trip(mask):
    np.testing.assert_array_equal(decode_rle(encode_rle(mask)), mask)


def test_coco_annotation():
    annotation = result().to_coco(7, 9)
    assert annotation["bbox"] == [20.0, 10.0, 30.0, 20.0] and annotation["area"] == 600
    assert (annotation["image_id"], annotation["id"], annotation["category_id"]) == (7, 9, 282)
    assert annotation["iscrowd"] == 0 and annotation["score"] == 0.75
    assert result(label=None).to_coco()["category_id"] == 1
    assert result().to_coco(category_id=3)["category_id"] == 3
    with pytest.raises(Pro2SamError, match="no result"):
        Localization("b.jpg", error="cannot read").to_coco()


def test_caption():
    assert result().caption() == "tabby cat 50%"
    assert result(label_name=None).caption() == "class 281 50%"
    assert result(label=None).caption() == "object 75%"


def test_plot_from_kept_read_and_given_photo(tmp_path):
    Image.fromarray(photo()).save(tmp_path / "a.png")
    kept, read = result(image=photo()).plot(), result(tmp_path / "a.png").plot()
    given_photo = result().plot(photo())
    assert kept.size == (80, 60) and kept.mode == "RGB"
    for other in (read, given_photo, result().plot(Image.fromarray(photo()))):
        np.testing.assert_array_equal(np.asarray(other), np.asarray(kept))
    with pytest.raises(ConfigError, match="doesn't hold its photo"):
        result().plot()
    with pytest.raises(ConfigError, match="shape"):
        result().plot(photo(5, 5))
    with pytest.raises(ImageReadError):
        result(tmp_path / "gone.png").plot()


def test_plot_dims_the_background_and_leaves_the_object_alone():
    white = np.full((400, 400, 3), 200, np.uint8)
    mask = np.zeros((400, 400), bool)
    mask[100:300, 100:300] = True
    picture = np.asarray(draw_localization(white, mask, (100, 100, 300, 300), ""))
    assert (picture[150:250, 150:250] == 200).all()
    assert picture[:80].max() < 140
    assert (picture[200, 98:104] == np.array([255, 196, 0])).all(axis=1).any()
    np.testing.assert_array_equal(white, 200)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (3, 2), (39, 500), (64, 64), (600, 900)])
@pytest.mark.parametrize("caption", ["", "x", LONG])
def test_pictures_of_any_size(shape, caption):
    for mask in (np.zeros(shape, bool), np.ones(shape, bool)):
        picture = draw_localization(photo(*shape), mask, (0, 0, shape[1], shape[0]), caption)
        assert picture.size == shape[::-1]
    draw_localization(photo(*shape), None, (0.2, 0.4, 0.6, 0.7), caption)
    draw_localization(photo(*shape))


def test_gallery_picture():
    patches = [(0, 0, np.ones((60, 80), bool)), (10, 5, np.ones((20, 20), bool)), (12, 7, np.ones((4, 4), bool))]
    picture = np.asarray(draw_gallery(np.zeros((60, 80, 3), np.uint8), patches))
    colors = {tuple(picture[y, x]) for y, x in ((40, 60), (20, 25), (9, 14))}
    assert len(colors) == 3
    grey = np.asarray(Image.fromarray(photo()).convert("L").convert("RGB"))
    np.testing.assert_array_equal(np.asarray(draw_gallery(photo(), [])), grey)
    assert draw_gallery(photo(1, 1), [(0, 0, np.ones((1, 1), bool))]).size == (1, 1)


def test_save(tmp_path):
    path = tmp_path / "in" / "a.png"
    path.parent.mkdir()
    Image.fromarray(photo()).save(path)
    found = result(path, name="a.png")
    written = found.save(tmp_path / "out")
    assert [one.name for one in written] == ["a.jpg", "a-mask.png", "a.json"]
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["a-mask.png", "a.jpg", "a.json"]
    assert json.loads((tmp_path / "out" / "a.json").read_text()) == found.to_dict()
    with Image.open(tmp_path / "out" / "a-mask.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), found.mask * 255)
    found.save(tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), np.asarray(found.plot()))
    found.save(tmp_path / "one.json")
    found.name = "../sub/b.png"  # a place below a folder source; never above the target
    assert found.save(tmp_path / "out")[0] == tmp_path / "out" / "sub" / "b.jpg"
    with pytest.raises(Pro2SamError, match="no result"):
        Localization("b.jpg", error="cannot read").save(tmp_path / "out")


def test_save_never_writes_over_the_photo(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(photo()).save(path)
    before = path.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path)
    for target in (path, tmp_path, tmp_path / "link"):
        with pytest.raises(ConfigError, match="refusing"):
            result(path, name="a.jpg").save(target)
    assert path.read_bytes() == before
    Image.fromarray(photo()).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="refusing"):  # its picture would be a.jpg
        result(tmp_path / "a.png", name="a.png").save(tmp_path)
    assert path.read_bytes() == before


def test_thin_pictures_that_jpeg_cannot_hold(tmp_path):
    mask = np.ones((1, 70000), bool)
    found = result(None, 1, 70000, box=(0, 0, 1, 1), mask=mask, image=photo(1, 70000), name="t.png")
    assert found.save(tmp_path)[0].name == "t.png"
