"""Exact tensor operations, each with a plain reference and faster back ends; see CONTRIBUTING.md to add one."""

from .packing import pack_masks, popcount, unpack_masks

__all__ = ["pack_masks", "popcount", "unpack_masks"]
