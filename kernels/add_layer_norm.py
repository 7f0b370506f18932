"""Triton back end of `add_layer_norm`. Tensors are contiguous and checked by the caller."""

import torch
import triton
import triton.language as tl

from .launch import on

MAX_CHANNELS = 8192


@triton.jit
def add_layer_norm_kernel(x, delta, weight, bias, total, normed, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    # One program a row of x float32, delta, total float32, normed, all (rows, D).
    row = tl.program_id(0).to(tl.int64) * D
    channel = tl.arange(0, BLOCK)
    inside = channel < D
    added = tl.load(x + row + channel, mask=inside, other=0.0)
    added += tl.load(delta + row + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + row + channel, added, mask=inside)
    mean = tl.sum(added, 0) / D
    centred = tl.where(inside, added - mean, 0.0)
    scale = 1 / tl.sqrt_rn(tl.sum(centred * centred, 0) / D + eps)
    gain = tl.load(weight + channel, mask=inside, other=0.0)
    shift = tl.load(bias + channel, mask=inside, other=0.0)
    tl.store(normed + row + channel, (centred * scale * gain + shift).to(normed.dtype.element_ty), mask=inside)


def add_layer_norm(
    x: torch.Tensor,
    delta: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    total: torch.Tensor,
    normed: torch.Tensor,
    eps: float,
) -> None:
    """x float32 and delta (..., D), weight and bias float32 (D,) -> total float32 and normed in the dtype of delta."""
    channels = x.shape[-1]
    rows = x.numel() // channels
    if rows:
        with on(x):
            add_layer_norm_kernel[(rows,)](
                x, delta, weight, bias, total, normed, eps, D=channels, BLOCK=triton.next_power_of_2(channels)
            )


def _ahead_of_time():
    for dtype in ("fp16", "bf16", "fp32"):
        types = dict.fromkeys(add_layer_norm_kernel.arg_names[:6], "*fp32")
        types |= {"delta": f"*{dtype}", "normed": f"*{dtype}", "eps": "fp32"}
        yield add_layer_norm_kernel, types, {"D": 1280, "BLOCK": 2048}


AHEAD_OF_TIME = tuple(_ahead_of_time())
