"""Exact tensor operations, each with a plain reference and faster back ends; see CONTRIBUTING.md to add one."""

from .add_layer_norm import add_layer_norm
from .compact import compact
from .contour_sweep import contour_sweep
from .decode_sweeps import decode_sweep0, decode_sweep1, decode_sweep2
from .decode_upscale import decode_upscale
from .gated_attention import gated_attention, query_maps
from .mask_clean import mask_clean
from .mask_match import mask_iou, mask_match
from .mask_measure import mask_measure, mask_pack
from .nms import nms
from .packing import pack_masks, popcount, unpack_masks
from .relative_attention import relative_attention

__all__ = [
    "add_layer_norm",
    "compact",
    "contour_sweep",
    "decode_sweep0",
    "decode_sweep1",
    "decode_sweep2",
    "decode_upscale",
    "gated_attention",
    "mask_clean",
    "mask_iou",
    "mask_match",
    "mask_measure",
    "mask_pack",
    "nms",
    "pack_masks",
    "popcount",
    "query_maps",
    "relative_attention",
    "unpack_masks",
]
