"""Two-way transformer of SAM's mask decoder (Kirillov et al. 2023, appendix A).

Tokens and image attend to each other. The image side of layer 0 is the same for every prompt of an image, so its key,
value and query projections are computed once per image and shared by that image's prompts: the same arithmetic with
less of it.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from .layers import MLPBlock


class Attention(nn.Module):
    """Multi-head attention with an inner width of ``embedding_dim // downsample_rate``.

    ``forward(q (B,Nq,D), k (Bk,Nk,D), v (Bk,Nk,D)) -> (B,Nq,D)``. ``Bk`` may divide ``B``: consecutive groups of
    ``B // Bk`` query sets then share one set of keys and values. Likewise ``q`` may be shared by ``Bk // B`` key sets;
    the output then has the batch of the keys.
    """

    def __init__(self, embedding_dim: int, num_heads: int, downsample_rate: int = 1) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.internal_dim = embedding_dim // downsample_rate
        self.num_heads = num_heads
        if self.internal_dim % num_heads:
            raise ValueError("num_heads must divide embedding_dim // downsample_rate.")
        self.q_proj = nn.Linear(embedding_dim, self.internal_dim)
        self.k_proj = nn.Linear(embedding_dim, self.internal_dim)
        self.v_proj = nn.Linear(embedding_dim, self.internal_dim)
        self.out_proj = nn.Linear(self.internal_dim, embedding_dim)

    def _heads(self, x: Tensor) -> Tensor:
        # (B, N, h*d) -> (B, h, N, d)
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = max(q.shape[0], k.shape[0])
        q, k, v = self.q_proj(q), self.k_proj(k), self.v_proj(v)
        if k.shape[0] < batch:
            # (B, Nq, C) -> (Bk, B/Bk*Nq, C): the prompts of an image become more queries over the same keys
            out = self._attend(q.reshape(k.shape[0], -1, q.shape[-1]), k, v).reshape(batch, q.shape[1], -1)
        else:
            out = self._attend(q.repeat_interleave(batch // q.shape[0], 0) if q.shape[0] < batch else q, k, v)
        return self.out_proj(out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # a handful of tokens on one side: two plain products beat blocked attention, backward above all
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return (weights @ v).transpose(1, 2).flatten(2)


class TwoWayAttentionBlock(nn.Module):
    """Self attention of the tokens, tokens to image, MLP on the tokens, image to tokens; post-norm.

    ``skip_first_layer_pe`` (layer 0) leaves out the positional term *and* the residual of the self attention.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int = 2048,
        activation: type[nn.Module] = nn.ReLU,
        attention_downsample_rate: int = 2,
        skip_first_layer_pe: bool = False,
    ) -> None:
        super().__init__()
        self.self_attn = Attention(embedding_dim, num_heads)
        self.norm1 = nn.LayerNorm(embedding_dim)
        self.cross_attn_token_to_image = Attention(embedding_dim, num_heads, attention_downsample_rate)
        self.norm2 = nn.LayerNorm(embedding_dim)
        self.mlp = MLPBlock(embedding_dim, mlp_dim, activation)
        self.norm3 = nn.LayerNorm(embedding_dim)
        self.norm4 = nn.LayerNorm(embedding_dim)
        self.cross_attn_image_to_token = Attention(embedding_dim, num_heads, attention_downsample_rate)
        self.skip_first_layer_pe = skip_first_layer_pe

    def forward(self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor) -> tuple[Tensor, Tensor]:
        if self.skip_first_layer_pe:
            queries = self.self_attn(queries, queries, queries)
        else:
            q = queries + query_pe
            queries = queries + self.self_attn(q, q, queries)
        queries = self.norm1(queries)

        k = keys + key_pe
        queries = self.norm2(queries + self.cross_attn_token_to_image(queries + query_pe, k, keys))
        queries = self.norm3(queries + self.mlp(queries))

        update = self.cross_attn_image_to_token(k, queries + query_pe, queries)
        if keys.shape[0] < update.shape[0]:
            # (Bi, P, D) -> (Bi, B/Bi, P, D): add the shared image to every prompt's update
            update = update.unflatten(0, (keys.shape[0], -1)) + keys.unsqueeze(1)
            return queries, self.norm4(update.flatten(0, 1))
        return queries, self.norm4(keys + update)


class TwoWayTransformer(nn.Module):
    """``forward(image_embedding (Bi,D,h,w), image_pe (1,D,h,w), point_embedding (B,T,D)) -> (B,T,D), (B,h*w,D)``.

    ``Bi`` divides ``B``; prompts are grouped by image in order.
    """

    def __init__(
        self,
        depth: int,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int,
        activation: type[nn.Module] = nn.ReLU,
        attention_downsample_rate: int = 2,
    ) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.num_heads = num_heads
        self.layers = nn.ModuleList(
            TwoWayAttentionBlock(
                embedding_dim,
                num_heads,
                mlp_dim,
                activation,
                attention_downsample_rate,
                skip_first_layer_pe=i == 0,
            )
            for i in range(depth)
        )
        self.final_attn_token_to_image = Attention(embedding_dim, num_heads, attention_downsample_rate)
        self.norm_final_attn = nn.LayerNorm(embedding_dim)

    def forward(self, image_embedding: Tensor, image_pe: Tensor, point_embedding: Tensor) -> tuple[Tensor, Tensor]:
        keys = image_embedding.flatten(2).transpose(1, 2)
        key_pe = image_pe.flatten(2).transpose(1, 2)
        queries = point_embedding
        for layer in self.layers:
            queries, keys = layer(queries, keys, point_embedding, key_pe)
        update = self.final_attn_token_to_image(queries + point_embedding, keys + key_pe, keys)
        return self.norm_final_attn(queries + update), keys
