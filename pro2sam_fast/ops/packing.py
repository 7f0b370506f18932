"""Bit-packed masks.

Layout: a mask of H rows and W columns is int64 (H, ceil(W / 64)), each row on its own words. Pixel x of a row is bit
`x % 64` of word `x // 64`, bit 0 being the least significant; the bits beyond W in a row's last word are zero. A
gallery is (K, H, ceil(W / 64)), which flattens to (K, n) words for `mask_match` and `mask_iou`. Words hold bit
patterns: the sign of an int64 carries no meaning.
"""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["pack_masks", "popcount", "unpack_masks"]

WORD_BITS = 64


def words_per_row(width: int) -> int:
    """Number of int64 words that hold a row of `width` pixels."""
    return -(-width // WORD_BITS)


def pack_masks(masks: torch.Tensor) -> torch.Tensor:
    """Pack masks into 64-pixel words, see the layout above.

    Args:
        masks: bool (..., H, W), any device.

    Returns:
        int64 (..., H, ceil(W / 64)), contiguous, on the same device.

    Raises:
        TypeError: `masks` isn't a bool tensor.
        ValueError: fewer than two dimensions.
    """
    if not isinstance(masks, torch.Tensor) or masks.dtype != torch.bool:
        raise TypeError(f"masks must be a bool tensor, got {_describe(masks)}")
    if masks.dim() < 2:
        raise ValueError(f"masks must have shape (..., H, W), got {tuple(masks.shape)}")
    *lead, width = masks.shape
    words = words_per_row(width)
    if width == 0:
        return masks.new_empty((*lead, 0), dtype=torch.int64)
    if _is_plain_cpu(masks):
        packed = np.zeros((*lead, words * 8), dtype=np.uint8)
        packed[..., : -(-width // 8)] = np.packbits(masks.numpy(), axis=-1, bitorder="little")
        return torch.from_numpy(packed.view("<i8"))
    padded = torch.nn.functional.pad(masks.to(torch.uint8), (0, words * WORD_BITS - width))
    # Eight 0/1 bytes b_i 2^(8i) times sum_j 2^(56 - 7j): byte 7 of the product collects b_i at its bit i, carry-free.
    octets = (padded.contiguous().view(torch.int64) * 0x0102040810204080) >> 56
    return octets.to(torch.uint8).view(torch.int64)


def unpack_masks(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Inverse of `pack_masks`.

    Args:
        packed: int64 (..., H, ceil(width / 64)), any device.
        width: W, pixels a row.

    Returns:
        bool (..., H, W), contiguous, on the same device.

    Raises:
        TypeError: `packed` isn't an int64 tensor.
        ValueError: the last dimension isn't ceil(width / 64), or `width` is negative.
    """
    if not isinstance(packed, torch.Tensor) or packed.dtype != torch.int64:
        raise TypeError(f"packed must be an int64 tensor, got {_describe(packed)}")
    if width < 0 or packed.dim() < 2 or packed.shape[-1] != words_per_row(width):
        raise ValueError(
            f"packed must have shape (..., H, {words_per_row(width)}) for width {width}, got {tuple(packed.shape)}"
        )
    if width == 0:
        return packed.new_zeros(packed.shape, dtype=torch.bool)
    octets = packed.contiguous().view(torch.uint8)
    if _is_plain_cpu(packed):
        bits = np.unpackbits(octets.numpy(), axis=-1, count=width, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_))
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (octets.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :width].to(torch.bool).contiguous()


def popcount(packed: torch.Tensor) -> torch.Tensor:
    """Number of set pixels of each packed mask.

    Args:
        packed: int64 (K, ...), any device; typically (K, n) or (K, H, n).

    Returns:
        int64 (K,).

    Raises:
        TypeError: `packed` isn't an int64 tensor.
        ValueError: `packed` has no dimensions.
    """
    if not isinstance(packed, torch.Tensor) or packed.dtype != torch.int64:
        raise TypeError(f"packed must be an int64 tensor, got {_describe(packed)}")
    if packed.dim() == 0:
        raise ValueError("packed must have shape (K, ...), got a scalar")
    bits = word_popcount(packed)
    return bits.sum(dim=tuple(range(1, packed.dim()))) if packed.dim() > 1 else bits


def word_popcount(words: torch.Tensor) -> torch.Tensor:
    """Set bits of each word, int64 to int64 of the same shape. `>>` drags the sign in, the bit masks drop it again."""
    pairs = words - ((words >> 1) & 0x5555555555555555)
    nibbles = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (octets * 0x0101010101010101) >> 56


def _is_plain_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and type(tensor) is torch.Tensor and not torch.compiler.is_compiling()


def _describe(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, torch.Tensor) else type(value).__name__
