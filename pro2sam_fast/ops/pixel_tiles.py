"""The layout in which the sweeps of the mask decoder read what all prompts of an image share.

Pixels come in tiles of 64 (the last one padded with zeros) and are the fastest dimension, so that a vector register
holds the same channel of neighbouring pixels. Operands are 32-bit words: one float32, or the `pair` of bfloat16 that a
dot-product instruction multiplies at once. Channels that meet a prompt's vector pair up by channel (`pack_pixels`);
channels that are averaged over pixels pair up by pixel (`pack_values`).
"""

from __future__ import annotations

import torch

__all__ = ["TILE", "VALUE_LANES", "pack_pixels", "pack_values", "pair", "unpack_pixels", "unpack_values"]

TILE = 64
VALUE_LANES = 16


def pair(dtype: torch.dtype) -> int:
    """Numbers in a 32-bit word: 1 for float32, 2 for bfloat16."""
    return {torch.float32: 1, torch.bfloat16: 2}[dtype]


def pack_pixels(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float (B, K, P), K even -> ``dtype`` (B, tiles, K / pair, 64, pair). Fastest if K is the dense dimension of x."""
    words = _words(_padded(x.to(dtype), TILE).transpose(1, 2))
    return _numbers(words.unflatten(1, (-1, TILE)).transpose(2, 3), dtype)


def unpack_pixels(packed: torch.Tensor, pixels: int) -> torch.Tensor:
    """The inverse of `pack_pixels`, in float32: (B, tiles, K / pair, 64, pair) -> (B, K, P)."""
    return packed.float().permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2)[..., :pixels]


def pack_values(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float (B, V, heads, d, P) -> ``dtype`` (B, tiles, V, heads, 64 / pair, d rounded up to 16, pair)."""
    words = _words(_padded(x.to(dtype), TILE)).unflatten(-1, (-1, TILE // pair(dtype)))
    return _numbers(_padded(words.permute(0, 4, 1, 2, 5, 3), VALUE_LANES), dtype)


def unpack_values(packed: torch.Tensor, width: int, pixels: int) -> torch.Tensor:
    """The inverse of `pack_values`, in float32, for heads of ``width`` d: -> (B, V, heads, d, P)."""
    return packed.float().permute(0, 2, 3, 5, 1, 4, 6).flatten(4)[:, :, :, :width, :pixels]


def _words(x: torch.Tensor) -> torch.Tensor:
    # (..., n) -> int32 (..., n / pair): copies move whole words
    return x.contiguous().view(torch.int32)


def _numbers(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # int32 (...) -> (..., pair)
    return words.contiguous().view(dtype).unflatten(-1, (-1, pair(dtype)))


def _padded(x: torch.Tensor, multiple: int) -> torch.Tensor:
    # zeros behind the last dimension
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % multiple))
