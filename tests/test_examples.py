"""The example scripts run as written. Without the bundled weights they run with random ones."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pro2sam_fast.io import iter_sources
from pro2sam_fast.models import lite
from pro2sam_fast.models.trunk import EfficientNetLite0

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in ("one.png", "two.png"):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / name)
    (folder / "bad.png").write_bytes(b"bad")
    return folder


@pytest.fixture(scope="module", autouse=True)
def cheap_weights(tmp_path_factory):
    """Random lite weights whose default is a small grid."""
    torch.manual_seed(0)
    trunk = EfficientNetLite0(1000)
    names = [f"thing {index}" for index in range(1000)]
    coarse, sam = lite.make_gtformer_lite(4, trunk), lite.make_sam_lite(trunk)
    defaults = {"points_per_side": 1, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
    model = lite.LiteModel(coarse, sam, lite.LabelHead(trunk), names, list("abcd"), defaults, {})
    path = tmp_path_factory.mktemp("weights") / "lite.safetensors"
    lite.save_lite(path, model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lite, "WEIGHTS", path)
        yield


def run(name, *arguments, **options):
    runpy.run_path(str(EXAMPLES / name))["main"](*map(str, arguments), **options)


def test_localize_folder(photos, tmp_path, capsys):
    run("localize_folder.py", photos, tmp_path / "out")
    output = capsys.readouterr().out
    assert "skipped: cannot read" in output and "one.png: thing" in output
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"one.jpg", "one-mask.png", "one.json", "two.jpg"}


def test_segment_everything(photos, tmp_path, capsys):
    options = {"points_per_side": 1, "pred_iou_thresh": 0, "stability_score_thresh": 0}
    run("segment_everything.py", tmp_path / "out", photos / "one.png", photos / "two.png", **options)
    assert capsys.readouterr().out.count("MaskGallery(") == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"one-masks.jpg", "two-masks.jpg"}


def test_custom_pair(photos, tmp_path, capsys):
    run("custom_pair.py", photos / "one.png", tmp_path / "out")
    assert "candidates kept" in capsys.readouterr().out and (tmp_path / "out" / "one.jpg").exists()


def test_own_classes(photos, tmp_path, capsys):
    for name, level in (("dark", 30), ("bright", 220)):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for k in range(3):
            grey = np.full((40, 60, 3), level + 5 * k, np.uint8)
            Image.fromarray(grey).save(tmp_path / "classes" / name / f"{k}.png")
    for name in ("dark", "bright"):
        run("own_classes.py", tmp_path / "classes", tmp_path / "classes" / name, tmp_path / "out")
        output = capsys.readouterr().out
        assert "6 photos of 2 classes learned" in output and output.count(f".png: {name} ") == 3
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 3


def test_prompt_a_batch(photos, capsys):
    run("prompt_a_batch.py", photos / "one.png", photos / "two.png")
    assert capsys.readouterr().out.count("predicted IoU") == 4


def test_example_photos_are_readable_and_described():
    described = (EXAMPLES / "images" / "README.md").read_text()
    sources = list(iter_sources(EXAMPLES / "images"))
    assert len(sources) >= 4
    for source in sources:
        assert source.read().ndim == 3 and f"`{source.name}`" in described
