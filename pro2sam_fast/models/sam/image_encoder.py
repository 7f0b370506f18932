"""ViT image encoder of SAM: windowed and global attention with decomposed relative positions (Kirillov et al. 2023;
Li et al., "Exploring plain vision transformer backbones for object detection", 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cpu import compute_dtype
from . import image_encoder_gpu
from .image_encoder_cpu import run_block
from .layers import LayerNorm2d, MLPBlock, resized_table

# Query rows of one attention call are limited so that the relative-position bias (heads x rows x keys) stays below
# this many elements; the result does not depend on it.
_MAX_BIAS_ELEMENTS = 1 << 25


class Attention(nn.Module):
    """Multi-head self attention over (B, h, w, D) with decomposed relative-position bias.

    The content term uses the scaled query, the positional term the unscaled one.
    """

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool, use_rel_pos: bool, input_size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.use_rel_pos = use_rel_pos
        if use_rel_pos:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * input_size[0] - 1, dim // num_heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * input_size[1] - 1, dim // num_heads))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        # (B, N, 3*heads*d) -> 3 x (B, heads, N, d)
        q, k, v = self.qkv(x).reshape(b, h * w, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.use_rel_pos:
            bias_h, bias_w = relative_position_terms(q, self.rel_pos_h, self.rel_pos_w, (h, w))
            step = max(1, _MAX_BIAS_ELEMENTS // (b * self.num_heads * h * w))
            parts = []
            for i in range(0, h * w, step):
                rows = slice(i, i + step)
                # (B, heads, rows, h, 1) + (B, heads, rows, 1, w) -> (B, heads, rows, h*w)
                bias = (bias_h[:, :, rows, :, None] + bias_w[:, :, rows, None, :]).flatten(-2)
                parts.append(F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=bias))
            x = torch.cat(parts, dim=2)
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, h, w, -1))


def relative_position_terms(
    q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """q (B, heads, h*w, d) -> terms (B, heads, h*w, h) and (B, heads, h*w, w); the bias is their outer sum."""
    h, w = size
    grid = q.unflatten(2, (h, w))
    r_h = _relative_rows(rel_pos_h, h)
    r_w = _relative_rows(rel_pos_w, w)
    bias_h = torch.einsum("bnyxd,ykd->bnyxk", grid, r_h)
    bias_w = torch.einsum("bnyxd,xkd->bnyxk", grid, r_w)
    return bias_h.flatten(2, 3), bias_w.flatten(2, 3)


def _relative_rows(rel_pos: Tensor, size: int) -> Tensor:
    # (2*size-1, d) -> (size, size, d): entry [i, j] is the vector of offset i - j
    index = torch.arange(size, device=rel_pos.device)
    return resized_table(rel_pos, size)[index[:, None] - index[None, :] + size - 1]


def window_partition(x: Tensor, window: int) -> tuple[Tensor, tuple[int, int]]:
    """(B, h, w, D) -> (B*windows, window, window, D), zero padded on the right and bottom; and the padded (h, w)."""
    b, h, w, d = x.shape
    pad_h, pad_w = -h % window, -w % window
    x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
    hp, wp = h + pad_h, w + pad_w
    x = x.reshape(b, hp // window, window, wp // window, window, d).transpose(2, 3)
    return x.reshape(-1, window, window, d), (hp, wp)


def window_unpartition(windows: Tensor, window: int, padded: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Inverse of :func:`window_partition`, cropped to ``size``."""
    hp, wp = padded
    x = windows.reshape(-1, hp // window, wp // window, window, window, windows.shape[-1]).transpose(2, 3)
    return x.reshape(-1, hp, wp, windows.shape[-1])[:, : size[0], : size[1]]


class Block(nn.Module):
    """Pre-norm transformer block; ``window_size`` 0 means global attention."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        norm_eps: float,
        act: type[nn.Module],
        use_rel_pos: bool,
        window_size: int,
        input_size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        attention_size = (window_size, window_size) if window_size else input_size
        self.attn = Attention(dim, num_heads, qkv_bias, use_rel_pos, attention_size)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLPBlock(dim, int(dim * mlp_ratio), act)
        self.window_size = window_size

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        if self.window_size:
            # padded after norm1: pad tokens are exactly zero here and take part in the softmax through the qkv bias
            size = (x.shape[1], x.shape[2])
            y, padded = window_partition(y, self.window_size)
            y = window_unpartition(self.attn(y), self.window_size, padded, size)
        else:
            y = self.attn(y)
        x = x + y
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: (B, 3, H, W) -> (B, H/p, W/p, D)."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class ImageEncoderViT(nn.Module):
    """``forward(x (B, 3, S, S) normalised and zero padded) -> (B, out_chans, S/p, S/p)``."""

    # On a GPU, without gradient: from the second batch of a shape on its launches are replayed as a CUDA graph.
    cuda_graphs = True

    def __init__(
        self,
        img_size: int = 1024,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        out_chans: int = 256,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        act: type[nn.Module] = nn.GELU,
        use_rel_pos: bool = True,
        window_size: int = 14,
        global_attn_indexes: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.img_size = img_size
        grid = img_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, embed_dim))
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                norm_eps,
                act,
                use_rel_pos,
                0 if i in global_attn_indexes else window_size,
                (grid, grid),
            )
            for i in range(depth)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(embed_dim, out_chans, kernel_size=1, bias=False),
            LayerNorm2d(out_chans),
            nn.Conv2d(out_chans, out_chans, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(out_chans),
        )

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x, self.pos_embed)
        if dtype is not None:
            # one by one: products of another size round differently
            return torch.cat([self._on_cpu(image, dtype) for image in x.split(1)])
        dtype = image_encoder_gpu.compute_dtype(x, self.pos_embed)
        if dtype is not None:
            return image_encoder_gpu.encode(self, x, dtype)
        x = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))

    def _on_cpu(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        x = (self.patch_embed(image) + self.pos_embed).contiguous()
        for block in self.blocks:
            run_block(block, x[0], dtype)
        return self.neck(x.permute(0, 3, 1, 2))
