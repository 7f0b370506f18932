"""Non-maximum suppression of boxes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from case import Case, Floor, Runs
from peers import attempt
from torch import Tensor

from pro2sam_fast.postprocess import nms

from . import Options
from .shared import instruction_sets

__all__ = ["cases", "torchvision_nms"]

TESTS = ("tests/ops/test_nms.py",)
COUNTS = (100, 1000, 3000, 10_000)
DEFAULT = (100, 1000, 10_000)
IOU = 0.7


def cases(options: Options) -> Iterator[Case]:
    for count in COUNTS:
        yield Case(
            "nms",
            f"K={count}",
            "float32",
            TESTS,
            functools.partial(_build, options, count),
            functools.partial(_floor, count),
            count in DEFAULT,
        )


def _floor(count: int, facts) -> Floor:
    formula = "boxes and scores read, indices written; pair tests aren't counted: sorting in space avoids most of them"
    return Floor(bytes=(16 + 4) * count + 8 * facts["kept"], formula=formula)


def _build(options: Options, count: int) -> Runs:
    boxes, scores = (x.to(options.device) for x in _boxes(count))
    ours = functools.partial(nms, boxes, scores, IOU)
    peers = {"torchvision": torchvision_nms(boxes, scores, IOU)}
    return Runs(instruction_sets(options.device, ours), peers, {"kept": len(ours())})


def torchvision_nms(boxes: Tensor, scores: Tensor, threshold: float):
    """torchvision's, with the conversion to float that segment_anything needs for it."""

    def build() -> Callable[[], object]:
        from torchvision.ops import nms as theirs

        return lambda: theirs(boxes.float(), scores, threshold)

    return attempt(build)


def _boxes(count: int) -> tuple[Tensor, Tensor]:
    """Boxes as a grid of points finds them, about six of each object: int64 (count, 4) in a 1024 x 1024 photo."""
    generator = torch.Generator().manual_seed(0)
    objects = torch.rand((-(-count // 6), 4), generator=generator)
    centre, size = 1024 * objects[:, :2], 16 + 300 * objects[:, 2:] ** 2
    which = torch.randint(len(objects), (count,), generator=generator)
    jitter = 1 + 0.05 * torch.randn((2, count, 2), generator=generator)
    centre, size = centre[which] + size[which] * (jitter[0] - 1), size[which] * jitter[1].abs()
    boxes = torch.cat([centre - size / 2, centre + size / 2], 1).clamp(0, 1023).long()
    return boxes, torch.rand(count, generator=generator)
