"""Global-token attention: forward, and forward with gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from case import Case, Floor, Runs
from peers import compiled
from torch import Tensor

from pro2sam_fast.models.gated_attention import gated_attention, gated_attention_reference

from . import Options
from .shared import back_ends

__all__ = ["cases"]

TESTS = ("tests/ops/test_gated_attention.py",)
WIDTHS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # D, heads
QUERIES = {198: 1, 201: 4}  # N: query tokens
BATCHES = (1, 8, 32, 128, 256, 512)
DEFAULT = {(1, 201, "small"), (32, 201, "small"), (8, 198, "tiny"), (8, 201, "base")}
DEFAULT_BACKWARD = {(32, 201, "small")}
DEFAULT_ON_GPU = {(256, 201, "small")}


def cases(options: Options) -> Iterator[Case]:
    for backward in (False, True):
        chosen = DEFAULT_BACKWARD if backward else DEFAULT
        if options.device.type != "cpu":
            chosen = chosen | DEFAULT_ON_GPU
        for batch in BATCHES:
            for tokens in QUERIES:
                for width in WIDTHS:
                    yield Case(
                        "gated_attention",
                        f"{'fwd+bwd' if backward else 'fwd'} B={batch} N={tokens} {width}",
                        options.dtype,
                        TESTS,
                        functools.partial(_build, options, backward, batch, tokens, width),
                        functools.partial(_floor, options, backward, batch, tokens, width),
                        (batch, tokens, width) in chosen,
                    )


def _floor(options: Options, backward: bool, batch: int, tokens: int, width: str, facts) -> Floor:
    dim, queries = WIDTHS[width][0], QUERIES[tokens]
    flops = batch * (4 * tokens**2 * dim + 2 * queries * tokens * dim)
    moved = 4
    formula = "B (4 N^2 D + 2 G N D): scores, values, gate; q, k, v read, output written; exponentials not counted"
    if backward:
        flops += batch * (8 * tokens**2 * dim + 4 * queries * tokens * dim)
        moved = 8
        formula = (
            "B (12 N^2 D + 6 G N D): scores, values, gate, their gradients; q, k, v, dO read, O, dQ, dK, dV written"
        )
    size = options.torch_dtype.itemsize
    return Floor({options.dtype: flops}, moved * batch * tokens * dim * size + 4 * batch * queries * tokens, formula)


def _build(options: Options, backward: bool, batch: int, tokens: int, width: str) -> Runs:
    dim, heads = WIDTHS[width]
    generator = torch.Generator().manual_seed(0)
    shape = (batch, tokens, 3 * dim)
    qkv = torch.randn(shape, generator=generator).to(options.device, options.torch_dtype).requires_grad_(backward)
    d_out = torch.randn((batch, tokens, dim), generator=generator).to(qkv)
    d_maps = torch.randn((batch, QUERIES[tokens], tokens), generator=generator).to(qkv) / tokens

    def call(attention: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], object]:
        def forward():
            return attention(*qkv.chunk(3, -1), heads, QUERIES[tokens])

        def both():
            out, maps = forward()
            return torch.autograd.grad((out, maps), qkv, (d_out, d_maps.to(maps.dtype)))

        return both if backward else torch.no_grad()(forward)

    return Runs(
        back_ends(options.device, lambda name: call(functools.partial(gated_attention, backend=name))()),
        {
            "materialised": call(gated_attention_reference),
            "torch.compile of materialised": compiled(
                lambda compile_: call(compile_(gated_attention_reference)), options.device
            ),
            "SDPA, gate outside": call(_gate_outside),
        },
    )


def _gate_outside(q: Tensor, k: Tensor, v: Tensor, heads: int, queries: int) -> tuple[Tensor, Tensor]:
    """Gate from the heads' own logits, values scaled by it, PyTorch's fused attention."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = q[:, :, -queries:] @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    maps = logits.mean(1).sigmoid()
    out = F.scaled_dot_product_attention(q, k, v * maps.mean(1)[:, None, :, None])
    return out.transpose(1, 2).flatten(2), maps
