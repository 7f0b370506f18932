"""Exact tensor operations, each with a plain reference and faster back ends; see CONTRIBUTING.md to add one."""

from .mask_match import mask_iou, mask_match
from .packing import pack_masks, popcount, unpack_masks

__all__ = ["mask_iou", "mask_match", "pack_masks", "popcount", "unpack_masks"]
