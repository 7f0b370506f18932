"""Baseline maps against plain arithmetic."""

import cv2
import numpy as np
import pytest
import torch
from toy_training import model

from pro2sam_fast.eval.baselines import BASELINES


@pytest.fixture
def net():
    return model(gate="none").eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", BASELINES)
def test_maps_fill_the_unit_interval(net, x, name):
    with torch.inference_mode():
        out = BASELINES[name](net)(x)
        torch.testing.assert_close(out["logits"], net(x)["logits"])
    assert out["map"].shape == (2, 14, 14)
    assert out["map"].amin((1, 2)).tolist() == [0, 0] and out["map"].amax((1, 2)).tolist() == pytest.approx([1, 1])


def test_class_activation_is_the_class_map(net, x):
    out = net(x, class_maps=True)
    torch.testing.assert_close(out["class_maps"].mean((2, 3)), out["logits"], rtol=1e-4, atol=1e-5)
    wanted = out["class_maps"][0, out["logits"][0].argmax()].relu()
    got = BASELINES["cam"](net)(x)["map"][0]
    torch.testing.assert_close(got, (wanted - wanted.min()) / (wanted.max() - wanted.min()))


@pytest.mark.parametrize("name", ["cam", "gradcam"])
def test_maps_of_given_classes(net, x, name):
    maps = BASELINES[name](net)
    plain = maps(x)
    top = plain["logits"].argmax(1)
    assert torch.equal(maps(x, top)["map"], plain["map"]) and not torch.equal(maps(x, 1 - top)["map"], plain["map"])


def test_grad_cam_is_the_gradient(net, x):
    # by finite differences: the logit's change along the tokens' own direction of one patch
    last = net.blocks[-1]
    seen = []
    handle = last.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        net(x[:1])
    handle.remove()
    tokens = seen[0].double()
    net = net.double()

    def logit(z):
        z, _ = last(z, 4, True, False, slice(1, -4))
        return net.head(net.norm(z).unflatten(1, (14, 14))).amax()

    step, gradient = 1e-6, torch.zeros_like(tokens)
    with torch.no_grad():
        for d in range(tokens.shape[-1]):
            # the mean gradient over patches is the change when all patches move together
            moved = tokens.clone()
            moved[:, 1:-4, d] += step
            gradient[:, 1:-4, d] = (logit(moved) - logit(tokens)) / step / 196
        scores = (tokens * gradient)[:, 1:-4].sum(-1).relu().view(14, 14)
        got = BASELINES["gradcam"](net)(x[:1].double())["map"][0]
    torch.testing.assert_close(got, (scores - scores.min()) / (scores.max() - scores.min()), rtol=1e-3, atol=1e-3)


def test_rollout_of_uniform_attention(net, x):
    for block in net.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)
        torch.nn.init.zeros_(block.attn.qkv.bias)
    _, reach = BASELINES["rollout"](net).scores(x)
    # every patch is reached alike, and with the other tokens it all adds up to one
    assert reach.std() < 1e-6
    share = 0.5**3
    mixed = (1 - share) / 201
    assert reach[0, 0, 0].item() == pytest.approx(share / 196 + mixed, rel=1e-4)


def test_grad_cam_is_that_of_the_library(net, x):
    library = pytest.importorskip("pytorch_grad_cam", reason="needs pip install grad-cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")

    class Tapped(torch.nn.Module):
        """A block whose input tokens can be watched."""

        def __init__(self, block):
            super().__init__()
            self.tap, self.block = torch.nn.Identity(), block

        def forward(self, z, *rest):
            return self.block(self.tap(z), *rest)

    class Logits(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x)["logits"]

    wanted = torch.tensor([1, 0])
    ours = BASELINES["gradcam"](net)(x, wanted)["map"]
    net.blocks[-1] = Tapped(net.blocks[-1])
    peer = library.GradCAM(
        Logits(net), [net.blocks[-1].tap], reshape_transform=lambda z: z[:, 1:-4].transpose(1, 2).unflatten(2, (14, 14))
    )
    maps = peer(x.clone().requires_grad_(), [targets.ClassifierOutputTarget(int(c)) for c in wanted])
    for one, other in zip(ours.numpy(), maps):
        enlarged = cv2.resize(one, (224, 224))
        low, high = enlarged.min(), enlarged.max()
        np.testing.assert_allclose(other, (enlarged - low) / (high - low), atol=1e-4)
