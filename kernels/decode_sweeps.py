"""Triton back end of `decode_sweep0`, `decode_sweep1` and `decode_sweep2`. Tensors are contiguous, begin at
multiples of 16 bytes, else registers spill, and are checked.

A program sees all pixels of its prompt, `step` at a time, and keeps what it gathers in registers. The maps between the
prompt's tokens (`couple_kernel`) are made before, and what the probabilities gathered goes through the maps after
(`finish_kernel`), in float32.
"""

import torch
import triton
import triton.language as tl

from .decode_rows import (
    Launch,
    all_places,
    attend_tokens,
    coupled,
    dot_vector,
    empty_matrices,
    entry,
    finish_kernel,
    in_blocks,
    load_basis,
    load_matrix,
    load_tokens,
    load_values,
    multiply,
    narrow,
    raise_top,
    scale_of,
    shape_of,
    sm_90,
    stacked,
    store_matrix,
)
from .launch import on

# Two programs of sweep 2 share a multiprocessor of sm_90 with all of a prompt's matrices in shared memory; with less of
# it, nothing is loaded ahead.
LAUNCHES = (Launch(64, 2, 4), Launch(32, 2, 4), Launch(16, 1, 4))
LAUNCHES_SM_90 = (*LAUNCHES[:2], Launch(16, 2, 4))


@triton.jit
def _of_image(bases, values, image, prompt, rows, tiles, S: tl.constexpr):
    # The prompt's image, and where its bases and values begin.
    place = tl.load(image + prompt)
    return place, bases + place * tiles * rows * 64, values + place * tiles * (3 * S.heads * 64 * S.lanes)


