import numpy as np
import pytest
import torch

from pro2sam_fast.errors import BackendError, ConfigError
from pro2sam_fast.ops import mask_clean, pack_masks, unpack_masks
from pro2sam_fast.testing import assert_matches, backend_cases, forced_isa, random_masks

CASES = [case for case in backend_cases() if case.problem is None and case.backend in ("auto", "cpu", "reference")]
SIZES = [(1, 1), (1, 64), (2, 129), (17, 63), (33, 65), (40, 128)]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    with forced_isa(request.param.isa):
        yield request.param


def blobs(count, size, density, seed):
    """Masks of noise, coarse in some of them, so that regions of all sizes touch, also across words and at corners."""
    generator = np.random.default_rng(seed)
    masks = []
    for i in range(count):
        scale = 1 + i % 4
        noise = generator.random((size[0] // scale + 1, size[1] // scale + 1)) < density
        masks.append(noise.repeat(scale, 0).repeat(scale, 1)[: size[0], : size[1]])
    return torch.from_numpy(np.stack(masks))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("min_area", [0.5, 1, 2, 5, 20.5, 100, 1e9])
def test_parity(case, size, min_area):
    for density in (0.05, 0.4, 0.6, 0.95):
        masks = pack_masks(blobs(8, size, density, seed=size[1])).to(case.device)
        expected = mask_clean(masks, size[1], min_area, backend="reference")
        before = masks.clone()
        assert_matches(mask_clean(masks, size[1], min_area, backend=case.backend), expected, "exact")
        assert torch.equal(masks, before)


@pytest.mark.parametrize("value", [False, True])
def test_uniform_masks(case, value):
    masks = torch.full((3, 5, 70), value).to(case.device)
    for min_area in (1, 350, 351):
        cleaned, changed = mask_clean(pack_masks(masks), 70, min_area, backend=case.backend)
        # a frame of 350 pixels that is all background is a hole if that is few
        assert bool(unpack_masks(cleaned, 70).all()) == (value or min_area > 350)
        assert bool(changed.any()) == (min_area > 350)


def test_order_of_equal_regions(case):
    masks = torch.zeros(1, 2, 130, dtype=torch.bool)
    masks[0, 0, 129] = masks[0, 1, 64] = True  # the second lies in an earlier block of 2 x 2 pixels
    cleaned, changed = mask_clean(pack_masks(masks), 130, 5, backend=case.backend)
    assert changed.all() and unpack_masks(cleaned, 130).nonzero().tolist() == [[0, 1, 64]]


def test_strided_masks_no_masks_and_threads(case):
    masks = pack_masks(random_masks(6, 20, 130))[::2].transpose(0, 1).contiguous().transpose(0, 1)
    expected = mask_clean(masks.contiguous(), 130, 10, backend="reference")
    threads = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        try:
            assert_matches(mask_clean(masks, 130, 10, backend=case.backend), expected, "exact")
        finally:
            torch.set_num_threads(threads)
    cleaned, changed = mask_clean(masks[:0], 130, 10, backend=case.backend)
    assert cleaned.shape == (0, 20, 3) and changed.shape == (0,)


def test_wrong_arguments():
    masks = torch.zeros(2, 4, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match="int64"):
        mask_clean(masks.int(), 65, 5)
    for wrong, width in ((masks, 64), (masks[0], 65), (masks[:, :0], 65)):
        with pytest.raises(ValueError, match="masks of"):
            mask_clean(wrong, width, 5)
    with pytest.raises(ConfigError):
        mask_clean(masks, 65, 5, backend="fast")
    with pytest.raises(BackendError):
        mask_clean(masks, 65, 5, backend="triton")


def test_opcheck():
    masks = pack_masks(random_masks(3, 5, 70))
    torch.library.opcheck(torch.ops.pro2sam_fast.mask_clean.default, (masks, 70, 3.0))
