"""Readers of annotated photos on tiny data sets written here."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from pro2sam_fast.data.cub import load_cub
from pro2sam_fast.data.segments import bsds, coco_panoptic, foreground
from pro2sam_fast.data.tables import image_size, open_image
from pro2sam_fast.errors import DataError

FILES = {
    "images.txt": "1 001.A/a.jpg\n2 002.B/b.jpg\n",
    "image_class_labels.txt": "1 1\n2 2\n",
    "train_test_split.txt": "1 1\n2 0\n",
    "bounding_boxes.txt": "1 60.0 27.0 325.0 304.0\n2 1.0 2.0 3.0 4.0\n",
    "classes.txt": "1 001.A\n2 002.B\n",
}


@pytest.fixture
def cub(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    for name in ("001.A/a.jpg", "002.B/b.jpg"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path)
    return tmp_path


def test_cub(cub):
    photos, names = load_cub(cub)
    assert names == ["001.A", "002.B"]
    assert [(p.id, p.label, p.train) for p in photos] == [("1", 0, True), ("2", 1, False)]
    assert photos[0].box == (60, 27, 385, 331)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("bounding_boxes.txt", "1 60 27 325 304\n2 1 2 3\n", "bounding_boxes.txt, line 2: expected 5 columns"),
        ("bounding_boxes.txt", "1 60 27 325 304\n", "images.txt, line 2: image 2 is not in bounding_boxes.txt"),
        ("bounding_boxes.txt", "1 a 27 325 304\n2 1 2 3 4\n", "bounding_boxes.txt, line 1: could not convert"),
        ("images.txt", "1 001.A/a.jpg\n2 002.B/c.jpg\n", "1 of 2 photos are missing: 002.B/c.jpg"),
    ],
)
def test_malformed_cub_files_are_named(cub, name, text, message):
    (cub / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load_cub(cub)


def test_missing_cub_folder(tmp_path):
    with pytest.raises(DataError, match="CUB_200_2011"):
        load_cub(tmp_path / "nowhere")


def test_coco_panoptic(tmp_path):
    ids = np.zeros((6, 8), np.int64)
    ids[:, :4] = 70000  # a thing, the larger one
    ids[:2, 4:] = 5  # stuff
    ids[4:, 4:] = 300  # a crowd: no single object
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    for folder in ("annotations/panoptic_val2017", "images/val2017"):
        (tmp_path / folder).mkdir(parents=True)
    Image.fromarray(rgb).save(tmp_path / "annotations/panoptic_val2017/1.png")
    Image.new("RGB", (8, 6)).save(tmp_path / "images/val2017/1.jpg")
    segments = [
        {"id": 70000, "category_id": 1, "iscrowd": 0},
        {"id": 5, "category_id": 2, "iscrowd": 0},
        {"id": 300, "category_id": 1, "iscrowd": 1},
    ]
    index = {
        "categories": [{"id": 1, "isthing": 1}, {"id": 2, "isthing": 0}],
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": segments}],
    }
    path = tmp_path / "annotations/panoptic_val2017.json"
    path.write_text(json.dumps(index))
    (photo,) = coco_panoptic(tmp_path, "val")
    assert photo.image.shape == (6, 8, 3) and photo.maps.shape == (1, 6, 8)
    (thing,) = photo.things
    assert ((photo.maps[0] == thing) == (ids == 70000)).all()
    assert (photo.maps[0][(ids == 0) | (ids == 300)] == 0).all()
    assert len(np.unique(photo.maps[0][ids == 5])) == 1 and photo.maps[0][0, 5] not in (0, thing)
    path.write_text("{")
    with pytest.raises(DataError, match=r"panoptic_val2017\.json"):
        list(coco_panoptic(tmp_path, "val"))


def test_bsds_gives_every_annotator(tmp_path):
    for folder in ("images", "segments"):
        (tmp_path / "train" / folder).mkdir(parents=True)
    Image.new("RGB", (8, 6)).save(tmp_path / "train/images/7.jpg")
    with pytest.raises(DataError, match="7_<k>"):
        list(bsds(tmp_path, "train"))
    one, two = np.zeros((6, 8), np.uint8), np.ones((6, 8), np.uint8)
    one[:, 4:] = 1
    two[3:] = 2
    for k, labels in enumerate((one, two)):
        Image.fromarray(labels).save(tmp_path / f"train/segments/7_{k}.png")
    (photo,) = bsds(tmp_path, "train")
    assert photo.maps.shape == (2, 6, 8) and photo.maps.min() == 1
    for labels, found in zip((one, two), photo.maps):
        assert len(np.unique(found)) == 2 and ((found == found[0, 0]) == (labels == labels[0, 0])).all()


def test_foreground_pairs_masks_with_photos(tmp_path):
    (tmp_path / "photos/a").mkdir(parents=True)
    (tmp_path / "masks/a").mkdir(parents=True)
    alpha = np.zeros((6, 8), np.uint8)
    alpha[1:4, 2:6] = 255
    alpha[4, 2:6] = 100  # neither sure foreground nor sure background
    Image.fromarray(alpha).save(tmp_path / "masks/a/x.png")
    with pytest.raises(DataError, match=r"x\.png"):
        list(foreground(tmp_path / "photos", tmp_path / "masks"))
    Image.new("RGB", (8, 6)).save(tmp_path / "photos/a/x.JPEG")
    (photo,) = foreground(tmp_path / "photos", tmp_path / "masks")
    assert ((photo.maps[0] == 1) == (alpha == 255)).all()
    assert ((photo.maps[0] == 2) == (alpha == 0)).all()


def test_a_photo_with_too_many_pixels_is_named(tmp_path, monkeypatch):
    Image.new("RGB", (8, 6)).save(tmp_path / "x.png")
    assert image_size(tmp_path / "x.png") == (8, 6)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(DataError, match=r"x\.png: not a readable image .*48 pixels"):
        open_image(tmp_path / "x.png")
