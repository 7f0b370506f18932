"""What `bench` reports adds up; how fast anything is isn't tested."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pro2sam_fast import bench
from pro2sam_fast.errors import ConfigError
from pro2sam_fast.pipelines.pro2sam import Localizer

spec = importlib.util.spec_from_file_location("toy", Path(__file__).with_name("toy.py"))
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)

STAGES = ["read", "coarse", "encode", "masks", "match"]


@pytest.fixture
def small(monkeypatch):
    """A small model in the place of `lite`; gives the arguments of `load`."""
    given = []
    options = {"points_per_side": 2, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}

    def load(name, **arguments):
        given.append((name, arguments))
        return Localizer(toy.ColorMap(), toy.tiny_sam(), generator=options, device="cpu")

    monkeypatch.setattr(bench, "load", load)
    return given


def test_generated_photos(small):
    found = bench.measure(seconds=0)
    assert small == [("lite", {"device": "auto", "candidates": 0})]
    assert list(found["stages_ms"]) == STAGES and all(ms > 0 for ms in found["stages_ms"].values())
    assert sum(found["stages_ms"].values()) / 1e3 <= 1 / found["photos_per_s"]
    assert found["photos"] == {"source": "generated", "files": 8, "megapixels": 0.307}
    assert found["measured"] == 4 and found["peak_bytes"] > 0
    assert set(found["back_ends"]) == {"reference", "cpu", "triton", "cuda"}
    assert json.loads(json.dumps(found)) == found
    text = bench.text(found)
    assert "generated photos of 480 x 640" in text and "photos/s" in text
    assert all(stage in text for stage in STAGES)


def test_own_photos_without_the_bad_one(small, tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(toy.painted()).save(tmp_path / name)
    (tmp_path / "c.png").write_bytes(b"bad")
    found = bench.measure(str(tmp_path), seconds=0, dtype="float32")
    assert small[0][1]["dtype"] == "float32"
    assert found["photos"] == {"source": str(tmp_path), "files": 3, "megapixels": 0.005} and found["measured"] == 3
    assert str(tmp_path) in bench.text(found)
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(b"bad")
    assert bench.measure(str(tmp_path), seconds=0)["measured"] == 2


@pytest.mark.parametrize("name", ["missing", "bad.png", "void"])
def test_no_photo(small, tmp_path, name):
    (tmp_path / "void").mkdir()
    (tmp_path / "bad.png").write_bytes(b"bad")
    with pytest.raises(ConfigError, match=name):
        bench.measure(str(tmp_path / name))


def test_generated_photos_are_the_same_every_time():
    np.testing.assert_array_equal(bench.generated_photo(3), bench.generated_photo(3))
    assert (bench.generated_photo(3) != bench.generated_photo(4)).any()
