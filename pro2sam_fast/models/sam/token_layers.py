"""The token side of SAM's two-way transformer with its weights laid out once, for `grid_decoder`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...ops import gated_attention
from ..cpu import PackedLinear

__all__ = ["TokenLayer", "pack", "perceptron"]


def pack(*layers: nn.Linear, dtype: torch.dtype = torch.float32) -> PackedLinear:
    """Linear layers on the same input, side by side, with operands and results in ``dtype``."""
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]).to(dtype) for name in ("weight", "bias"))
    return PackedLinear(weight, bias)


def perceptron(mlp: nn.Module) -> Callable[[Tensor], Tensor]:
    """`layers.MLP` without a sigmoid behind it: (..., input_dim) -> (..., output_dim)."""
    *hidden, last = (pack(layer) for layer in mlp.layers)

    def forward(x: Tensor) -> Tensor:
        for layer in hidden:
            x = layer(x, "relu")
        return last(x)

    return forward


class TokenLayer:
    """The token side of one layer of the two-way transformer.

    Args:
        layer: `TwoWayAttentionBlock`.
        dtype: of the MLP's operands.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        own, read, ask = layer.self_attn, layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        self.norm1, self.norm2, self.norm3 = layer.norm1, layer.norm2, layer.norm3
        self.own_query_key, self.own_value = pack(own.q_proj, own.k_proj), pack(own.v_proj)
        self.own_out = pack(own.out_proj)
        self.query, self.out = pack(read.q_proj), pack(read.out_proj)
        self.key, self.value = pack(ask.k_proj), pack(ask.v_proj)
        self.mlp1, self.mlp2 = pack(layer.mlp.lin1, dtype=dtype), pack(layer.mlp.lin2, dtype=dtype)

    def self_attention(self, qk: Tensor, v: Tensor, heads: int) -> Tensor:
        """Attention among the tokens of each prompt: (g, T, D) with and without positions -> (g, T, D)."""
        q, k = self.own_query_key(qk).chunk(2, dim=-1)
        return self.own_out(gated_attention(q, k, self.own_value(v), heads, 0, gate=False)[0])

    def finish(self, q: Tensor, attended: Tensor) -> Tensor:
        """What comes behind token-to-image attention: output projection, norm, MLP, norm."""
        q = self.norm2(q + self.out(attended))
        return self.norm3(q + self.mlp2(self.mlp1(q, "relu")))
