"""The layout in which the sweeps of the mask decoder read what all prompts of an image share.

Pixels come in tiles of 64 (the last one padded with zeros) and are the fastest dimension, so that a vector register
holds the same channel of neighbouring pixels. On a CPU bfloat16 comes in the `pair` that a dot-product instruction
multiplies at once; elsewhere, and in other types, a `pair` is one number. Channels that meet a prompt's vector pair up
by channel (`pack_pixels`); channels that are averaged over pixels pair up by pixel (`pack_values`).
"""

from __future__ import annotations

import torch

__all__ = ["TILE", "VALUE_LANES", "pack_pixels", "pack_values", "pair", "unpack_pixels", "unpack_values"]

TILE = 64
VALUE_LANES = 16


def pair(dtype: torch.dtype, device_type: str = "cpu") -> int:
    """Numbers that are multiplied at once: 2 for bfloat16 on a CPU, else 1."""
    return 2 if dtype == torch.bfloat16 and device_type == "cpu" else 1


def pack_pixels(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float (B, K, P), K even -> ``dtype`` (B, tiles, K / pair, 64, pair). Fastest if K is the dense dimension of x."""
    n = pair(dtype, x.device.type)
    words = _words(_padded(x.to(dtype), TILE).transpose(1, 2), n)
    return _numbers(words.unflatten(1, (-1, TILE)).transpose(2, 3), dtype, n)


def unpack_pixels(packed: torch.Tensor, pixels: int) -> torch.Tensor:
    """The inverse of `pack_pixels`, in float32: (B, tiles, K / pair, 64, pair) -> (B, K, P)."""
    return packed.float().permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2)[..., :pixels]


def pack_values(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float (B, V, heads, d, P) -> ``dtype`` (B, tiles, V, heads, 64 / pair, d rounded up to 16, pair)."""
    n = pair(dtype, x.device.type)
    words = _words(_padded(x.to(dtype), TILE), n).unflatten(-1, (-1, TILE // n))
    return _numbers(_padded(words.permute(0, 4, 1, 2, 5, 3), VALUE_LANES), dtype, n)


def unpack_values(packed: torch.Tensor, width: int, pixels: int) -> torch.Tensor:
    """The inverse of `pack_values`, in float32, for heads of ``width`` d: -> (B, V, heads, d, P)."""
    return packed.float().permute(0, 2, 3, 5, 1, 4, 6).flatten(4)[:, :, :, :width, :pixels]


def _words(x: torch.Tensor, n: int) -> torch.Tensor:
    # (..., m) -> (..., m / n): copies move whole words
    return x.contiguous().view(torch.int32) if n > 1 else x


def _numbers(words: torch.Tensor, dtype: torch.dtype, n: int) -> torch.Tensor:
    # (...) -> (..., n)
    return words.contiguous().view(dtype).unflatten(-1, (-1, n))


def _padded(x: torch.Tensor, multiple: int) -> torch.Tensor:
    # zeros behind the last dimension
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % multiple))
