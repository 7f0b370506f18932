"""Triton back end of `mask_measure` and `mask_pack`. Tensors are contiguous and checked by the caller.

A program works on a tile of pixels, row by row downwards, and keeps the two rows of the input frame between which the
row lies, resized to the tile's columns. Where the low-resolution logits around a tile are sure to stay on one side of
every cutoff, no pixel is computed.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from .launch import UNFUSED, on

ROWS = 32
# Columns of a tile, warps, and the most low-resolution columns among which a tile's extremes are looked for.
MEASURE, PACK, INTERPRETED = (128, 4, 64), (64, 1, 32), (1024, 4, 256)
JOIN_BLOCK = 256
# counts above three cutoffs, then x0, y0, x1, y1
VALUES = tl.constexpr(7)
WORD = tl.constexpr(64)

# Beyond it a sum of products could overflow.
_TAME = tl.constexpr(2.0**120)
_NONE = tl.constexpr(2**31 - 1)
# Low-resolution values a pixel of a tile beyond which looking for the least and the largest doesn't pay.
_MOST_SUPPORT = tl.constexpr(4)


@triton.jit
def _tap(at, axis, FUSED: tl.constexpr):
    # The two values between which output `at` of an axis (length, ratio) lies, and their weights. PyTorch rounds the
    # position once on CUDA, its CPU kernel the product too.
    centre = at.to(tl.float32) + 0.5
    if FUSED:
        position = tl.fma(centre, axis[1], -0.5)
    else:
        position = centre * axis[1] - 0.5
    position = tl.maximum(position, 0.0)
    first = tl.minimum(position.to(tl.int32), axis[0] - 1)
    w1 = tl.minimum(position - first.to(tl.float32), 1.0)
    return first, tl.minimum(first + 1, axis[0] - 1), 1.0 - w1, w1


@triton.jit
def _lerp(tap, a, b, COPIES: tl.constexpr):
    # w1 * b is rounded first
    if COPIES:
        return a
    else:
        return tl.fma(a, tap[2], tap[3] * b)


@triton.jit
def _input_row(
    low_res, i, stride, row_axis, across, a, b, COPIES_INPUT: tl.constexpr, COPIES: tl.constexpr, FUSED: tl.constexpr
):
    # Row i of the input at the photo's columns: between the input's columns a and b, each between two of low_res.
    tap = _tap(i, row_axis, FUSED)
    top, bottom = low_res + tap[0] * stride, low_res + tap[1] * stride
    top_a = _lerp(a, tl.load(top + a[0]), tl.load(top + a[1]), COPIES_INPUT)
    bottom_a = _lerp(a, tl.load(bottom + a[0]), tl.load(bottom + a[1]), COPIES_INPUT)
    value = _lerp(tap, top_a, bottom_a, COPIES_INPUT)
    if not COPIES:
        top_b = _lerp(b, tl.load(top + b[0]), tl.load(top + b[1]), COPIES_INPUT)
        bottom_b = _lerp(b, tl.load(bottom + b[0]), tl.load(bottom + b[1]), COPIES_INPUT)
        value = _lerp(across, value, _lerp(tap, top_b, bottom_b, COPIES_INPUT), False)
    return value


@triton.jit
def _row(
    low_res,
    y,
    stride,
    axes,
    across,
    a,
    b,
    top,
    bottom,
    top_at,
    bottom_at,
    COPIES_INPUT: tl.constexpr,
    COPIES: tl.constexpr,
    FUSED: tl.constexpr,
):
    # Row y of the photo, and the two input rows it lies between, which the next call takes.
    tap = _tap(y, axes[1], FUSED)
    if tap[0] != top_at:
        if tap[0] == bottom_at:
            top = bottom
        else:
            top = _input_row(low_res, tap[0], stride, axes[0], across, a, b, COPIES_INPUT, COPIES, FUSED)
        top_at = tap[0]
    if not COPIES:  # noqa: SIM102
        if tap[1] != bottom_at:
            bottom = _input_row(low_res, tap[1], stride, axes[0], across, a, b, COPIES_INPUT, COPIES, FUSED)
            bottom_at = tap[1]
    return _lerp(tap, top, bottom, COPIES), top, bottom, top_at, bottom_at


@triton.jit
def _support(
    low_res,
    stride,
    begin,
    end,
    left,
    right,
    axes,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUPPORT: tl.constexpr,
    FUSED: tl.constexpr,
):
    # Least and largest logit, float64, on which rows [begin, end) and columns [left, right] of the photo depend, with
    # margins: values are nested means, off by less than 2^-20 of the larger end after four interpolations, or by
    # subnormals. A range that settles nothing where there are too many, or values that aren't tame.
    top = _tap(_tap(begin, axes[1], FUSED)[0], axes[0], FUSED)[0]
    bottom = _tap(_tap(end - 1, axes[1], FUSED)[1], axes[0], FUSED)[1]
    first = _tap(_tap(left, axes[3], FUSED)[0], axes[2], FUSED)[0]
    last = _tap(_tap(right, axes[3], FUSED)[1], axes[2], FUSED)[1]
    at = first + tl.arange(0, SUPPORT)
    low = tl.full((SUPPORT,), _TAME, tl.float32)
    high = -low
    wild = tl.zeros((SUPPORT,), tl.int32)
    few = (last - first < SUPPORT) & ((bottom - top + 1) * SUPPORT <= _MOST_SUPPORT * ROWS * COLUMNS)
    if few:
        for j in range(top, bottom + 1):
            value = tl.load(low_res + j * stride + at, mask=at <= last, other=0.0)
            wild |= (tl.abs(value) <= _TAME).to(tl.int32) ^ 1
            low = tl.where((at <= last) & (value < low), value, low)
            high = tl.where((at <= last) & (value > high), value, high)
    least, most = tl.min(low, 0).to(tl.float64), tl.max(high, 0).to(tl.float64)
    margin = tl.maximum(-least, most) * 2.0**-19 + 2.0**-126
    sure = few & (tl.max(wild, 0) == 0)
    return tl.where(sure, least - margin, -float("inf")), tl.where(sure, most + margin, float("inf"))


@triton.jit
def _unsure(support, cut):
    return (support[0] <= cut) & (support[1] >= cut)


@triton.jit
def _program(
    tiles, rows, columns, input_height, input_width, input_row_ratio, input_column_ratio, row_ratio, column_ratio
):
    # Its mask, its tile, and the axes: low_res to input and input to photo, down and then across.
    axes = (
        (rows, input_row_ratio),
        (input_height, row_ratio),
        (columns, input_column_ratio),
        (input_width, column_ratio),
    )
    return (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles, axes


@triton.jit
def _before_rows(x, begin, axes, FUSED: tl.constexpr):
    # Of the photo's columns x, what every `_row` takes, and what the first one takes.
    across = _tap(x, axes[3], FUSED)
    a, b = _tap(across[0], axes[2], FUSED), _tap(across[1], axes[2], FUSED)
    none = tl.zeros(x.shape, tl.float32)
    return across, a, b, none, none, begin * 0 - 1, begin * 0 - 1


@triton.jit
def mask_measure_kernel(
    low_res, partial, tiles, height, width, rows, columns, input_height, input_width,
    input_row_ratio, input_column_ratio, row_ratio, column_ratio, high, low, cut,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUPPORT: tl.constexpr,
    COPIES_INPUT: tl.constexpr, COPIES: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    # Program k * tiles + tile; low_res (K, rows, columns), partial (K, tiles, VALUES).
    k, tile, axes = _program(
        tiles, rows, columns, input_height, input_width, input_row_ratio, input_column_ratio, row_ratio, column_ratio
    )
    strips = tl.cdiv(width, COLUMNS)
    low_res += k * rows * columns
    begin, left = tile // strips * ROWS, tile % strips * COLUMNS
    end, right = tl.minimum(begin + ROWS, height), tl.minimum(left + COLUMNS, width) - 1
    x = left + tl.arange(0, COLUMNS)
    inside = x < width
    inner = tl.zeros((COLUMNS,), tl.int32)
    outer, area = inner, inner
    y0 = inner + _NONE
    y1 = inner - 1
    support = _support(low_res, columns, begin, end, left, right, axes, ROWS, COLUMNS, SUPPORT, FUSED)
    if _unsure(support, high) | _unsure(support, low) | _unsure(support, cut):
        across, a, b, top, bottom, top_at, bottom_at = _before_rows(tl.minimum(x, width - 1), begin, axes, FUSED)
        for step in range(ROWS):
            y = begin + step
            value, top, bottom, top_at, bottom_at = _row(
                low_res, tl.minimum(y, height - 1), columns, axes, across, a, b, top, bottom, top_at, bottom_at,
                COPIES_INPUT, COPIES, FUSED,
            )  # fmt: skip
            there = inside & (y < height)
            above = there & (value > cut)
            inner += (there & (value > high)).to(tl.int32)
            outer += (there & (value > low)).to(tl.int32)
            area += above.to(tl.int32)
            y0 = tl.where(above, tl.minimum(y0, y), y0)
            y1 = tl.where(above, y, y1)
    else:
        pixels = inside.to(tl.int32) * (end - begin)
        inner = pixels * (support[0] > high).to(tl.int32)
        outer = pixels * (support[0] > low).to(tl.int32)
        area = pixels * (support[0] > cut).to(tl.int32)
        y0 = tl.where(area > 0, begin, _NONE)
        y1 = tl.where(area > 0, end - 1, -1)
    to = partial + tl.program_id(0).to(tl.int64) * VALUES
    tl.store(to, tl.sum(inner, 0).to(tl.int64))
    tl.store(to + 1, tl.sum(outer, 0).to(tl.int64))
    tl.store(to + 2, tl.sum(area, 0).to(tl.int64))
    tl.store(to + 3, tl.min(tl.where(area > 0, x, _NONE), 0).to(tl.int64))
    tl.store(to + 4, tl.min(y0, 0).to(tl.int64))
    tl.store(to + 5, tl.max(tl.where(area > 0, x, -1), 0).to(tl.int64))
    tl.store(to + 6, tl.max(y1, 0).to(tl.int64))


@triton.jit
def mask_join_kernel(partial, inner, outer, areas, boxes, tiles, BLOCK: tl.constexpr):
    # One program a mask; partial (K, tiles, VALUES).
    k = tl.program_id(0).to(tl.int64)
    zero = tl.zeros((BLOCK,), tl.int64)
    counts0, counts1, counts2, x1, y1 = zero, zero, zero, zero, zero
    x0, y0 = zero + _NONE, zero + _NONE
    for start in range(0, tiles, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < tiles
        values = partial + (k * tiles + at) * VALUES
        counts0 += tl.load(values, mask=there, other=0)
        counts1 += tl.load(values + 1, mask=there, other=0)
        counts2 += tl.load(values + 2, mask=there, other=0)
        x0 = tl.minimum(x0, tl.load(values + 3, mask=there, other=_NONE))
        y0 = tl.minimum(y0, tl.load(values + 4, mask=there, other=_NONE))
        x1 = tl.maximum(x1, tl.load(values + 5, mask=there, other=0))
        y1 = tl.maximum(y1, tl.load(values + 6, mask=there, other=0))
    area = tl.sum(counts2, 0)
    some = (area > 0).to(tl.int64)
    tl.store(inner + k, tl.sum(counts0, 0))
    tl.store(outer + k, tl.sum(counts1, 0))
    tl.store(areas + k, area)
    tl.store(boxes + 4 * k, tl.min(x0, 0) * some)
    tl.store(boxes + 4 * k + 1, tl.min(y0, 0) * some)
    tl.store(boxes + 4 * k + 2, tl.max(x1, 0) * some)
    tl.store(boxes + 4 * k + 3, tl.max(y1, 0) * some)


@triton.jit
def mask_pack_kernel(
    low_res, masks, tiles, height, width, rows, columns, input_height, input_width,
    input_row_ratio, input_column_ratio, row_ratio, column_ratio, cut, image_height, words, y0, x0,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUPPORT: tl.constexpr,
    COPIES_INPUT: tl.constexpr, COPIES: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    # Program k * tiles + tile of the image; low_res (K, rows, columns), masks (K, image_height, words).
    k, tile, axes = _program(
        tiles, rows, columns, input_height, input_width, input_row_ratio, input_column_ratio, row_ratio, column_ratio
    )
    PER: tl.constexpr = COLUMNS // WORD
    strips = tl.cdiv(words, PER)
    low_res += k * rows * columns
    # in the photo, also outside of it
    above, left = tile // strips * ROWS - y0, tile % strips * COLUMNS - x0
    begin, end = tl.maximum(above, 0), tl.minimum(above + ROWS, height)
    first, last = tl.maximum(left, 0), tl.minimum(left + COLUMNS, width) - 1
    x = left + tl.arange(0, COLUMNS)
    inside = (x >= 0) & (x < width)
    bit = (tl.arange(0, COLUMNS) % WORD).to(tl.int64)
    full = tl.sum(tl.reshape(inside.to(tl.int64) << bit, (PER, WORD)), 1)
    word = tile % strips * PER + tl.arange(0, PER)
    row = tile // strips * ROWS
    to = masks + (k * image_height + row) * words + word
    touches = (begin < end) & (first <= last)
    begin, first = tl.minimum(begin, height - 1), tl.minimum(first, width - 1)
    end, last = tl.maximum(end, begin + 1), tl.maximum(last, first)
    support = _support(low_res, columns, begin, end, first, last, axes, ROWS, COLUMNS, SUPPORT, FUSED)
    if touches & _unsure(support, cut):
        clamped = tl.minimum(tl.maximum(x, 0), width - 1)
        across, a, b, top, bottom, top_at, bottom_at = _before_rows(clamped, begin, axes, FUSED)
        for step in range(ROWS):
            y = above + step
            value, top, bottom, top_at, bottom_at = _row(
                low_res, tl.minimum(tl.maximum(y, 0), height - 1), columns, axes, across, a, b, top, bottom, top_at,
                bottom_at, COPIES_INPUT, COPIES, FUSED,
            )  # fmt: skip
            set_ = (inside & (y >= 0) & (y < height) & (value > cut)).to(tl.int64)
            bits = tl.sum(tl.reshape(set_ << bit, (PER, WORD)), 1)
            tl.store(to + step * words, bits, mask=word < tl.where(row + step < image_height, words, 0))
    else:
        for step in range(ROWS):
            y = above + step
            set_ = (touches & (support[0] > cut) & (y >= 0) & (y < height)).to(tl.int64)
            tl.store(to + step * words, full * set_, mask=word < tl.where(row + step < image_height, words, 0))


def _launch(kernel, low_res, out, grid_size, img_size, input_size, size, more, plan):
    """`grid_size`: (rows, columns) that the tiles cover."""
    columns, warps, support = plan
    sizes = (*low_res.shape[1:], *input_size)
    pairs = ((sizes[0], img_size), (sizes[1], img_size), (input_size[0], size[0]), (input_size[1], size[1]))
    tiles = triton.cdiv(grid_size[0], ROWS) * triton.cdiv(grid_size[1], columns)
    kernel[(len(low_res) * tiles,)](
        low_res,
        out,
        tiles,
        *size,
        *sizes,
        *(float(np.float32(n) / np.float32(m)) for n, m in pairs),
        *more,
        ROWS=ROWS,
        COLUMNS=columns,
        SUPPORT=support,
        COPIES_INPUT=sizes[:2] == (img_size, img_size),
        COPIES=tuple(input_size) == tuple(size),
        FUSED=low_res.is_cuda,
        num_warps=warps,
        **UNFUSED,
    )


def mask_measure(
    low_res: torch.Tensor,
    inner: torch.Tensor,
    outer: torch.Tensor,
    areas: torch.Tensor,
    boxes: torch.Tensor,
    img_size: int,
    input_size: tuple[int, int],
    size: tuple[int, int],
    cuts: tuple[float, float, float],
) -> None:
    """low_res float32 (K, n, m) -> inner, outer, areas int64 (K), boxes int64 (K, 4); one cutoff for each count."""
    if not len(low_res):
        return
    plan = MEASURE if low_res.is_cuda else INTERPRETED
    tiles = triton.cdiv(size[0], ROWS) * triton.cdiv(size[1], plan[0])
    partial = torch.empty((len(low_res), tiles, VALUES.value), dtype=torch.int64, device=low_res.device)
    with on(low_res):
        _launch(mask_measure_kernel, low_res, partial, size, img_size, input_size, size, cuts, plan)
        mask_join_kernel[(len(low_res),)](partial, inner, outer, areas, boxes, tiles, BLOCK=JOIN_BLOCK)


def mask_pack(
    low_res: torch.Tensor,
    masks: torch.Tensor,
    img_size: int,
    input_size: tuple[int, int],
    size: tuple[int, int],
    cut: float,
    origin: tuple[int, int],
) -> None:
    """low_res float32 (K, n, m) -> masks int64 (K, H', n')."""
    if not masks.numel():
        return
    _, height, words = masks.shape
    plan = PACK if low_res.is_cuda else INTERPRETED
    more = (cut, height, words, *origin)
    with on(low_res):
        grid_size = (height, words * WORD.value)
        _launch(mask_pack_kernel, low_res, masks, grid_size, img_size, input_size, size, more, plan)


_FRAME = {
    **dict.fromkeys(("tiles", "height", "width", "rows", "columns", "input_height", "input_width"), "i32"),
    **dict.fromkeys(("input_row_ratio", "input_column_ratio", "row_ratio", "column_ratio"), "fp32"),
}


def _ahead_of_time(kernel, types, plan, copies):
    columns, warps, support = plan
    constants = {"COPIES_INPUT": False, "COPIES": copies, "FUSED": True}
    return (
        kernel,
        {"low_res": "*fp32", **_FRAME, **types},
        {"ROWS": ROWS, "COLUMNS": columns, "SUPPORT": support, **constants},
        {"num_warps": warps, **UNFUSED},
    )


_CUTS = {"partial": "*i64", **dict.fromkeys(("high", "low", "cut"), "fp32")}
_IMAGE = {"masks": "*i64", "cut": "fp32", **dict.fromkeys(("image_height", "words", "y0", "x0"), "i32")}
AHEAD_OF_TIME = (
    _ahead_of_time(mask_measure_kernel, _CUTS, MEASURE, False),
    _ahead_of_time(mask_measure_kernel, _CUTS, MEASURE, True),
    _ahead_of_time(mask_pack_kernel, _IMAGE, PACK, False),
    (
        mask_join_kernel,
        {**dict.fromkeys(("partial", "inner", "outer", "areas", "boxes"), "*i64"), "tiles": "i32"},
        {"BLOCK": JOIN_BLOCK},
    ),
)
