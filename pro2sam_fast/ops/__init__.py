"""Exact tensor operations, each with a plain reference and faster back ends; see CONTRIBUTING.md to add one."""

from .decode_sweeps import decode_sweep0, decode_sweep1, decode_sweep2
from .decode_upscale import decode_upscale
from .mask_match import mask_iou, mask_match
from .packing import pack_masks, popcount, unpack_masks

__all__ = [
    "decode_sweep0",
    "decode_sweep1",
    "decode_sweep2",
    "decode_upscale",
    "mask_iou",
    "mask_match",
    "pack_masks",
    "popcount",
    "unpack_masks",
]
