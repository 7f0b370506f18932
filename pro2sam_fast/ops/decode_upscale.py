"""Low-resolution masks of prompts that share an image, straight from what `decode_sweeps` left: neither the image of a
prompt nor its upscaled embedding exists, and masks that nobody wants cost no dot product.

The transposed convolutions of SAM's mask decoder have kernel 2 and stride 2, so every pixel of the image embedding
makes its own 4 x 4 block of every mask (Kirillov et al. 2023, appendix A):

    y     = r2 (r1 (basis + a0 map0) + a1 map1 + vector) + constant        4 positions x C1 channels
    z     = GELU(y / sqrt(mean(y^2) + eps) * norm_weight + norm_bias)      layer norm: y is centred over C1
    logit = hyper . GELU(z weight + bias)                                  4 positions x C2 channels for each of the 4

A position is (row, column) of two by two. Other shapes and layouts are those of `decode_sweeps`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import _native
from ._backends import check_call, register, triton_kernels
from .decode_sweeps import (
    BASES,
    addresses,
    aligned,
    attend_tokens,
    check_decode,
    check_images,
    cpu_limits,
    examples,
    native_shape,
    queries1,
    shapes,
    triton_limits,
    unpack_rows,
)
from .pixel_tiles import unpack_pixels

__all__ = ["decode_upscale"]

MAX_MASKS = 4


def _decode_upscale(
    bases, positional, image, r1, r2, k0, v0, k1, v1, hyper, first, query, maps, vectors, norm, weight, bias,
    height, width, eps,
):  # fmt: skip
    """Reference."""
    pixels, inner = height * width, k0.shape[1] * k0.shape[3]
    r1, r2 = r1[:, None, :pixels], r2[:, None, :pixels]
    a0 = attend_tokens(unpack_rows(bases, BASES, "q0", inner, pixels)[image], k0, v0)
    a1 = attend_tokens(queries1(bases, positional, image, r1[:, 0], a0, query, inner, pixels), k1, v1)
    start, count = (n // bases.shape[4] for n in (len(BASES) * inner, maps.shape[2]))
    shared = unpack_pixels(bases[:, :, start : start + count], pixels)[image]
    own = [torch.einsum("gip,in->gnp", a, m) for a, m in zip((a0, a1), maps, strict=True)]
    y = r2 * (r1 * (shared + own[0]) + own[1] + vectors[0, :, None]) + vectors[1, :, None]
    y = y.unflatten(1, (4, -1))
    y = y * (y.square().mean(dim=2, keepdim=True) + eps).rsqrt() * norm[0, :, None] + norm[1, :, None]
    x = torch.einsum("gscp,knc->gsknp", F.gelu(y), weight.unflatten(0, (4, -1))) + bias[:, None]
    mask = torch.arange(len(hyper), device=first.device)
    prompt = (torch.searchsorted(first, mask, right=True) - 1).clamp(max=len(k0) - 1)
    logits = torch.einsum("mn,msknp->mskp", hyper, F.gelu(x)[prompt])
    # (m, i, j, k, l, h, w) -> rows h, i, k and columns w, j, l
    logits = logits.reshape(-1, 2, 2, 2, 2, height, width).permute(0, 5, 1, 3, 6, 2, 4)
    return logits.reshape(-1, 4 * height, 4 * width)


def decode_upscale(
    bases: torch.Tensor,
    positional: torch.Tensor,
    image: torch.Tensor,
    r1: torch.Tensor,
    r2: torch.Tensor,
    k0: torch.Tensor,
    v0: torch.Tensor,
    k1: torch.Tensor,
    v1: torch.Tensor,
    hyper: torch.Tensor,
    first: torch.Tensor,
    query: torch.Tensor,
    maps: torch.Tensor,
    vectors: torch.Tensor,
    norm: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    height: int,
    width: int,
    eps: float,
    backend: str = "auto",
) -> torch.Tensor:
    """The logits of chosen masks.

    Args:
        bases: as in `decode_sweeps`; behind `BASES` come the 4 C1 rows of the first convolution.
        positional, image: as in `decode_sweeps`.
        r1, r2: float32 (G, 64 tiles) from `decode_sweep1` and `decode_sweep2`.
        k0, v0, k1, v1: float32 (G, h, T, d), keys and values of image-to-token attention 0 and 1; T at most 32.
        hyper: float32 (M, C2), the hypernetworks' vectors, masks of a prompt next to each other.
        first: int64 (G + 1,), prompt i has the masks first[i]..first[i + 1] - 1, at most 4. Prompts without any cost
            nothing.
        query: float32 (I, I), a0's way to the queries of attention 1.
        maps: float32 (2, I, 4 C1), a0's and a1's way through the first convolution.
        vectors: float32 (2, 4 C1), what is multiplied by r2, and the constant.
        norm: float32 (2, C1), weight and bias of the layer norm; C1 a multiple of 4.
        weight: float32 (4 C2, C1), the second convolution, position by position. bias: float32 (C2,).
        height, width: of the grid of P pixels.
        eps: epsilon of the layer norm.
        backend: as for `mask_match`.

    Returns:
        float32 (M, 4 height, 4 width), undefined from mask first[G] on.

    Raises:
        As `decode_sweep0`; on a CPU ValueError also for `first` that doesn't split M or fewer into runs of at most 4.
    """
    tensors = {"positional": positional, "image": image, "r1": r1, "r2": r2, "k0": k0, "v0": v0, "k1": k1, "v1": v1}
    masks = {"hyper": hyper, "first": first, "query": query, "maps": maps, "vectors": vectors, "norm": norm}
    check_call("decode_upscale", backend, bases=bases, **tensors, **masks, weight=weight, bias=bias)
    return torch.ops.pro2sam_fast.decode_upscale(
        bases, *tensors.values(), *masks.values(), weight, bias, height, width, eps, backend=backend
    )


def _check_upscale(
    bases, positional, image, r1, r2, k0, v0, k1, v1, hyper, first, query, maps, vectors, norm, weight, bias,
    height, width, eps,
):  # fmt: skip
    tokens = {"k0": k0, "v0": v0, "k1": k1, "v1": v1}
    if norm.dim() != 2 or norm.shape[1] % 4 or bias.dim() != 1 or hyper.dim() != 2:
        raise ValueError(
            "decode_upscale: norm must be (2, C1) with C1 a multiple of 4, bias (C2,) and hyper (M, C2), got "
            f"{tuple(norm.shape)}, {tuple(bias.shape)} and {tuple(hyper.shape)}"
        )
    others = {}
    if bases.dim() == 5 and k0.dim() == 4:
        s, inner = shapes(bases, k0), k0.shape[1] * k0.shape[3]
        channels1, channels2 = norm.shape[1], len(bias)
        others = {
            "positional": (positional, s["positional"]),
            "image": (image, s["image"]),
            "r1": (r1, s["r"]),
            "r2": (r2, s["r"]),
            "hyper": (hyper, (len(hyper), channels2)),
            "first": (first, (len(k0) + 1,)),
            "query": (query, s["map"]),
            "maps": (maps, (2, inner, 4 * channels1)),
            "vectors": (vectors, (2, 4 * channels1)),
            "norm": (norm, (2, channels1)),
            "weight": (weight, (4 * channels2, channels1)),
            "bias": (bias, (channels2,)),
        }
        rows = (len(BASES) * inner + 4 * channels1) // bases.shape[4]
        if bases.shape[2] != rows:
            raise ValueError(f"decode_upscale: bases must have {rows} rows, got {bases.shape[2]}")
    check_decode("decode_upscale", bases, tokens, height * width, **others)


def _empty_upscale(hyper: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return torch.empty((len(hyper), 4 * height, 4 * width), dtype=torch.float32, device=hyper.device)


def _decode_upscale_cpu(
    bases, positional, image, r1, r2, k0, v0, k1, v1, hyper, first, query, maps, vectors, norm, weight, bias,
    height, width, eps,
):  # fmt: skip
    check_images("decode_upscale", image, len(bases))
    counts = first.diff()
    if int(first[0]) != 0 or int(first[-1]) > len(hyper) or not bool(((counts >= 0) & (counts <= MAX_MASKS)).all()):
        raise ValueError(f"decode_upscale: first must split {len(hyper)} masks into runs of at most {MAX_MASKS}")
    bases, positional, image = bases.contiguous(), positional.contiguous(), image.contiguous()
    inputs = (r1, r2, k0, v0, k1, v1, hyper, first, query, maps, vectors, norm, weight, bias)
    inputs = tuple(x.contiguous() for x in inputs)
    out = _empty_upscale(hyper, height, width)
    shape = native_shape(bases, k0, height * width, channels1=norm.shape[1], channels2=len(bias))
    image_arrays = (bases.data_ptr(), 0, 0, positional.data_ptr(), image.data_ptr())
    _native._cpu.decode_upscale(
        shape, eps, image_arrays, addresses(*inputs), height, width, out.data_ptr(), torch.get_num_threads()
    )
    return out


def _triton_limits(*arguments) -> str | None:
    channels = arguments[14].shape[1], len(arguments[16])
    if channels[0] not in (16, 32, 64) or channels[1] not in (8, 16, 32):
        return f"it takes powers of two up to 64 and 32 channels, not {channels[0]} and {channels[1]}"
    return triton_limits(arguments[0], arguments[5])


def _decode_upscale_triton(
    bases, positional, image, r1, r2, k0, v0, k1, v1, hyper, first, query, maps, vectors, norm, weight, bias,
    height, width, eps,
):  # fmt: skip
    tensors = (bases, positional, image, r1, r2, k0, v0, k1, v1, hyper, first, query, maps, vectors, norm, weight, bias)
    out = _empty_upscale(hyper, height, width)
    triton_kernels("decode_upscale").upscale(*map(aligned, tensors), height, width, eps, out)
    return out


register(
    "decode_upscale(Tensor bases, Tensor positional, Tensor image, Tensor r1, Tensor r2, Tensor k0, Tensor v0, "
    "Tensor k1, Tensor v1, Tensor hyper, Tensor first, Tensor query, Tensor maps, Tensor vectors, Tensor norm, "
    'Tensor weight, Tensor bias, int height, int width, float eps, *, str backend="auto") -> Tensor',
    _check_upscale,
    {"reference": _decode_upscale, "cpu": _decode_upscale_cpu, "triton": _decode_upscale_triton},
    lambda *arguments: _empty_upscale(arguments[9], *arguments[17:19]),
    examples("upscale"),
    {"cpu": cpu_limits, "triton": _triton_limits},
)
