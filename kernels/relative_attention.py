"""Triton back end of `relative_attention`. Tensors are checked by the caller; channels are adjacent.

A program takes a tile of one head's queries in one window and runs over the keys with a running softmax. Tiles of keys
are whole rows of the window, their width a power of two, so that of a key tile's bias the part by columns stays in
registers and the part by rows is a vector (or, for narrow windows, `BLOCK_N // WIDTH` of them). A head is read as
D0 + D1 channels: 80 as 64 + 16, which wastes nothing, where one power of two would be 128.
"""

import itertools
import math

import torch
import triton
import triton.language as tl

from .launch import on

MAX_WIDTH = 96
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _load_rows(rows, inside, FIRST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    # (n, BLOCK) channels from FIRST on of the rows that begin at pointers (n,); 0 outside and from channel D on
    channel = FIRST + tl.arange(0, BLOCK)
    if FIRST + BLOCK <= D:
        return tl.load(rows[:, None] + channel[None, :], mask=inside[:, None], other=0.0)
    return tl.load(rows[:, None] + channel[None, :], mask=inside[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def _store_rows(rows, inside, values, FIRST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    channel = FIRST + tl.arange(0, BLOCK)
    mask = inside[:, None] & (channel < D)[None, :]
    tl.store(rows[:, None] + channel[None, :], values.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _terms(terms, asked, start, side, COUNT: tl.constexpr):
    # (n, COUNT) bias, in base 2, by the keys' rows or columns from `start` on; beyond `side` no key is seen
    key = start + tl.arange(0, COUNT)
    inside = (key < side)[None, :]
    found = tl.load(terms[:, None] - key[None, :], mask=asked[:, None] & inside, other=0.0)
    return tl.where(inside, found.to(tl.float32) * LOG2E, float("-inf"))


@triton.jit
def _offset(y, x, row_stride, column_stride):
    return (y * row_stride + x * column_stride).to(tl.int64)


@triton.jit
def relative_attention_kernel(
    q, k, v, rel, pad_k, pad_v, out,
    image_stride, row_stride, column_stride, head_stride, pad_stride,
    images, height, width, heads, side_h, side_w, tiles, scale,
    UNIT: tl.constexpr, REL: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    # q, k, v (images, height, width, heads, D), strides in units of UNIT elements; rel (heads, images, height, width,
    # REL) holds q times the tables, offsets of rows before those of columns; pad_k, pad_v (heads, D). WIDEN is for the
    # interpreter, which takes bfloat16 operands for integers. UNIT is 16 if D is a multiple of it and rows begin at
    # multiples of 16 bytes, else 1.
    down, across = tl.cdiv(height, side_h), tl.cdiv(width, side_w)
    tile = tl.program_id(0) % tiles
    place = tl.program_id(0) // tiles
    head = (place % heads).to(tl.int64)
    place //= heads
    first_column = place % across * side_w
    place //= across
    first_row = place % down * side_h
    image = (place // down).to(tl.int64)
    rows = tl.minimum(side_h, height - first_row)
    columns = tl.minimum(side_w, width - first_column)

    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    asked = query < rows * columns
    query_y, query_x = query // columns, query % columns
    token = (image * height + first_row + query_y) * width + first_column + query_x
    here = (image * image_stride + head * head_stride) * UNIT
    at_q = q + here + _offset(first_row + query_y, first_column + query_x, row_stride, column_stride) * UNIT
    if UNIT == 16:
        at_q = tl.multiple_of(at_q, 16)
    q0 = _load_rows(at_q, asked, 0, D, D0)
    if D1 > 0:
        q1 = _load_rows(at_q, asked, D0, D, D1)
    # entry ky of a query's terms belongs to the offset query_y - ky
    term_h = rel + (head * images * height * width + token) * REL + query_y + side_h - 1
    term_w = rel + (head * images * height * width + token) * REL + 2 * side_h - 1 + query_x + side_w - 1

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out0 = tl.zeros((BLOCK_M, D0), tl.float32)
    if D1 > 0:
        out1 = tl.zeros((BLOCK_M, D1), tl.float32)
    ROWS: tl.constexpr = BLOCK_N // WIDTH
    key = tl.arange(0, BLOCK_N)
    for start_x in range(0, side_w, WIDTH):
        key_x = start_x + key % WIDTH
        by_column = _terms(term_w, asked, start_x, side_w, WIDTH)
        for start_y in range(0, side_h, ROWS):
            key_y = start_y + key // WIDTH
            inside = (key_y < side_h) & (key_x < side_w)
            at = here + _offset(first_row + key_y, first_column + key_x, row_stride, column_stride) * UNIT
            at_k, at_v = k + at, v + at
            if PADDED:
                real = (key_y < rows) & (key_x < columns)
                at_k = tl.where(real, at_k, pad_k + head * pad_stride * UNIT)
                at_v = tl.where(real, at_v, pad_v + head * pad_stride * UNIT)
            if UNIT == 16:
                at_k, at_v = tl.multiple_of(at_k, 16), tl.multiple_of(at_v, 16)
            logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            logits = _dot(q0, tl.trans(_load_rows(at_k, inside, 0, D, D0)), logits, PRECISION, WIDEN)
            if D1 > 0:
                logits = _dot(q1, tl.trans(_load_rows(at_k, inside, D0, D, D1)), logits, PRECISION, WIDEN)
            bias = _terms(term_h, asked, start_y, side_h, ROWS)[:, :, None] + by_column[:, None, :]
            logits = logits * (scale * LOG2E) + tl.reshape(bias, (BLOCK_M, BLOCK_N))
            highest = tl.maximum(top, tl.max(logits, 1))
            weights = tl.exp2(logits - highest[:, None])
            shrink = tl.exp2(top - highest)
            total = total * shrink + tl.sum(weights, 1)
            top = highest
            weights = weights.to(v.dtype.element_ty)
            out0 = _dot(weights, _load_rows(at_v, inside, 0, D, D0), out0 * shrink[:, None], PRECISION, WIDEN)
            if D1 > 0:
                out1 = _dot(weights, _load_rows(at_v, inside, D0, D, D1), out1 * shrink[:, None], PRECISION, WIDEN)
    at_out = out + (token * heads + head) * D
    if UNIT == 16:
        at_out = tl.multiple_of(at_out, 16)
    _store_rows(at_out, asked, out0 / total[:, None], 0, D, D0)
    if D1 > 0:
        _store_rows(at_out, asked, out1 / total[:, None], D0, D, D1)


def supports(dtype: torch.dtype, d: int, device: torch.device) -> bool:
    """Whether the kernel takes heads of d channels: float32 ones of more than 64 fill the registers before sm_90."""
    return dtype in DTYPES and d <= (64 if dtype == torch.float32 and not _wgmma(device) else MAX_WIDTH)


def relative_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rel: torch.Tensor,
    pad_k: torch.Tensor,
    pad_v: torch.Tensor,
    out: torch.Tensor,
    sides: tuple[int, int],
) -> None:
    """q, k, v (B, h, w, H, d) with equal strides, rel (H, B, h, w, R) contiguous, pads (H, d) with equal strides -> out
    like q, contiguous. `sides` are those of a window."""
    images, height, width, heads, d = q.shape
    down, across = triton.cdiv(height, sides[0]), triton.cdiv(width, sides[1])
    constants, options = _plan(q.dtype, d, sides, rel.shape[-1], _wgmma(q.device))
    strides = (*q.stride()[:4], pad_k.stride(0))
    addresses = (t.data_ptr() for t in (q, k, v, pad_k, pad_v, out))
    unit = 16 if all(n % 16 == 0 for n in (d, *strides, *addresses)) else 1
    tiles = triton.cdiv(min(sides[0], height) * min(sides[1], width), constants["BLOCK_M"])
    programs = tiles * heads * down * across * images
    if not programs:
        return
    with on(q):
        relative_attention_kernel[(programs,)](
            q, k, v, rel, pad_k, pad_v, out, *(stride // unit for stride in strides), images, height, width, heads,
            *sides, tiles, d**-0.5, UNIT=unit, PADDED=bool(height % sides[0] or width % sides[1]),
            WIDEN=not q.is_cuda, **constants, **options,
        )  # fmt: skip


def _wgmma(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _plan(dtype: torch.dtype, d: int, sides: tuple[int, int], rel: int, wgmma: bool) -> tuple[dict, dict]:
    """Compile-time constants and options of a launch: what spills nothing and keeps most programs on a processor."""
    whole = 1 << (max(d, 16).bit_length() - 1)
    rest = max(16, triton.next_power_of_2(d - whole)) if d > whole else 0
    narrow = dtype != torch.float32
    keys = (64 if wgmma else 32) if narrow else 16
    constants = {
        "REL": rel,
        "D": d,
        "D0": whole,
        "D1": rest,
        "BLOCK_M": 128 if narrow else 64,
        "BLOCK_N": keys,
        "WIDTH": min(keys, max(16, triton.next_power_of_2(sides[1]))),
        "PRECISION": "ieee" if narrow else "tf32x3",
    }
    return constants, {"num_warps": 8 if narrow else 4, "num_stages": 2 if narrow else 1}


def _ahead_of_time():
    types = {
        **dict.fromkeys(("image_stride", "row_stride", "column_stride", "head_stride", "pad_stride"), "i32"),
        **dict.fromkeys(("images", "height", "width", "heads", "side_h", "side_w", "tiles"), "i32"),
        "scale": "fp32",
    }
    for dtype, name in ((torch.float16, "*fp16"), (torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        pointers = dict.fromkeys(("q", "k", "v", "rel", "pad_k", "pad_v", "out"), name)
        for d, side, wgmma in itertools.product((64, 80), (14, 64), (False, True)):
            if (dtype == torch.float32 and d > 64 and not wgmma) or (dtype == torch.bfloat16 and d == 64):
                continue  # not launched; like float16's
            rel = triton.cdiv(4 * side - 2, 8) * 8
            constants, options = _plan(dtype, d, (side, side), rel, wgmma)
            constants |= {"UNIT": 16, "PADDED": bool(64 % side), "WIDEN": False}
            options["capabilities"] = (90,) if wgmma else (80,)
            yield relative_attention_kernel, {**pointers, **types}, constants, options


AHEAD_OF_TIME = tuple(_ahead_of_time())
