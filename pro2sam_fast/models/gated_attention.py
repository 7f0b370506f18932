"""Global-token attention: a fused form and the plain materialised form that specifies it.

Source: Pro2SAM (ECCV 2024), global-token attention; with one query token it is the spatial-aware attention of SAT (ICCV
    2023).
For one image with N tokens, of which the last G are query tokens, and H heads of width d:

    S^h = q^h (k^h)^T / sqrt(d);  A^h = softmax over keys of S^h
    z_g[j] = mean over h of S^h[i_g, j];  mu_g = sigmoid(z_g);  m = mean over g of mu_g
    o^h = (A^h * m) v^h                       column j scaled by m[j], rows not renormalised
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["gated_attention", "gated_attention_reference", "query_maps"]


def query_maps(query_q: Tensor, k: Tensor, num_heads: int) -> Tensor:
    """Foreground probability of every key for every query token.

    The head mean of the scaled logits is one product over all D channels divided by H*sqrt(d), so no per-head work is
    needed.

    Args:
        query_q: (B, G, D) projected queries of the G query tokens, heads side by side.
        k: (B, N, D) projected keys, heads side by side.
        num_heads: H, a divisor of D.

    Returns:
        (B, G, N) in (0, 1); float64 for float64 inputs, else float32, also under autocast.
    """
    dim = k.shape[-1]
    dtype = torch.promote_types(k.dtype, torch.float32)
    scale = 1.0 / (num_heads * math.sqrt(dim // num_heads))
    with torch.autocast(device_type=k.device.type, enabled=False):
        return torch.sigmoid((query_q.to(dtype) * scale) @ k.to(dtype).transpose(-2, -1))


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    num_queries: int,
    *,
    gate: bool = True,
    query_rows: slice | None = None,
) -> tuple[Tensor, Tensor]:
    """Global-token attention through fused attention on gated values.

    Scaling columns of A commutes with the value product, (A * m) V = A (m * V), so any fused attention serves. The gate
    is computed and applied in float32 (float64 for float64 inputs) and the gated values are rounded to the dtype of
    `v`.

    Args:
        q, k, v: (B, N, D) projections of all N tokens, heads side by side; the last `num_queries` tokens are the query
            tokens.
        num_heads: H, a divisor of D.
        num_queries: G >= 1.
        gate: False computes the maps but leaves the values alone (ablation without the gate).
        query_rows: rows of the output to compute; None for all N.

    Returns:
        Output (B, R, D) in the dtype of `v`, R = N or the length of `query_rows`, and the maps (B, G, N), see
        `query_maps`.
    """
    maps = query_maps(q[:, -num_queries:], k, num_heads)
    if gate:
        v = (v * maps.mean(1).unsqueeze(-1)).to(v.dtype)
    if query_rows is not None:
        q = q[:, query_rows]
    return attention(q, k, v, num_heads), maps


def attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Multi-head softmax attention: q (B, R, D), k and v (B, N, D), heads side by side -> (B, R, D)."""
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def gated_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, num_queries: int, *, gate: bool = True
) -> tuple[Tensor, Tensor]:
    """The module docstring's formulas, materialised per head. Arguments and results as `gated_attention`, all rows."""
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, H, N, d)
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, N, N)
    weights = logits.softmax(-1)
    maps = logits[:, :, -num_queries:].mean(1).sigmoid()  # (B, G, N)
    if gate:
        weights = weights * maps.mean(1)[:, None, None, :]
    return (weights @ v).transpose(1, 2).flatten(2), maps
