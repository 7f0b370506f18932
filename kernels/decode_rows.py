"""What the kernels of the grid decoder share: how a prompt's tokens and an image's bases become matrix operands.

All heads of a prompt are one matrix of heads * padded rows, in blocks of `join` heads. In a block the first half of
every head's tokens comes before the second halves, so that a softmax over the tokens of a head stays inside four
neighbouring threads of a matrix product's result. A product with a basis couples a head with its own channels only:
blocks are separate products, and block-diagonal inside.

A number that the operands' type can't hold becomes NaN, never infinity: it reaches every result that depends on it.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

PADDED = 8  # rows of a head; at least the tokens
LEAST_ROWS = 16  # of a matrix product, and its least depth


class Shape(NamedTuple):
    """Compile-time numbers of one decoder.

    heads, tokens, width: h, T, d. padded: rows of a head. join: heads of a block. lanes, pair: of the packed layouts.
    step: pixels at a time, a divisor of 64.
    exact: float32 operands. wide: 16-bit operands are widened first, for the interpreter,
    which multiplies bfloat16 as integers.
    """

    heads: int
    tokens: int
    width: int
    padded: int
    join: int
    lanes: int
    pair: int
    step: int
    exact: bool
    wide: bool


class Launch(NamedTuple):
    """How a kernel is compiled: pixels at a time, loads under way at a time, warps."""

    step: int
    stages: int
    warps: int

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {"num_stages": self.stages, "num_warps": self.warps}


def sm_90(tensor: torch.Tensor) -> bool:
    """Whether the tensor is on a GPU with sm_90's shared memory and matrix instructions."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] == 9


def shape_of(tokens: torch.Tensor, lanes: int, bases: torch.Tensor, step: int) -> Shape:
    """Of tokens (G, h, T, d) and packed bases."""
    _, heads, count, width = tokens.shape
    return make_shape(heads, count, width, lanes, bases.shape[4], step, bases.dtype, not bases.is_cuda)


