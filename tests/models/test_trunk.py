"""The trunk against timm's, and folding: it follows the weights, whoever changes them."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

from pro2sam_fast.models.trunk import EfficientNetLite0

SIZES = ((64, 64), (97, 130), (33, 32))


def lively(seed=0):
    """A trunk with statistics and gains that matter."""
    torch.manual_seed(seed)
    trunk = EfficientNetLite0(10)
    for name, value in trunk.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_(std=0.2)
        elif name.endswith("running_var") or (".bn" in name and name.endswith("weight")):
            value.uniform_(0.5, 1.5)
        elif ".bn" in name and name.endswith("bias"):
            value.normal_(std=0.2)
    return trunk


def relative_error(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", SIZES)
def test_same_network_as_timm(size):
    timm = pytest.importorskip("timm")
    trunk = lively()
    net = timm.create_model("tf_efficientnet_lite0", num_classes=10).eval()
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in trunk.net.state_dict().items()}
    assert list(net.state_dict()) == list(trunk.net.state_dict())
    net.load_state_dict(trunk.net.state_dict())
    x = torch.randn(1, 3, *size)
    assert relative_error(trunk(x), net(x)) < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_inference_is_the_same_function(size):
    trunk = lively()
    x = torch.randn(2, 3, *size)
    expected = copy.deepcopy(trunk).double().features(x.double())
    modules, folded = trunk.features(x), trunk.folded().features(x)
    with torch.autocast("cpu", torch.bfloat16):
        half_modules = trunk.features(x)
        with torch.no_grad():
            half = trunk.features(x)
    with torch.no_grad():
        fast = trunk.features(x)
    strides = [tuple(-(-side // stride) for side in size) for stride in (4, 8, 16, 32)]
    assert [tuple(f.shape) for f in fast] == [(2, c, *s) for c, s in zip((24, 40, 112, 320), strides)]
    for found in (modules, folded, fast):
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, expected))
    for a, b, exact in zip(half, half_modules, expected):
        assert a.dtype == torch.bfloat16
        # rounding is random: the same size of error, not the same error
        assert relative_error(a, exact) < 1.5 * relative_error(b, exact)


def test_gradients_reach_the_input():
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    lively()(x).sum().backward()
    assert x.grad.abs().sum() > 0


def write_in_place(trunk):
    trunk.net.blocks[2][0].bn2.running_var.mul_(3)


def write_data(trunk):
    trunk.net.conv_stem.weight.data = 2 * trunk.net.conv_stem.weight.data


def load(trunk):
    trunk.load_state_dict(lively(1).state_dict())


def assign(trunk):
    trunk.load_state_dict(lively(1).state_dict(), assign=True)


@pytest.mark.parametrize("change", [write_in_place, write_data, load, assign])
def test_folded_weights_follow_the_weights(change):
    trunk = lively()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = trunk(x)
        assert torch.equal(trunk(x), before)
        change(trunk)
        after = trunk(x)
    assert relative_error(after, before) > 1e-3
    assert relative_error(after, trunk(x)) < 1e-5


def test_folding_stays_out_of_copies_and_files():
    trunk = lively()
    names = list(trunk.state_dict())
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        expected = trunk(x)
    assert list(trunk.state_dict()) == names
    for other in (copy.deepcopy(trunk), pickle.loads(pickle.dumps(trunk))):
        with torch.no_grad():
            assert torch.equal(other(x), expected)
    assert len(pickle.dumps(trunk)) == len(pickle.dumps(lively()))


def test_lite_needs_no_timm():
    code = "import sys, pro2sam_fast.models.lite; sys.exit(any(m in sys.modules for m in ('timm', 'torchvision')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
