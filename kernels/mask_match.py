"""Triton back end of `mask_match` and `mask_iou`. Tensors are contiguous and checked by the caller."""

import torch
import triton
import triton.language as tl

from .bits import popcount, ratio
from .launch import on

MATCH_BLOCK = 1024
BEST_BLOCK = 1024
IOU_TILE = 16
IOU_WORDS = 8


@triton.jit
def mask_match_kernel(masks, query, scores, words, BLOCK: tl.constexpr):
    # One program a mask; masks (K, words), query (words), scores (K).
    row = tl.program_id(0).to(tl.int64)
    inter = tl.zeros((BLOCK,), tl.int64)
    union = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, words, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(masks + row * words + at, mask=at < words, other=0)
        y = tl.load(query + at, mask=at < words, other=0)
        inter += popcount(x & y)
        union += popcount(x | y)
    tl.store(scores + row, ratio(tl.sum(inter, 0), tl.sum(union, 0)))


@triton.jit
def first_best_kernel(scores, best, count, BLOCK: tl.constexpr):
    # One program; scores (count) are never negative. A later block wins only with a higher score.
    top = tl.full((), -1.0, tl.float32)
    index = tl.full((), -1, tl.int64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        score = tl.load(scores + at, mask=at < count, other=-1.0)
        highest, where = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
        index = tl.where(highest > top, (start + where).to(tl.int64), index)
        top = tl.maximum(highest, top)
    tl.store(best, index)


@triton.jit
def mask_iou_kernel(a, b, iou, rows, columns, words, TILE: tl.constexpr, WORDS: tl.constexpr):
    # One program a TILE x TILE part of iou (rows, columns); a (rows, words), b (columns, words).
    down = tl.cdiv(rows, TILE)
    row = (tl.program_id(0) % down).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = (tl.program_id(0) // down).to(tl.int64) * TILE + tl.arange(0, TILE)
    inter = tl.zeros((TILE, TILE, WORDS), tl.int64)
    area_a = tl.zeros((TILE, WORDS), tl.int64)
    area_b = tl.zeros((TILE, WORDS), tl.int64)
    for start in range(0, words, WORDS):
        at = start + tl.arange(0, WORDS)
        inside = (at < words)[None, :]
        x = tl.load(a + row[:, None] * words + at[None, :], mask=inside & (row < rows)[:, None], other=0)
        y = tl.load(b + column[:, None] * words + at[None, :], mask=inside & (column < columns)[:, None], other=0)
        area_a += popcount(x)
        area_b += popcount(y)
        inter += popcount(x[:, None, :] & y[None, :, :])
    common = tl.sum(inter, 2)
    union = tl.sum(area_a, 1)[:, None] + tl.sum(area_b, 1)[None, :] - common
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(iou + row[:, None] * columns + column[None, :], ratio(common, union), mask=inside)


def mask_match(masks: torch.Tensor, query: torch.Tensor, scores: torch.Tensor, best: torch.Tensor) -> None:
    """masks int64 (K, n), query int64 (n,) -> scores float32 (K,), best int64 ()."""
    count, words = masks.shape
    with on(masks):
        if count:
            mask_match_kernel[(count,)](masks, query, scores, words, BLOCK=MATCH_BLOCK)
        first_best_kernel[(1,)](scores, best, count, BLOCK=BEST_BLOCK)


def mask_iou(a: torch.Tensor, b: torch.Tensor, iou: torch.Tensor) -> None:
    """a int64 (K, n), b int64 (M, n) -> iou float32 (K, M)."""
    rows, columns = iou.shape
    tiles = triton.cdiv(rows, IOU_TILE) * triton.cdiv(columns, IOU_TILE)
    if tiles:
        with on(a):
            mask_iou_kernel[(tiles,)](a, b, iou, rows, columns, a.shape[1], TILE=IOU_TILE, WORDS=IOU_WORDS)


# kernel, argument types, compile-time constants: what the launchers above ask for, compiled ahead of time by the tests.
AHEAD_OF_TIME = (
    (
        mask_match_kernel,
        {"masks": "*i64", "query": "*i64", "scores": "*fp32", "words": "i32"},
        {"BLOCK": MATCH_BLOCK},
    ),
    (first_best_kernel, {"scores": "*fp32", "best": "*i64", "count": "i32"}, {"BLOCK": BEST_BLOCK}),
    (
        mask_iou_kernel,
        {"a": "*i64", "b": "*i64", "iou": "*fp32", "rows": "i32", "columns": "i32", "words": "i32"},
        {"TILE": IOU_TILE, "WORDS": IOU_WORDS},
    ),
)