def make_shape(
    heads: int, tokens: int, width: int, lanes: int, pair: int, step: int, dtype: torch.dtype, wide: bool = False
) -> Shape:
    """The derived numbers: blocks are as small as a matrix product may be."""
    join = min(heads, max(LEAST_ROWS // PADDED, LEAST_ROWS // width))
    return Shape(heads, tokens, width, PADDED, join, lanes, pair, step, dtype == torch.float32, wide)


@triton.jit
def multiply(a, b, acc, S: tl.constexpr):
    # acc + a @ b in float32; acc may be None
    if S.wide:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    if tl.float16 == DTYPE:
        x = tl.where(tl.abs(x) <= 65504.0, x, float("nan"))
    return x.to(DTYPE)


@triton.jit
def places(prompt, block, row, channel, S: tl.constexpr):
    # Where (G, h, T, d) holds these entries of the blocks, and which entries it holds.
    half: tl.constexpr = S.padded // 2
    head, token = row // half % S.join, row // (S.join * half) * half + row % half
    at = ((prompt * S.heads + block * S.join + head) * S.tokens + token) * S.width + channel % S.width
    return at, (channel // S.width == head) & (token < S.tokens)


@triton.jit
def all_places(prompt, S: tl.constexpr):
    block = tl.arange(0, S.heads // S.join)[:, None, None]
    row = tl.arange(0, S.join * S.padded)[None, :, None]
    return places(prompt, block, row, tl.arange(0, S.join * S.width)[None, None, :], S)


@triton.jit
def load_tokens(x, prompt, S: tl.constexpr):
    # float32 (blocks, rows, channels) of (G, h, T, d), zero where row and channel are of different heads
    at, there = all_places(prompt, S)
    return tl.load(x + at, mask=there, other=0.0)


@triton.jit
def load_basis(tile, first, pixel, S: tl.constexpr):
    # (blocks, channels, pixels) of the rows of a packed tile from `first` on
    depth: tl.constexpr = S.join * S.width
    block = tl.arange(0, S.heads // S.join)[:, None, None]
    row = first + block * depth + tl.arange(0, depth)[None, :, None]
    return tl.load(tile + (row // S.pair * 64 + pixel[None, None, :]) * S.pair + row % S.pair)


@triton.jit
def load_values(tile, which: tl.constexpr, pixel, S: tl.constexpr):
    # (blocks, pixels, channels) of a packed tile
    block = tl.arange(0, S.heads // S.join)[:, None, None]
    pixel = pixel[None, :, None]
    channel = tl.arange(0, S.join * S.width)[None, None, :]
    head = which * S.heads + block * S.join + channel // S.width
    return tl.load(tile + ((head * 64 + pixel) // S.pair * S.lanes + channel % S.width) * S.pair + pixel % S.pair)


@triton.jit
def load_matrix(x, prompt, S: tl.constexpr):
    # (rows, rows) of (G, rows, rows)
    rows: tl.constexpr = S.heads * S.padded
    row = tl.arange(0, rows)
    return tl.load(x + prompt * (rows * rows) + row[:, None] * rows + row[None, :])


@triton.jit
def store_matrix(x, prompt, matrix, S: tl.constexpr):
    rows: tl.constexpr = S.heads * S.padded
    row = tl.arange(0, rows)
    tl.store(x + prompt * (rows * rows) + row[:, None] * rows + row[None, :], matrix)


@triton.jit
def dot_vector(x, vector, prompt, S: tl.constexpr):
    # (rows,) products of (G, h, T, d) with the heads' parts of a vector (I,)
    block = tl.arange(0, S.heads // S.join)[:, None, None]
    depth: tl.constexpr = S.join * S.width
    part = tl.load(vector + block * depth + tl.arange(0, depth)[None, None, :])
    return tl.reshape(tl.sum(load_tokens(x, prompt, S) * part, 2), (S.heads * S.padded,))


@triton.jit
def stacked(x, S: tl.constexpr):
    # (blocks, rows of a block, n) -> (rows, n)
    return tl.reshape(x, (S.heads * S.padded, x.shape[2]))


@triton.jit
def in_blocks(x, S: tl.constexpr):
    return tl.reshape(x, (S.heads // S.join, S.join * S.padded, x.shape[1]))


@triton.jit
def attend_tokens(scores, S: tl.constexpr):
    # Softmax to the base of two over the tokens of each head: (blocks, rows, pixels) -> (rows, pixels);
    # 0 for rows of no token.
    half: tl.constexpr = S.padded // 2
    row = tl.arange(0, S.join * S.padded)
    token = row // (S.join * half) * half + row % half
    scores = tl.where((token < S.tokens)[None, :, None], scores, -float("inf"))
    x = tl.reshape(scores, (S.heads // S.join, 2, S.join, half, S.step))
    x = tl.exp2(x - tl.max(tl.max(x, 1, keep_dims=True), 3, keep_dims=True))
    x = x / tl.sum(tl.sum(x, 1, keep_dims=True), 3, keep_dims=True)
    return tl.reshape(x, (S.heads * S.padded, S.step))


@triton.jit
def raise_top(scores, top):
    # One step of a running softmax over pixels, to the base of two: weights, new maximum, factor of what came before.
    higher = tl.maximum(top, tl.max(scores, 1))
    return tl.exp2(scores - higher[:, None]), higher, tl.exp2(top - higher)


@triton.jit
def couple_kernel(left, map, right, out, scale, S: tl.constexpr):
    # out (G, rows, rows) = scale left map^T right^T, left and right as block-diagonal matrices of (G, h, T, d), map
    # float32 (I, I). A program one block of left's rows.
    inner: tl.constexpr = S.heads * S.width
    depth: tl.constexpr = S.join * S.width
    rows: tl.constexpr = S.heads * S.padded
    blocks: tl.constexpr = S.heads // S.join
    prompt = (tl.program_id(0) // blocks).to(tl.int64)
    own = tl.program_id(0) % blocks
    channel = tl.arange(0, depth)
    from_row = tl.arange(0, blocks)[:, None, None] * depth + channel[None, :, None]
    part = tl.load(map + from_row * inner + own * depth + channel[None, None, :])
    projected = stacked(multiply(load_tokens(right, prompt, S), part, None, S), S)
    row = tl.arange(0, S.join * S.padded)
    at, there = places(prompt, own, row[:, None], channel[None, :], S)
    vectors = tl.load(left + at, mask=there, other=0.0) * scale
    coupled = narrow(multiply(vectors, tl.trans(projected), None, S), out.dtype.element_ty)
    to = (prompt * rows + own * (S.join * S.padded) + row)[:, None] * rows + tl.arange(0, rows)[None, :]
    tl.store(out + to, coupled)


@triton.jit
def project_kernel(tokens, map, out, columns, COLUMNS: tl.constexpr, S: tl.constexpr):
    # out (G, rows, columns) = block-diagonal tokens (G, h, T, d) times map float32 (I, columns). A program COLUMNS of
    # them.
    depth: tl.constexpr = S.join * S.width
    rows: tl.constexpr = S.heads * S.padded
    parts = tl.cdiv(columns, COLUMNS)
    prompt = (tl.program_id(0) // parts).to(tl.int64)
    column = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    from_row = tl.arange(0, S.heads // S.join)[:, None, None] * depth + tl.arange(0, depth)[None, :, None]
    inside = column < columns
    part = tl.load(map + from_row * columns + column[None, None, :], mask=inside[None, None, :], other=0.0)
    projected = narrow(stacked(multiply(load_tokens(tokens, prompt, S), part, None, S), S), out.dtype.element_ty)
    to = (prompt * rows + tl.arange(0, rows))[:, None] * columns + column[None, :]
    tl.store(out + to, projected, mask=inside[None, :])


@triton.jit
def finish_kernel(weights, tokens, map, out, S: tl.constexpr):
    # out (G, h, T, d) += what `weights` (G, rows, rows) average of block-diagonal tokens times map float32 (I, I). A
    # program one prompt.
    inner: tl.constexpr = S.heads * S.width
    depth: tl.constexpr = S.join * S.width
    rows: tl.constexpr = S.heads * S.padded
    height: tl.constexpr = S.join * S.padded
    prompt = tl.program_id(0).to(tl.int64)
    row, channel = tl.arange(0, height), tl.arange(0, depth)
    to, real = all_places(prompt, S)
    total = tl.load(out + to, mask=real, other=0.0)
    column = tl.arange(0, S.heads // S.join)[:, None, None] * depth + channel[None, None, :]
    for block in range(S.heads // S.join):
        at, there = places(prompt, block, row[:, None], channel[None, :], S)
        vectors = tl.load(tokens + at, mask=there, other=0.0)
        share = tl.load(weights + (prompt * rows + tl.arange(0, rows))[:, None] * rows + block * height + row[None, :])
        part = tl.load(map + (block * depth + channel[None, :, None]) * inner + column)
        total = multiply(in_blocks(multiply(share, vectors, None, S), S), part, total, S)
    tl.store(out + to, total, mask=real)


def coupled(bases: torch.Tensor, S: Shape, *products) -> list[torch.Tensor]:
    """What `couple_kernel` makes of each left, map, right and scale, in the type of the bases."""
    matrices = []
    for left, map, right, scale in products:
        out = empty_matrices(bases, len(left), S, bases.dtype)
        couple_kernel[(len(left) * (S.heads // S.join),)](left, map, right, out, scale, S=S, num_stages=1)
        matrices.append(out)
    return matrices


def empty_matrices(bases: torch.Tensor, prompts: int, S: Shape, dtype: torch.dtype) -> torch.Tensor:
    """(prompts, rows, rows)."""
    rows = S.heads * S.padded
    return torch.empty((prompts, rows, rows), dtype=dtype, device=bases.device)


def scale_of(tokens: torch.Tensor) -> float:
    """Factor of the scores of tokens (G, h, T, d), for softmax to the base of two."""
    return math.log2(math.e) / math.sqrt(tokens.shape[3])


def entry(
    kernel, types: dict[str, str], launch: Launch, operand: str, capabilities=(80, 90), aligned=(False, True), **consts
):
    """An ahead-of-time entry for SAM's decoder. types: type -> names of arguments; "operand" is the operands'."""
    shape = make_shape(8, 7, 16, 16, 1, launch.step, torch.float16)
    of_name = {name: type_.replace("operand", operand) for type_, names in types.items() for name in names.split()}
    ordered = {name: of_name[name] for name in kernel.arg_names if name in of_name}
    options = {**launch.options, "capabilities": capabilities, "aligned": aligned}
    return kernel, ordered, {**consts, "S": shape}, options


AHEAD_OF_TIME = (
    entry(finish_kernel, {"*fp32": "weights tokens map out"}, Launch(16, 1, 4), "fp16"),
    *(
        entry(kernel, types, Launch(16, 1, 4), operand, **constants)
        for operand in ("fp16", "bf16")
        for kernel, types, constants in (
            (couple_kernel, {"*fp32": "left map right", "*operand": "out", "fp32": "scale"}, {}),
            (project_kernel, {"*fp32": "tokens map", "*operand": "out", "i32:16": "columns"}, {"COLUMNS": 64}),
        )
    ),
)
