"""Losses against golden numbers and against the convolution and sums written out here."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from pro2sam_fast.errors import ConfigError
from pro2sam_fast.train.losses import (
    AREA_TARGETS,
    LOSS_PRESETS,
    LossConfig,
    all_reduce_mean,
    area_loss,
    blur,
    edge_kernel,
    edge_loss,
    localization_loss,
)

SIDE, EDGE, CENTRE = 0.0026284618773611, 0.0460116034072816, 0.8054397388614290
KERNEL = torch.tensor([[SIDE, EDGE, SIDE], [EDGE, CENTRE, EDGE], [SIDE, EDGE, SIDE]], dtype=torch.float64)


def conv_blur(maps):
    return F.conv2d(maps.flatten(0, -3).unsqueeze(1), KERNEL[None, None], padding=1).view_as(maps)


def ramp():
    i, j = torch.meshgrid(torch.arange(14).double(), torch.arange(14).double(), indexing="ij")
    return (14 * i + j) / 195


def checkerboard():
    return ((torch.arange(14)[:, None] + torch.arange(14)) % 2).double()


def block():
    out = torch.zeros(14, 14, dtype=torch.float64)
    out[4:10, 3:11] = 1
    return out


def full(value):
    return torch.full((14, 14), value, dtype=torch.float64)


@pytest.fixture
def outputs():
    torch.manual_seed(0)
    maps = torch.rand(3, 4, 14, 14, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    return {"logits": logits, "maps": maps, "map": maps.mean(1)}


LABELS = torch.tensor([0, 4, 2])


def test_kernel_entries():
    assert (edge_kernel() - KERNEL).abs().max() < 1e-12
    assert edge_kernel().sum().item() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(
    ("maps", "mean", "expected"),
    [
        (full(1.0), 1.0, 0.0137470949),
        (full(0.5), 0.5, 0.2497881466),
        (full(0.25), 0.25, 0.1856227231),
        (ramp(), 0.5, 0.1703406283),
        (checkerboard(), 0.5, 0.1461276959),
        (block(), 48 / 196, 0.0137040304),
    ],
)
def test_golden_numbers(maps, mean, expected):
    assert edge_loss(maps[None]).item() == pytest.approx(expected, abs=6e-11)
    assert area_loss(maps[None], 0.25).item() == pytest.approx(abs(mean - 0.25), abs=1e-15)


def test_blur_is_the_zero_padded_convolution():
    maps = torch.randn(2, 3, 14, 14, dtype=torch.float64)
    assert (blur(maps) - conv_blur(maps)).abs().max() < 1e-13
    corner = blur(full(1.0))
    assert corner[0, 0].item() == pytest.approx(0.948731**2, abs=1e-6)
    assert corner[0, 5].item() == pytest.approx(0.948731, abs=1e-6)
    for shape in ((1, 1), (1, 7), (5, 1)):
        maps = torch.randn(2, *shape, dtype=torch.float64)
        assert (blur(maps) - conv_blur(maps)).abs().max() < 1e-13


def test_gradients_are_the_stated_ones():
    maps = torch.rand(3, 14, 14, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(area_loss(maps, 0.9), maps)
    assert torch.equal(grad, torch.full_like(grad, -1 / maps.numel()))
    (grad,) = torch.autograd.grad(edge_loss(maps), maps)
    with torch.no_grad():
        expected = conv_blur(1 - 2 * conv_blur(maps)) / maps.numel()
    assert (grad - expected).abs().max() < 1e-15
    half = full(0.5)[None].requires_grad_()
    (grad,) = torch.autograd.grad(area_loss(half, 0.5), half)
    assert not grad.any()


def test_area_is_the_distance_of_the_batch_mean():
    maps = torch.stack([full(0.0), full(0.5)])
    assert area_loss(maps, 0.25).item() == 0
    assert area_loss(maps[:1], 0.25).item() == 0.25


def naive_terms(maps, target):
    c = conv_blur(maps)
    return (maps.mean() - target).abs(), (c * (1 - c)).mean()


class TestTotal:
    def check(self, outputs, config, expected):
        got = localization_loss(outputs, LABELS, config)
        assert (got["loss"] - expected).abs() < 1e-13
        inputs = [outputs["logits"], outputs["maps"]]
        pairs = zip(torch.autograd.grad(got["loss"], inputs), torch.autograd.grad(expected, inputs), strict=True)
        assert all((one - other).abs().max() < 1e-14 for one, other in pairs)
        return got

    def test_official(self, outputs):
        expected = F.cross_entropy(outputs["logits"], LABELS) + sum(naive_terms(outputs["map"], 0.25))
        for g in range(4):
            expected = expected + 0.5 * sum(naive_terms(outputs["maps"][:, g], 0.25))
        got = self.check({**outputs, "map": outputs["maps"].mean(1)}, LossConfig(area_target=0.25), expected)
        assert set(got) == {"loss", "ce", "area", "edge", "token_area", "token_edge"}

    def test_mean_map_only(self, outputs):
        area, edge = naive_terms(outputs["map"], 0.35)
        self.check(outputs, "paper", F.cross_entropy(outputs["logits"], LABELS) + edge + 0.5 * area)

    def test_sat(self, outputs):
        area, edge = naive_terms(outputs["map"], 0.35)
        got = self.check(outputs, "sat", F.cross_entropy(outputs["logits"], LABELS) + area + edge)
        assert set(got) == {"loss", "ce", "area", "edge"}

    def test_official_without_token_terms_is_sat(self, outputs):
        official = localization_loss(outputs, LABELS, LossConfig(lambda2=0.0))["loss"]
        assert (official - localization_loss(outputs, LABELS, "sat")["loss"]).abs() < 1e-14

    def test_class_probabilities_as_labels(self, outputs):
        soft = F.one_hot(LABELS, 5).double()
        hard = localization_loss(outputs, LABELS)["loss"]
        assert (localization_loss(outputs, soft)["loss"] - hard).abs() < 1e-14

    def test_stays_in_float32_under_autocast(self):
        maps = torch.rand(2, 4, 14, 14)
        outputs = {"logits": torch.randn(2, 5).bfloat16(), "maps": maps, "map": maps.mean(1)}
        with torch.autocast("cpu", torch.bfloat16):
            got = localization_loss(outputs, LABELS[:2])
        assert all(value.dtype == torch.float32 for value in got.values())
        assert torch.equal(got["edge"], localization_loss(outputs, LABELS[:2])["edge"])


def test_external_reducer_sees_the_local_means_once(outputs):
    other = torch.rand(4, dtype=torch.float64)
    calls = []

    def reducer(means):
        calls.append(means.detach().clone())
        return (means + other) / 2

    got = localization_loss(outputs, LABELS, reducer=reducer)
    means = (outputs["maps"].mean((0, 2, 3)) + other) / 2
    assert torch.allclose(calls[0], outputs["maps"].mean((0, 2, 3))) and len(calls) == 1
    assert (got["token_area"] - (means - 0.35).abs().sum()).abs() < 1e-14
    assert (got["area"] - (means.mean() - 0.35).abs()).abs() < 1e-14
    assert area_loss(full(0.0)[None], 0.25, reducer=lambda mean: mean + 0.25).item() == 0


def test_all_reduce_mean_without_processes_is_the_identity():
    values = torch.rand(3)
    assert all_reduce_mean(values) is values


RANK_PROGRAM = """
import sys, torch, torch.distributed as dist
from pro2sam_fast.train.losses import all_reduce_mean, area_loss
rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
maps = torch.full((1, 4, 4), [0.1, 0.7][rank], dtype=torch.float64, requires_grad=True)
loss = area_loss(maps, 0.3, reducer=all_reduce_mean)
loss.backward()
assert abs(loss.item() - 0.1) < 1e-12, loss
# averaged over the two ranks this is the gradient 1 / 32 of the mean over all 32 values
assert torch.allclose(maps.grad, torch.full_like(maps, 1 / 16)), maps.grad
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_all_reduce_mean_over_two_processes(tmp_path):
    command = [sys.executable, "-c", RANK_PROGRAM]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")]) for rank in range(2)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


def test_presets_and_bad_options():
    assert AREA_TARGETS == {"cub": 0.25, "ilsvrc": 0.35}
    assert LOSS_PRESETS["default"] == LOSS_PRESETS["official"] == LossConfig("official", 0.35, 1.0, 0.5)
    for options in ({"scheme": "x"}, {"area_target": 1.5}, {"area_target": math.nan}, {"lambda1": math.inf}):
        with pytest.raises(ConfigError):
            LossConfig(**options)
    with pytest.raises(ConfigError, match="preset"):
        localization_loss({}, LABELS, "best")
