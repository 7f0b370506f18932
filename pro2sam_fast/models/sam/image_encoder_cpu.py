"""The ViT image encoder of SAM on a CPU, for inference: the same function as `ImageEncoderViT` in the order that keeps
its working set in the cache.

Rows of tokens pass through a block a band at a time, so neither the MLP's hidden layer nor the scores of more than a
few hundred queries ever exist in memory. Window attention projects the real tokens only: padding comes after the norm,
so the keys and values of pad tokens are the bias. The residual stream and the norms are float32; products run in the
dtype of autocast, their weights cast as they are needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cpu import linear
from .layers import resized_table

if TYPE_CHECKING:
    from .image_encoder import Attention, Block

# Scores of one tile of queries: 4 MB in float32, which stay in the cache between their three passes.
_MAX_SCORES = 1 << 20
# Rows of the MLP's hidden layer at a time.
_TOKENS_PER_BAND = 1024


def run_block(block: Block, x: Tensor, dtype: torch.dtype) -> None:
    """One block on the residual stream ``x`` float32 (h, w, D), in place."""
    with torch.autocast("cpu", enabled=False):
        weights = _Weights(block, dtype)
        if block.window_size:
            _window_attention(block, weights, x)
        else:
            _global_attention(block, weights, x)
        h, w, dim = x.shape
        for band in x.view(h * w, dim).split(_TOKENS_PER_BAND):
            hidden = linear(block.norm2(band).to(dtype), *weights.lin1, act=block.mlp.act)
            band += linear(hidden, *weights.lin2)


class _Weights:
    """Weights and biases of a block's four linear layers in the dtype of products."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.qkv, self.proj = self._cast(block.attn.qkv), self._cast(block.attn.proj)
        self.lin1, self.lin2 = self._cast(block.mlp.lin1), self._cast(block.mlp.lin2)

    def _cast(self, layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
        return layer.weight.to(self.dtype), None if layer.bias is None else layer.bias.to(self.dtype)


def _global_attention(block: Block, weights: _Weights, x: Tensor) -> None:
    h, w, dim = x.shape
    heads = block.attn.num_heads
    tokens = x.view(h * w, dim)
    y = block.norm1(tokens).to(weights.dtype)
    weight, bias = weights.qkv
    qk = linear(y, weight[: 2 * dim], None if bias is None else bias[: 2 * dim]).view(h * w, 2, heads, -1)
    # (heads*d, N): values come transposed, as the second product wants them
    v = linear(weight[2 * dim :], y)
    if bias is not None:
        v += bias[2 * dim :, None]
    v = v.view(heads, -1, h * w)
    out = torch.empty_like(qk[:, 0])
    rows = min(h, max(1, _MAX_SCORES // (w * h * w)))
    bias = qk.new_empty(rows, w, h, w)
    for head in range(heads):
        q, k = qk[:, 0, head].contiguous(), qk[:, 1, head] * qk.shape[-1] ** -0.5
        terms = relative_terms(q, block.attn, (h, w))
        for start in range(0, h, rows):
            tile = slice(start * w, min(start + rows, h) * w)
            scores = _scores(q[tile], k, [t[start : start + rows] for t in terms], bias)
            out[tile, head] = linear(torch.softmax(scores, -1, out=scores), v[head])
    tokens += linear(out.view(h * w, dim), *weights.proj)


def _scores(q: Tensor, k: Tensor, terms: list[Tensor], bias: Tensor) -> Tensor:
    """q (r*w, d) and k (h*w, d) of one head, terms (r, w, h) and (r, w, w) or none -> logits (r*w, h*w)."""
    if not terms:
        return linear(q, k)
    term_h, term_w = terms
    bias = bias[: len(term_h)]
    torch.add(term_h[..., None], term_w[..., None, :], out=bias)
    return linear(q, k, add=bias.view(len(q), len(k)))


def _window_attention(block: Block, weights: _Weights, x: Tensor) -> None:
    window, heads = block.window_size, block.attn.num_heads
    for band in x.split(window):
        h, w, dim = band.shape
        qkv = linear(block.norm1(band).to(weights.dtype).view(h * w, dim), *weights.qkv)
        across = -(-w // window)
        if (h, w) != (window, across * window):
            bias = weights.qkv[1] if weights.qkv[1] is not None else qkv.new_zeros(3 * dim)
            padded = bias.expand(window, across * window, -1).contiguous()
            padded[:h, :w] = qkv.view(h, w, 3 * dim)
            qkv = padded
        # (window, across*window, 3*heads*d) -> 3 x (across*heads, window*window, d)
        qkv = qkv.view(window, across, window, 3, heads, -1).permute(3, 1, 4, 0, 2, 5)
        q, k, v = qkv.reshape(3, across * heads, window * window, -1)
        q = q[:, : h * window]  # the rows of pad queries
        terms = relative_terms(q, block.attn, (window, window))
        out = _attend_windows(q, k, v, terms)
        # (across*heads, h*window, d) -> (h, across*window, heads*d)
        out = out.view(across, heads, h, window, -1).permute(2, 0, 3, 1, 4).reshape(h, across * window, dim)
        band += linear(out[:, :w].reshape(h * w, dim), *weights.proj).view(h, w, dim)


def _attend_windows(q: Tensor, k: Tensor, v: Tensor, terms: list[Tensor]) -> Tensor:
    """q (n, r*w, d), k, v (n, h*w, d), terms (n, r, w, h) and (n, r, w, w) or none -> (n, r*w, d)."""
    n, queries, d = q.shape
    if q.dtype == torch.float32:
        bias = (terms[0][..., None] + terms[1][..., None, :]).view(n, queries, -1) if terms else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    # fused attention would multiply in float32; here the key's row and column, one-hot, pick the terms in the product
    k = k * d**-0.5
    if terms:
        h, w = terms[0].shape[-1], terms[1].shape[-1]
        q = torch.cat([q, *(t.reshape(n, queries, -1) for t in terms)], -1)
        row = torch.eye(h, dtype=k.dtype).repeat_interleave(w, 0)
        column = torch.eye(w, dtype=k.dtype).repeat(h, 1)
        k = torch.cat([k, row.expand(n, -1, -1), column.expand(n, -1, -1)], -1)
    scores = q @ k.transpose(-1, -2)
    return torch.softmax(scores, -1, out=scores) @ v


def relative_terms(q: Tensor, attn: Attention, size: tuple[int, int]) -> list[Tensor]:
    """Positional terms of queries, see `image_encoder.relative_position_terms`.

    Args:
        q: (..., r*w, d), r rows of w queries, the first row being row 0 of the grid.
        attn: has the tables (2h-1, d) and (2w-1, d), or none. size: (h, w) of the keys' grid.

    Returns:
        (..., r, w, h) and (..., r, w, w), strided views of one product with both tables; nothing without tables.
    """
    if not attn.use_rel_pos:
        return []
    h, w = size
    tables = [resized_table(t, side).flip(0) for t, side in ((attn.rel_pos_h, h), (attn.rel_pos_w, w))]
    *batch, n, d = q.shape
    product = linear(q.reshape(-1, d), torch.cat(tables).to(q.dtype)).view(*batch, n // w, w, -1)
    # entry [y, x, j] belongs to the key at offset j - (h-1) from y: moving one row down slides the h keys back by one
    *outer, down, right, _ = product.stride()
    first = product.storage_offset()
    shape = product.shape[:-1]
    return [
        product.as_strided((*shape, h), (*outer, down - 1, right, 1), first + h - 1),
        product.as_strided((*shape, w), (*outer, down, right - 1, 1), first + 2 * h - 1 + w - 1),
    ]