@triton.jit
def _nothing_yet(S: tl.constexpr):
    # Maximum, sum and what is gathered before the first pixel.
    top = tl.full((S.heads * S.padded,), -float("inf"), tl.float32)
    gathered = tl.zeros((S.heads // S.join, S.join * S.padded, S.join * S.width), tl.float32)
    return top, tl.zeros((S.heads * S.padded,), tl.float32), gathered


@triton.jit
def _gather(weights, values, tile, which: tl.constexpr, pixel, gathered, fade, S: tl.constexpr):
    # weights (rows, pixels), operands or float32: rounded before the values are loaded, sweep 0 takes 30 registers more
    gathered = gathered * tl.reshape(fade, (S.heads // S.join, S.join * S.padded, 1))
    shared = load_values(values + tile * (3 * S.heads * 64 * S.lanes), which, pixel, S)
    if weights.dtype == tl.float32:
        weights = narrow(weights, values.dtype.element_ty)
    return multiply(in_blocks(weights, S), shared, gathered, S)


@triton.jit
def _channels(S: tl.constexpr):
    # (blocks, 1, channels), where a vector over all heads holds them
    depth: tl.constexpr = S.join * S.width
    return tl.arange(0, S.heads // S.join)[:, None, None] * depth + tl.arange(0, depth)[None, None, :]


@triton.jit
def sweep0_kernel(bases, values, image, q, out, rows, tiles, pixels, scale, S: tl.constexpr):
    # Grid (G,). rows: of a packed tile.
    DTYPE: tl.constexpr = bases.dtype.element_ty
    height: tl.constexpr = S.join * S.padded
    blocks: tl.constexpr = S.heads // S.join
    prompt = tl.program_id(0).to(tl.int64)
    _, bases, values = _of_image(bases, values, image, prompt, rows, tiles, S)
    q = narrow(load_tokens(q, prompt, S) * scale, DTYPE)
    top, total, gathered = _nothing_yet(S)
    for step in range(tl.cdiv(pixels, S.step)):
        tile, pixel = step // (64 // S.step), step % (64 // S.step) * S.step + tl.arange(0, S.step)
        scores = stacked(multiply(q, load_basis(bases + tile * rows * 64, 0, pixel, S), None, S), S)
        scores = tl.where((tile * 64 + pixel < pixels)[None, :], scores, -float("inf"))
        weights, top, fade = raise_top(scores, top)
        total = total * fade + tl.sum(weights, 1)
        gathered = _gather(weights, values, tile, 0, pixel, gathered, fade, S)
    at, real = all_places(prompt, S)
    tl.store(out + at, gathered / tl.reshape(total, (blocks, height, 1)), mask=real)


@triton.jit
def sweep1_kernel(
    bases, values, norms, positional, image, k0, v0, q1, gram, key, bias, out, shares, r1,
    rows, tiles, pixels, scale, per_channel, eps, S: tl.constexpr,
):  # fmt: skip
    # Grid (G,). gram, key: of `couple_kernel`. shares (G, rows, rows): what the probabilities gathered; out misses it.
    DTYPE: tl.constexpr = bases.dtype.element_ty
    height: tl.constexpr = S.join * S.padded
    blocks: tl.constexpr = S.heads // S.join
    inner: tl.constexpr = S.heads * S.width
    prompt = tl.program_id(0).to(tl.int64)
    place, bases, values = _of_image(bases, values, image, prompt, rows, tiles, S)
    norms += place * 3 * tiles * 64
    r1 += prompt * tiles * 64
    k0 = narrow(load_tokens(k0, prompt, S) * scale, DTYPE)
    v0 = narrow(load_tokens(v0, prompt, S) * (2 * per_channel), DTYPE)
    q1 = narrow(load_tokens(q1, prompt, S) * scale, DTYPE)
    gram, key = load_matrix(gram, prompt, S), load_matrix(key, prompt, S)
    top, total, gathered = _nothing_yet(S)
    share = tl.zeros((S.heads * S.padded, S.heads * S.padded), tl.float32)
    for step in range(tl.cdiv(pixels, S.step)):
        tile, pixel = step // (64 // S.step), step % (64 // S.step) * S.step + tl.arange(0, S.step)
        basis, inside = bases + tile * rows * 64, tile * 64 + pixel < pixels
        p0 = attend_tokens(multiply(k0, load_basis(basis, 3 * inner, pixel, S), None, S), S).to(DTYPE)
        form = stacked(multiply(v0, load_basis(basis, 2 * inner, pixel, S), None, S), S)
        form = multiply(gram, p0, form, S)
        var = tl.load(norms + tile * 64 + pixel) * per_channel + tl.sum(p0.to(tl.float32) * form, 0)
        r = tl.where(inside, tl.rsqrt(var + eps), 0.0)
        tl.store(r1 + tile * 64 + pixel, r)
        scores = stacked(multiply(q1, load_basis(basis, inner, pixel, S), None, S), S)
        scores = multiply(key, p0, scores, S) * r[None, :]
        shared = load_basis(positional + tile * 3 * inner * 64, 0, pixel, S)
        scores = stacked(multiply(q1, shared, in_blocks(scores, S), S), S)
        weights, top, fade = raise_top(tl.where(inside[None, :], scores, -float("inf")), top)
        total = total * fade + tl.sum(weights, 1)
        weights = narrow(weights * r[None, :], DTYPE)
        share = multiply(weights, tl.trans(p0), share * fade[:, None], S)
        gathered = _gather(weights, values, tile, 1, pixel, gathered, fade, S)
    at, real = all_places(prompt, S)
    gathered = gathered / tl.reshape(total, (blocks, height, 1)) + tl.load(bias + _channels(S))
    tl.store(out + at, gathered, mask=real)
    store_matrix(shares, prompt, share / total[:, None], S)


@triton.jit
def sweep2_kernel(
    bases, values, norms, positional, image, r1, k0, v0, k1, v1, qf, vectors,
    query, gram0, gram01, gram1, key0, key1, out, shares0, shares1, r2,
    rows, tiles, pixels, scale, per_channel, beta_norm, eps, S: tl.constexpr,
):  # fmt: skip
    # Grid (G,). query..key1: of `couple_kernel`. shares (G, rows, rows): what the probabilities gathered. out misses
    # them.
    DTYPE: tl.constexpr = bases.dtype.element_ty
    height: tl.constexpr = S.join * S.padded
    blocks: tl.constexpr = S.heads // S.join
    inner: tl.constexpr = S.heads * S.width
    prompt = tl.program_id(0).to(tl.int64)
    place, bases, values = _of_image(bases, values, image, prompt, rows, tiles, S)
    norms += place * 3 * tiles * 64
    r1 += prompt * tiles * 64
    r2 += prompt * tiles * 64
    linear0 = dot_vector(v0, vectors, prompt, S) * (2 * per_channel)
    linear1 = dot_vector(v1, vectors + inner, prompt, S) * (2 * per_channel)
    linear_key = dot_vector(qf, vectors + 2 * inner, prompt, S) * scale
    k0 = narrow(load_tokens(k0, prompt, S) * scale, DTYPE)
    k1 = narrow(load_tokens(k1, prompt, S) * scale, DTYPE)
    v0 = narrow(load_tokens(v0, prompt, S) * (2 * per_channel), DTYPE)
    v1 = narrow(load_tokens(v1, prompt, S) * (2 * per_channel), DTYPE)
    qf = narrow(load_tokens(qf, prompt, S) * scale, DTYPE)
    query, key0, key1 = load_matrix(query, prompt, S), load_matrix(key0, prompt, S), load_matrix(key1, prompt, S)
    gram0, gram01 = load_matrix(gram0, prompt, S), load_matrix(gram01, prompt, S)
    gram1 = load_matrix(gram1, prompt, S)
    top, total, gathered = _nothing_yet(S)
    share = tl.zeros((S.heads * S.padded,), tl.float32)
    share0 = tl.zeros((S.heads * S.padded, S.heads * S.padded), tl.float32)
    share1 = tl.zeros((S.heads * S.padded, S.heads * S.padded), tl.float32)
    for step in range(tl.cdiv(pixels, S.step)):
        tile, pixel = step // (64 // S.step), step % (64 // S.step) * S.step + tl.arange(0, S.step)
        basis, inside = bases + tile * rows * 64, tile * 64 + pixel < pixels
        fixed = positional + tile * 3 * inner * 64
        r = tl.load(r1 + tile * 64 + pixel, mask=inside, other=0.0)
        p0 = attend_tokens(multiply(k0, load_basis(basis, 3 * inner, pixel, S), None, S), S).to(DTYPE)
        scores = stacked(multiply(k1, load_basis(basis, 4 * inner, pixel, S), None, S), S)
        scores = multiply(query, p0, scores, S) * r[None, :]
        scores = multiply(k1, load_basis(fixed, inner, pixel, S), in_blocks(scores, S), S)
        p1 = attend_tokens(scores, S).to(DTYPE)

        form = stacked(multiply(v0, load_basis(basis, 5 * inner, pixel, S), None, S), S)
        form = multiply(gram0, p0, form, S) * r[None, :] + linear0[:, None]
        var = tl.sum(p0.to(tl.float32) * form, 0) * r
        form = stacked(multiply(v1, load_basis(basis, 6 * inner, pixel, S), None, S), S)
        form = multiply(gram01, p0, form, S) * r[None, :] + linear1[:, None]
        form = multiply(gram1, p1, form, S)
        var += tl.sum(p1.to(tl.float32) * form, 0)
        own = tl.load(norms + (tiles + tile) * 64 + pixel) * r + 2 * tl.load(norms + (2 * tiles + tile) * 64 + pixel)
        var += (own * r + beta_norm) * per_channel
        s = tl.where(inside, tl.rsqrt(var + eps), 0.0)
        tl.store(r2 + tile * 64 + pixel, s)

        scores = stacked(multiply(qf, load_basis(basis, 7 * inner, pixel, S), None, S), S)
        scores = multiply(key0, p0, scores, S) * r[None, :] + linear_key[:, None]
        scores = multiply(key1, p1, scores, S) * s[None, :]
        scores = stacked(multiply(qf, load_basis(fixed, 2 * inner, pixel, S), in_blocks(scores, S), S), S)
        weights, top, fade = raise_top(tl.where(inside[None, :], scores, -float("inf")), top)
        total = total * fade + tl.sum(weights, 1)
        weights = weights * s[None, :]
        share = share * fade + tl.sum(weights, 1)
        share1 = multiply(narrow(weights, DTYPE), tl.trans(p1), share1 * fade[:, None], S)
        weights = narrow(weights * r[None, :], DTYPE)
        share0 = multiply(weights, tl.trans(p0), share0 * fade[:, None], S)
        gathered = _gather(weights, values, tile, 2, pixel, gathered, fade, S)
    at, real = all_places(prompt, S)
    channel = _channels(S)
    beta, constant = tl.load(vectors + 3 * inner + channel), tl.load(vectors + 4 * inner + channel)
    total, share = tl.reshape(total, (blocks, height, 1)), tl.reshape(share, (blocks, height, 1))
    tl.store(out + at, (gathered + share * beta) / total + constant, mask=real)
    store_matrix(shares0, prompt, share0 / stacked(total, S), S)
    store_matrix(shares1, prompt, share1 / stacked(total, S), S)


def sweep0(bases, values, image, q, pixels, out) -> None:
    """See `ops.decode_sweeps.decode_sweep0`."""
    launch = (LAUNCHES_SM_90 if sm_90(bases) else LAUNCHES)[0]
    S = shape_of(q, values.shape[5], bases, launch.step)
    if len(q):
        with on(bases):
            sweep0_kernel[(len(q),)](
                bases, values, image, q, out, _rows(bases), bases.shape[1], pixels, scale_of(q), S=S, **launch.options
            )


def sweep1(bases, values, norms, positional, image, k0, v0, q1, maps, bias, pixels, channels, eps, out, r1) -> None:
    """See `ops.decode_sweeps.decode_sweep1`."""
    launch = (LAUNCHES_SM_90 if sm_90(bases) else LAUNCHES)[1]
    S = shape_of(k0, values.shape[5], bases, launch.step)
    if not len(k0):
        return
    with on(bases):
        gram, key = coupled(bases, S, (v0, maps[0], v0, 1 / channels), (q1, maps[1], v0, scale_of(q1)))
        shares = empty_matrices(bases, len(k0), S, torch.float32)
        sweep1_kernel[(len(k0),)](
            bases, values, norms, positional, image, k0, v0, q1, gram, key, bias, out, shares, r1,
            _rows(bases), bases.shape[1], pixels, scale_of(k0), 1 / channels, eps, S=S, **launch.options,
        )  # fmt: skip
        finish_kernel[(len(k0),)](shares, v0, maps[2], out, S=S, num_stages=1)


def sweep2(
    bases, values, norms, positional, image, r1, k0, v0, k1, v1, qf, maps, vectors, beta_norm, pixels, channels, eps,
    out, r2,
) -> None:  # fmt: skip
    """See `ops.decode_sweeps.decode_sweep2`."""
    launch = (LAUNCHES_SM_90 if sm_90(bases) else LAUNCHES)[2]
    S = shape_of(k0, values.shape[5], bases, launch.step)
    if not len(k0):
        return
    scale, per_channel = scale_of(k0), 1 / channels
    query, gram0, gram01, gram1, key0, key1, value0, value1 = maps
    with on(bases):
        matrices = coupled(
            bases, S, (k1, query, v0, scale), (v0, gram0, v0, per_channel), (v1, gram01, v0, 2 * per_channel),
            (v1, gram1, v1, per_channel), (qf, key0, v0, scale), (qf, key1, v1, scale),
        )  # fmt: skip
        shares0, shares1 = (empty_matrices(bases, len(k0), S, torch.float32) for _ in range(2))
        sweep2_kernel[(len(k0),)](
            bases, values, norms, positional, image, r1, k0, v0, k1, v1, qf, vectors, *matrices, out, shares0, shares1,
            r2, _rows(bases), bases.shape[1], pixels, scale, per_channel, beta_norm, eps, S=S, **launch.options,
        )  # fmt: skip
        finish_kernel[(len(k0),)](shares0, v0, value0, out, S=S, num_stages=1)
        finish_kernel[(len(k0),)](shares1, v1, value1, out, S=S, num_stages=1)


def _rows(bases) -> int:
    return bases.shape[2] * bases.shape[4]


_SHARED = {"*operand": "bases values positional gram key query gram0 gram01 gram1 key0 key1", "*i64": "image"}
_SWEEPS = (
    (sweep0_kernel, {"*fp32": "q out", "fp32": "scale"}),
    (sweep1_kernel, {"*fp32": "norms k0 v0 q1 bias out shares r1", "fp32": "scale per_channel eps"}),
    (
        sweep2_kernel,
        {
            "*fp32": "norms r1 k0 v0 k1 v1 qf vectors out shares0 shares1 r2",
            "fp32": "scale per_channel beta_norm eps",
        },
    ),
)

AHEAD_OF_TIME = tuple(
    entry(
        kernel,
        {**_SHARED, **own, "i32": "pixels", "i32:16": "rows tiles"},
        *(launches[sweep], operand),
        capabilities=(capability,),
        aligned=(True,),
    )
    for operand in ("fp16", "bf16")
    for sweep, (kernel, own) in enumerate(_SWEEPS)
    for capability, launches in ((80, LAUNCHES), (90, LAUNCHES_SM_90))
)
