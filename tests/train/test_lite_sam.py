"""Training of SAM-lite: batches, losses, and a run that is stopped and continued."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from pro2sam_fast.data.prompts import PromptDataset, augment
from pro2sam_fast.data.segments import SegmentedPhoto
from pro2sam_fast.models.sam.lite import make_sam_lite
from pro2sam_fast.models.trunk import EfficientNetLite0
from pro2sam_fast.train.checkpoint import load_latest, save_checkpoint
from pro2sam_fast.train.lite_sam import SamLiteConfig, forward_batch, learning_rate, mask_losses, train_sam_lite

SIZE = 64


def photos() -> list[SegmentedPhoto]:
    rng = np.random.default_rng(0)
    out = []
    for kind in ("coco", "bsds", "foreground", "foreground"):
        image = rng.integers(0, 256, (48, 80, 3), dtype=np.uint8)
        maps = np.full((2 if kind == "bsds" else 1, 48, 80), 2, np.uint8)
        maps[0, 10:40, 20:60] = 1
        if kind == "bsds":
            maps[1, 5:45, :40] = 1
        if kind == "coco":
            maps[0, :5] = 0
        out.append(SegmentedPhoto(image, maps, kind, (1,)))
    return out


@pytest.fixture(scope="module")
def trunk():
    torch.manual_seed(0)
    return EfficientNetLite0()


def config(**changes) -> SamLiteConfig:
    small = {"steps": 4, "size": SIZE, "batch": 2, "prompts": 3, "save_every": 1, "warmup": 2}
    return SamLiteConfig(**{**small, **changes})


def test_a_batch_depends_on_its_step_alone():
    a, b = (PromptDataset(photos(), 10, 2, 3, SIZE, seed=1)[7] for _ in range(2))
    assert a.mode == b.mode
    for x, y in zip((a.images, a.targets, a.points), (b.images, b.targets, b.points)):
        assert torch.equal(x, y)


def test_every_click_lies_in_its_target_and_inside_the_photo():
    seen = set()
    for step in range(30):
        batch = PromptDataset(photos(), 30, 2, 3, SIZE, seed=2)[step]
        seen.add(batch.mode)
        assert batch.images.shape == (2, 3, SIZE, SIZE) and batch.targets.shape == (6, 3, SIZE // 4, SIZE // 4)
        assert batch.targets.min() >= 0 and batch.targets.max() <= 1
        for k in range(6):
            if not batch.target_valid[k, 0]:
                continue
            x, y = batch.points[k, 0].long().tolist()
            assert batch.valid[k // 3, y, x]
            assert batch.targets[k, 0, y // 4, x // 4] > 0
            # alternatives under the same click hold it too
            for t in range(1, 3):
                assert not batch.target_valid[k, t] or batch.targets[k, t, y // 4, x // 4] > 0
    assert seen == {"single", "multi", "mask"}


def test_augmentation_moves_photo_and_labels_together():
    photo = photos()[2]
    photo.image[:] = (photo.maps[0] == 1)[..., None] * 200
    for seed in range(20):
        image, maps, inside = augment(photo, SIZE, np.random.default_rng(seed))
        bright = image.mean(-1) > 100
        assert (bright[inside] == (maps[0] == 1)[inside]).mean() > 0.93
        assert not image[~inside].any() and not maps[:, ~inside].any()


def test_losses_prefer_the_right_mask_and_ignore_padding():
    batch = PromptDataset(photos(), 10, 2, 3, SIZE, seed=3)[0]
    batch.target_valid[:, 1:] = False
    target = batch.targets[:, :1]
    right = (target * 2 - 1) * 10
    iou = torch.ones(6, 4)
    good = mask_losses(right.repeat(1, 4, 1, 1), iou, batch)
    bad = mask_losses(-right.repeat(1, 4, 1, 1), iou, batch)
    assert good["loss"] < 0.5 < bad["loss"]
    # logits on padding change nothing
    inside = torch.nn.functional.avg_pool2d(batch.valid[:, None].float(), 4).repeat_interleave(3, 0)
    noisy = torch.where(inside == 0, torch.full_like(right, 5.0), right)
    torch.testing.assert_close(mask_losses(noisy.repeat(1, 4, 1, 1), iou, batch)["loss"], good["loss"])


def test_training_path_equals_the_prompt_encoder(trunk):
    torch.manual_seed(1)
    sam = make_sam_lite(trunk, SIZE)
    dataset = PromptDataset(photos(), 40, 1, 2, SIZE, seed=4)
    batch = next(b for b in (dataset[i] for i in range(40)) if b.mode == "multi")
    with torch.no_grad():
        logits, iou, embedding = forward_batch(sam, trunk, batch)
        sparse, dense = sam.prompt_encoder((batch.points, batch.point_labels), None, None)
        image = sam.image_encoder((batch.images - sam.pixel_mean) / sam.pixel_std * batch.valid[:, None])
        torch.testing.assert_close(embedding, image, rtol=1e-4, atol=1e-4)
        expected, expected_iou = sam.mask_decoder(image, sam.prompt_encoder.get_dense_pe(), sparse, dense, True)
    torch.testing.assert_close(logits[:, 1:], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(iou[:, 1:], expected_iou, rtol=1e-4, atol=1e-4)


def test_folded_trunk_equals_the_trunk(trunk):
    for module in trunk.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(trunk.folded()(x), trunk(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tuned", [(), (3, 4)])
def test_a_stopped_run_ends_with_the_weights_of_an_unbroken_one(trunk, tmp_path, tuned):
    results, before = [], copy.deepcopy(trunk.state_dict())
    for name, stops in (("whole", [None]), ("broken", [2, None])):
        for stop in stops:
            torch.manual_seed(0)
            sam = make_sam_lite(copy.deepcopy(trunk), SIZE)
            train_sam_lite(sam, photos(), config(stop_at=stop, tuned=tuned), tmp_path / name, workers=0)
        results.append(load_latest(tmp_path / name))
    whole, broken = results
    assert whole["step"] == broken["step"] == 4
    for part in ("model", "average", "affinity"):
        assert all(torch.equal(v, broken[part][k]) for k, v in whole[part].items()), part
    after = sam.image_encoder.trunk.state_dict()
    changed = {name.split(".")[2] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {str(stage) for stage in tuned}


def test_an_unreadable_newest_checkpoint_is_passed_over(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"step": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002.pt", "step_00000003.pt"]
    (tmp_path / "step_00000003.pt").write_bytes(b"cut off")
    assert load_latest(tmp_path)["step"] == 2
    assert load_latest(tmp_path / "nothing") is None


def test_learning_rate_warms_up_and_falls():
    c = config(steps=100, warmup=10, lr=1.0, final_lr=0.1)
    rates = [learning_rate(step, c) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == 1.0 and rates[-1] == pytest.approx(0.1, abs=1e-3)
