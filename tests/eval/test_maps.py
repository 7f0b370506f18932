"""From photos to a report: predictions, threshold selection, the table."""

import numpy as np
import pytest
import torch
from PIL import Image

from pro2sam_fast.data.localization import ImageFolder
from pro2sam_fast.errors import ConfigError, DataError
from pro2sam_fast.eval.localization import LocalizationAccuracy
from pro2sam_fast.eval.maps import evaluate_maps, predict_maps
from pro2sam_fast.eval.table import read_records, write_records


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
    [("id,label", "id,class", "line 1: expected the columns"), ("green/0.png,0", "green/0.png,zero", "line 2")],
)
def test_malformed_tables_name_the_line(data, tmp_path, old, new, message):
    report = evaluate_maps(predict_maps(brightness, data), data)
    path = tmp_path / "photos.csv"
    write_records(path, list(report.accuracy.records.values()))
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        read_records(path)
