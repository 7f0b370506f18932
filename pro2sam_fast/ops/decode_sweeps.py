"""The attention of SAM's mask decoder over the image's pixels, for prompts that share the image.

The two-way transformer (Kirillov et al. 2023, appendix A) updates the image for every prompt: X1 = LN(X0 + I2T-0),
X2 = LN(X1 + I2T-1). Both are per-pixel affine maps of shared tensors and of the low-rank attention outputs a0 = P0 v0,
a1 = P1 v1, because a layer norm is an affine map once its two statistics are known. With r1, r2 the reciprocal standard
deviations, every projection of X1 and X2 is a shared basis plus a projection of a0 and a1, times r1 and r2; the (P, D)
image of a prompt never exists. Projections that feed a layer norm are centred, so that variances are plain quadratic
forms without cancellation:

    256 var1 = n0 + 2 B0 a0 + a0 G00 a0
    X1 W     = r1 (basis_W + a0 map_W) + constant_W
    256 var2 = r1^2 (n1 + 2 B00 a0 + a0 Ggg a0) + |b|^2 + a1 G11 a1 + 2 a1 (O1 b)
               + 2 r1 (xb + a0 (Og b)) + 2 r1 (B01 a1 + a0 G01 a1)
    X2 W     = r2 (r1 (basis_W + a0 map0_W) + a1 map1_W + b W) + constant_W

`models.sam.grid_decoder` computes bases, maps and vectors from a model. Shapes: B images, P pixels, G prompts, h heads,
T tokens, d channels a head, I = h d, D channels of the image.

    bases       (B, tiles, K / pair, 64, pair)  `pack_pixels` of K >= 8 I rows: `BASES` in order, then columns of others
    positional  (1, tiles, 3 I / pair, 64, pair)  `pack_pixels` of the rows `POSITIONAL`, the same for all images
    values      (B, tiles, 3, h, 64 / pair, lanes, pair)  `pack_values` of `VALUES`
    norms       float32 (B, 3, 64 tiles): n0, n1, xb
    image       int64 (G,), which image a prompt belongs to
    q, k, v     float32 (G, h, T, d); scores are divided by sqrt(d) here

Bases of 16 bits mean operands of 16 bits, float32 sums and float32 statistics; with float16, an operand beyond its
range makes what depends on it NaN. Results don't depend on the number of threads, on the order of the prompts or on
which other prompts there are. Only the CPU kernels check the numbers in ``image``: others would wait for the GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from .. import _native
from ._backends import check_call, register, triton_kernels, unavailable
from .pixel_tiles import TILE, VALUE_LANES, unpack_pixels, unpack_values

__all__ = ["BASES", "POSITIONAL", "VALUES", "decode_sweep0", "decode_sweep1", "decode_sweep2"]

BASES = ("k0", "k1", "b0", "q0", "q1", "b00", "b01", "kf")
POSITIONAL = ("k1", "q1", "kf")
VALUES = ("v0", "v1", "vf")
MAPS1 = ("gram", "key", "value")
MAPS2 = ("query", "gram0", "gram01", "gram1", "key0", "key1", "value0", "value1")
VECTORS2 = ("beta0", "beta1", "key", "value", "constant")
MAX_TOKENS = 32
MAX_WIDTH = 256
TRITON_TOKENS = 8


def unpack_rows(packed: torch.Tensor, names: tuple[str, ...], name: str, inner: int, pixels: int) -> torch.Tensor:
    """One of the bases ``names``: (B, tiles, K / pair, 64, pair) -> float32 (B, I, P)."""
    words = inner // packed.shape[-1]
    start = names.index(name) * words
    return unpack_pixels(packed[:, :, start : start + words], pixels)


def attend_tokens(queries: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Reference of image-to-token attention: queries (G, I, P), k and v (G, h, T, d) -> (G, I, P)."""
    scores = torch.einsum("ghdp,ghtd->ghtp", queries.unflatten(1, (k.shape[1], -1)), k / math.sqrt(k.shape[-1]))
    return torch.einsum("ghtp,ghtd->ghdp", scores.softmax(dim=2), v).flatten(1, 2)


