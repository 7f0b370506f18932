"""Clean-up of small regions in packed masks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from case import Case, Floor, Runs
from peers import attempt
from torch import Tensor

from pro2sam_fast.ops import mask_clean, pack_masks

from . import Options

__all__ = ["cases"]

TESTS = ("tests/ops/test_mask_clean.py",)
HEIGHT, WIDTH = 480, 640
COUNTS = (8, 64)
MIN_AREA = 100


def cases(options: Options) -> Iterator[Case]:
    for count in COUNTS:
        build = functools.partial(_build, options, count)
        floor = Floor(bytes=2 * count * HEIGHT * WIDTH // 8, formula="packed masks read and written")
        yield Case("mask_clean", f"K={count} {HEIGHT}x{WIDTH}", "int64", TESTS, build, lambda facts, floor=floor: floor)


def _build(options: Options, count: int) -> Runs:
    dense = _masks(count)
    masks = pack_masks(dense).to(options.device)
    ours = {name: functools.partial(mask_clean, masks, WIDTH, MIN_AREA, name) for name in ("auto", "reference")}
    return Runs(ours, {"segment_anything": _original(dense)})


def _original(masks: Tensor):
    """segment_anything's, for masks that are dense already."""

    def build() -> Callable[[], object]:
        from segment_anything.utils.amg import remove_small_regions

        remove_small_regions(masks[0].numpy(), MIN_AREA, "holes")  # fails here without OpenCV

        def run() -> None:
            for mask in masks.numpy():
                for mode in ("holes", "islands"):
                    mask, _ = remove_small_regions(mask, MIN_AREA, mode)

        return run

    return attempt(build)


def _masks(count: int) -> Tensor:
    """Smooth blobs with rough edges, so that most have small holes and islands: bool (count, HEIGHT, WIDTH)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn((count, 1, 6, 8), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic")[:, 0]
    return smooth + 0.1 * torch.randn((count, HEIGHT, WIDTH), generator=generator) > 0.3
