"""Residual sum and the norm that follows it in one pass: total = x + delta, normed = layer_norm(total).

Between two layers of a transformer in reduced precision, the residual stream stays float32 and the next product's input
is rounded once: x and total are float32, delta and normed in the products' dtype. See "Layer normalization" (Ba et al.
2016), equations 3 and 4, with the biased variance.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backends import check_call, register, triton_kernels

__all__ = ["add_layer_norm"]


def _add_layer_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Reference. x, delta (..., D), weight, bias (D,) -> total (..., D), normed (..., D)."""
    with torch.autocast(x.device.type, enabled=False):
        total = (x + delta).contiguous()
        return total, F.layer_norm(total, weight.shape, weight, bias, eps).to(delta.dtype)


def add_layer_norm(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Adds to the residual stream and normalises over the channels, for inference.

    Args:
        x: float32 (..., D), D at least 1.
        delta: float32, bfloat16 or float16, of the same shape.
        weight, bias: float32 (D,).
        eps: added to the variance.
        backend: as for `mask_match`; more than 8192 channels take the reference also in Triton's name.

    Returns:
        total: float32 (..., D), contiguous.
        normed: (..., D) in the dtype of delta, contiguous.

    Raises:
        TypeError: an argument isn't a dense tensor of these dtypes.
        ValueError: shapes or devices don't fit.
        ConfigError, BackendError: as `mask_match`.
    """
    check_call("add_layer_norm", backend, x=x, delta=delta, weight=weight, bias=bias)
    return torch.ops.pro2sam_fast.add_layer_norm(x, delta, weight, bias, eps, backend=backend)


def _check_add_layer_norm(x, delta, weight, bias, eps) -> None:
    op = "add_layer_norm"
    if delta.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: delta must be float32, bfloat16 or float16, got {delta.dtype}")
    for name, tensor in (("x", x), ("delta", delta), ("weight", weight), ("bias", bias)):
        if name != "delta" and tensor.dtype != torch.float32:
            raise TypeError(f"{op}: {name} must be float32, got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be dense, got {tensor.layout}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: all inputs must be on one device, got {name} on {tensor.device}, not {x.device}")
    if x.dim() == 0 or x.shape[-1] == 0 or delta.shape != x.shape:
        raise ValueError(f"{op}: x and delta must be (..., D) alike, got {tuple(x.shape)} and {tuple(delta.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != x.shape[-1:]:
            raise ValueError(f"{op}: {name} must be ({x.shape[-1]},), got {tuple(tensor.shape)}")


def _empty_add_layer_norm(x, delta, *others):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(
        x.shape, dtype=delta.dtype, device=x.device
    )


def _add_layer_norm_triton(x, delta, weight, bias, eps):
    kernels = triton_kernels("add_layer_norm")
    if x.shape[-1] > kernels.MAX_CHANNELS:
        return _add_layer_norm(x, delta, weight, bias, eps)
    outputs = _empty_add_layer_norm(x, delta)
    kernels.add_layer_norm(*(t.contiguous() for t in (x, delta, weight, bias)), *outputs, eps)
    return outputs


def _example(dtype: torch.dtype, device: torch.device) -> tuple:
    generator = torch.Generator().manual_seed(0)
    x, delta, (weight, bias) = (torch.randn(shape, generator=generator) for shape in ((3, 80), (3, 80), (2, 80)))
    return x.to(device), delta.to(device, dtype), weight.to(device), bias.to(device), 1e-6


register(
    "add_layer_norm(Tensor x, Tensor delta, Tensor weight, Tensor bias, float eps, *, "
    'str backend="auto") -> (Tensor total, Tensor normed)',
    _check_add_layer_norm,
    {"reference": _add_layer_norm, "triton": _add_layer_norm_triton},
    _empty_add_layer_norm,
    {torch.float32: functools.partial(_example, torch.float32)},
)
