"""Triton back end of `decode_upscale`. Tensors are contiguous and checked by the caller."""

import torch
import triton
import triton.language as tl

from .decode_rows import (
    Launch,
    attend_tokens,
    coupled,
    entry,
    in_blocks,
    load_basis,
    load_matrix,
    load_tokens,
    multiply,
    narrow,
    project_kernel,
    scale_of,
    shape_of,
    sm_90,
    stacked,
)
from .launch import on

LAUNCH, LAUNCH_SM_90 = Launch(32, 2, 4), Launch(64, 1, 8)
STEPS = 16  # of a program
COLUMNS = 64  # of a projection
MOST_MASKS = 4


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    # The second form is within 2.5e-5 of the first: x sigmoid(2 x (a + b x^2 + c x^4)), whose quintic turns over
    # beyond |x| = 8.
    if EXACT:
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    near = tl.minimum(tl.maximum(x, -8.0), 8.0)
    square = near * near
    inside = near * (-2.3011189 + square * (-0.10677906 + square * 1.0148206e-3))
    return x / (1 + tl.exp2(inside))


@triton.jit
def upscale_kernel(
    bases, positional, image, r1, r2, k0, k1, hyper, first, query, map0, map1, vectors, norm, weight, bias, out,
    rows, tiles, height, width, scale, eps, C1: tl.constexpr, C2: tl.constexpr, MASKS: tl.constexpr,
    STEPS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    # A program STEPS times S.step pixels of one prompt. query (G, rows, rows): of `couple_kernel`. map0, map1 (G, rows,
    # 4 C1): of `project_kernel`. weight (4 C2, C1) in the operands' type.
    DTYPE: tl.constexpr = bases.dtype.element_ty
    inner: tl.constexpr = S.heads * S.width
    count: tl.constexpr = S.heads * S.padded
    parts = tl.cdiv(tl.cdiv(height * width, S.step), STEPS)
    prompt = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    mask = tl.load(first + prompt)
    masks = tl.load(first + prompt + 1) - mask
    if masks == 0:
        return
    bases += tl.load(image + prompt) * tiles * rows * 64
    r1 += prompt * tiles * 64
    r2 += prompt * tiles * 64
    k0 = narrow(load_tokens(k0, prompt, S) * scale, DTYPE)
    k1 = narrow(load_tokens(k1, prompt, S) * scale, DTYPE)
    query = load_matrix(query, prompt, S)
    channel, channel2 = tl.arange(0, C1), tl.arange(0, 4 * C2)
    row = tl.arange(0, count)
    map0 += (prompt * count + row)[:, None] * (4 * C1) + channel[None, :]
    map1 += (prompt * count + row)[:, None] * (4 * C1) + channel[None, :]
    gamma, beta = tl.load(norm + channel), tl.load(norm + C1 + channel)
    weight = tl.load(weight + channel2[None, :] * C1 + channel[:, None])
    offset = tl.load(bias + channel2 % C2)
    index = tl.arange(0, MASKS)
    for step in range(part * STEPS, min(part * STEPS + STEPS, tl.cdiv(height * width, S.step))):
        tile, pixel = step // (64 // S.step), step % (64 // S.step) * S.step + tl.arange(0, S.step)
        basis, fixed = bases + tile * rows * 64, positional + tile * 3 * inner * 64
        inside = tile * 64 + pixel < height * width
        r = tl.load(r1 + tile * 64 + pixel, mask=inside, other=0.0)
        s = tl.load(r2 + tile * 64 + pixel, mask=inside, other=0.0)
        p0 = attend_tokens(multiply(k0, load_basis(basis, 3 * inner, pixel, S), None, S), S).to(DTYPE)
        scores = stacked(multiply(k1, load_basis(basis, 4 * inner, pixel, S), None, S), S)
        scores = multiply(query, p0, scores, S) * r[None, :]
        p1 = attend_tokens(multiply(k1, load_basis(fixed, inner, pixel, S), in_blocks(scores, S), S), S).to(DTYPE)
        p0, p1 = tl.trans(p0), tl.trans(p1)
        for i in range(2):
            left = _logits(
                2 * i, basis, pixel, p0, p1, r, s, map0, map1, vectors, gamma, beta, weight, offset, hyper, mask,
                masks, eps, C1, C2, MASKS, S,
            )  # fmt: skip
            right = _logits(
                2 * i + 1, basis, pixel, p0, p1, r, s, map0, map1, vectors, gamma, beta, weight, offset, hyper, mask,
                masks, eps, C1, C2, MASKS, S,
            )  # fmt: skip
            # (pixels, row k, column l, masks, column j) -> (pixels, masks, row k, columns j l)
            both = tl.reshape(tl.join(left, right), (S.step, 2, 2, MASKS, 2))
            both = tl.reshape(tl.permute(both, (0, 3, 1, 4, 2)), (S.step, MASKS, 2, 4))
            place = (tile * 64 + pixel)[:, None, None, None]
            line = 4 * (place // width) + 2 * i + tl.arange(0, 2)[None, None, :, None]
            at = ((mask + index)[None, :, None, None] * (4 * height) + line) * (4 * width)
            at += 4 * (place % width) + tl.arange(0, 4)[None, None, None, :]
            wanted = inside[:, None, None, None] & (index < masks)[None, :, None, None]
            tl.store(out + at, both, mask=wanted)


@triton.jit
def _logits(
    part, basis, pixel, p0, p1, r, s, map0, map1, vectors, gamma, beta, weight, offset, hyper, mask, masks, eps,
    C1: tl.constexpr, C2: tl.constexpr, MASKS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    # (pixels, 4 positions of the second convolution, masks) at one position of the first
    channel, channel2 = tl.arange(0, C1), tl.arange(0, C2)
    row = 8 * S.heads * S.width + part * C1 + channel
    y = tl.load(basis + ((row // S.pair)[None, :] * 64 + pixel[:, None]) * S.pair + (row % S.pair)[None, :])
    y = multiply(p0, tl.load(map0 + part * C1), y.to(tl.float32), S) * r[:, None]
    y = multiply(p1, tl.load(map1 + part * C1), y + tl.load(vectors + part * C1 + channel)[None, :], S)
    y = y * s[:, None] + tl.load(vectors + (4 + part) * C1 + channel)[None, :]
    y = y * tl.rsqrt(tl.sum(y * y, 1) * (1 / C1) + eps)[:, None] * gamma[None, :] + beta[None, :]
    z = narrow(gelu(y, S.exact), weight.dtype)
    x = gelu(multiply(z, weight, None, S) + offset[None, :], S.exact)
    x = tl.reshape(x, (S.step, 4, C2))
    index = tl.arange(0, MASKS)
    logits = tl.zeros((x.shape[0], 4, MASKS), tl.float32)
    for m in tl.static_range(MASKS):
        if m < masks:
            vector = tl.load(hyper + (mask + m) * C2 + channel2)
            own = tl.sum(x * vector[None, None, :], 2)
            logits = tl.where((index == m)[None, None, :], own[:, :, None], logits)
    return logits


def upscale(
    bases, positional, image, r1, r2, k0, v0, k1, v1, hyper, first, query, maps, vectors, norm, weight, bias,
    height, width, eps, out,
) -> None:  # fmt: skip
    """See `ops.decode_upscale.decode_upscale`. All tensors begin at a multiple of 16 bytes: else registers spill."""
    launch = LAUNCH_SM_90 if sm_90(bases) else LAUNCH
    S = shape_of(k0, k0.shape[3], bases, launch.step)
    prompts, columns, scale = len(k0), maps.shape[2], scale_of(k0)
    if not prompts or not len(hyper):
        return
    with on(bases):
        (query,) = coupled(bases, S, (k1, query, v0, scale))
        size = (prompts, query.shape[1], columns)
        projected = [torch.empty(size, dtype=bases.dtype, device=bases.device) for _ in range(2)]
        grid = (prompts * triton.cdiv(columns, COLUMNS),)
        for tokens, map, to in zip((v0, v1), maps, projected, strict=True):
            project_kernel[grid](tokens, map, to, columns, COLUMNS=COLUMNS, S=S, num_stages=1)
        parts = triton.cdiv(triton.cdiv(height * width, S.step), STEPS)
        upscale_kernel[(prompts * parts,)](
            bases, positional, image, r1, r2, k0, k1, hyper, first, query, *projected, vectors, norm,
            weight.to(bases.dtype), bias, out, bases.shape[2] * bases.shape[4], bases.shape[1], height, width, scale,
            eps, C1=norm.shape[1], C2=len(bias), MASKS=MOST_MASKS, STEPS=STEPS, S=S, **launch.options,
        )  # fmt: skip


_TYPES = {
    "*operand": "bases positional query map0 map1 weight",
    "*fp32": "r1 r2 k0 k1 hyper vectors norm bias out",
    "*i64": "image first",
    "i32:16": "rows tiles height width",
    "fp32": "scale eps",
}
_CONSTANTS = {"C1": 64, "C2": 32, "MASKS": MOST_MASKS, "STEPS": STEPS}

AHEAD_OF_TIME = tuple(
    entry(upscale_kernel, _TYPES, launch, operand, capabilities=(capability,), aligned=(True,), **_CONSTANTS)
    for operand in ("fp16", "bf16")
    for capability, launch in ((80, LAUNCH), (90, LAUNCH_SM_90))
)
