"""Triton back end of `nms`. Tensors are contiguous and checked by the caller; boxes come in words of 64."""

import numpy as np
import torch
import triton
import triton.language as tl

from .launch import UNFUSED, on

WORD = 64
VISIT_BLOCK = 1024


@triton.jit
def _side(low, high, lows, highs):
    return tl.maximum(tl.minimum(high[:, None], highs[None, :]) - tl.maximum(low[:, None], lows[None, :]), 0.0)


@triton.jit
def _or(x, y):
    return x | y


@triton.jit
def nms_overlaps_kernel(boxes, order, count, alive, overlaps, first, size, threshold, WORD: tl.constexpr):
    # Program (r, w): the boxes of word r against those of word first + w that come after them; overlaps (w, i) gets bit
    # j where box i overlaps the word's box j. Words before `first` of which no box is kept are left out.
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1).to(tl.int64) + first
    n = tl.minimum(tl.load(count), size)
    wanted = (row <= word) & (word * WORD < n)
    wanted = wanted & ((row >= first) | (tl.load(alive + row, mask=wanted & (row < first), other=0) != 0))
    if wanted:
        lane = tl.arange(0, WORD)
        i, j = row * WORD + lane, word * WORD + lane
        a = boxes + 4 * tl.load(order + i, mask=i < n, other=0)
        b = boxes + 4 * tl.load(order + j, mask=j < n, other=0)
        ax0, ay0, ax1, ay1 = tl.load(a), tl.load(a + 1), tl.load(a + 2), tl.load(a + 3)
        bx0, by0, bx1, by1 = tl.load(b), tl.load(b + 1), tl.load(b + 2), tl.load(b + 3)
        inter = _side(ax0, ax1, bx0, bx1) * _side(ay0, ay1, by0, by1)
        union = ((ax1 - ax0) * (ay1 - ay0))[:, None] + ((bx1 - bx0) * (by1 - by0))[None, :] - inter
        # 0 / 0 isn't above any threshold
        iou = tl.where(union == 0.0, 0.0, tl.div_rn(inter, tl.where(union == 0.0, 1.0, union)))
        later = (i[:, None] < j[None, :]) & (j < n)[None, :]
        bits = ((iou > threshold) & later).to(tl.int64) << lane.to(tl.int64)[None, :]
        tl.store(overlaps + tl.program_id(1).to(tl.int64) * (tl.num_programs(0) * WORD) + i, tl.sum(bits, 1))


@triton.jit
def nms_visit_kernel(
    order, count, keep, kept, alive, overlaps, first, last, size, words, WORD: tl.constexpr, BLOCK: tl.constexpr
):
    # One program visits the boxes of words [first, last), those of the words before being settled.
    n = tl.minimum(tl.load(count), size)
    total = tl.load(kept, mask=first > 0, other=0)
    lane = tl.arange(0, WORD)
    for word in range(first, tl.minimum(tl.cdiv(n, WORD), last)):  # in 64 bits, as n
        begin = word * WORD
        rows = overlaps + (word - first) * words * WORD
        removed = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, begin, BLOCK):
            i = start + tl.arange(0, BLOCK)
            living = tl.load(alive + i // WORD, mask=i < begin, other=0) >> (i % WORD).to(tl.int64) & 1
            removed |= tl.load(rows + i, mask=living != 0, other=0)
        left = tl.sum((begin + lane < n).to(tl.int64) << lane.to(tl.int64), 0) & ~tl.reduce(removed, 0, _or)
        for i in range(WORD):
            overlapped = tl.load(rows + begin + i)
            left = tl.where((left >> i) & 1 != 0, left & ~overlapped, left)
        set_ = (left >> lane.to(tl.int64)) & 1
        box = tl.load(order + begin + lane, mask=set_ != 0, other=0)
        tl.store(keep + total + tl.cumsum(set_, 0) - 1, box, mask=set_ != 0)
        tl.store(alive + word, left)
        total += tl.sum(set_, 0)
        tl.debug_barrier()
    tl.store(kept, total)
    if last == words:
        for start in range(0, size, BLOCK):
            i = start + tl.arange(0, BLOCK)
            tl.store(keep + i, tl.full((BLOCK,), -1, tl.int64), mask=(i >= total) & (i < size))


def nms(
    boxes: torch.Tensor,
    order: torch.Tensor,
    count: torch.Tensor,
    keep: torch.Tensor,
    kept: torch.Tensor,
    alive: torch.Tensor,
    overlaps: torch.Tensor,
    iou_threshold: float,
) -> None:
    """boxes float32 (K, 4), order int64 (K), count int64 () -> keep int64 (K), kept int64 (). Scratch: alive int64 (n),
    overlaps int64 (w, n * 64), n the number of words."""
    words, at_once, threshold = len(alive), len(overlaps), float_below(iou_threshold)
    with on(boxes):
        for first in range(0, max(1, words), at_once):
            last = min(first + at_once, words)
            if words:
                nms_overlaps_kernel[(words, last - first)](
                    boxes, order, count, alive, overlaps, first, len(boxes), threshold, WORD=WORD, **UNFUSED
                )
            nms_visit_kernel[(1,)](
                *(order, count, keep, kept, alive, overlaps, first, last, len(boxes), words),
                WORD=WORD,
                BLOCK=VISIT_BLOCK,
            )


def float_below(x: float) -> float:
    """The largest float32 up to x: a float32 is above x if and only if it is above that."""
    with np.errstate(over="ignore"):
        rounded = np.float32(x)
    return float(np.nextafter(rounded, np.float32("-inf")) if float(rounded) > x else rounded)


AHEAD_OF_TIME = (
    (
        nms_overlaps_kernel,
        {
            **dict.fromkeys(("order", "count", "alive", "overlaps"), "*i64"),
            **{"boxes": "*fp32", "first": "i32", "size": "i32", "threshold": "fp32"},
        },
        {"WORD": WORD},
        UNFUSED,
    ),
    (
        nms_visit_kernel,
        {
            **dict.fromkeys(("order", "count", "keep", "kept", "alive", "overlaps"), "*i64"),
            **dict.fromkeys(("first", "last", "size", "words"), "i32"),
        },
        {"WORD": WORD, "BLOCK": VISIT_BLOCK},
    ),
)
