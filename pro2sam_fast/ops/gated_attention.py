"""Global-token attention: softmax attention whose values are scaled by the query tokens' foreground maps.

Source: Pro2SAM (ECCV 2024), global-token attention; with one query token it is the spatial-aware attention of SAT (ICCV
    2023).
For one image with N tokens, of which the last G are query tokens, and H heads of width d:

    S^h = q^h (k^h)^T / sqrt(d);  A^h = softmax over keys of S^h
    z_g[j] = mean over h of S^h[i_g, j];  mu_g = sigmoid(z_g);  m = mean over g of mu_g
    o^h = (A^h * m) v^h                       column j scaled by m[j], rows not renormalised
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .. import _native
from ._backends import check_call, library, register, triton_kernels, unavailable

__all__ = ["gated_attention", "query_maps"]


def _gated_attention(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, num_queries: int, gate: bool, first_row: int, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference. q, k, v (B, N, D) -> out (B, rows, D), maps (B, G, N), lse (B, H, rows)."""
    with torch.autocast(q.device.type, enabled=False):
        dtype = v.dtype
        q, k, v = (_split_heads(t, num_heads) for t in (q, k, v))  # (B, H, N, d)
        logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, N, N)
        maps = logits[:, :, logits.shape[2] - num_queries :].mean(1).sigmoid()  # (B, G, N)
        logits = logits[:, :, first_row : first_row + rows]
        weights = logits.softmax(-1)
        if gate:
            weights = weights * maps.mean(1)[:, None, None, :]
        return _join_heads(weights @ v, dtype), maps, logits.logsumexp(-1)


