"""Self attention over a grid of tokens, in windows or global, with decomposed relative positions.

Source: "Exploring plain vision transformer backbones for object detection" (Li et al. 2022), section 3, as the image
encoder of "Segment Anything" (Kirillov et al. 2023) has it. For a head of width d, a query at (y, x) and a key at
(y', x') of the same s_h x s_w window, with tables R_h (2 s_h - 1, d) and R_w (2 s_w - 1, d):

    S[q, k] = q . k / sqrt(d) + q . R_h[y - y' + s_h - 1] + q . R_w[x - x' + s_w - 1];  o = softmax(S) v

The positional terms take the unscaled query. Windows that reach beyond the grid are filled with pad tokens, which have
a key and a value like any other and take part in the softmax.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backends import check_call, register, triton_kernels

__all__ = ["relative_attention"]


def _relative_attention(
    q: Tensor, k: Tensor, v: Tensor, table_h: Tensor, table_w: Tensor, pad_k: Tensor, pad_v: Tensor, window: int
) -> Tensor:
    """Reference. q, k, v (B, h, w, H, d) -> (B, h, w, H, d)."""
    with torch.autocast(q.device.type, enabled=False):
        dtype, size = q.dtype, q.shape[1:3]
        wide = torch.promote_types(dtype, torch.float32)
        q, k, v, table_h, table_w, pad_k, pad_v = (t.to(wide) for t in (q, k, v, table_h, table_w, pad_k, pad_v))
        sides = _sides(q, window)
        q, k, v = (_windows(t, sides, pad) for t, pad in ((q, torch.zeros_like(pad_k)), (k, pad_k), (v, pad_v)))
        logits = q.flatten(1, 2).transpose(1, 2) @ k.flatten(1, 2).permute(0, 2, 3, 1) * q.shape[-1] ** -0.5
        bias_h = torch.einsum("byxhd,ykd->bhyxk", q, _offsets(table_h, sides[0]))
        bias_w = torch.einsum("byxhd,xkd->bhyxk", q, _offsets(table_w, sides[1]))
        bias = bias_h[..., :, None] + bias_w[..., None, :]  # (n, H, s_h, s_w, s_h, s_w)
        weights = (logits + bias.flatten(4, 5).flatten(2, 3)).softmax(-1)
        out = (weights @ v.flatten(1, 2).transpose(1, 2)).transpose(1, 2).unflatten(1, sides)
        return _grid(out, size).to(dtype).contiguous()


def _sides(q: Tensor, window: int) -> tuple[int, int]:
    return (window, window) if window else (q.shape[1], q.shape[2])


def _offsets(table: Tensor, side: int) -> Tensor:
    """(2*side-1, d) -> (side, side, d): entry [i, j] is that of the offset i - j."""
    index = torch.arange(side, device=table.device)
    return table[index[:, None] - index[None, :] + side - 1]


def _windows(x: Tensor, sides: tuple[int, int], pad: Tensor) -> Tensor:
    """(B, h, w, H, d) -> (B*windows, s_h, s_w, H, d), filled up with pad (H, d) on the right and at the bottom."""
    b, h, w, *token = x.shape
    (side_h, side_w), down, across = sides, -(-h // sides[0]), -(-w // sides[1])
    if (down * side_h, across * side_w) != (h, w):
        padded = pad.expand(b, down * side_h, across * side_w, *token).contiguous()
        padded[:, :h, :w] = x
        x = padded
    return x.reshape(b, down, side_h, across, side_w, *token).transpose(2, 3).reshape(-1, side_h, side_w, *token)


def _grid(windows: Tensor, size: tuple[int, int]) -> Tensor:
    """Inverse of `_windows`."""
    (h, w), (_, side_h, side_w, *token) = size, windows.shape
    down, across = -(-h // side_h), -(-w // side_w)
    x = windows.reshape(-1, down, across, side_h, side_w, *token).transpose(2, 3)
    return x.reshape(-1, down * side_h, across * side_w, *token)[:, :h, :w]


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table_h: Tensor,
    table_w: Tensor,
    pad_k: Tensor,
    pad_v: Tensor,
    window: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Attention of every token of a grid over its window, for inference.

    The reference holds the scores of all windows and computes in float32 (float64 for float64); the other back ends
    never hold them, and round the factors of products to the dtype of the inputs: scores, terms and weights.

    Args:
        q, k, v: floating (B, h, w, H, d), h, w, H, d at least 1; slices of one (B, h, w, 3, H, d) are read in place.
        table_h: (2*s_h - 1, d), the entry of the offset 0 in the middle; s_h is the window's side, or h if global.
        table_w: (2*s_w - 1, d), likewise.
        pad_k, pad_v: (H, d), key and value of a pad token, used where the window's side doesn't divide the grid's.
        window: side of the square windows, the first at the upper left corner; 0 for global attention.
        backend: as for `mask_match`. On a GPU where Triton can't run, or a head is too wide for its kernel (96
            channels; 64 in float32 before sm_90), "auto" makes the terms further channels of torch's fused attention.

    Returns:
        (B, h, w, H, d), contiguous, in the dtype of q.

    Raises:
        TypeError: an argument isn't a dense floating point tensor, or the dtypes differ.
        ValueError: shapes or devices don't fit.
        ConfigError, BackendError: as `mask_match`.
    """
    tensors = {"q": q, "k": k, "v": v, "table_h": table_h, "table_w": table_w, "pad_k": pad_k, "pad_v": pad_v}
    check_call("relative_attention", backend, **tensors)
    arguments = (*tensors.values(), window)
    if backend == "auto" and q.device.type == "cuda" and not torch.compiler.is_compiling():
        _check_relative_attention(*arguments)
        if _registration.pick("auto", q.device) == "reference":
            return _relative_attention_fused(*arguments)
    return torch.ops.pro2sam_fast.relative_attention(*arguments, backend=backend)


