"""Matrix products for inference on the CPU.

torch gives float32 products to MKL, which on some processors runs at half the speed of oneDNN; the same oneDNN operator
that `torch.compile` uses for linear layers takes float32 and bfloat16 and adds the activation or the residual before it
rounds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["linear"]


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
    # oneDNN falls back to its slow reference for other strides
    x, weight = x.contiguous(), weight.contiguous()
    gelu = isinstance(act, nn.GELU)
    if not _onednn(x):
        x = F.linear(x, weight, bias)
        x = x if add is None else x + add
    elif add is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, add.contiguous(), weight, bias, "add")
    else:
        x = torch.ops.mkldnn._linear_pointwise(
            x, weight, bias, "gelu" if gelu else "none", [], act.approximate if gelu else ""
        )
        if gelu:
            return x
    return x if act is None else act(x)


def _onednn(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.numel() == 0 or not torch.backends.mkldnn.is_available():
        return False
    if x.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return x.dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise")
