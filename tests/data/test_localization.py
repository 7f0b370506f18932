"""Data sets of labelled photos, on tiny ones written here."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from pro2sam_fast.data.localization import (
    CUB200,
    ILSVRC,
    FlatFolder,
    ImageFolder,
    WSOLMetadata,
    coco_labels,
    kind_of,
    open_dataset,
    voc_labels,
)
from pro2sam_fast.errors import ConfigError, DataError

XML = "<annotation><size><width>9</width><height>8</height></size>{}</annotation>"
OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>1</ymin><xmax>7</xmax><ymax>6</ymax></bndbox></object>"


def photo(path, size=(9, 8), colour=(10, 200, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    for name in ("cat/a.jpg", "cat/b.png", "dog/sub/c.jpg", "dog/d.jpg"):
        photo(tmp_path / name)
    return tmp_path


@pytest.fixture
def imagenet(tmp_path):
    for name in ("train/n02/x.JPEG", "train/n01/y.JPEG", "val/v1.JPEG", "val/n01/v2.JPEG"):
        photo(tmp_path / name)
    boxes = tmp_path / "xml"
    boxes.mkdir()
    (boxes / "v1.xml").write_text(XML.format(OBJECT.format("n02", 0) + OBJECT.format("n02", 3)))
    (boxes / "v2.xml").write_text(XML.format(OBJECT.format("n01", 2)))
    return tmp_path


def test_items(folder):
    (folder / "cat" / "._a.jpg").write_bytes(b"what macOS knows of a.jpg")
    data = ImageFolder(folder, transform=np.asarray)
    assert data.class_names == ["cat", "dog"] and len(data) == 4
    image, label, index = data[3]
    assert image.shape == (8, 9, 3) and label == 1 and data.photos[index].id == "dog/sub/c.jpg"
    assert not data.has_boxes


@pytest.mark.parametrize("header", ["", "path,x0,y0,x1,y1\n"])
def test_boxes_from_a_csv(folder, header):
    table = folder / "boxes.csv"
    table.write_text(header + "cat/a.jpg,1,2,3,4\ncat/a.jpg,0,0,5,5\ndog/d.jpg,1,1,2,2\n")
    data = ImageFolder(folder, table)
    assert data.photos[0].boxes == ((1, 2, 3, 4), (0, 0, 5, 5)) and data.photos[1].boxes == ()


def test_boxes_from_coco(folder):
    table = folder / "boxes.json"
    table.write_text(
        json.dumps(
            {
                "images": [{"id": 7, "file_name": "cat/b.png"}],
                "annotations": [{"image_id": 7, "bbox": [1, 2, 3, 4], "category_id": 1}],
            }
        )
    )
    assert ImageFolder(folder, table).photos[1].boxes == ((1, 2, 4, 6),)


def test_boxes_from_voc(folder):
    boxes = folder.parent / "boxes"
    boxes.mkdir()
    (boxes / "d.xml").write_text(XML.format(OBJECT.format("dog", 1)))
    assert ImageFolder(folder, boxes).photos[2].boxes == ((1, 1, 7, 6),)
    photo(folder / "cat" / "d.jpg")
    with pytest.raises(DataError, match="d.xml: 2 photos have this name"):
        ImageFolder(folder, boxes)
    for i, name in enumerate(("dog", "cat"), 1):
        (boxes / name).mkdir()
        (boxes / name / "d.xml").write_text(XML.format(OBJECT.format(name, i)))
    (boxes / "d.xml").unlink()
    assert {p.id: p.boxes for p in ImageFolder(folder, boxes).photos if p.boxes} == {
        "cat/d.jpg": ((2, 1, 7, 6),),
        "dog/d.jpg": ((1, 1, 7, 6),),
    }
    (folder / "cat" / "d.jpg").unlink()
    with pytest.raises(DataError, match="photo 'dog/d.jpg' has another annotation"):
        ImageFolder(folder, boxes)
    (boxes / "cat" / "d.xml").unlink()
    (boxes / "dog" / "d.xml").unlink()
    (boxes / "d.xml").write_text(XML.format(OBJECT.format("dog", "nan")))
    with pytest.raises(DataError, match="d.xml, line 1: object 'dog' has no complete bndbox"):
        ImageFolder(folder, boxes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat/a.jpg,1,2,3\n", "boxes.csv, line 1: expected path,x0,y0,x1,y1"),
        ("cat/a.jpg,1,2,3,4\ncat/z.jpg,1,2,3,4\n", "line 2: 'cat/z.jpg' is no photo"),
        ("cat/a.jpg,1,2,3,4\ncat/b.png,a,2,3,4\n", "line 2: could not convert"),
        ("cat/a.jpg,1,2,inf,4\n", "line 1: expected finite numbers, found 1 2 inf 4"),
        ("cat/a.jpg,1,2,3,4\n\ncat/b.png,10,20,5,6\n", "line 3: the box must be x0,y0,x1,y1 with x0 < x1"),
    ],
)
def test_malformed_boxes_name_the_line(folder, text, message):
    (folder / "boxes.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        ImageFolder(folder, folder / "boxes.csv")


def test_classes_of_another_split(folder):
    assert ImageFolder(folder, class_names=["ant", "cat", "dog"]).photos[0].label == 1
    with pytest.raises(DataError, match="'cat' is none of the 1 classes"):
        ImageFolder(folder, class_names=["dog"])


def test_few_shot(folder):
    a, b = (ImageFolder(folder, images_per_class=1, seed=s) for s in (0, 0))
    assert [p.label for p in a.photos] == [0, 1] and a.photos == b.photos
    assert {tuple(p.id for p in ImageFolder(folder, images_per_class=1, seed=s).photos) for s in range(20)} > {
        tuple(p.id for p in a.photos)
    }
    with pytest.raises(DataError, match="class 0 has 2 photos, images_per_class wants 3"):
        ImageFolder(folder, images_per_class=3)
    with pytest.raises(ConfigError, match="images_per_class"):
        ImageFolder(folder, images_per_class=0)


def test_imagenet(imagenet):
    train = ILSVRC(imagenet)
    assert train.class_names == ["n01", "n02"] and [p.label for p in train.photos] == [0, 1]
    val = ILSVRC(imagenet, "val", imagenet / "xml")
    assert val.single_precision and not ImageFolder(imagenet / "train").single_precision
    assert [(p.id, p.label, p.boxes) for p in val.photos] == [
        ("v1", 1, ((0, 1, 7, 6), (3, 1, 7, 6))),
        ("v2", 0, ((2, 1, 7, 6),)),
    ]


def test_imagenet_boxes_as_csv_and_list(imagenet):
    table = imagenet / "boxes.csv"
    table.write_text("ImageId,PredictionString\nv1,n02 0 1 7 6 n02 3 1 7 6 \nv2,n01 2 1 7 6 \n")
    (imagenet / "list.txt").write_text("n01/v2.JPEG;0\nn02/v1.JPEG;1\n")
    plain, listed = ILSVRC(imagenet, "val", table), ILSVRC(imagenet, "val", table, imagenet / "list.txt")
    assert [p.id for p in listed.photos] == ["v2", "v1"]
    assert sorted(listed.photos, key=lambda p: p.id) == plain.photos == ILSVRC(imagenet, "val", imagenet / "xml").photos
    text = imagenet / "val_gt.txt"
    for content in (
        "n02\\\\v1.JPEG 9 8 ; 0 1 7 6 3 1 7 6\nn01\\\\v2.JPEG 9 8 ; 2 1 7 6\n",
        "n02/v1.JPEG 1 0 1 7 6 3 1 7 6\nn01/v2.JPEG 0 2 1 7 6\n",
    ):
        text.write_text(content)
        assert ILSVRC(imagenet, "val", text).photos == plain.photos
    text.write_text("n02/v1.JPEG 1 0 1 7 6 3 1 7\n")
    with pytest.raises(DataError, match="val_gt.txt, line 1: expected four numbers a box"):
        ILSVRC(imagenet, "val", text)
    (imagenet / "list.txt").write_text("n01/v2.JPEG;0\nn02/v1.JPEG;2\n")
    with pytest.raises(DataError, match="list.txt, line 2: class 2 isn't one of 0 to 1"):
        ILSVRC(imagenet, "val", table, imagenet / "list.txt")
    table.write_text("v1,n02 0 1 7\n")
    with pytest.raises(DataError, match="boxes.csv, line 1: expected ImageId"):
        ILSVRC(imagenet, "val", table)


@pytest.mark.parametrize("table", ["map_clsloc.txt", "meta.mat"])
def test_imagenet_labels_of_the_devkit(tmp_path, table):
    # the devkit's own numbers are not the order of the WordNet ids, and groups of classes have numbers, too
    for number in (1, 2):
        photo(tmp_path / f"val/ILSVRC2012_val_{number:08d}.JPEG")
    truth = tmp_path / "devkit" / "ILSVRC2012_validation_ground_truth.txt"
    truth.parent.mkdir()
    truth.write_text("1\n2\n")
    with pytest.raises(DataError, match="neither meta.mat nor map_clsloc.txt"):
        open_dataset("ilsvrc", tmp_path, False, val_list=truth)
    if table == "meta.mat":
        fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
        synsets = np.array([(1, "n02", "b", 0), (2, "n01", "a", 0), (1001, "n03", "group", 2)], dtype=fields)
        savemat(truth.parent / table, {"synsets": synsets})
    else:
        (truth.parent / table).write_text("n02 1 b\nn01 2 a\n")
    data = open_dataset("ilsvrc", tmp_path, False, val_list=truth)
    assert data.class_names == ["n01", "n02"] and [p.label for p in data.photos] == [1, 0]
    truth.write_text("1\n1001\n")
    with pytest.raises(DataError, match="ground_truth.txt, line 2: class 1001"):
        open_dataset("ilsvrc", tmp_path, False, val_list=truth)
    (truth.parent / table).write_bytes(b"no table")
    with pytest.raises(DataError, match=table):
        open_dataset("ilsvrc", tmp_path, False, val_list=truth)


def test_missing_photos_are_listed(imagenet):
    (imagenet / "val" / "v1.JPEG").unlink()
    with pytest.raises(DataError, match="1 of 2 photos are missing: v1.JPEG"):
        ILSVRC(imagenet, "val", imagenet / "xml")
    with pytest.raises(ConfigError, match="needs boxes"):
        ILSVRC(imagenet, "val")


def test_cub_splits(tmp_path):
    files = {
        "images.txt": "1 001.A/a.jpg\n2 002.B/b.jpg\n",
        "image_class_labels.txt": "1 1\n2 2\n",
        "train_test_split.txt": "1 1\n2 0\n",
        "bounding_boxes.txt": "1 60.0 27.0 325.0 304.0\n2 1.0 2.0 3.0 4.0\n",
        "classes.txt": "1 001.A\n2 002.B\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for name in ("001.A/a.jpg", "002.B/b.jpg"):
        photo(tmp_path / "images" / name)
    assert [p.boxes for p in CUB200(tmp_path).photos] == [((60, 27, 385, 331),)]
    assert [p.id for p in CUB200(tmp_path, "test").photos] == ["2"]
    (tmp_path / "image_class_labels.txt").write_text("1 1\n2 3\n")
    with pytest.raises(DataError, match="image_class_labels.txt, line 2: class 3 isn't one of 1 to 2"):
        CUB200(tmp_path)
    with pytest.raises(ConfigError, match="split must be one of train, test"):
        CUB200(tmp_path, "val")


def test_cub_as_text_lists(tmp_path):
    for name in ("train/a/1.jpg", "train/b/2.jpg", "test/b/3.jpg"):
        photo(tmp_path / name)
    (tmp_path / "test_list.txt").write_text("b/3.jpg;1\n")
    (tmp_path / "test_gt.txt").write_text("1 2 5 6 8 9\n")
    assert [p.label for p in CUB200(tmp_path).photos] == [0, 1]
    (test,) = CUB200(tmp_path, "test").photos
    assert (test.label, test.boxes) == (1, ((1, 2, 5, 6),))
    (tmp_path / "test_list.txt").write_text("b/3.jpg;2\n")
    with pytest.raises(DataError, match="test_list.txt, line 1: class 2"):
        CUB200(tmp_path, "test")
    (tmp_path / "test_list.txt").write_text("b/3.jpg;1\n")
    (tmp_path / "test_gt.txt").write_text("1 2 5 6 8 9\n1 2 5 6 8 9\n")
    with pytest.raises(DataError, match="holds 2 boxes, test_list.txt 1 photos"):
        CUB200(tmp_path, "test")


@pytest.fixture
def metadata(tmp_path):
    photo(tmp_path / "val/1.jpg")
    photo(tmp_path / "val/2.jpg")
    for name in ("m1.png", "m2.png", "i.png"):
        photo(tmp_path / name)
    (tmp_path / "image_ids.txt").write_text("val/1.jpg\nval/2.jpg")
    (tmp_path / "class_labels.txt").write_text("val/1.jpg,1\nval/2.jpg,0")
    return tmp_path


def test_metadata_with_boxes(metadata):
    (metadata / "localization.txt").write_text("val/1.jpg,1,2,3,4\nval/1.jpg,5,6,7,8\nval/2.jpg,0,0,1,1")
    data = WSOLMetadata(metadata, metadata)
    assert data.photos[0].boxes == ((1, 2, 3, 4), (5, 6, 7, 8)) and data.has_boxes
    assert [p.label for p in data.photos] == [1, 0] and data.class_names == ["0", "1"]


def test_metadata_with_masks(metadata):
    (metadata / "localization.txt").write_text("val/1.jpg,m1.png,i.png\nval/1.jpg,m2.png,\nval/2.jpg,m1.png,")
    first, second = WSOLMetadata(metadata, metadata).photos
    assert [m.name for m in first.masks] == ["m1.png", "m2.png"] and first.ignore.name == "i.png"
    assert second.ignore is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("localization.txt", "val/1.jpg,1,2,3", "line 1: expected a box or mask files, found 4 columns"),
        ("class_labels.txt", "val/1.jpg,1", "image_ids.txt, line 2: 'val/2.jpg' is not in class_labels.txt"),
        ("class_labels.txt", "val/1.jpg,x\n", "class_labels.txt, line 1: invalid literal"),
        ("image_ids.txt", "val/1.jpg\nval/1.jpg", "'val/1.jpg' is listed twice"),
    ],
)
def test_malformed_metadata(metadata, name, text, message):
    (metadata / name).write_text(text)
    with pytest.raises(DataError, match=message):
        WSOLMetadata(metadata, metadata)


def test_labels_of_voc(tmp_path):
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\nb\n")
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations/a.xml").write_text(XML.format(OBJECT.format("dog", 1) + OBJECT.format("cat", 2)))
    (tmp_path / "Annotations/b.xml").write_text(XML.format(OBJECT.format("cat", 3)))
    for name in "ab":
        photo(tmp_path / f"JPEGImages/{name}.jpg")
    photos, names = voc_labels(tmp_path, "train")
    assert names == ["cat", "dog"] and [p.labels for p in photos] == [(1, 0), (0,)]
    assert kind_of(tmp_path) == "voc"
    (tmp_path / "ImageSets/Main/val.txt").write_text("b\n")
    data, val = (open_dataset("voc", tmp_path, train, class_names=None if train else names) for train in (True, False))
    assert data.photos == photos and [p.label for p in val.photos] == [0] and val.class_names == names
    with pytest.raises(DataError, match="b.xml: the class 'cat' of photo b is none of the 1 classes"):
        open_dataset("voc", tmp_path, False, class_names=["dog"])
    (tmp_path / "Annotations/b.xml").write_text("<annotation>\n<object>\n<name>cat</name>\n</object></annotation>")
    with pytest.raises(DataError, match="b.xml, line 2: object 'cat' has no complete bndbox"):
        voc_labels(tmp_path, "train")
    (tmp_path / "Annotations/b.xml").write_text("<annotation>")
    with pytest.raises(DataError, match="b.xml: not a readable annotation"):
        voc_labels(tmp_path, "train")


def test_labels_of_coco(tmp_path):
    photo(tmp_path / "1.jpg")
    path = tmp_path / "instances.json"
    path.write_text(
        json.dumps(
            {
                "categories": [{"id": 9, "name": "zebra"}, {"id": 2, "name": "car"}],
                "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
                "annotations": [
                    {"image_id": 1, "bbox": [1, 2, 3, 4], "category_id": 9},
                    {"image_id": 1, "bbox": [0, 0, 1, 1], "category_id": 2},
                    {"image_id": 1, "bbox": [0, 0, 2, 2], "category_id": 9},
                ],
            }
        )
    )
    photos, names = coco_labels(tmp_path, path)
    assert names == ["car", "zebra"] and [p.labels for p in photos] == [(1, 0)] and len(photos[0].boxes) == 3
    content = json.loads(path.read_text())
    content["annotations"][1]["category_id"] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"annotation 1: ValueError\('unknown category 3"):
        coco_labels(tmp_path, path)
    for place, number, key, value in (
        ("images", 0, "file_name", 5),
        ("categories", 0, "name", None),
        ("annotations", 2, "bbox", ["0", "0", "2", "2"]),
        ("annotations", 2, "bbox", [0, 0, float("nan"), 2]),
        ("annotations", 2, "bbox", [0, 0, 10**400, 2]),
    ):
        wrong = json.loads(json.dumps(content))
        wrong["annotations"][1]["category_id"] = 2
        wrong[place][number][key] = value
        path.write_text(json.dumps(wrong))
        with pytest.raises(DataError, match=f"annotation {number}:" if place == "annotations" else f"{place}:"):
            coco_labels(tmp_path, path)
    path.write_text("[]")
    with pytest.raises(DataError, match=r"instances.json: not a COCO annotation file: the top level must be an object"):
        coco_labels(tmp_path, path)


def test_photos_by_wordnet_id(tmp_path):
    for name in ("n02_x", "n00000002_great_white_shark", "n00000001_tench", "n00000003_18", "n00000001_tench_2"):
        photo(tmp_path / f"{name}.JPEG")
    with pytest.raises(DataError, match=r"1 of 5 photos don't begin with a WordNet id .* the first is n02_x.JPEG"):
        FlatFolder(tmp_path)
    (tmp_path / "n02_x.JPEG").unlink()
    data = FlatFolder(tmp_path)
    assert data.class_names == ["n00000001_tench", "n00000002_great_white_shark", "n00000003"]
    assert [p.label for p in data.photos] == [0, 0, 1, 2] and data.photos[0].id == "n00000001_tench.JPEG"
    assert len(FlatFolder(tmp_path, images_per_class=1)) == 3
    other = FlatFolder(tmp_path, class_names=["n00000000", "n00000003", "n00000002", "n00000001"])
    assert [p.label for p in other.photos] == [3, 3, 2, 1]
    with pytest.raises(DataError, match="n00000001_tench is of none of the 1 classes"):
        FlatFolder(tmp_path, class_names=["n00000002"])
    (tmp_path / "boxes.csv").write_text("n00000003_18.JPEG,1,2,3,4\n")
    assert open_dataset("flat", tmp_path, False, boxes=tmp_path / "boxes.csv").photos[3].boxes == ((1, 2, 3, 4),)


def test_kind_by_layout(folder, imagenet):
    assert kind_of(folder / "cat") == "folder"
    photo(folder / "cat" / "n00000001_tench.JPEG")
    assert kind_of(folder / "cat") == "flat"
    assert kind_of(folder) == "folder"
    (folder / "train" / "n00000001").mkdir()
    assert kind_of(folder) == "ilsvrc"
    (folder / "images.txt").touch()
    assert kind_of(folder) == "cub"
    with pytest.raises(DataError, match="can't be listed"):
        kind_of(folder / "none")


def test_coco_in_its_layout(tmp_path):
    for name in ("images/train2017/1.jpg", "images/train2017/2.jpg", "images/val2017/3.jpg"):
        photo(tmp_path / name)
    categories = [{"id": 1, "name": "car", "isthing": 1}, {"id": 7, "name": "sky", "isthing": 0}]
    (tmp_path / "annotations").mkdir()
    for split, numbers in (("train", (1, 2)), ("val", (3,))):
        images = [{"id": n, "file_name": f"{n}.jpg"} for n in numbers]
        segments = [{"category_id": 7, "bbox": [0, 0, 9, 8]}, {"category_id": 1, "bbox": [1, 1, 2, 2]}]
        things = [{"image_id": n, "segments_info": segments[: 1 if n == 2 else 2]} for n in numbers]
        content = {"categories": categories, "images": images, "annotations": things}
        (tmp_path / "annotations" / f"panoptic_{split}2017.json").write_text(json.dumps(content))
    assert kind_of(tmp_path) == "coco"
    train, val = (open_dataset("coco", tmp_path, train) for train in (True, False))
    # a photo of nothing but stuff has no class
    assert train.class_names == ["car"] and [p.boxes for p in train.photos] == [((1, 1, 3, 3),)]
    named = {"boxes": tmp_path / "annotations/panoptic_val2017.json", "class_names": ["bus", "car"]}
    assert [p.label for p in open_dataset("coco", tmp_path / "images/val2017", False, **named).photos] == [1]
    assert [p.label for p in val.photos] == [0]
    with pytest.raises(DataError, match=r"no annotations/instances_val\*.json"):
        open_dataset("coco", tmp_path / "images", False)
