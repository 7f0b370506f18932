"""`pro2sam-fast train lite` from tiny photos to a model folder that localizes."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import pro2sam_fast
from pro2sam_fast.cli import main
from pro2sam_fast.errors import ConfigError
from pro2sam_fast.models.trunk import EfficientNetLite0
from pro2sam_fast.train import lite
from pro2sam_fast.train.checkpoint import load_latest
from pro2sam_fast.train.lite_gtformer import GTFormerLiteConfig
from pro2sam_fast.train.lite_sam import SamLiteConfig

CLASSES = 3


def photo(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 80, (40, 60, 3), dtype=np.uint8)
    pixels[10:30, 15:45] += 150
    Image.fromarray(pixels).save(path)


def mask(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    inside = np.zeros((40, 60), np.uint8)
    inside[10:30, 15:45] = 1
    cub = root / "cub10/CUB_200_2011"
    for i in range(2):
        photo(cub / f"images/A/{i}.jpg", i)
        photo(root / f"caltech101_24/cup/{i}.jpg", 10 + i)
        mask(root / f"foreground/cub10/A/{i}.png", inside * 255)
        mask(root / f"foreground/caltech101_24/cup/{i}.png", inside * 255)
    for name, line in (
        ("images", "A/{}.jpg"),
        ("image_class_labels", "1"),
        ("train_test_split", "1"),
        ("bounding_boxes", "15 10 30 20"),
    ):
        (cub / f"{name}.txt").write_text("".join(f"{i + 1} {line.format(i)}\n" for i in range(2)))
    (cub / "classes.txt").write_text("1 001.A\n")
    for i in range(CLASSES):
        name = f"n{i:08}_thing_{i}"
        photo(root / f"imagenet1k_one_per_class/{name}.JPEG", 20 + i)
        mask(root / f"foreground/imagenet1k_one_per_class/{name}.png", inside * 255)
    photo(root / "bsds500/train/images/1.jpg", 30)
    mask(root / "bsds500/train/segments/1_0.png", inside)
    photo(root / "coco200/images/train2017/1.jpg", 31)
    panoptic = np.zeros((40, 60, 3), np.uint8)
    panoptic[..., 0] = inside + 1
    mask(root / "coco200/annotations/panoptic_train2017/1.png", panoptic)
    index = {
        "categories": [{"id": 1, "isthing": 1}, {"id": 2, "isthing": 0}],
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "annotations": [
            {
                "image_id": 1,
                "file_name": "1.png",
                "segments_info": [{"id": k, "category_id": c, "iscrowd": 0} for k, c in ((2, 1), (1, 2))],
            }
        ],
    }
    (root / "coco200/annotations/panoptic_train2017.json").write_text(json.dumps(index))
    return root


@pytest.fixture
def tiny(monkeypatch):
    torch.manual_seed(0)
    trunk = EfficientNetLite0(CLASSES)
    monkeypatch.setattr(lite, "load_pretrained_trunk", lambda: trunk)
    small = {"steps": 2, "size": 64, "batch": 2, "prompts": 2, "warmup": 1}
    phases = {}, {"seed": 1, "tuned": (3,)}, {"follows": 2, "tuned": (3,)}
    return lite.LiteRecipe(
        sam=[SamLiteConfig(**small, **phase) for phase in phases],
        gtformer=GTFormerLiteConfig(views=(2, 1, 1), steps=2, batch=6, warmup=1),
        defaults={"points_per_side": 2, "pred_iou_thresh": -1.0, "stability_score_thresh": 0.0},
    )


def test_from_photos_to_a_model_folder(data, tiny, tmp_path):
    before = {p: p.read_bytes() for p in data.rglob("*") if p.is_file()}
    path = lite.train_lite(data, tmp_path, recipe=tiny)
    assert path == tmp_path / "lite.safetensors"
    content = path.read_bytes()
    known = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert json.loads((tmp_path / "weights.json").read_text()) == {"lite.safetensors": known}
    localizer = pro2sam_fast.load(tmp_path, device="cpu")
    assert localizer.class_names == ("thing 0", "thing 1", "thing 2")
    (result,) = localizer(data / "imagenet1k_one_per_class/n00000000_thing_0.JPEG")
    assert result.orig_shape == (40, 60) and result.label_name in localizer.class_names
    # a finished stage stays as it is
    first = load_file(path)
    lite.train_lite(data, tmp_path, recipe=tiny)
    assert all(torch.equal(value, first[name]) for name, value in load_file(path).items())
    assert before == {p: p.read_bytes() for p in data.rglob("*") if p.is_file()}
    # another run can begin with these weights; a learning rate of zero leaves them as they are
    tiny.sam = [SamLiteConfig(steps=1, size=64, batch=2, prompts=2, lr=0.0, final_lr=0.0, tuned=(3,))]
    lite.train_lite(data, tmp_path / "next", stages=["sam"], recipe=tiny, start=tmp_path)
    weights = load_latest(tmp_path / "next" / "sam0")["model"]
    assert all(torch.equal(value, first[f"sam.{name}"].float()) for name, value in weights.items())


def test_stages_in_the_wrong_order(data, tiny, tmp_path):
    with pytest.raises(ConfigError, match="run the stages before"):
        lite.train_lite(data, tmp_path, stages=["bundle"], recipe=tiny)
    with pytest.raises(ConfigError, match="unknown stage 'all'"):
        lite.train_lite(data, tmp_path, stages=["all"], recipe=tiny)


def test_a_phase_that_drops_tuned_stages(data, tiny, tmp_path):
    tiny.sam[2].tuned = (4,)
    with pytest.raises(ConfigError, match=r"SAM phase 2 must tune stages \[3\]"):
        lite.train_lite(data, tmp_path, recipe=tiny)


def test_command_names_what_is_missing(data, tmp_path, capsys):
    assert main(["train", "lite", "--run", str(tmp_path)]) == 2
    assert "--data is missing" in capsys.readouterr().err
    assert main(["train", "lite", "--data", str(tmp_path), "--run", str(tmp_path / "run")]) == 1
    assert "coco200" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
