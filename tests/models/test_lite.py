"""The lite bundle: what is written is what is read, and the shared trunk is stored once."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pro2sam_fast.errors import CheckpointError, ConfigError
from pro2sam_fast.models.lite import (
    WEIGHTS,
    LabelHead,
    LiteModel,
    load_lite,
    load_sam_lite,
    make_gtformer_lite,
    map_and_label,
    save_lite,
)
from pro2sam_fast.models.sam.lite import make_sam_lite
from pro2sam_fast.models.trunk import EfficientNetLite0
from pro2sam_fast.pipelines.pro2sam import Localizer
from pro2sam_fast.train.lite_gtformer import class_activation_map, forward_cached, seed_loss


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    trunk = EfficientNetLite0(7)
    names = [str(i) for i in range(7)]
    coarse = make_gtformer_lite(3, trunk).eval()
    head, sam = LabelHead(trunk), make_sam_lite(trunk)
    return LiteModel(coarse, sam, head, names, names[:3], {"points_per_side": 8}, {"seed": 1})


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("lite") / "lite.safetensors"
    save_lite(path, model)
    return path


def test_round_trip(model, path):
    read = load_lite(path.parent)
    assert (read.class_names, read.coarse_class_names) == (model.class_names, model.coarse_class_names)
    assert (read.defaults, read.card) == ({"points_per_side": 8}, {"seed": 1})
    assert read.coarse.patch_embed.trunk is read.classifier.trunk
    inside = read.sam.image_encoder.trunk.parameters()
    assert all(a is b for a, b in zip(inside, read.classifier.trunk.parameters(), strict=True))
    for part in ("coarse", "sam", "classifier"):
        for (name, a), b in zip(getattr(model, part).state_dict().items(), getattr(read, part).state_dict().values()):
            assert torch.equal(a if "running" in name or "num_batches" in name else a.half().float(), b), name


def test_the_trunk_is_stored_once(path):
    names = load_file(path)
    assert not [name for name in names if name.startswith(("sam.image_encoder.trunk.", "gtformer.patch_embed.trunk."))]
    assert path.stat().st_size < 25e6


def test_stages_that_sam_has_to_itself(model, tmp_path):
    mine = copy.deepcopy(model.classifier.trunk)
    with torch.no_grad():
        mine.net.blocks[3][0].conv_pw.weight.mul_(0.5)
    path = tmp_path / "lite.safetensors"
    save_lite(path, replace(model, sam=make_sam_lite(mine)))
    own = "image_encoder.trunk.net.blocks.3.0.conv_pw.weight"
    assert [name for name in load_file(path) if name.startswith("sam.image_encoder.trunk.")] == [f"sam.{own}"]
    read = load_lite(path)
    weights, shared = read.sam.state_dict(keep_vars=True), read.classifier.trunk.state_dict(keep_vars=True)
    assert torch.equal(weights[own], mine.net.blocks[3][0].conv_pw.weight.half().float())
    prefix = "image_encoder.trunk."
    assert [prefix + name for name, value in shared.items() if weights[prefix + name] is not value] == [own]
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        found, others = read.sam.image_encoder.trunk.features(x), read.classifier.trunk.features(x)
    assert [torch.equal(a, b) for a, b in zip(found, others)] == [True, True, False, False]


def test_sam_alone_from_a_bundle_or_a_plain_state_dict(model, path, tmp_path):
    plain = tmp_path / "sam.safetensors"
    save_file({k: v.contiguous() for k, v in model.sam.state_dict().items()}, plain)
    with pytest.raises(CheckpointError, match=r"sam\.safetensors"):  # a trunk for 7 classes
        load_sam_lite(plain)
    assert load_sam_lite(path).name == "lite"
    sam = make_sam_lite()
    save_file({k: v.contiguous() for k, v in sam.state_dict().items()}, plain)
    assert torch.equal(load_sam_lite(plain).mask_decoder.iou_token.weight, sam.mask_decoder.iou_token.weight)


def test_other_files_are_refused(model, path, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_lite(tmp_path)
    tensors = load_file(path)
    bare = tmp_path / "lite.safetensors"
    save_file(tensors, bare)
    with pytest.raises(CheckpointError, match="no lite metadata"):
        load_lite(bare)
    torch.save(tensors, tmp_path / "lite.pth")
    with pytest.raises(CheckpointError, match="no lite metadata"):
        load_lite(tmp_path / "lite.pth")


def test_cached_features_give_the_forward_pass(model):
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        features = model.coarse.patch_embed.features(x)
        cached = forward_cached(model.coarse, *features, model.coarse.query_embed.phases(x))
        whole = model.coarse(x)
    for name, value in whole.items():
        torch.testing.assert_close(cached[name], value)


def test_map_and_label_with_one_pass_of_the_trunk(model, monkeypatch):
    x = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        expected = model.coarse.coarse_map(x), model.classifier(x)
        passes = []
        features = EfficientNetLite0.features
        monkeypatch.setattr(EfficientNetLite0, "features", lambda *args: passes.append(1) or features(*args))
        actual = map_and_label(model.coarse, model.classifier, x)
        assert len(passes) == 1 and all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        photo = np.zeros((30, 40, 3), np.uint8)
        assert Localizer(model.coarse, model.sam, classifier=model.classifier)._coarse([photo], [])[1].shape == (1, 7)
        assert len(passes) == 2
        with pytest.raises(ConfigError, match="224"):
            map_and_label(model.coarse, model.classifier, x[:, :, :192, :192])
    assert map_and_label(model.coarse, LabelHead(EfficientNetLite0(7)), x) is None
    assert map_and_label(torch.nn.Identity(), model.classifier, x) is None


def test_class_activation_map_and_seeds():
    torch.manual_seed(0)
    trunk = EfficientNetLite0(30)
    cam = class_activation_map(trunk, torch.randn(2, 320, 7, 7))
    assert cam.shape == (2, 14, 14) and cam.min() >= 0 and cam.max() <= 1
    sure = torch.zeros(1, 4, 4)
    sure[:, 1:3, 1:3] = 1
    right, wrong = seed_loss(sure, sure, 0.15, 0.6), seed_loss(1 - sure, sure, 0.15, 0.6)
    assert right < 1e-3 < 5 < wrong
    # where the CAM is unsure the map is free
    unsure = torch.full((1, 4, 4), 0.4)
    assert seed_loss(torch.rand(1, 4, 4), unsure, 0.15, 0.6) == 0


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="no bundled weights: train them first")
def test_bundled_file():
    model = load_lite()
    assert WEIGHTS.stat().st_size <= 25e6
    assert len(model.class_names) == 1000 and model.class_names[281] == "tabby"
    assert model.card["recipe"]["gtformer"]["seed"] == 6
