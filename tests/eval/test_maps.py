"""From photos to a report: predictions, threshold selection, the table."""

import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from toy_training import model

from pro2sam_fast.data.localization import ImageFolder
from pro2sam_fast.errors import ConfigError, DataError
from pro2sam_fast.eval import maps
from pro2sam_fast.eval.baselines import ClassActivation
from pro2sam_fast.eval.box_accuracy import MaxBoxAcc
from pro2sam_fast.eval.localization import LocalizationAccuracy
from pro2sam_fast.eval.maps import evaluate_maps, evaluate_pixels, predict_maps, shared_classes
from pro2sam_fast.eval.protocols import PROTOCOLS, prepare_score_maps, transform_boxes
from pro2sam_fast.eval.pxap import PxAP, ground_truth_pixels
from pro2sam_fast.eval.table import parquet, read_records, write_parquet, write_records


def brightness(x):
    """The brightest channel on a 14 x 14 grid; the class is the brighter of red and green."""
    small = torch.nn.functional.avg_pool2d(x, 16)
    return {"map": small.amax(1), "logits": x.mean((2, 3))[:, :2]}


@pytest.fixture
def data(tmp_path):
    rows = []
    for c, name in enumerate(("green", "red")):
        (tmp_path / name).mkdir()
        for i in range(3):
            pixels = np.zeros((120, 160, 3), np.uint8)
            x, y = 10 + 20 * i, 20 + 10 * i
            pixels[y : y + 60, x : x + 80, 1 - c] = 255
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
            rows.append(f"{name}/{i}.png,{x},{y},{x + 80},{y + 60}")
    (tmp_path / "boxes.csv").write_text("\n".join(rows))
    return ImageFolder(tmp_path, tmp_path / "boxes.csv")


@pytest.mark.parametrize("rules", ["sat", "direct224", "wsoleval", "tscam"])
def test_a_report(data, rules, tmp_path):
    predictions = predict_maps(brightness, data, rules, batch_size=4)
    assert predictions.maps.shape == (6, 14, 14) and predictions.sizes == [(160, 120)] * 6
    report = evaluate_maps(predictions, data, rules)
    assert report.metrics["GT-known"] == 100 and report.curves["box_acc@0.7"].max() == 100
    assert report.metrics["Top-1 Loc"] == report.metrics["Top-1 Cls"] == 0, "channels are the wrong way round"
    assert set(report.fixed) == {0.3, 0.4}
    assert report.curves["box_acc@0.5"].max() == 100
    write_records(tmp_path / "photos.csv", list(report.accuracy.records.values()))
    again = LocalizationAccuracy(rules)
    again.merge(read_records(tmp_path / "photos.csv"))
    assert again.compute() == report.metrics
    restored = np.stack([r.ious for r in again.records.values()])
    best = 100 * (restored >= 0.5).mean(0).max()
    assert best == report.curves["box_acc@0.5"].max()


def test_wsoleval_reports_its_own_metrics(data):
    found = predict_maps(brightness, data, "wsoleval")
    boxes = [transform_boxes(p.boxes, (160, 120), PROTOCOLS["wsoleval"]) for p in data.photos]
    prepared = prepare_score_maps(torch.from_numpy(found.maps))
    report = evaluate_maps(found, data, "wsoleval")
    for name, metric in (("MaxBoxAcc", MaxBoxAcc()), ("MaxBoxAccV2", MaxBoxAcc((0.3, 0.5, 0.7), multi_contour=True))):
        metric.update(prepared, boxes)
        assert report.sweeps[name] == metric.compute()
    assert evaluate_maps(found, data, "direct224").sweeps == {}


def test_class_maps_are_those_of_the_annotated_class(data):
    net = model(gate="none").eval()
    labels = torch.tensor([p.label for p in data.photos])
    seen = []

    class Watched(ClassActivation):
        def scores(self, x, classes=None):
            seen.append(classes)
            return super().scores(x, classes)

    predict_maps(Watched(net), data, "sat")
    swapped = predict_maps(Watched(net), data, "sat", classes=[1, 0])
    assert torch.equal(seen.pop(), 1 - labels) and swapped.scores.shape == (len(data), 2)
    assert predict_maps(Watched(net), data, "sat", classes=[]).scores is None and seen.pop() is None
    data.class_names = ["other", *data.class_names]
    predict_maps(Watched(net), data, "sat")
    assert torch.equal(seen[0], labels) and seen[1] is None, "classes of other data say nothing"


def test_classes_by_name():
    assert shared_classes(["a", "b"], ["b", "a"]) == [1, 0]
    assert shared_classes(["a", "b", "c"], ["c"]) == [2]
    assert shared_classes(["a", "b"], ["a", "d"]) == []
    assert shared_classes(["n00000001_tench", "n00000002"], ["n00000002_shark", "n00000001"]) == [1, 0]
    assert shared_classes(["0", "1"], ["a", "b"]) == [0, 1] and shared_classes(["a", "b"], ["0", "1", "2"]) == []


