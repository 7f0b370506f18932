import numpy as np
import pytest
import torch

from pro2sam_fast.ops import pack_masks, packing, popcount, unpack_masks
from pro2sam_fast.testing import UNKIND_COUNTS, UNKIND_SIZES, random_masks


@pytest.fixture(params=["numpy", "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(packing, "_is_plain_cpu", lambda tensor: False)


@pytest.mark.parametrize("size", UNKIND_SIZES)
@pytest.mark.parametrize("count", UNKIND_COUNTS)
def test_round_trip(path, count, size):
    masks = random_masks(count, *size)
    packed = pack_masks(masks)
    assert packed.dtype == torch.int64 and packed.shape == (count, size[0], -(-size[1] // 64))
    assert packed.is_contiguous()
    assert torch.equal(unpack_masks(packed, size[1]), masks)
    assert torch.equal(popcount(packed), masks.sum((1, 2)))
    assert torch.equal(popcount(packed.flatten(1)), masks.sum((1, 2)))


def test_layout(path):
    mask = torch.zeros((2, 130), dtype=torch.bool)
    mask[0, 0] = mask[0, 65] = mask[1, 63] = mask[1, 129] = True
    assert pack_masks(mask).tolist() == [[1, 2, 0], [-(2**63), 0, 2]]


def test_bits_beyond_the_width_are_zero(path):
    full = torch.ones((4, 3, 70), dtype=torch.bool)
    assert popcount(pack_masks(full)).tolist() == [210] * 4


def test_leading_dimensions_and_strides(path):
    masks = random_masks(6, 40, 70).unflatten(0, (2, 3))
    packed = pack_masks(masks.transpose(0, 1)[:, :, ::2])
    assert torch.equal(unpack_masks(packed, 70), masks.transpose(0, 1)[:, :, ::2])
    assert torch.equal(unpack_masks(packed.transpose(0, 1), 70), masks[:, :, ::2])
    assert pack_masks(masks[0, 0]).shape == (40, 2)


def test_popcount_of_every_pattern():
    words = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, size=(200, 5))
    words[0], words[1], words[2] = 0, -1, -(2**63)
    expected = [sum(bin(int(word) & (2**64 - 1)).count("1") for word in row) for row in words]
    assert popcount(torch.from_numpy(words)).tolist() == expected
    assert popcount(torch.from_numpy(words[:, 0])).shape == (200,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pack_masks(torch.zeros(3, 4)), TypeError, "bool tensor, got a torch.float32 tensor"),
        (lambda: pack_masks(np.zeros((3, 4), bool)), TypeError, "bool tensor, got ndarray"),
        (lambda: pack_masks(torch.zeros(3, dtype=torch.bool)), ValueError, r"\(\.\.\., H, W\), got \(3,\)"),
        (lambda: unpack_masks(torch.zeros(3, 4), 200), TypeError, "int64 tensor, got a torch.float32 tensor"),
        (lambda: unpack_masks(torch.zeros(3, 4, dtype=torch.int64), 300), ValueError, r"H, 5\) for width 300"),
        (lambda: unpack_masks(torch.zeros(3, 0, dtype=torch.int64), -5), ValueError, "width -5"),
        (lambda: popcount(torch.zeros(3)), TypeError, "int64 tensor"),
        (lambda: popcount(torch.zeros((), dtype=torch.int64)), ValueError, "scalar"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_compiles():
    def through(masks):
        return popcount(pack_masks(masks)), unpack_masks(pack_masks(masks), masks.shape[-1])

    masks = random_masks(3, 5, 70)
    compiled = torch.compile(through, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(masks), through(masks), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.cuda
def test_cuda_equals_cpu():
    masks = random_masks(9, 63, 65)
    packed = pack_masks(masks.cuda())
    assert torch.equal(packed.cpu(), pack_masks(masks))
    assert torch.equal(unpack_masks(packed, 65).cpu(), masks)
