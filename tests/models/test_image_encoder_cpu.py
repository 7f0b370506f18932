"""The ViT image encoder's inference on the CPU against its modules, which gradients and other devices use."""

import copy

import pytest
import torch
from torch import nn
from toy_vit import CONFIGS, make

from pro2sam_fast.models import cpu
from pro2sam_fast.models.sam import image_encoder_cpu


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("tile", [1, 64, 1 << 20])
@pytest.mark.parametrize("config", CONFIGS)
def test_same_function(monkeypatch, config, tile):
    monkeypatch.setattr(image_encoder_cpu, "_MAX_SCORES", tile)
    monkeypatch.setattr(image_encoder_cpu, "_TOKENS_PER_BAND", 7 if tile == 64 else 1024)
    encoder = make(**CONFIGS[config])
    x = torch.randn(2, 3, encoder.img_size, encoder.img_size)
    expected = copy.deepcopy(encoder).double()(x.double()).detach()
    with torch.no_grad():
        assert relative_error(encoder(x), expected) < 1e-6
        with torch.autocast("cpu", torch.bfloat16):
            ours = encoder(x)
    with torch.autocast("cpu", torch.bfloat16):
        modules = encoder(x).detach()
    assert ours.dtype == modules.dtype
    # rounding is random: the same size of error, not the same error
    assert relative_error(ours, expected) < 1.25 * relative_error(modules, expected)


def test_without_onednn(monkeypatch):
    encoder = make(img_size=96, window_size=5)
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = encoder(x).double()
        monkeypatch.setattr(cpu, "_onednn", lambda x: False)
        assert relative_error(encoder(x), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_independent_of_the_batch(dtype):
    encoder = make(img_size=96, window_size=5)
    x = torch.randn(3, 3, 96, 96)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        whole = encoder(x)
        assert torch.equal(whole, torch.cat([encoder(image) for image in x.split(1)]))
        assert torch.equal(encoder(x.flip(0)), whole.flip(0))
        assert torch.equal(encoder(x.contiguous(memory_format=torch.channels_last)), whole)


def test_tables_of_another_length():
    encoder = make(img_size=96, window_size=5)
    for block in encoder.blocks:
        for name in ("rel_pos_h", "rel_pos_w"):
            setattr(block.attn, name, nn.Parameter(torch.randn(17, 16)))
    x = torch.randn(1, 3, 96, 96)
    expected = copy.deepcopy(encoder).double()(x.double()).detach()
    with torch.no_grad():
        assert relative_error(encoder(x), expected) < 1e-6


def test_gradients_reach_every_parameter():
    encoder = make(img_size=96, window_size=5)
    encoder(torch.randn(1, 3, 96, 96)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_input_and_parameters_stay():
    encoder = make(img_size=64, window_size=3)
    before = copy.deepcopy(encoder.state_dict())
    x = torch.randn(1, 3, 64, 64)
    kept = x.clone()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        encoder(x)
    assert torch.equal(x, kept) and all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