def test_any_class_of_a_photo_will_do(data):
    found = predict_maps(brightness, data)
    right = evaluate_maps(found, data).metrics["Top-1 Cls"]
    data.photos = [replace(p, labels=(0, 1)) for p in data.photos]
    assert evaluate_maps(found, data).metrics["Top-1 Cls"] == 100 >= right


def test_pixels(data, tmp_path):
    rng = np.random.default_rng(0)
    photos = []
    for i, photo in enumerate(data.photos):
        paths = [tmp_path / f"{i}_{k}.png" for k in range(3)]
        for path in paths:
            Image.fromarray(((rng.random((101, 311)) < 0.3) * 255).astype(np.uint8)).save(path)
        photos.append(replace(photo, boxes=(), masks=tuple(paths[:2]), ignore=paths[2] if i else None))
    data.photos = photos
    found = predict_maps(brightness, data, "wsoleval")
    wanted = PxAP()
    for photo, coarse in zip(photos, found.maps):
        read = [cv2.imread(str(p), 0) for p in (*photo.masks, *([photo.ignore] if photo.ignore else []))]
        small = [cv2.resize(m, (224, 224), interpolation=cv2.INTER_NEAREST) for m in read]
        scores = prepare_score_maps(torch.from_numpy(coarse)[None])[0]
        wanted.update(scores, ground_truth_pixels(small[:2], small[2] if photo.ignore else None))
    report = evaluate_pixels(found, data)
    assert report.pxap == wanted.compute() and len(report.foreground) == 6
    assert np.array_equal(report.background.sum(0), wanted.background)
    data.photos[3] = replace(data.photos[3], masks=())
    with pytest.raises(DataError, match="red/0.png' has no annotated mask"):
        evaluate_pixels(found, data)


@pytest.mark.parametrize("world", [2, 8])
def test_ranks_share_the_photos(data, world, monkeypatch):
    whole, shares = predict_maps(brightness, data), []
    monkeypatch.setattr(maps, "gathered", lambda mine: shares.append(mine) or shares)
    for rank in range(world):
        monkeypatch.setattr(maps, "ranks", lambda rank=rank: (rank, world))
        found = maps.predict_on_all_ranks(brightness, data)
    assert sum(len(share.ids) for share in shares) == 6
    assert found.ids == whole.ids and found.sizes == whole.sizes
    assert np.array_equal(found.maps, whole.maps) and np.array_equal(found.scores, whole.scores)


def test_ten_crops_decide_the_class_only(data):
    one, ten = (predict_maps(brightness, data, "sat", ten_crop=t) for t in (False, True))
    assert np.array_equal(one.maps, ten.maps) and not np.array_equal(one.scores, ten.scores)
    np.testing.assert_allclose(np.exp(ten.scores).sum(1), 1, rtol=1e-5)


def test_selections(data):
    predictions = predict_maps(brightness, data)
    fixed = evaluate_maps(predictions, data, selection="val_split", threshold=0.37)
    assert fixed.threshold == 0.37 and 0.37 in fixed.curves["threshold"]
    for options in ({"threshold": 0.3}, {"selection": "fixed"}):
        with pytest.raises(ConfigError, match="give a threshold"):
            evaluate_maps(predictions, data, **options)
    with pytest.raises(ConfigError, match="selection"):
        evaluate_maps(predictions, data, selection="best", threshold=0.3)


def test_every_photo_must_be_there(data):
    part = predict_maps(brightness, data, indices=[0, 2])
    with pytest.raises(DataError, match="4 photos are missing"):
        evaluate_maps(part, data)
    part.ids[1] = part.ids[0]
    with pytest.raises(DataError, match="twice"):
        evaluate_maps(part, data)
    part.ids[1] = "nowhere"
    with pytest.raises(DataError, match="aren't in the data set"):
        evaluate_maps(part, data)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("id,label", "id,class", "line 1: expected the columns"),
        ("green/0.png,0", "green/0.png,zero", "line 2"),
        (",map,{}", ",map,5", "line 2"),
    ],
)
def test_malformed_tables_name_the_line(data, tmp_path, old, new, message):
    report = evaluate_maps(predict_maps(brightness, data), data)
    path = tmp_path / "photos.csv"
    write_records(path, list(report.accuracy.records.values()))
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        read_records(path)


def test_parquet_holds_the_same(data, tmp_path):
    pytest.importorskip("pyarrow", reason='needs pip install "pro2sam-fast[parquet]"')
    records = list(evaluate_maps(predict_maps(brightness, data), data).accuracy.records.values())
    records[0].class_boxes, records[1].top5, records[2].ious = {3: (1.0, 2.0, 3.0, 4.0)}, (), None
    path = tmp_path / "photos.parquet"
    write_parquet(path, records)
    for one, other in zip(records, read_records(path), strict=True):
        for name in ("id", "label", "top5", "box", "iou", "source", "class_boxes"):
            assert getattr(one, name) == getattr(other, name)
        np.testing.assert_array_equal(one.boxes, other.boxes)
        assert (one.ious is None) == (other.ious is None)
        assert one.ious is None or one.ious.tolist() == other.ious.tolist()
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a table of an evaluation"):
        read_records(path)


def test_parquet_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"pip install \"pro2sam-fast\[parquet\]\""):
        parquet()
