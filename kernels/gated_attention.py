"""Triton back end of `gated_attention` and its gradient. Tensors are checked by the caller; channels are adjacent.

No logits leave a program: forward is one pass over the keys with a running softmax, backward recomputes the weights
from `lse`, once for tiles of keys and once for tiles of rows. The map of every key couples all heads and all query
tokens, so it is made before the pass that uses it, and so is its gradient. Every sum has one order: no atomics.
"""

import math

import torch
import triton
import triton.language as tl

from .launch import on
from .products import product, rounded

MAX_WIDTH = 128
TILE = {
    torch.float32: 32,
    torch.bfloat16: 64,
    torch.float16: 64,
}  # rows and keys of a program, if nothing is in the way
FORWARD_STAGES = {torch.float32: 2, torch.bfloat16: 3, torch.float16: 3}
QUERIES = 16

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


@triton.jit
def _load_rows(first, row, inside, stride, width: tl.constexpr, WIDTH: tl.constexpr):
    # (rows, WIDTH) of a matrix whose channels are adjacent; 0 outside, and for channels from `width` on.
    channel = tl.arange(0, WIDTH)
    at = first + row[:, None] * stride + channel[None, :]
    if width == WIDTH:
        return tl.load(at, mask=inside[:, None], other=0.0)
    return tl.load(at, mask=inside[:, None] & (channel < width)[None, :], other=0.0)


@triton.jit
def _store_rows(first, row, inside, stride, values, width: tl.constexpr, WIDTH: tl.constexpr):
    channel = tl.arange(0, WIDTH)
    at = first + row[:, None] * stride + channel[None, :]
    tl.store(at, rounded(values, first.dtype.element_ty), mask=inside[:, None] & (channel < width)[None, :])