def _check_relative_attention(q, k, v, table_h, table_w, pad_k, pad_v, window) -> None:
    op = "relative_attention"
    tensors = {"q": q, "k": k, "v": v, "table_h": table_h, "table_w": table_w, "pad_k": pad_k, "pad_v": pad_v}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must be floating point like q, {q.dtype}, got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be dense, got {tensor.layout}")
        if tensor.device != q.device:
            raise ValueError(f"{op}: all inputs must be on one device, got {name} on {tensor.device}, not {q.device}")
    if q.dim() != 5 or k.shape != q.shape or v.shape != q.shape or 0 in q.shape[1:]:
        raise ValueError(
            f"{op}: q, k and v must all be (B, h, w, H, d) with h, w, H and d at least 1, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if window < 0:
        raise ValueError(f"{op}: window must be 0 (global) or a number of tokens, got {window}")
    heads, d = q.shape[3:]
    side_h, side_w = _sides(q, window)
    shapes = {"table_h": (2 * side_h - 1, d), "table_w": (2 * side_w - 1, d), "pad_k": (heads, d), "pad_v": (heads, d)}
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{op}: {name} must be {shape}, got {tuple(tensors[name].shape)}")


def _empty_relative_attention(q, *others):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _relative_attention_triton(q, k, v, table_h, table_w, pad_k, pad_v, window):
    kernels = triton_kernels("relative_attention")
    if not kernels.supports(q.dtype, q.shape[-1], q.device):
        return _relative_attention_fused(q, k, v, table_h, table_w, pad_k, pad_v, window)
    # one product with both tables: (H, B, h, w, R), R a multiple of 8
    tables = torch.cat([table_h, table_w])
    tables = F.pad(tables, (0, 0, 0, -len(tables) % 8))
    by_head = q.permute(3, 0, 1, 2, 4).flatten(1, 3)
    rel = torch.bmm(by_head, tables.t().expand(len(by_head), -1, -1))
    if q.stride(-1) != 1 or not q.stride() == k.stride() == v.stride():
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if pad_k.stride(-1) != 1 or pad_k.stride() != pad_v.stride():
        pad_k, pad_v = pad_k.contiguous(), pad_v.contiguous()
    out = _empty_relative_attention(q)
    kernels.relative_attention(q, k, v, rel, pad_k, pad_v, out, _sides(q, window))
    return out


def _relative_attention_fused(q, k, v, table_h, table_w, pad_k, pad_v, window):
    """Any fused attention: a query's terms are further channels, in which a key has ones at its row and its column."""
    size, sides, d = q.shape[1:3], _sides(q, window), q.shape[-1]
    q, k, v = (_windows(t, sides, pad) for t, pad in ((q, torch.zeros_like(pad_k)), (k, pad_k), (v, pad_v)))
    # of a window's grid of queries, (n, s_h, s_w, H, s)
    terms = (
        torch.einsum("byxhd,ykd->byxhk", q, _offsets(table_h, sides[0])),
        torch.einsum("byxhd,xkd->byxhk", q, _offsets(table_w, sides[1])),
    )
    rows = torch.eye(sides[0], dtype=k.dtype, device=k.device)[:, None, None].expand(*k.shape[:4], -1)
    columns = torch.eye(sides[1], dtype=k.dtype, device=k.device)[None, :, None].expand(*k.shape[:4], -1)
    fill = -(d + sum(sides)) % 8  # which fused attention wants
    q = F.pad(torch.cat([q, *terms], -1), (0, fill))
    k = F.pad(torch.cat([k * d**-0.5, rows, columns], -1), (0, fill))
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))  # (n, H, s_h*s_w, .)
    out = F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).unflatten(1, sides)
    return _grid(out, size).contiguous()


def _example(dtype: torch.dtype, device: torch.device) -> tuple:
    """Windows of 4 x 4 over 5 x 6 tokens, heads of two widths of channels."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 5, 6, 3, 2, 80), (7, 80), (7, 80), (2, 80), (2, 80)
    qkv, *others = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    table_h, table_w, pad_k, pad_v = others
    return *qkv.unbind(3), table_h * 0.1, table_w * 0.1, pad_k, pad_v, 4


_registration = register(
    "relative_attention(Tensor q, Tensor k, Tensor v, Tensor table_h, Tensor table_w, Tensor pad_k, Tensor pad_v, "
    'int window, *, str backend="auto") -> Tensor',
    _check_relative_attention,
    {"reference": _relative_attention, "triton": _relative_attention_triton},
    _empty_relative_attention,
    {
        "TF32 products": functools.partial(_example, torch.float32),
        "bfloat16 products": functools.partial(_example, torch.bfloat16),
        "float16 products": functools.partial(_example, torch.float16),
    },
)
