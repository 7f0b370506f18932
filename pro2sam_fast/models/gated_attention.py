"""Attention of GTFormer's blocks: the op `gated_attention`, and the published form, which measurements compare with.

See `ops.gated_attention` for the formulas and their source.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..ops.gated_attention import gated_attention, query_maps

__all__ = ["attention", "gated_attention", "gated_attention_reference", "query_maps"]


def attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Multi-head softmax attention: q, k, v (B, N, D), heads side by side -> (B, N, D)."""
    return gated_attention(q, k, v, num_heads, 0, gate=False)[0]


def gated_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, num_queries: int, *, gate: bool = True
) -> tuple[Tensor, Tensor]:
    """The published form, materialised per head in the inputs' dtype. Arguments and results as `gated_attention`."""
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, H, N, d)
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, N, N)
    weights = logits.softmax(-1)
    maps = logits[:, :, -num_queries:].mean(1).sigmoid()  # (B, G, N)
    if gate:
        weights = weights * maps.mean(1)[:, None, None, :]
    return (weights @ v).transpose(1, 2).flatten(2), maps