def _gated_attention_backward(
    grad_out: Tensor,
    grad_maps: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    maps: Tensor,
    lse: Tensor,
    num_heads: int,
    gate: bool,
    first_row: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference. With A, S, m, mu as above, Vg = m * V and the gradients dO of out, U of maps:

    dVg = A^T dO;  dS = A * (dO Vg^T - rowsum(dO * O));  dQ = dS K / sqrt(d);  dK = dS^T Q / sqrt(d);  dV = m * dVg
    dm_j = sum over all channels of dVg_j * V_j;  dz_g = (dm / G + U_g) * mu_g * (1 - mu_g)
    dq_{i_g} += sum_j dz_g[j] k_j / (H sqrt(d));  dk_j += sum_g dz_g[j] q_{i_g} / (H sqrt(d))
    """
    with torch.autocast(q.device.type, enabled=False):
        dtype, rows, num_queries = q.dtype, lse.shape[2], maps.shape[1]
        q, k, v, out, grad_out = (_split_heads(t, num_heads) for t in (q, k, v, out, grad_out))
        scale = 1.0 / math.sqrt(q.shape[-1])
        row = slice(first_row, first_row + rows)
        query = slice(q.shape[2] - num_queries, q.shape[2])
        mean_map = maps.mean(1)[:, None, :, None]  # (B, 1, N, 1)
        gated = v * mean_map if gate else v

        weights = (q[:, :, row] @ k.transpose(-2, -1) * scale - lse.unsqueeze(-1)).exp()  # (B, H, rows, N)
        delta = (grad_out * out).sum(-1, keepdim=True)
        grad_logits = weights * (grad_out @ gated.transpose(-2, -1) - delta)
        grad_q = torch.zeros_like(q)
        grad_q[:, :, row] = grad_logits @ k * scale
        grad_k = grad_logits.transpose(-2, -1) @ q[:, :, row] * scale
        grad_v = weights.transpose(-2, -1) @ grad_out

        grad_z = grad_maps
        if gate:
            grad_z = grad_z + (grad_v * v).sum((1, 3)).unsqueeze(1) / num_queries
            grad_v = grad_v * mean_map
        grad_z = (grad_z * maps * (1 - maps) * (scale / num_heads)).unsqueeze(1)  # (B, 1, G, N)
        grad_q[:, :, query] += grad_z @ k
        grad_k += grad_z.transpose(-2, -1) @ q[:, :, query]
        return tuple(_join_heads(grad, dtype) for grad in (grad_q, grad_k, grad_v))


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, D) -> (B, H, N, d), at least float32."""
    return x.to(_wide(x.dtype)).unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _join_heads(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, N, d) -> (B, N, D) in `dtype`."""
    return x.transpose(1, 2).flatten(2).to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    num_queries: int,
    *,
    gate: bool = True,
    query_rows: slice | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Global-token attention, with gradients for q, k and v through both outputs.

    Computes in float32, or float64 for float64 inputs; bfloat16 and float16 inputs may have their products' factors
    rounded to their own dtype. The CPU kernels serve float32 and bfloat16, Triton's these and float16 in heads of up to
    128 channels; others take the reference there. The CUDA kernels serve these three in heads of 32 or 64 channels;
    others take Triton's kernels or, where these can't run, the reference.

    Args:
        q, k, v: (B, N, D) projections of all N tokens, heads side by side, of one floating dtype; the last
            `num_queries` tokens are the query tokens. Slices of one (B, N, 3D) tensor are read in place.
        num_heads: H, a divisor of D.
        num_queries: G, 0 to N; 0 is plain attention and needs `gate=False`.
        gate: False computes the maps but leaves the values alone (ablation without the gate).
        query_rows: rows of the output to compute, a slice without a step; None for all N.
        backend: as for `mask_match`.

    Returns:
        out: (B, R, D) in the dtype of `v`, R = N or the length of `query_rows`.
        maps: (B, G, N) in (0, 1), float32 or wider, see `query_maps`.

    Raises:
        NotImplementedError: a second derivative is asked for.
        TypeError: an argument isn't a dense floating point tensor, or the dtypes differ.
        ValueError: shapes, devices, heads, queries or rows don't fit.
        ConfigError, BackendError: as `mask_match`.
    """
    check_call("gated_attention", backend, q=q, k=k, v=v)
    first_row, rows = 0, q.shape[1] if q.dim() > 1 else 0
    if query_rows is not None:
        if query_rows.step not in (None, 1):
            raise ValueError(f"gated_attention: query_rows must have no step, got {query_rows}")
        first_row, end, _ = query_rows.indices(rows)
        rows = max(0, end - first_row)
    op = torch.ops.pro2sam_fast.gated_attention
    return op(q, k, v, num_heads, num_queries, gate, first_row, rows, backend=backend)[:2]


def query_maps(query_q: Tensor, k: Tensor, num_heads: int) -> Tensor:
    """Foreground probability of every key for every query token.

    The head mean of the scaled logits is one product over all D channels divided by H*sqrt(d), so no per-head work is
    needed.

    Args:
        query_q: (B, G, D) projected queries of the G query tokens, heads side by side.
        k: (B, N, D) projected keys, heads side by side.
        num_heads: H, a divisor of D.

    Returns:
        (B, G, N) in (0, 1); float64 for float64 inputs, else float32, also under autocast.
    """
    dim, dtype = k.shape[-1], _wide(k.dtype)
    scale = 1.0 / (num_heads * math.sqrt(dim // num_heads))
    with torch.autocast(device_type=k.device.type, enabled=False):
        return torch.sigmoid((query_q.to(dtype) * scale) @ k.to(dtype).transpose(-2, -1))


def _check_gated_attention(q, k, v, num_heads, num_queries, gate, first_row, rows) -> None:
    _check_tensors("gated_attention", q.dtype, q.device, q=q, k=k, v=v)
    if q.dim() != 3 or k.shape != q.shape or v.shape != q.shape or 0 in q.shape[1:]:
        raise ValueError(
            "gated_attention: q, k and v must all be (B, N, D) with N and D at least 1, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    tokens, dim = q.shape[1:]
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"gated_attention: num_heads must divide D = {dim}, got {num_heads}")
    if num_queries < int(gate) or num_queries > tokens:
        raise ValueError(
            f"gated_attention: num_queries must be {int(gate)} to N = {tokens} with gate={gate}, got {num_queries}"
        )
    if first_row < 0 or rows < 0 or first_row + rows > tokens:
        raise ValueError(f"gated_attention: no rows {first_row} to {first_row + rows} in {tokens} tokens")


def _check_gated_attention_backward(grad_out, grad_maps, q, k, v, out, maps, lse, num_heads, gate, first_row) -> None:
    op = "gated_attention_backward"
    _check_gated_attention(q, k, v, num_heads, maps.shape[1], gate, first_row, lse.shape[-1])
    _check_tensors(op, q.dtype, q.device, grad_out=grad_out, out=out)
    _check_tensors(op, _wide(q.dtype), q.device, grad_maps=grad_maps, maps=maps, lse=lse)
    batch, tokens, dim = q.shape
    for name, tensor, shape in (
        ("grad_out", grad_out, (batch, lse.shape[-1], dim)),
        ("out", out, (batch, lse.shape[-1], dim)),
        ("grad_maps", grad_maps, (batch, maps.shape[1], tokens)),
        ("maps", maps, (batch, maps.shape[1], tokens)),
        ("lse", lse, (batch, num_heads, lse.shape[-1])),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} must be {shape}, got {tuple(tensor.shape)}")


def _check_tensors(op: str, dtype: torch.dtype, device: torch.device, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} must be floating point like q, {dtype}, got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be dense, got {tensor.layout}")
        if tensor.device != device:
            raise ValueError(f"{op}: all inputs must be on one device, got {name} on {tensor.device}, not {device}")


def _empty_gated_attention(q, k, v, num_heads, num_queries, gate, first_row, rows):
    batch, tokens, dim = q.shape
    wide = {"dtype": _wide(q.dtype), "device": q.device}
    return (
        torch.empty((batch, rows, dim), dtype=v.dtype, device=q.device),
        torch.empty((batch, num_queries, tokens), **wide),
        torch.empty((batch, num_heads, rows), **wide),
    )


def _empty_gated_attention_backward(grad_out, grad_maps, q, k, v, *others):
    return tuple(torch.empty(q.shape, dtype=t.dtype, device=q.device) for t in (q, k, v))


_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # what native kernels call a dtype
_CPU_DTYPES = (torch.float32, torch.bfloat16)


def _gated_attention_cpu(q, k, v, num_heads, num_queries, gate, first_row, rows):
    if q.dtype not in _CPU_DTYPES:
        return _gated_attention(q, k, v, num_heads, num_queries, gate, first_row, rows)
    inputs = _with_adjacent_channels(q, k, v)
    outputs = _empty_gated_attention(q, k, v, num_heads, num_queries, gate, first_row, rows)
    forward = _native_arguments(inputs, outputs, num_heads, num_queries, gate, first_row)
    workspace, threads = _cpu_workspace(inputs, num_heads, num_queries)
    _native._cpu.gated_attention(*forward, workspace.data_ptr(), threads)
    return outputs


def _gated_attention_backward_cpu(grad_out, grad_maps, q, k, v, out, maps, lse, num_heads, gate, first_row):
    if q.dtype not in _CPU_DTYPES:
        return _gated_attention_backward(grad_out, grad_maps, q, k, v, out, maps, lse, num_heads, gate, first_row)
    inputs = _with_adjacent_channels(q, k, v)
    grad_out, grad_maps, *outputs = (t.contiguous() for t in (grad_out, grad_maps, out, maps, lse))
    forward = _native_arguments(inputs, outputs, num_heads, maps.shape[1], gate, first_row)
    workspace, threads = _cpu_workspace(inputs, num_heads, maps.shape[1])
    grads = _empty_gated_attention_backward(grad_out, grad_maps, q, k, v)
    grad_gate = torch.empty((q.shape[0], num_heads, q.shape[1]), dtype=torch.float32)
    _native._cpu.gated_attention_backward(
        *forward,
        grad_out.data_ptr(),
        grad_maps.data_ptr(),
        [grad.data_ptr() for grad in grads],
        grad_gate.data_ptr(),
        workspace.data_ptr(),
        threads,
    )
    return grads


def _gated_attention_triton(q, k, v, num_heads, num_queries, gate, first_row, rows):
    kernels = triton_kernels("gated_attention")
    if not kernels.takes(q.dtype, *q.shape[1:], num_heads):
        return _gated_attention(q, k, v, num_heads, num_queries, gate, first_row, rows)
    outputs = _empty_gated_attention(q, k, v, num_heads, num_queries, gate, first_row, rows)
    mean_map = _empty_floats(q, q.shape[:2])
    kernels.forward(*_with_short_offsets(q, k, v), num_heads, num_queries, gate, first_row, *outputs, mean_map)
    return outputs


def _gated_attention_backward_triton(grad_out, grad_maps, q, k, v, out, maps, lse, num_heads, gate, first_row):
    kernels = triton_kernels("gated_attention")
    if not kernels.takes(q.dtype, *q.shape[1:], num_heads):
        return _gated_attention_backward(grad_out, grad_maps, q, k, v, out, maps, lse, num_heads, gate, first_row)
    inputs = _with_short_offsets(q, k, v)
    grad_out, grad_maps, *outputs = (t.contiguous() for t in (grad_out, grad_maps, out, maps, lse))
    grads = _empty_gated_attention_backward(grad_out, grad_maps, q, k, v)
    above = (maps.mean(1), grad_out, grad_maps)
    kernels.backward(*inputs, num_heads, gate, first_row, *outputs, *above, *grads, *_scratch(q, lse, maps))
    return grads


def _gated_attention_cuda(q, k, v, num_heads, num_queries, gate, first_row, rows):
    if not _cuda_takes(q, num_heads):
        slower = _gated_attention if unavailable("triton", q.device.type) else _gated_attention_triton
        return slower(q, k, v, num_heads, num_queries, gate, first_row, rows)
    inputs = _with_vectors(q, k, v)
    outputs = _empty_gated_attention(q, k, v, num_heads, num_queries, gate, first_row, rows)
    forward = _native_arguments(inputs, outputs, num_heads, num_queries, gate, first_row)
    mean_map = _empty_floats(q, q.shape[:2])
    _native._cuda.gated_attention(*forward, mean_map.data_ptr(), *_device_and_stream(q))
    return outputs


def _gated_attention_backward_cuda(grad_out, grad_maps, q, k, v, out, maps, lse, num_heads, gate, first_row):
    if not _cuda_takes(q, num_heads):
        slower = _gated_attention_backward
        if not unavailable("triton", q.device.type):
            slower = _gated_attention_backward_triton
        return slower(grad_out, grad_maps, q, k, v, out, maps, lse, num_heads, gate, first_row)
    inputs = _with_vectors(q, k, v)
    grad_out, out = _with_vectors(grad_out.contiguous(), out.contiguous())
    grad_maps, maps, lse = (t.contiguous() for t in (grad_maps, maps, lse))
    forward = _native_arguments(inputs, (out, maps, lse), num_heads, maps.shape[1], gate, first_row)
    grads = _empty_gated_attention_backward(grad_out, grad_maps, q, k, v)
    mean_map, (delta, grad_gate, grad_logits) = maps.mean(1), _scratch(q, lse, maps)
    _native._cuda.gated_attention_backward(
        *forward,
        grad_out.data_ptr(),
        grad_maps.data_ptr(),
        [grad.data_ptr() for grad in grads],
        *(t.data_ptr() for t in (grad_gate, mean_map, delta, grad_logits)),
        *_device_and_stream(q),
    )
    return grads


def _cuda_takes(q, num_heads):
    tokens, dim = q.shape[1:]
    return q.dtype in _NUMBERS and dim // num_heads in (32, 64) and tokens * dim < 2**31


def _device_and_stream(tensor):
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def _empty_floats(like, shape):
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _scratch(q, lse, maps):
    """delta (B, H, R), grad_gate (B, H, N), grad_logits (B, G, N)."""
    shapes = (lse.shape, (*lse.shape[:2], q.shape[1]), maps.shape)
    return tuple(_empty_floats(q, shape) for shape in shapes)


def _with_adjacent_channels(*tensors):
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def _with_short_offsets(*tensors):
    """For kernels whose offsets within an item are 32-bit."""
    return _with_adjacent_channels(*(t if t.shape[1] * t.stride(1) < 2**31 else t.contiguous() for t in tensors))


def _with_vectors(*tensors):
    """For kernels that load 16 bytes at once."""

    def aligned(t):
        return not (t.data_ptr() % 16 or any(s * t.itemsize % 16 for s in t.stride()[:2]))

    tensors = _with_short_offsets(*tensors)
    return tuple(t if aligned(t) else t.clone(memory_format=torch.contiguous_format) for t in tensors)


def _native_arguments(inputs, outputs, num_heads, num_queries, gate, first_row):
    """What every native kernel starts with. The caller keeps the tensors alive."""
    batch, tokens, dim = inputs[0].shape
    return (
        [t.data_ptr() for t in (*inputs, *outputs)],
        [stride for t in inputs for stride in t.stride()[:2]],
        [batch, tokens, dim, num_heads, num_queries, first_row, outputs[0].shape[1]],
        gate,
        _NUMBERS[inputs[0].dtype],
    )


def _cpu_workspace(inputs, num_heads, num_queries):
    """A workspace and the number of threads."""
    threads = torch.get_num_threads()
    floats = threads * _native._cpu.gated_attention_workspace(*inputs[0].shape[1:], num_heads, num_queries)
    return torch.empty(floats, dtype=torch.float32), threads


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    q, k, v, num_heads, _, gate, first_row, _ = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.options = (num_heads, gate, first_row)
    ctx.backend = keyword_only_inputs["backend"]


def _differentiate(ctx, grad_out, grad_maps, _grad_lse):
    grads = torch.ops.pro2sam_fast.gated_attention_backward(
        grad_out, grad_maps, *ctx.saved_tensors, *ctx.options, backend=ctx.backend
    )
    return *grads, None, None, None, None, None


def _differentiate_again(ctx, *grads):
    raise NotImplementedError("gated_attention has no second derivatives")


def _example(dtype, device):
    """Two images of 41 tokens, the last 4 query tokens; 2 heads of 64 channels."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn((3, 2, 41, 128), generator=generator).to(device, dtype)
    return q, k, v, 2, 4, True, 0, 41


def _example_backward(dtype, device):
    q, k, v, num_heads, num_queries, gate, first_row, rows = _example(dtype, device)
    out, maps, lse = _gated_attention(q, k, v, num_heads, num_queries, gate, first_row, rows)
    return v.flip(1), maps.flip(1) - 0.5, q, k, v, out, maps, lse, num_heads, gate, first_row


def _examples(example):
    rows = {
        torch.float32: torch.float32,
        "bfloat16 products": torch.bfloat16,
        "float16 products": torch.float16,
    }
    return {row: functools.partial(example, dtype) for row, dtype in rows.items()}


register(
    "gated_attention(Tensor q, Tensor k, Tensor v, int num_heads, int num_queries, bool gate, SymInt first_row, "
    'SymInt rows, *, str backend="auto") -> (Tensor out, Tensor maps, Tensor lse)',
    _check_gated_attention,
    {
        "reference": _gated_attention,
        "cpu": _gated_attention_cpu,
        "cuda": _gated_attention_cuda,
        "triton": _gated_attention_triton,
    },
    _empty_gated_attention,
    _examples(_example),
)
register(
    "gated_attention_backward(Tensor grad_out, Tensor grad_maps, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor maps, Tensor lse, int num_heads, bool gate, SymInt first_row, *, "
    'str backend="auto") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)',
    _check_gated_attention_backward,
    {
        "reference": _gated_attention_backward,
        "cpu": _gated_attention_backward_cpu,
        "cuda": _gated_attention_backward_cuda,
        "triton": _gated_attention_backward_triton,
    },
    _empty_gated_attention_backward,
    _examples(_example_backward),
)
torch.library.register_autograd(
    "pro2sam_fast::gated_attention", _differentiate, setup_context=_setup_context, lib=library
)
torch.library.register_autograd("pro2sam_fast::gated_attention_backward", _differentiate_again, lib=library)
