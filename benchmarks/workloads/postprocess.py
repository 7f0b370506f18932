"""Post-processing: low-resolution logits to stable masks and their boxes at the photo's size."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import torch
from case import Case, Floor, Runs, Skip
from peers import attempt, segment_anything
from torch import Tensor

from pro2sam_fast.postprocess import Frame, measure_masks
from pro2sam_fast.transforms import ResizeLongestSide

from . import Options
from .shared import instruction_sets, original

__all__ = ["cases", "frame_of", "measure_peer", "postprocess_floor"]

TESTS = ("tests/ops/test_mask_measure.py",)
SIDE = 1024
# masks, height, width
SIZES = ((64, 480, 640), (64, 1024, 1024), (32, 1500, 2250), (16, 3000, 4000))
OFFSET, THRESHOLD = 1.0, 0.95


def cases(options: Options) -> Iterator[Case]:
    for count, height, width in SIZES:
        frame = frame_of(height, width, SIDE)
        yield Case(
            "postprocess",
            f"K={count} {height}x{width}",
            "float32",
            TESTS,
            functools.partial(_build, options, count, frame),
            functools.partial(postprocess_floor, count, frame, 256),
        )


def frame_of(height: int, width: int, side: int) -> Frame:
    """A whole photo in an input frame of `side` pixels."""
    resized = ResizeLongestSide.get_preprocess_shape(height, width, side)
    return Frame(side, resized, (0, 0, width, height), (height, width))


def postprocess_floor(count: int, frame: Frame, low_side: int, facts: Mapping[str, object]) -> Floor:
    (h, w), (height, width) = frame.input_size, frame.image_size
    lanes = 2 * low_side * w + 2 * h * w + 2 * h * width + 2 * height * width + 6 * height * width
    return Floor(
        {"float32": 2.0 * count * lanes},
        4 * count * low_side**2,
        "lane operations K (2 l w + 2 h w + 2 h W + 8 H W), l = logits' side, (h, w) = resized photo, each counted as "
        "two flops as a matrix product does 2 a lane; logits read once; skipping tiles that are all in or all out "
        "can beat this",
    )


def _build(options: Options, count: int, frame: Frame) -> Runs:
    low_res = _logits(count, 256).to(options.device)
    ours = functools.partial(measure_masks, low_res, frame, 0.0, OFFSET, THRESHOLD)
    return Runs(
        instruction_sets(options.device, ours),
        {"segment_anything": measure_peer(options, "vit_b", low_res, frame, OFFSET, THRESHOLD)},
        {"stability_pass_rate": round(len(ours()[0]) / count, 3)},
        ("masks", count),
    )


def measure_peer(
    options: Options, name: str, low_res: Tensor, frame: Frame, offset: float, threshold: float
) -> Callable[[], object] | Skip:
    """segment_anything's post-processing of the same logits."""

    def build():
        model = original(name, options.device)
        return lambda: segment_anything.measured(model, low_res, frame, offset, threshold)

    return attempt(build)


def _logits(count: int, side: int) -> Tensor:
    """Ellipses of all sizes with ragged, more or less steep borders: float32 (count, side, side)."""
    generator = torch.Generator().manual_seed(0)
    centre, radius = (torch.rand((2, count, 1, 1), generator=generator) for _ in range(2))
    radius = 0.1 + 0.4 * radius
    y, x = (torch.linspace(0, 1, side).reshape(shape) for shape in ((1, side, 1), (1, 1, side)))
    distance = ((y - centre[0]) / radius[0]) ** 2 + ((x - centre[1]) / radius[1]) ** 2
    steep = 20 + 60 * torch.rand((count, 1, 1), generator=generator)
    return steep * (1 - distance) + torch.randn((count, side, side), generator=generator)