@triton.jit
def gated_attention_maps_kernel(
    q, k, maps, mean_map, q_item, q_row, k_item, k_row, n, dim, queries, scale,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # A program KEYS keys of one item: maps (items, queries, n) and their mean over the queries (items, n).
    tiles = tl.cdiv(n, KEYS)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    key = tl.program_id(0) % tiles * KEYS + tl.arange(0, KEYS)
    total = tl.zeros((KEYS,), tl.float32)
    for first in range(0, queries, QUERIES):
        query = first + tl.arange(0, QUERIES)
        logits = tl.zeros((KEYS, QUERIES), tl.float32)
        for start in range(0, dim, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            here = (channel < dim)[None, :]
            at = q + item * q_item + (n - queries + query)[:, None] * q_row + channel[None, :]
            x = tl.load(at, mask=(query < queries)[:, None] & here, other=0.0)
            at = k + item * k_item + key[:, None] * k_row + channel[None, :]
            y = tl.load(at, mask=(key < n)[:, None] & here, other=0.0)
            logits = product(y, tl.trans(x), logits)
        probability = tl.sigmoid(logits * scale)
        inside = (key < n)[:, None] & (query < queries)[None, :]
        at = maps + (item * queries + query[None, :]) * n + key[:, None]
        tl.store(at, probability, mask=inside)
        total += tl.sum(tl.where(inside, probability, 0.0), 1)
    tl.store(mean_map + item * n + key, total / queries, mask=key < n)


@triton.jit
def gated_attention_kernel(
    q, k, v, mean_map, out, lse, q_item, q_row, k_item, k_row, v_item, v_row, n, heads, first_row, rows, scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # A program ROWS rows of one head: out (items, rows, heads * HEAD), lse (items, heads, rows).
    tiles = tl.cdiv(rows, ROWS)
    head = tl.program_id(0) // tiles % heads
    item = (tl.program_id(0) // tiles // heads).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    x = _load_rows(q + item * q_item + head * HEAD, first_row + row, row < rows, q_row, HEAD, WIDTH)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, n, KEYS):
        key = start + tl.arange(0, KEYS)
        y = _load_rows(k + item * k_item + head * HEAD, key, key < n, k_row, HEAD, WIDTH)
        logits = product(x, tl.trans(y), tl.zeros((ROWS, KEYS), tl.float32)) * (scale * LOG2E)
        logits = tl.where((key < n)[None, :], logits, -float("inf"))
        highest = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - highest[:, None])
        shrink = tl.exp2(top - highest)
        total = total * shrink + tl.sum(weights, 1)
        if GATE:
            weights *= tl.load(mean_map + item * n + key, mask=key < n, other=0.0)[None, :]
        y = _load_rows(v + item * v_item + head * HEAD, key, key < n, v_row, HEAD, WIDTH)
        result = product(rounded(weights, y.dtype), y, result * shrink[:, None])
        top = highest
    dim = heads * HEAD
    _store_rows(out + item * rows * dim + head * HEAD, row, row < rows, dim, result / total[:, None], HEAD, WIDTH)
    tl.store(lse + (item * heads + head) * rows + row, (top + tl.log2(total)) * LN2, mask=row < rows)


@triton.jit
def gated_attention_keys_kernel(
    q, k, v, mean_map, out, lse, grad_out, delta, grad_k, grad_v, grad_gate,
    q_item, q_row, k_item, k_row, v_item, v_row, n, heads, first_row, rows, scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # A program KEYS keys of one head: grad_v, what the softmax gives of grad_k, and the head's part of the gradient of
    # mean_map in grad_gate (items, heads, n). The first tile leaves rowsum(out * grad_out) in delta, like lse.
    tiles = tl.cdiv(n, KEYS)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    item = (tl.program_id(0) // tiles // heads).to(tl.int64)
    key = tile * KEYS + tl.arange(0, KEYS)
    dim = heads * HEAD
    y = _load_rows(k + item * k_item + head * HEAD, key, key < n, k_row, HEAD, WIDTH)
    value = _load_rows(v + item * v_item + head * HEAD, key, key < n, v_row, HEAD, WIDTH)
    if GATE:
        gate = tl.load(mean_map + item * n + key, mask=key < n, other=0.0)
    to_key = tl.zeros((KEYS, WIDTH), tl.float32)
    to_value = tl.zeros((KEYS, WIDTH), tl.float32)
    zero = tl.zeros((KEYS, ROWS), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < rows
        x = _load_rows(q + item * q_item + head * HEAD, first_row + row, inside, q_row, HEAD, WIDTH)
        above = _load_rows(grad_out + item * rows * dim + head * HEAD, row, inside, dim, HEAD, WIDTH)
        result = _load_rows(out + item * rows * dim + head * HEAD, row, inside, dim, HEAD, WIDTH)
        change = tl.sum(above.to(tl.float32) * result.to(tl.float32), 1)
        if tile == 0:
            tl.store(delta + (item * heads + head) * rows + row, change, mask=inside)
        # Rows past the end weigh exp(-inf) = 0.
        base = tl.load(lse + (item * heads + head) * rows + row, mask=inside, other=float("inf")) * LOG2E
        weights = tl.exp2(product(y, tl.trans(x), zero) * (scale * LOG2E) - base[None, :])
        to_value = product(rounded(weights, above.dtype), above, to_value)
        slope = product(value, tl.trans(above), zero)
        if GATE:
            slope *= gate[:, None]
        slope = weights * (slope - change[None, :])
        to_key = product(rounded(slope, x.dtype), x, to_key)
    if GATE:
        tl.store(grad_gate + (item * heads + head) * n + key, tl.sum(to_value * value.to(tl.float32), 1), mask=key < n)
        to_value *= gate[:, None]
    _store_rows(grad_k + item * n * dim + head * HEAD, key, key < n, dim, to_key * scale, HEAD, WIDTH)
    _store_rows(grad_v + item * n * dim + head * HEAD, key, key < n, dim, to_value, HEAD, WIDTH)


@triton.jit
def gated_attention_maps_gradient_kernel(
    q, maps, grad_maps, grad_gate, grad_logits, grad_k, q_item, q_row, n, dim, heads, queries, scale,
    GATE: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # A program KEYS keys and CHANNELS channels of one item: what the maps add to grad_k. The programs of the first
    # channels leave the gradient of each head's scaled logits in grad_logits (items, queries, n).
    parts = tl.cdiv(dim, CHANNELS)
    part = tl.program_id(0) % parts
    tiles = tl.cdiv(n, KEYS)
    item = (tl.program_id(0) // parts // tiles).to(tl.int64)
    key = tl.program_id(0) // parts % tiles * KEYS + tl.arange(0, KEYS)
    channel = part * CHANNELS + tl.arange(0, CHANNELS)
    to_mean = tl.zeros((KEYS,), tl.float32)
    if GATE:
        for head in range(heads):
            to_mean += tl.load(grad_gate + (item * heads + head) * n + key, mask=key < n, other=0.0)
        to_mean /= queries
    change = tl.zeros((KEYS, CHANNELS), tl.float32)
    for first in range(0, queries, QUERIES):
        query = first + tl.arange(0, QUERIES)
        inside = (key < n)[:, None] & (query < queries)[None, :]
        at = (item * queries + query[None, :]) * n + key[:, None]
        probability = tl.load(maps + at, mask=inside, other=0.0)
        slope = tl.load(grad_maps + at, mask=inside, other=0.0) + to_mean[:, None]
        slope *= probability * (1.0 - probability) / heads
        if part == 0:
            tl.store(grad_logits + at, slope, mask=inside)
        at = q + item * q_item + (n - queries + query)[:, None] * q_row + channel[None, :]
        x = tl.load(at, mask=(query < queries)[:, None] & (channel < dim)[None, :], other=0.0)
        change = product(rounded(slope, x.dtype), x, change)
    at = grad_k + (item * n + key[:, None]) * dim + channel[None, :]
    inside = (key < n)[:, None] & (channel < dim)[None, :]
    before = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, rounded(before + change * scale, grad_k.dtype.element_ty), mask=inside)


@triton.jit
def gated_attention_rows_kernel(
    q, k, v, mean_map, lse, grad_out, delta, grad_logits, grad_q,
    q_item, q_row, k_item, k_row, v_item, v_row, n, heads, queries, first_row, rows, scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # A program ROWS of all n rows of one head: grad_q. Rows without an output weigh exp(-inf) = 0.
    tiles = tl.cdiv(n, ROWS)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    item = (tl.program_id(0) // tiles // heads).to(tl.int64)
    dim = heads * HEAD
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = (row >= first_row) & (row < first_row + rows)
    x = _load_rows(q + item * q_item + head * HEAD, row, inside, q_row, HEAD, WIDTH)
    above = _load_rows(grad_out + item * rows * dim + head * HEAD, row - first_row, inside, dim, HEAD, WIDTH)
    at = (item * heads + head) * rows + row - first_row
    base = tl.load(lse + at, mask=inside, other=float("inf")) * LOG2E
    change = tl.load(delta + at, mask=inside, other=0.0)
    to_query = tl.zeros((ROWS, WIDTH), tl.float32)
    zero = tl.zeros((ROWS, KEYS), tl.float32)
    for start in range(0, n, KEYS):
        key = start + tl.arange(0, KEYS)
        y = _load_rows(k + item * k_item + head * HEAD, key, key < n, k_row, HEAD, WIDTH)
        value = _load_rows(v + item * v_item + head * HEAD, key, key < n, v_row, HEAD, WIDTH)
        weights = tl.exp2(product(x, tl.trans(y), zero) * (scale * LOG2E) - base[:, None])
        weights = tl.where((key < n)[None, :], weights, 0.0)
        slope = product(above, tl.trans(value), zero)
        if GATE:
            slope *= tl.load(mean_map + item * n + key, mask=key < n, other=0.0)[None, :]
        slope = weights * (slope - change[:, None])
        to_query = product(rounded(slope, y.dtype), y, to_query)
    # What the maps add to the rows of the query tokens.
    query = row - (n - queries)
    for start in range(0, tl.where(tile * ROWS + ROWS > n - queries, n, 0), KEYS):
        key = start + tl.arange(0, KEYS)
        asked = ((query >= 0) & (query < queries))[:, None] & (key < n)[None, :]
        slope = tl.load(grad_logits + (item * queries + query[:, None]) * n + key[None, :], mask=asked, other=0.0)
        y = _load_rows(k + item * k_item + head * HEAD, key, key < n, k_row, HEAD, WIDTH)
        to_query = product(rounded(slope, y.dtype), y, to_query)
    _store_rows(grad_q + item * n * dim + head * HEAD, row, row < n, dim, to_query * scale, HEAD, WIDTH)


def takes(dtype: torch.dtype, tokens: int, dim: int, num_heads: int) -> bool:
    """Whether these kernels serve heads of this dtype and width; offsets within an item are 32-bit."""
    return dtype in TILE and dim // num_heads <= MAX_WIDTH and tokens * dim < 2**31


def forward(q, k, v, num_heads, num_queries, gate, first_row, out, maps, lse, mean_map) -> None:
    """q, k, v (B, N, D) -> out (B, R, D), maps (B, G, N), lse (B, H, R), mean_map (B, N) if G is not 0."""
    batch, n, dim = q.shape
    rows, width, strides = lse.shape[2], dim // num_heads, _strides(q, k, v)
    tile, head, step = _sizes(q.dtype, width, _aligned(q, k, v, out))
    scale = 1 / math.sqrt(width)
    with on(q):
        if batch * num_queries:
            gated_attention_maps_kernel[(batch * triton.cdiv(n, tile),)](
                q, k, maps, mean_map, *strides[:4], n, dim, num_queries, scale / num_heads,
                KEYS=tile, QUERIES=QUERIES, CHANNELS=step,
            )  # fmt: skip
        if batch * rows:
            gated_attention_kernel[(batch * num_heads * triton.cdiv(rows, tile),)](
                q, k, v, mean_map, out, lse, *strides, n, num_heads, first_row, rows, scale,
                GATE=gate, ROWS=tile, KEYS=tile, **head, num_stages=FORWARD_STAGES[q.dtype],
            )  # fmt: skip


def backward(
    q, k, v, num_heads, gate, first_row, out, maps, lse, mean_map, grad_out, grad_maps,
    grad_q, grad_k, grad_v, delta, grad_gate, grad_logits,
) -> None:  # fmt: skip
    """Gradients (B, N, D), contiguous like out, grad_out, maps and grad_maps; scratch delta (B, H, R), grad_gate
    (B, H, N), grad_logits (B, G, N)."""
    batch, n, dim = q.shape
    rows, num_queries, width, strides = lse.shape[2], maps.shape[1], dim // num_heads, _strides(q, k, v)
    tile, head, step = _sizes(q.dtype, width, _aligned(q, k, v, out, grad_out))
    scale = 1 / math.sqrt(width)
    tiles = batch * triton.cdiv(n, tile)
    if not tiles:
        return
    with on(q):
        gated_attention_keys_kernel[(tiles * num_heads,)](
            q, k, v, mean_map, out, lse, grad_out, delta, grad_k, grad_v, grad_gate,
            *strides, n, num_heads, first_row, rows, scale, GATE=gate, ROWS=step, KEYS=tile, **head,
        )  # fmt: skip
        if num_queries:
            gated_attention_maps_gradient_kernel[(tiles * triton.cdiv(dim, step),)](
                q, maps, grad_maps, grad_gate, grad_logits, grad_k, *strides[:2], n, dim, num_heads, num_queries, scale,
                GATE=gate, KEYS=tile, QUERIES=QUERIES, CHANNELS=step,
            )  # fmt: skip
        gated_attention_rows_kernel[(tiles * num_heads,)](
            q, k, v, mean_map, lse, grad_out, delta, grad_logits, grad_q,
            *strides, n, num_heads, num_queries, first_row, rows, scale, GATE=gate, ROWS=tile, KEYS=tile, **head,
        )  # fmt: skip


def _sizes(dtype: torch.dtype, width: int, aligned: bool) -> tuple[int, dict[str, int], int]:
    """Rows and keys of a tile, the head's constants, the smaller step of a second dimension."""
    padded = max(16, triton.next_power_of_2(width))
    tile = max(16, TILE[dtype] // (1 if aligned else 2) // max(1, padded // 64))
    return tile, {"HEAD": width, "WIDTH": padded}, max(16, tile // 2)


def _aligned(*tensors: torch.Tensor) -> bool:
    """Whether Triton may load 16 bytes at once."""
    return all(not (t.data_ptr() | t.stride(0) | t.stride(1)) % 16 for t in tensors)


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:2]]


def _ahead_of_time(kernel: triton.JITFunction, dtype: torch.dtype, width: int, aligned: bool):
    """An entry for a gated call."""
    tile, head, step = _sizes(dtype, width, aligned)
    name = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    types = {
        **dict.fromkeys(("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v"), name),
        **dict.fromkeys(("mean_map", "maps", "lse", "delta", "grad_gate", "grad_maps", "grad_logits"), "*fp32"),
        **dict.fromkeys(("q_item", "q_row", "k_item", "k_row", "v_item", "v_row", "dim"), "i32:16"),
        **dict.fromkeys(("n", "heads", "queries", "first_row", "rows"), "i32"),
        "scale": "fp32",
    }
    rows = step if kernel is gated_attention_keys_kernel else tile
    constants = {"GATE": True, "QUERIES": QUERIES, "CHANNELS": step, "ROWS": rows, "KEYS": tile, **head}
    return (
        kernel,
        {name: type_ for name, type_ in types.items() if name in kernel.arg_names},
        {name: value for name, value in constants.items() if name in kernel.arg_names},
        {
            "aligned": (True,) if aligned else (False, True),
            "num_stages": FORWARD_STAGES[dtype] if kernel is gated_attention_kernel else 3,
        },
    )


# The kernels of the maps don't look at heads: a wide head's launch is a narrow unaligned one's.
_LAUNCHES = (
    *((dtype, 64, True) for dtype in TILE),
    (torch.float32, 33, False),
    (torch.bfloat16, 33, False),
    (torch.float32, 128, True),
    (torch.bfloat16, 128, True),
)
AHEAD_OF_TIME = (
    *(
        _ahead_of_time(kernel, *launch)
        for kernel in (gated_attention_maps_kernel, gated_attention_maps_gradient_kernel)
        for launch in _LAUNCHES[:5]
    ),
    *(
        _ahead_of_time(kernel, *launch)
        for kernel in (gated_attention_kernel, gated_attention_keys_kernel, gated_attention_rows_kernel)
        for launch in _LAUNCHES
    ),
)
