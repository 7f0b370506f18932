"""One op at a time: mask matching and mask IoU, gated attention, grid decoding, post-processing, NMS, clean-up."""

from __future__ import annotations

from collections.abc import Iterator

from case import Case

from . import Options, decoding, gated_attention, mask_clean, mask_match, nms, postprocess

__all__ = ["cases"]


def cases(options: Options) -> Iterator[Case]:
    for module in (mask_match, gated_attention, decoding, postprocess, nms, mask_clean):
        yield from module.cases(options)
