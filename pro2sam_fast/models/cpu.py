"""Operators for inference on the CPU.

torch gives float32 products to MKL, which on some processors runs at half the speed of oneDNN. The oneDNN operators
that `torch.compile` uses for linear layers and convolutions take float32 and bfloat16, and apply the activation or add
the residual before they round. Where torch has no oneDNN, or oneDNN no bfloat16, torch's usual operators do the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["apply_linear", "compute_dtype", "convolution", "linear"]


def compute_dtype(x: Tensor, parameter: Tensor) -> torch.dtype | None:
    """The dtype of products if this module's functions can stand in for torch's modules; None if they can't.

    They take float32 parameters and inputs on the CPU, without gradient, tracing or autocast to float16.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if x.device.type != "cpu" or x.numel() == 0 or not x.is_floating_point() or parameter.dtype != torch.float32:
        return None
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        return dtype if dtype == torch.bfloat16 else None
    return torch.float32 if x.dtype == torch.float32 else None


def apply_linear(layer: nn.Linear, x: Tensor, act: nn.Module | None = None) -> Tensor:
    """``act(layer(x))`` for x (..., K), by :func:`linear` where it can."""
    dtype = compute_dtype(x, layer.weight)
    if dtype is None:
        x = layer(x)
        return x if act is None else act(x)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return linear(x.flatten(0, -2).to(dtype), layer.weight.to(dtype), bias, act=act).unflatten(0, x.shape[:-1])


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, act: nn.Module | None = None, add: Tensor | None = None
) -> Tensor:
    """``act(x @ weight.T + bias)`` or ``x @ weight.T + bias + add``, without gradient.

    Args:
        x: (N, K). weight: (M, K). bias: (M,). All of one dtype.
        act: activation module, fused if it is `nn.GELU`. add: (N, M); not together with ``act``.

    Returns:
        (N, M) in the dtype of ``x``.
    """
    gelu = isinstance(act, nn.GELU)
    if not _onednn(x):
        x = F.linear(x, weight, bias)
        x = x if add is None else x + add
        return x if act is None else act(x)
    # for other strides oneDNN would take its slow reference
    x, weight = x.contiguous(), weight.contiguous()
    if add is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, add.contiguous(), weight, bias, "add")
    name, algorithm = ("gelu", act.approximate) if gelu else ("none", "")
    x = torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)
    return x if act is None or gelu else act(x)


def convolution(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, groups: int, relu6: bool) -> Tensor:
    """Convolution (B, C, H, W) -> (B, C', H', W') and, with ``relu6``, clamping to 0..6; without gradient."""
    if not _onednn(x):
        x = F.conv2d(x, weight, bias, stride, padding, groups=groups)
        return F.relu6(x) if relu6 else x
    sides = (padding, padding), (stride, stride), (1, 1)
    act = ("hardtanh", [0.0, 6.0]) if relu6 else ("none", [])
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *sides, groups, *act, "")


def _onednn(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.numel() == 0 or not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_convolution_pointwise")):
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
