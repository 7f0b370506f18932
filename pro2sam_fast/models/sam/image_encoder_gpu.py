"""The ViT image encoder of SAM on a GPU, for inference: the same function as `ImageEncoderViT`, a whole batch at once.

Products run in the dtype of autocast or of the parameters, their weights cast once. The residual stream, the sums into
it, the norms and the softmax are float32, so that float16 doesn't overflow where activations grow. Windows are read and
written in place: only real tokens are projected, and the key and value of a pad token, which is zero after the norm,
are the bias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...memory import in_chunks, joined
from ...ops import add_layer_norm, relative_attention
from ..cache import states_of
from ..graphs import GraphCache
from .layers import resized_table

if TYPE_CHECKING:
    from .image_encoder import Block, ImageEncoderViT

__all__ = ["compute_dtype", "encode"]

# Larger batches make the products no faster, but hold more (ViT-H: 0.15 GB an image).
IMAGES_PER_PASS = 8

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def compute_dtype(x: Tensor, parameter: Tensor) -> torch.dtype | None:
    """The dtype of products if :func:`encode` can stand in for the modules, None if it can't: on a GPU, without
    gradient or tracing, for parameters and inputs in float32, bfloat16 or float16."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if x.device.type != "cuda" or x.numel() == 0 or parameter.dtype not in _DTYPES:
        return None
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        return dtype if dtype in _DTYPES and x.dtype in _DTYPES else None
    return parameter.dtype if x.dtype == parameter.dtype else None


def encode(encoder: ImageEncoderViT, x: Tensor, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    """Embeddings of images, without gradient.

    Args:
        encoder: its parameters on the device of ``x``.
        x: floating (B, 3, S, S), B at least 1.
        dtype: of products, as :func:`compute_dtype` says.
        backend: of the ops.

    Returns:
        (B, out_chans, e, e), float32 or, if that is what the parameters are, in a reduced dtype.
    """
    form, graphs = _form(encoder, dtype, backend)
    run = graphs if encoder.cuda_graphs else form.run
    with torch.autocast(x.device.type, enabled=False):
        parts = in_chunks(lambda start, stop: run(x[start:stop]), len(x), IMAGES_PER_PASS)
    # the modules' dtype: a norm's output is float32 under autocast
    return joined(parts).to(torch.float32 if torch.is_autocast_enabled(x.device.type) else encoder.pos_embed.dtype)


# By encoder, then dtype and back end: the parameters' state, the form, its graphs.
_forms: WeakKeyDictionary[nn.Module, dict[tuple, tuple[tuple, _Form, GraphCache]]] = WeakKeyDictionary()


def _form(encoder: ImageEncoderViT, dtype: torch.dtype, backend: str) -> tuple[_Form, GraphCache]:
    state = tuple(states_of(encoder))
    forms = _forms.setdefault(encoder, {})
    if (dtype, backend) not in forms or forms[dtype, backend][0] != state:
        forms.pop((dtype, backend), None)  # its memory first
        with torch.inference_mode(False), torch.no_grad():
            form = _Form(encoder, dtype, backend)
        forms[dtype, backend] = state, form, GraphCache(form.run)
    return forms[dtype, backend][1:]


class _Form:
    """An encoder's parameters as inference reads them."""

    def __init__(self, encoder: ImageEncoderViT, dtype: torch.dtype, backend: str) -> None:
        self.dtype, self.backend = dtype, backend
        embed = encoder.patch_embed.proj
        self.embed, self.stride = _cast(embed, dtype), embed.stride
        self.position = encoder.pos_embed.float()
        self.blocks = [_Block(block, dtype, tuple(encoder.pos_embed.shape[1:3])) for block in encoder.blocks]
        first, norm1, second, norm2 = encoder.neck
        self.neck = first.weight.flatten(1).float(), second.weight.to(dtype), second.padding
        self.neck_norms = _Norm(norm1), _Norm(norm2)

    def run(self, x: Tensor) -> Tensor:
        delta = F.conv2d(x.to(self.dtype), *self.embed, stride=self.stride).permute(0, 2, 3, 1)
        stream = self.position.expand(delta.shape)
        for block in self.blocks:
            stream, y = add_layer_norm(stream, delta, *block.norm1, backend=self.backend)
            delta = block.attend(y, self.backend)
            stream, y = add_layer_norm(stream, delta, *block.norm2, backend=self.backend)
            delta = block.expand(y)
        pointwise, spatial, padding = self.neck
        x = F.linear(stream + delta, pointwise)  # in float32, as the stream may be too large for float16
        x = self.neck_norms[0](x).to(self.dtype).permute(0, 3, 1, 2)
        x = F.conv2d(x, spatial, padding=padding).permute(0, 2, 3, 1)
        return self.neck_norms[1](x).permute(0, 3, 1, 2)


class _Norm(tuple):
    """(weight, bias, eps) in float32."""

    def __new__(cls, norm: nn.LayerNorm) -> _Norm:
        return super().__new__(cls, (norm.weight.float(), norm.bias.float(), norm.eps))

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias, eps = self
        return F.layer_norm(x.float(), weight.shape, weight, bias, eps)


class _Block:
    def __init__(self, block: Block, dtype: torch.dtype, size: tuple[int, int]) -> None:
        attn = block.attn
        self.norm1, self.norm2 = _Norm(block.norm1), _Norm(block.norm2)
        self.qkv, self.proj = _cast(attn.qkv, dtype), _cast(attn.proj, dtype)
        self.lin1, self.lin2 = _cast(block.mlp.lin1, dtype), _cast(block.mlp.lin2, dtype)
        self.act = block.mlp.act
        self.window, self.heads = block.window_size, attn.num_heads
        sides = (self.window, self.window) if self.window else size
        weight, bias = self.qkv
        width = weight.shape[1] // self.heads
        if attn.use_rel_pos:
            tables = (attn.rel_pos_h, attn.rel_pos_w)
            self.tables = [resized_table(table.float(), side).to(dtype) for table, side in zip(tables, sides)]
        else:
            self.tables = [weight.new_zeros(2 * side - 1, width) for side in sides]
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        self.pads = bias.view(3, self.heads, width)[1:].unbind(0)

    def attend(self, x: Tensor, backend: str) -> Tensor:
        """(B, h, w, D) -> (B, h, w, D), both normed and in the dtype of products."""
        q, k, v = F.linear(x, *self.qkv).unflatten(-1, (3, self.heads, -1)).unbind(3)
        x = relative_attention(q, k, v, *self.tables, *self.pads, self.window, backend=backend)
        return F.linear(x.flatten(3), *self.proj)

    def expand(self, x: Tensor) -> Tensor:
        """The MLP, (B, h, w, D) -> (B, h, w, D)."""
        hidden = F.linear(x, *self.lin1)
        if isinstance(self.act, nn.GELU):
            torch.ops.aten.gelu_(hidden, approximate=self.act.approximate)
        else:
            hidden = self.act(hidden)
        return F.linear(hidden, *self.lin2)


def _cast(layer: nn.Linear | nn.Conv2d, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype)