def _attend_pixels(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    # q (G, h, T, d), keys and values (G, I, P) -> (G, h, T, d)
    keys, values = (x.unflatten(1, (q.shape[1], -1)) for x in (keys, values))
    weights = (torch.einsum("ghtd,ghdp->ghtp", q, keys) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return torch.einsum("ghtp,ghdp->ghtd", weights, values)


def _form(a: torch.Tensor, gram: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # a, b (G, I, P), gram (I, I) -> (G, P)
    return (_map(a, gram) * b).sum(dim=1)


def _map(a: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    # (G, I, P) x (I, N) -> (G, N, P)
    return torch.einsum("gip,in->gnp", a, matrix)


def _pad_pixels(r: torch.Tensor, tiles: int) -> torch.Tensor:
    # (G, P) -> (G, 64 tiles)
    return torch.nn.functional.pad(r, (0, tiles * TILE - r.shape[-1]))


def _decode_sweep0(bases, values, image, q, pixels):
    """Reference."""
    inner = q.shape[1] * q.shape[3]
    keys = unpack_rows(bases, BASES, "k0", inner, pixels)
    shared = unpack_values(values, q.shape[3], pixels)[:, VALUES.index("v0")].flatten(1, 2)
    return _attend_pixels(q, keys[image], shared[image])


def _decode_sweep1(bases, values, norms, positional, image, k0, v0, q1, maps, bias, pixels, channels, eps):
    """Reference."""
    inner = k0.shape[1] * k0.shape[3]

    def basis(name):
        return unpack_rows(bases, BASES, name, inner, pixels)[image]

    gram, key, value = maps
    a0 = attend_tokens(basis("q0"), k0, v0)
    var = norms[image, 0, :pixels] + 2 * (basis("b0") * a0).sum(dim=1) + _form(a0, gram, a0)
    r1 = (var / channels + eps).rsqrt()
    v1 = unpack_values(values, k0.shape[3], pixels)[:, VALUES.index("v1")].flatten(1, 2)[image]
    keys = r1[:, None] * (basis("k1") + _map(a0, key)) + unpack_rows(positional, POSITIONAL, "k1", inner, pixels)
    out = _attend_pixels(q1, keys, r1[:, None] * (v1 + _map(a0, value)) + bias[:, None])
    return out, _pad_pixels(r1, norms.shape[-1] // TILE)


def queries1(bases, positional, image, r1, a0, query, inner, pixels):
    """Reference of the queries of image-to-token attention 1: r1 (G, P), a0 (G, I, P), query (I, I) -> (G, I, P)."""
    shared = unpack_rows(bases, BASES, "q1", inner, pixels)[image]
    return r1[:, None] * (shared + _map(a0, query)) + unpack_rows(positional, POSITIONAL, "q1", inner, pixels)


def _decode_sweep2(
    bases, values, norms, positional, image, r1, k0, v0, k1, v1, qf, maps, vectors, beta_norm, pixels, channels, eps
):
    """Reference."""
    inner = k0.shape[1] * k0.shape[3]

    def basis(name):
        return unpack_rows(bases, BASES, name, inner, pixels)[image]

    query, gram0, gram01, gram1, key0, key1, value0, value1 = maps
    beta0, beta1, beta_key, beta_value, constant = vectors[:, :, None]
    r1 = r1[:, :pixels]
    a0 = attend_tokens(basis("q0"), k0, v0)
    a1 = attend_tokens(queries1(bases, positional, image, r1, a0, query, inner, pixels), k1, v1)
    shared = norms[image, 1, :pixels] + 2 * (basis("b00") * a0).sum(dim=1) + _form(a0, gram0, a0)
    own = beta_norm + _form(a1, gram1, a1) + 2 * (beta1 * a1).sum(dim=1)
    cross = norms[image, 2, :pixels] + (beta0 * a0).sum(dim=1) + (basis("b01") * a1).sum(dim=1)
    var = r1**2 * shared + own + 2 * r1 * (cross + _form(a0, gram01, a1))
    r2 = (var / channels + eps).rsqrt()
    vf = unpack_values(values, k0.shape[3], pixels)[:, VALUES.index("vf")].flatten(1, 2)[image]

    def project(shared, map0, map1, beta):
        return r2[:, None] * (r1[:, None] * (shared + _map(a0, map0)) + _map(a1, map1) + beta)

    keys = project(basis("kf"), key0, key1, beta_key) + unpack_rows(positional, POSITIONAL, "kf", inner, pixels)
    out = _attend_pixels(qf, keys, project(vf, value0, value1, beta_value) + constant)
    return out, _pad_pixels(r2, norms.shape[-1] // TILE)


def fast_operands(device_type: str, dtype: torch.dtype) -> torch.dtype | None:
    """The operands with which fast sweeps serve a model that works in ``dtype``; None if there are no fast sweeps.

    On a CPU bfloat16 is only worth its rounding where the processor multiplies it directly. On a GPU float16 costs what
    bfloat16 does and is ten times closer to float32, which has no fast sweeps there.
    """
    if device_type == "cuda":
        halves = dtype != torch.float32 and unavailable("triton", device_type) is None
        return torch.float16 if halves else None
    if device_type != "cpu" or unavailable("cpu", device_type) is not None:
        return None
    return dtype if dtype == torch.bfloat16 and _native._cpu.isa_active() == "avx512bf16" else torch.float32


def decode_sweep0(
    bases: torch.Tensor,
    values: torch.Tensor,
    image: torch.Tensor,
    q: torch.Tensor,
    pixels: int,
    backend: str = "auto",
) -> torch.Tensor:
    """Token-to-image attention of layer 0, whose keys and values are the same for all prompts of an image.

    Args:
        bases, values, image: see the module.
        q: float32 (G, h, T, d), T at most 32.
        pixels: P.
        backend: as for `mask_match`.

    Returns:
        float32 (G, h, T, d): the attention's output before its output projection.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices don't fit, or `image` names one that isn't there.
        ConfigError: unknown back end.
        BackendError: the back end can't run here or not on this device.
    """
    check_call("decode_sweep0", backend, bases=bases, values=values, image=image, q=q)
    return torch.ops.pro2sam_fast.decode_sweep0(bases, values, image, q, pixels, backend=backend)


def decode_sweep1(
    bases: torch.Tensor,
    values: torch.Tensor,
    norms: torch.Tensor,
    positional: torch.Tensor,
    image: torch.Tensor,
    k0: torch.Tensor,
    v0: torch.Tensor,
    q1: torch.Tensor,
    maps: torch.Tensor,
    bias: torch.Tensor,
    pixels: int,
    channels: int,
    eps: float,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image-to-token attention 0, its layer norm, and token-to-image attention 1 on what comes out.

    Args:
        bases, values, norms, positional, image: see the module.
        k0, v0: float32 (G, h, T, d), keys and values of image-to-token attention 0; T at most 32.
        q1: float32 (G, h, T, d), queries of token-to-image attention 1.
        maps: float32 (3, I, I): G00, and a0's way to keys and values of attention 1.
        bias: float32 (I,), the constant of the values.
        pixels, channels, eps: P; D and epsilon of the layer norm.
        backend: as for `mask_match`.

    Returns:
        out: float32 (G, h, T, d), the attention's output before its output projection.
        r1: float32 (G, 64 tiles), reciprocal standard deviations of the pixels; undefined beyond P.

    Raises:
        As `decode_sweep0`.
    """
    tensors = {"values": values, "norms": norms, "positional": positional, "image": image, "k0": k0, "v0": v0}
    check_call("decode_sweep1", backend, bases=bases, **tensors, q1=q1, maps=maps, bias=bias)
    return torch.ops.pro2sam_fast.decode_sweep1(
        bases, *tensors.values(), q1, maps, bias, pixels, channels, eps, backend=backend
    )


def decode_sweep2(
    bases: torch.Tensor,
    values: torch.Tensor,
    norms: torch.Tensor,
    positional: torch.Tensor,
    image: torch.Tensor,
    r1: torch.Tensor,
    k0: torch.Tensor,
    v0: torch.Tensor,
    k1: torch.Tensor,
    v1: torch.Tensor,
    qf: torch.Tensor,
    maps: torch.Tensor,
    vectors: torch.Tensor,
    beta_norm: float,
    pixels: int,
    channels: int,
    eps: float,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image-to-token attention 1, its layer norm, and the final token-to-image attention on what comes out.

    Args:
        bases, values, norms, positional, image: see the module.
        r1: float32 (G, 64 tiles) from `decode_sweep1`.
        k0, v0, k1, v1: float32 (G, h, T, d), keys and values of image-to-token attention 0 and 1; T at most 32.
        qf: float32 (G, h, T, d), queries of the final attention.
        maps: float32 (8, I, I): a0 to the queries of attention 1; Ggg, G01, G11; a0 and a1 to the final keys; a0 and a1
            to the final values.
        vectors: float32 (5, I): Og b, O1 b, b to keys, b to values, the constant of the values.
        beta_norm: |b|^2.
        pixels, channels, eps: P; D and epsilon of the layer norm.
        backend: as for `mask_match`.

    Returns:
        out: float32 (G, h, T, d), the final attention's output before its output projection.
        r2: float32 (G, 64 tiles), reciprocal standard deviations of the pixels; undefined beyond P.

    Raises:
        As `decode_sweep0`.
    """
    tensors = {"values": values, "norms": norms, "positional": positional, "image": image, "r1": r1}
    tokens = {"k0": k0, "v0": v0, "k1": k1, "v1": v1, "qf": qf, "maps": maps, "vectors": vectors}
    check_call("decode_sweep2", backend, bases=bases, **tensors, **tokens)
    return torch.ops.pro2sam_fast.decode_sweep2(
        bases, *tensors.values(), *tokens.values(), beta_norm, pixels, channels, eps, backend=backend
    )


def check_decode(
    op: str, bases: torch.Tensor, tokens: dict[str, torch.Tensor], pixels: int, **others: tuple[torch.Tensor, tuple]
) -> None:
    """Checks of all sweeps.

    Args:
        op: for messages.
        bases: packed, float32, bfloat16 or float16.
        tokens: float32 tensors of one shape (G, h, T, d), which gives the others theirs.
        pixels: P.
        others: float32 tensors (int64 for `image`, the dtype of `bases` for `values` and `positional`) with the shapes
            that they must have.
    """
    shape = next(iter(tokens.values())).shape
    if bases.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: bases must be float32, bfloat16 or float16, got {bases.dtype}")
    if len(shape) != 4 or not 2 <= shape[2] <= MAX_TOKENS or shape[3] % 2 or min(shape[1:]) < 1:
        raise ValueError(
            f"{op}: {next(iter(tokens))} must be (G, h, T, d), T from 2 to {MAX_TOKENS} and d even, got {tuple(shape)}"
        )
    n = 2 if bases.dim() == 5 and bases.shape[4] == 2 and bases.dtype == torch.bfloat16 else 1
    tiles, inner = max(-(-pixels // TILE), 1), shape[1] * shape[3]
    if inner % VALUE_LANES or shape[3] > MAX_WIDTH:
        raise ValueError(
            f"{op}: h d must be a multiple of {VALUE_LANES} and d at most {MAX_WIDTH}, got {shape[1]} and {shape[3]}"
        )
    if bases.dim() != 5 or bases.shape[1] != tiles or bases.shape[3:] != (TILE, n) or pixels < 1:
        raise ValueError(f"{op}: bases must be (B, {tiles}, K / {n}, {TILE}, {n}), got {tuple(bases.shape)}")
    if bases.shape[2] < len(BASES) * inner // n:
        raise ValueError(f"{op}: bases must have {len(BASES) * inner // n} rows or more, got {bases.shape[2]}")
    for name, (tensor, wanted) in {**{k: (v, shape) for k, v in tokens.items()}, **others}.items():
        dtype = {"image": torch.int64, "first": torch.int64}.get(name, torch.float32)
        if name in ("values", "positional"):
            dtype = bases.dtype
        if tensor.dtype != dtype or tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be dense {dtype}, got {tensor.dtype} {tensor.layout}")
        if tensor.device != bases.device:
            raise ValueError(f"{op}: all inputs must be on one device, got {name} on {tensor.device}")
        if tuple(tensor.shape) != tuple(wanted):
            raise ValueError(f"{op}: {name} must have the shape {tuple(wanted)}, got {tuple(tensor.shape)}")


def shapes(bases: torch.Tensor, tokens: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that depend on ``bases`` and a (G, h, T, d) tensor alone."""
    (images, tiles, _, _, n), (prompts, heads, _, width) = bases.shape, tokens.shape
    inner = heads * width
    lanes = -(-width // VALUE_LANES) * VALUE_LANES
    return {
        "values": (images, tiles, len(VALUES), heads, TILE // n, lanes, n),
        "norms": (images, 3, tiles * TILE),
        "positional": (1, tiles, len(POSITIONAL) * inner // n, TILE, n),
        "image": (prompts,),
        "r": (prompts, tiles * TILE),
        "map": (inner, inner),
    }


def check_images(op: str, image: torch.Tensor, images: int) -> None:
    """Raises ValueError unless all of ``image`` (G,) are in 0..images - 1."""
    if len(image) and (int(image.min()) < 0 or int(image.max()) >= images):
        raise ValueError(f"{op}: image must be in 0..{images - 1}, got {int(image.min())}..{int(image.max())}")


def _check_sweep0(bases, values, image, q, pixels):
    s = shapes(bases, q) if bases.dim() == 5 and q.dim() == 4 else None
    others = {"values": (values, s["values"]), "image": (image, s["image"])} if s else {}
    check_decode("decode_sweep0", bases, {"q": q}, pixels, **others)


def _check_sweep1(bases, values, norms, positional, image, k0, v0, q1, maps, bias, pixels, channels, eps):
    s = shapes(bases, k0) if bases.dim() == 5 and k0.dim() == 4 else None
    others = (
        {
            "values": (values, s["values"]),
            "norms": (norms, s["norms"]),
            "positional": (positional, s["positional"]),
            "image": (image, s["image"]),
            "maps": (maps, (len(MAPS1), *s["map"])),
            "bias": (bias, s["map"][:1]),
        }
        if s
        else {}
    )
    check_decode("decode_sweep1", bases, {"k0": k0, "v0": v0, "q1": q1}, pixels, **others)


def _check_sweep2(
    bases, values, norms, positional, image, r1, k0, v0, k1, v1, qf, maps, vectors, beta_norm, pixels, channels, eps
):
    s = shapes(bases, k0) if bases.dim() == 5 and k0.dim() == 4 else None
    others = (
        {
            "values": (values, s["values"]),
            "norms": (norms, s["norms"]),
            "positional": (positional, s["positional"]),
            "image": (image, s["image"]),
            "r1": (r1, s["r"]),
            "maps": (maps, (len(MAPS2), *s["map"])),
            "vectors": (vectors, (len(VECTORS2), s["map"][0])),
        }
        if s
        else {}
    )
    check_decode("decode_sweep2", bases, {"k0": k0, "v0": v0, "k1": k1, "v1": v1, "qf": qf}, pixels, **others)


def native_shape(bases, tokens, pixels, channels=0, channels1=0, channels2=0):
    """The numbers that every native sweep begins with."""
    prompts, heads, count, width = tokens.shape
    words = bases.shape[2]
    return (
        *(bases.shape[4], bases.shape[1], pixels, words, prompts, heads, count, width),
        *(channels, channels1, channels2),
    )


def cpu_limits(bases, *others) -> str | None:
    """Why the CPU kernels don't take these bases, or None."""
    if bases.dtype == torch.float32 or bases.shape[4] == 2:
        return None
    return f"it takes float32 and pairs of bfloat16, not {bases.dtype}"


def triton_limits(bases: torch.Tensor, tokens: torch.Tensor) -> str | None:
    """Why the Triton kernels don't take bases and tokens (G, h, T, d), or None."""
    _, heads, count, width = tokens.shape
    if bases.dtype == torch.float32 and bases.is_cuda:
        return "it takes bases of 16 bits: with float32 a prompt's operands don't fit the registers"
    if count > TRITON_TOKENS:
        return f"it takes at most {TRITON_TOKENS} tokens, not {count}"
    if heads not in (2, 4, 8) or width not in (2, 4, 8, 16) or heads * width < VALUE_LANES:
        return f"it takes powers of two up to 8 heads of 16 channels, not {heads} heads of {width}"
    if bases[:1].numel() >= 1 << 31:
        return "it takes images of less than 2^31 numbers"
    return None


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Dense, from a multiple of 16 bytes on: else the registers of Triton's kernels spill."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def addresses(*tensors):
    """Of the first element of each."""
    return tuple(tensor.data_ptr() for tensor in tensors)


def _decode_sweep0_cpu(bases, values, image, q, pixels):
    check_images("decode_sweep0", image, len(bases))
    bases, values, image, q = (x.contiguous() for x in (bases, values, image, q))
    out = torch.empty_like(q)
    image_arrays = (*addresses(bases, values), 0, 0, image.data_ptr())
    shape = native_shape(bases, q, pixels)
    _native._cpu.decode_sweep0(shape, image_arrays, q.data_ptr(), out.data_ptr(), torch.get_num_threads())
    return out


def _decode_sweep1_cpu(bases, values, norms, positional, image, k0, v0, q1, maps, bias, pixels, channels, eps):
    check_images("decode_sweep1", image, len(bases))
    shared = tuple(x.contiguous() for x in (bases, values, norms, positional, image))
    inputs = tuple(x.contiguous() for x in (k0, v0, q1, maps, bias))
    out, r1 = _empty_sweep(k0, norms)
    _native._cpu.decode_sweep1(
        *(native_shape(bases, k0, pixels, channels), eps, addresses(*shared), addresses(*inputs)),
        *(out.data_ptr(), r1.data_ptr(), torch.get_num_threads()),
    )
    return out, r1


def _decode_sweep2_cpu(
    bases, values, norms, positional, image, r1, k0, v0, k1, v1, qf, maps, vectors, beta_norm, pixels, channels, eps
):
    check_images("decode_sweep2", image, len(bases))
    shared = tuple(x.contiguous() for x in (bases, values, norms, positional, image))
    inputs = tuple(x.contiguous() for x in (r1, k0, v0, k1, v1, qf, maps, vectors))
    out, r2 = _empty_sweep(k0, norms)
    _native._cpu.decode_sweep2(
        *(native_shape(bases, k0, pixels, channels), eps, addresses(*shared), addresses(*inputs), beta_norm),
        *(out.data_ptr(), r2.data_ptr(), torch.get_num_threads()),
    )
    return out, r2


def _decode_sweep0_triton(bases, values, image, q, pixels):
    bases, values, image, q = map(aligned, (bases, values, image, q))
    out = torch.empty_like(q)
    triton_kernels("decode_sweeps").sweep0(bases, values, image, q, pixels, out)
    return out


def _decode_sweep1_triton(bases, values, norms, positional, image, k0, v0, q1, maps, bias, pixels, channels, eps):
    tensors = map(aligned, (bases, values, norms, positional, image, k0, v0, q1, maps, bias))
    out, r1 = _empty_sweep(k0, norms)
    triton_kernels("decode_sweeps").sweep1(*tensors, pixels, channels, eps, out, r1)
    return out, r1


def _decode_sweep2_triton(
    bases, values, norms, positional, image, r1, k0, v0, k1, v1, qf, maps, vectors, beta_norm, pixels, channels, eps
):
    tensors = (bases, values, norms, positional, image, r1, k0, v0, k1, v1, qf, maps, vectors)
    out, r2 = _empty_sweep(k0, norms)
    triton_kernels("decode_sweeps").sweep2(*map(aligned, tensors), beta_norm, pixels, channels, eps, out, r2)
    return out, r2


def _empty_sweep(tokens, norms):
    out = torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device)
    return out, torch.empty((len(tokens), norms.shape[-1]), dtype=torch.float32, device=tokens.device)


def examples(op: str) -> dict[str, Callable[[torch.device], tuple]]:
    """Of the self-check of "sweep0", "sweep1", "sweep2" or "upscale"."""

    def arguments(dtype, device):
        from .decode_example import Arguments

        _, values = getattr(Arguments(dtype=dtype, device=device), op)()
        return tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in values)

    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    return {f"decode {name}": functools.partial(arguments, dtype) for name, dtype in dtypes.items()}


register(
    'decode_sweep0(Tensor bases, Tensor values, Tensor image, Tensor q, int pixels, *, str backend="auto") -> Tensor',
    _check_sweep0,
    {"reference": _decode_sweep0, "cpu": _decode_sweep0_cpu, "triton": _decode_sweep0_triton},
    lambda bases, values, image, q, pixels: torch.empty(q.shape, dtype=torch.float32, device=q.device),
    examples("sweep0"),
    {"cpu": cpu_limits, "triton": lambda bases, values, image, q, pixels: triton_limits(bases, q)},
)
register(
    "decode_sweep1(Tensor bases, Tensor values, Tensor norms, Tensor positional, Tensor image, Tensor k0, Tensor v0, "
    "Tensor q1, Tensor maps, Tensor bias, int pixels, int channels, float eps, *, "
    'str backend="auto") -> (Tensor out, Tensor r1)',
    _check_sweep1,
    {"reference": _decode_sweep1, "cpu": _decode_sweep1_cpu, "triton": _decode_sweep1_triton},
    lambda bases, values, norms, positional, image, k0, *others: _empty_sweep(k0, norms),
    examples("sweep1"),
    {"cpu": cpu_limits, "triton": lambda bases, *others: triton_limits(bases, others[4])},
)
register(
    "decode_sweep2(Tensor bases, Tensor values, Tensor norms, Tensor positional, Tensor image, Tensor r1, Tensor k0, "
    "Tensor v0, Tensor k1, Tensor v1, Tensor qf, Tensor maps, Tensor vectors, float beta_norm, int pixels, "
    'int channels, float eps, *, str backend="auto") -> (Tensor out, Tensor r2)',
    _check_sweep2,
    {"reference": _decode_sweep2, "cpu": _decode_sweep2_cpu, "triton": _decode_sweep2_triton},
    lambda bases, values, norms, positional, image, r1, k0, *others: _empty_sweep(k0, norms),
    examples("sweep2"),
    {"cpu": cpu_limits, "triton": lambda bases, *others: triton_limits(bases, others[5])},
)
