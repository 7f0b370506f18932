"""Torch's OpenMP team shares work out where there is one, threads of our own elsewhere: the results are equal."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pro2sam_fast import _cpu
from pro2sam_fast.ops import gated_attention, mask_match, mask_measure, pack_masks
from pro2sam_fast.testing import assert_matches, random_masks


@pytest.fixture(params=["OpenMP", "own"])
def team(request):
    if request.param == "OpenMP" and not _cpu.openmp_used():
        pytest.skip("this process holds no OpenMP runtime that the kernels can use")
    _cpu.openmp_allow(request.param == "OpenMP")
    assert _cpu.openmp_used() == (request.param == "OpenMP")
    yield request.param
    _cpu.openmp_allow(True)


def results(threads):
    """Of ops that share out prompts, rows and heads, with more and with fewer parts than threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(0)
        masks = pack_masks(random_masks(600, 64, 70)).flatten(1)
        logits = torch.randn((7, 16, 16), generator=generator)
        qkv = torch.randn((3, 70, 96), generator=generator).requires_grad_()
        out, maps = gated_attention(*qkv.chunk(3, -1), 2, 3, backend="cpu")
        (grad,) = torch.autograd.grad(out.square().sum() + maps.sum(), qkv)
        one_head = gated_attention(*qkv[:1].detach().chunk(3, -1), 1, 1, backend="cpu")
        measures = mask_measure(logits, 80, (69, 70), (69, 70), 0.0, 1.0, backend="cpu")
        return (*mask_match(masks, masks[1], backend="cpu"), *measures, out.detach(), maps.detach(), grad, *one_head)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [2, 5])
def test_results_do_not_depend_on_who_shares_out_the_work(team, threads):
    assert_matches(results(threads), results(1), "exact")


def test_calls_from_several_threads_at_once_share_nothing(team):
    expected = results(2)
    with ThreadPoolExecutor(3) as pool:
        for actual in pool.map(lambda _: results(2), range(6)):
            assert_matches(actual, expected, "exact")
