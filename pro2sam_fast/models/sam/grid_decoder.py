"""SAM's mask decoder for many point or box prompts on the same images, without any prompt's image in memory.

:class:`~.mask_decoder.MaskDecoder` gives every prompt its own (P, D) image tensor. Here the image side of the two-way
transformer (Kirillov et al. 2023, appendix A) is kept as what all prompts share plus an update of low rank, see
`ops.decode_sweeps`: once per model the weights are folded together, once per image they give its bases, and a prompt
costs three passes over the pixels with a few hundred products each. The same numbers in another order of operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ...memory import joined
from ...ops.compact import compact
from ...ops.decode_sweeps import MAX_TOKENS, decode_sweep0, decode_sweep1, decode_sweep2
from ...ops.decode_upscale import MAX_MASKS, decode_upscale
from ...ops.pixel_tiles import TILE, VALUE_LANES, pack_pixels, pair
from .mask_decoder import MaskDecoder
from .sam import Sam
from .token_layers import TokenLayer, pack, perceptron
from .transformer import Attention, TwoWayTransformer

__all__ = ["DecodedGrid", "GridDecoder", "ImageBases"]


class ImageBases(NamedTuple):
    """What all prompts of B images share, in the layouts of `ops.decode_sweeps`."""

    bases: Tensor
    values: Tensor
    norms: Tensor


class DecodedGrid(NamedTuple):
    """What the transformer made of G prompts.

    iou: float32 (G, M), predicted IoU of all mask tokens. hyper: float32 (G, M, D / 8), the masks' vectors. image:
    int64 (G,). k0, v0, k1, v1: float32 (G, h, T, d), keys and values of image-to-token attention. r1, r2: float32
    (G, 64 tiles), reciprocal deviations of the layer norms behind it.
    """

    iou: Tensor
    hyper: Tensor
    image: Tensor
    k0: Tensor
    v0: Tensor
    k1: Tensor
    v1: Tensor
    r1: Tensor
    r2: Tensor

    def select(self, index: Tensor) -> DecodedGrid:
        """Some of the prompts, by an index of any kind that indexes (G,)."""
        return DecodedGrid(*(x[index] for x in self))


class GridDecoder:
    """Tokens and masks of prompts of up to 27 tokens, `MAX_TOKENS` less the output tokens: even with so many it is
    three times as fast as the mask decoder. Parameters are read once: later changes to ``sam`` don't count.

    Matrix products of different sizes round differently, so tokens go through the layers in groups of a fixed number of
    prompts (the last one filled up with zeros): a mask does not depend on how many others are asked for with it.

    Args:
        sam: a model for which :meth:`supports` holds, its decoder's parameters in float32.
        dtype: of the operands of matrix products, float32, bfloat16 or float16; sums and everything else are in
            float32. The few products that make queries, keys, values and the masks' vectors stay in float32 (they are
            a third of the tokens' work, and their rounding would be most of the error). float16 becomes bfloat16 if a
            constant of the model is beyond its range; a number of an image or a prompt that is makes predicted IoU or
            logits NaN.
        prompts_per_group: size of those groups; a single prompt costs as much token work as a whole group.
        backend: of the sweeps, as for `mask_match`.

    Raises:
        ConfigError: the model's decoder is of another kind.
    """

    def __init__(
        self,
        sam: Sam,
        dtype: torch.dtype = torch.float32,
        prompts_per_group: int = 64,
        backend: str = "auto",
    ) -> None:
        if not self.supports(sam):
            raise ConfigError("GridDecoder needs SAM's own mask decoder with its two-way transformer of two layers.")
        decoder = self.decoder = sam.mask_decoder
        self.prompts_per_group, self.backend = prompts_per_group, backend
        self.size = tuple(sam.prompt_encoder.image_embedding_size)
        self.output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        self.most_prompt_tokens = MAX_TOKENS - len(self.output_tokens)
        transformer = decoder.transformer
        self.heads = transformer.final_attn_token_to_image.num_heads
        self.final_query = pack(transformer.final_attn_token_to_image.q_proj)
        self.final_out = pack(transformer.final_attn_token_to_image.out_proj)
        self.iou_head = perceptron(decoder.iou_prediction_head)
        self.hypernetworks = [perceptron(mlp) for mlp in decoder.output_hypernetworks_mlps]
        with torch.no_grad():
            positional = self._fold(sam)
            beyond = dtype == torch.float16 and not _fit_float16(positional, *self._converted())
            self.dtype = torch.bfloat16 if beyond else dtype
            self.positional = pack_pixels(positional, self.dtype)
            self.layers = [TokenLayer(layer, self.dtype) for layer in transformer.layers]

    def _converted(self) -> list[Tensor]:
        # parameters that become operands, and a bound of what is between the two convolutions
        gamma, beta = self.upscaling["norm"].abs()
        linear = [part.weight for layer in self.decoder.transformer.layers for part in (layer.mlp.lin1, layer.mlp.lin2)]
        return [*linear, self.upscaling["weight"], gamma * len(gamma) ** 0.5 + beta]

    @staticmethod
    def supports(sam: Sam) -> bool:
        """Whether the model's decoder is of the kind, and of a size, that this one knows."""
        decoder = sam.mask_decoder
        if not isinstance(decoder, MaskDecoder) or not isinstance(decoder.transformer, TwoWayTransformer):
            return False
        layers, attention = decoder.transformer.layers, decoder.transformer.final_attn_token_to_image
        activations = [m for m in decoder.output_upscaling if not list(m.parameters())]
        return (
            len(layers) == 2
            and attention.internal_dim % 16 == 0
            and attention.internal_dim // attention.num_heads % 2 == 0
            and decoder.transformer_dim % 16 == 0
            and decoder.num_mask_tokens <= MAX_MASKS
            and all(isinstance(m, nn.GELU) and m.approximate == "none" for m in activations)
            and all(isinstance(layer.mlp.act, nn.ReLU) for layer in layers)
            and not decoder.iou_prediction_head.sigmoid_output
        )

    def _fold(self, sam: Sam) -> Tensor:
        """The constants of the model, in float64 until they are finished. Rows times matrices: x @ weight.T + bias.

        Returns:
            float32 (1, 3 I, P): the positional rows of the sweeps.
        """
        first, second = (_Image(layer) for layer in self.decoder.transformer.layers)
        final = _Projections(self.decoder.transformer.final_attn_token_to_image)
        channels = self.decoder.transformer_dim
        eye = torch.eye(channels, dtype=torch.float64, device=sam.device)
        centre = eye - 1 / channels
        dense = sam.prompt_encoder.no_mask_embed.weight[0].double()
        positions = sam.prompt_encoder.get_dense_pe()[0].flatten(1).double().T

        o0, o1 = first.to_token.out @ centre, second.to_token.out @ centre
        og = o0 * first.gamma @ centre
        beta = (first.beta + second.to_token.out_bias) @ centre
        deconv1, norm, _, deconv2, _ = self.decoder.output_upscaling
        channels1 = deconv1.out_channels
        centre1 = torch.block_diag(*[torch.eye(channels1, dtype=torch.float64, device=sam.device) - 1 / channels1] * 4)
        convolution = deconv1.weight.double().permute(0, 2, 3, 1).flatten(1) @ centre1

        # an image E (P, D) enters as x0 = E + dense, xc = (x0 + out_bias) centred, xg = (xc gamma) centred
        xc = _Affine(centre, (dense + first.to_token.out_bias) @ centre)
        xg = (xc * first.gamma) @ centre
        x0 = _Affine(eye, dense)
        read0, read1, ask0, ask1 = first.to_image, second.to_image, first.to_token, second.to_token
        shared = {
            "k0": x0 @ read0.k,
            "k1": xc * first.gamma @ read1.k,
            "b0": xc @ o0.T,
            "q0": x0 @ ask0.q,
            "q1": xc * first.gamma @ ask1.q,
            "b00": xg @ og.T,
            "b01": xg @ o1.T,
            "kf": xg * second.gamma @ final.k,
            "convolution": xg * second.gamma @ convolution,
            "v0": x0 @ read0.v + read0.v_bias,
            "v1": xc * first.gamma @ read1.v,
            "vf": xg * second.gamma @ final.v,
        }
        names = list(shared)
        bases, values = ([shared[n] for n in part] for part in (names[:9], names[9:]))
        own = {"k0": positions @ read0.k, "q0": positions @ ask0.q + ask0.q_bias}
        constants = [shared[n].constant + own.get(n, 0) for n in names[:9]]  # (I) or (P, I)
        constants = [_tiles(x.float().expand(len(positions), -1).T) for x in constants]
        self.bases_constant = torch.cat(constants, dim=1)
        self.values_constant = self._lanes(torch.stack([x.constant for x in values]))[:, :, None, :, None].float()
        bases_map = torch.cat([x.matrix for x in bases], dim=1).T
        values_map = self._lanes(torch.stack([x.matrix for x in values], dim=1)).flatten(1)
        self.image_maps = bases_map.float().contiguous(), values_map.float()
        *hidden, last = sam.prompt_encoder.mask_downscaling
        self.mask_hidden = nn.Sequential(*hidden)
        # the hidden channels of a mask and a one -> what it adds to an image without a mask
        embed = torch.cat([last.weight.double().flatten(1), (last.bias.double() - dense)[:, None]], dim=1)
        self.mask_embed = embed.float()
        self.mask_maps = (bases_map @ embed).float(), (embed.T @ values_map).float()
        self.centred_constant, self.gamma = xc.constant[:, None].float(), first.gamma[:, None].float()
        self.beta = beta.float()
        positional = [positions @ read1.k, positions @ ask1.q + first.beta @ ask1.q + ask1.q_bias, positions @ final.k]

        scaled0, scaled1 = o0 * first.gamma, o1 * second.gamma
        scaledg = og * second.gamma
        self.maps1 = torch.stack([o0 @ o0.T, scaled0 @ read1.k, scaled0 @ read1.v]).float()
        self.bias1 = (first.beta @ read1.v + read1.v_bias).float()
        grams = [og @ og.T, og @ o1.T, o1 @ o1.T]
        finals = [scaledg @ final.k, scaled1 @ final.k, scaledg @ final.v, scaled1 @ final.v]
        self.maps2 = torch.stack([scaled0 @ ask1.q, *grams, *finals]).float()
        scaled_beta = beta * second.gamma
        self.vectors2 = torch.stack(
            [og @ beta, o1 @ beta, scaled_beta @ final.k, scaled_beta @ final.v, second.beta @ final.v + final.v_bias]
        ).float()
        self.beta_norm = float(beta @ beta)
        self.epsilons = tuple(layer.norm4.eps for layer in self.decoder.transformer.layers)

        constant = second.beta @ convolution + deconv1.bias.double().repeat(4) @ centre1
        self.upscaling = {
            "query": self.maps2[0].contiguous(),
            "maps": torch.stack([scaledg @ convolution, scaled1 @ convolution]).float(),
            "vectors": torch.stack([scaled_beta @ convolution, constant]).float(),
            "norm": torch.stack([norm.weight, norm.bias]),
            "weight": deconv2.weight.permute(2, 3, 1, 0).flatten(0, 2).contiguous(),
            "bias": deconv2.bias.detach(),
        }
        self.upscale_eps = norm.eps
        return torch.cat(positional, dim=1).T[None].float()

    def _lanes(self, x: Tensor) -> Tensor:
        # (..., I) -> (..., h, lanes)
        x = x.unflatten(-1, (self.heads, -1))
        return F.pad(x, (0, -x.shape[-1] % VALUE_LANES))

    @torch.no_grad()
    def bases(self, embeddings: Tensor) -> ImageBases:
        """What all prompts of these images share: float32 (B, D, e, e) -> bases."""
        constants = self.bases_constant, self.values_constant
        return _joined([self._bases(e, e, self.image_maps, *constants) for e in embeddings.flatten(2).float()])

    @torch.no_grad()
    def masked_bases(self, bases: ImageBases, embedding: Tensor, masks: Tensor) -> ImageBases:
        """An image as prompts with mask input see it, each of them differently: it is the image and a projection of the
        16 hidden channels of the mask (Kirillov et al. 2023, appendix A), so are its bases.

        Args:
            bases: of the image.
            embedding: float32 (1, D, e, e).
            masks: float32 (G, 1, 4e, 4e) logits.

        Returns:
            Bases of G images.
        """
        image, parts = embedding[0].flatten(1), []
        shared = bases.bases[0].float().transpose(2, 3).flatten(1, 2), bases.values[0].float()
        for mask in masks:
            hidden = self.mask_hidden(mask[None])[0].flatten(1)
            hidden = torch.cat([hidden, torch.ones_like(hidden[:1])])
            x = torch.addmm(image, self.mask_embed, hidden)
            parts.append(self._bases(x, hidden, self.mask_maps, *shared))
        return _joined(parts)

    def _bases(
        self, image: Tensor, x: Tensor, maps: tuple[Tensor, Tensor], bases: Tensor, values: Tensor
    ) -> ImageBases:
        """Bases of an image (D, P), two linear maps of x (C, P) to which bases (tiles, K, 64) and values
        (tiles or 1, 3, h, 64 / pair or 1, lanes, pair or 1) are added."""
        tiles, words = _tiles(x), pair(self.dtype, x.device.type)
        bases = torch.baddbmm(bases, maps[0].expand(len(tiles), -1, -1), tiles).to(self.dtype)
        # (P, 3 h lanes) -> (tiles, 3, h, 64 / pair, lanes, pair)
        own = (_padded(x).T @ maps[1]).unflatten(1, (3, self.heads, -1)).unflatten(0, (-1, TILE // words, words))
        values = (own.permute(0, 3, 4, 1, 5, 2) + values).to(self.dtype)
        norms = _padded(self._norms(image))[None]
        if self.dtype == torch.float16:  # variances of NaN make everything NaN
            norms = torch.where(bases.isfinite().all() & values.isfinite().all(), norms, torch.nan)
        return ImageBases(
            bases.unflatten(1, (-1, words)).transpose(2, 3).contiguous()[None], values.contiguous()[None], norms
        )

    def _norms(self, image: Tensor) -> Tensor:
        # (D, P) -> (3, P)
        xc = image - image.mean(dim=0) + self.centred_constant
        xg = xc * self.gamma
        xg -= xg.mean(dim=0)
        return torch.stack([xc.square().sum(dim=0), xg.square().sum(dim=0), self.beta @ xg])

    @torch.no_grad()
    def tokens(self, bases: ImageBases, sparse: Tensor, image: Tensor | None = None) -> DecodedGrid:
        """The transformer, the IoU head and the hypernetworks for G prompts.

        Args:
            bases: of B images.
            sparse: float32 (G, n, D) prompt tokens, the same number for all prompts.
            image: int64 (G,), which image a prompt belongs to; None for the first image.

        Raises:
            ConfigError: too many prompt tokens.
        """
        if sparse.shape[1] > self.most_prompt_tokens:
            raise ConfigError(f"prompts may have {self.most_prompt_tokens} tokens, got {sparse.shape[1]}.")
        if image is None:
            image = torch.zeros(len(sparse), dtype=torch.int64, device=sparse.device)
        size = self.prompts_per_group
        starts = range(0, max(len(sparse), 1), size)
        return _joined([self._tokens(bases, *(x[i : i + size] for x in (sparse, image))) for i in starts])

    def _tokens(self, bases: ImageBases, sparse: Tensor, image: Tensor) -> DecodedGrid:
        count, size = len(sparse), self.prompts_per_group
        pixels, channels = self.size[0] * self.size[1], self.decoder.transformer_dim
        eps1, eps2 = self.epsilons
        first, second = self.layers
        transformer = self.decoder.transformer

        def split(x):  # (g, T, I) -> float32 (count, h, T, d)
            return x[:count].float().unflatten(-1, (self.heads, -1)).transpose(1, 2).contiguous()

        def merged(x):  # float32 (count, h, T, d) -> (g, T, I)
            return F.pad(x.transpose(1, 2).flatten(2), (0, 0, 0, 0, 0, size - count))

        sparse = F.pad(sparse, (0, 0, 0, 0, 0, size - count))
        tok = torch.cat([self.output_tokens.expand(size, -1, -1), sparse], dim=1)
        q = first.norm1(first.self_attention(tok, tok, self.heads))
        out = decode_sweep0(bases.bases, bases.values, image, split(first.query(q + tok)), pixels, self.backend)
        q = first.finish(q, merged(out))
        k0, v0 = split(first.key(q + tok)), split(first.value(q))

        q = second.norm1(q + second.self_attention(q + tok, q, self.heads))
        q1 = split(second.query(q + tok))
        shared = (*bases, self.positional, image)
        out, r1 = decode_sweep1(*shared, k0, v0, q1, self.maps1, self.bias1, pixels, channels, eps1, self.backend)
        q = second.finish(q, merged(out))
        k1, v1 = split(second.key(q + tok)), split(second.value(q))

        qf = split(self.final_query(q + tok))
        constants = (self.maps2, self.vectors2, self.beta_norm, pixels, channels, eps2, self.backend)
        out, r2 = decode_sweep2(*shared, r1, k0, v0, k1, v1, qf, *constants)
        q = transformer.norm_final_attn(q + self.final_out(merged(out)))

        iou = self.iou_head(q[:, 0])[:count].float()
        hyper = torch.stack([mlp(q[:, 1 + i]) for i, mlp in enumerate(self.hypernetworks)], dim=1)[:count].float()
        return DecodedGrid(iou, hyper, image, k0, v0, k1, v1, r1, r2)

    @torch.no_grad()
    def upscale(self, bases: ImageBases, decoded: DecodedGrid, masks: Tensor) -> Tensor:
        """Low-resolution logits of the wanted masks, prompt by prompt.

        Args:
            bases: the images' that were given to :meth:`tokens`.
            decoded: G prompts.
            masks: bool (G, M), which masks of a prompt are wanted.

        Returns:
            float32 (K, 4e, 4e), K the number of wanted masks.
        """
        wanted = masks.any(dim=1)
        decoded, masks = decoded.select(wanted), masks[wanted]
        first = F.pad(masks.sum(dim=1).cumsum(dim=0), (1, 0))
        return self._upscale(bases, decoded, decoded.hyper[masks], first)

    @torch.no_grad()
    def upscale_padded(
        self, bases: ImageBases, decoded: DecodedGrid, masks: Tensor, most: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`upscale`, without waiting for the device to know how many masks are wanted.

        Args:
            most: at least as many as are wanted.

        Returns:
            logits: float32 (most, 4e, 4e), undefined from the number of wanted masks on.
            index: int64 (most,), positions of the wanted masks in (G, M), ascending, then -1.
            count: int64 (), how many are wanted.
        """
        index, count = compact(masks.flatten())
        index = index[:most]
        first = F.pad(masks.sum(dim=1).cumsum(dim=0), (1, 0))
        hyper = decoded.hyper.flatten(0, 1)[index.clamp(min=0)]
        return self._upscale(bases, decoded, hyper, first), index, count

    def _upscale(self, bases: ImageBases, decoded: DecodedGrid, hyper: Tensor, first: Tensor) -> Tensor:
        own = (decoded.r1, decoded.r2, decoded.k0, decoded.v0, decoded.k1, decoded.v1, hyper, first)
        constants = (*self.upscaling.values(), *self.size, self.upscale_eps, self.backend)
        return decode_upscale(bases.bases, self.positional, decoded.image, *own, *constants)

    @torch.no_grad()
    def decode(
        self,
        bases: ImageBases,
        sparse: Sequence[Tensor] | Tensor,
        image: Tensor | None = None,
        masks: slice = slice(None),
    ) -> tuple[Tensor, Tensor]:
        """IoU and low-resolution logits of G prompts of any kinds on any of the images.

        Args:
            bases: of B images.
            sparse: float32 (n, D) prompt tokens of each.
            image: int64 (G,), which image a prompt belongs to; None for the first image.
            masks: which of the M masks of every prompt.

        Returns:
            float32 (G, m), (G, m, 4e, 4e).

        Raises:
            ConfigError: too many prompt tokens.
        """
        if image is None:
            image = torch.zeros(len(sparse), dtype=torch.int64, device=bases.norms.device)
        counts = torch.tensor([len(tokens) for tokens in sparse], dtype=torch.int64)
        chosen = torch.zeros(self.decoder.num_mask_tokens, dtype=torch.bool)
        chosen[masks] = True
        iou = self.output_tokens.new_empty(len(counts), int(chosen.sum()))
        logits = iou.new_empty(*iou.shape, 4 * self.size[0], 4 * self.size[1])
        for count in counts.unique():
            index = (counts == count).nonzero().squeeze(1)
            decoded = self.tokens(bases, torch.stack([sparse[i] for i in index]), image[index])
            iou[index] = decoded.iou[:, masks]
            logits[index] = self.upscale(bases, decoded, chosen.expand(len(index), -1)).unflatten(0, (len(index), -1))
        return iou, logits


def _fit_float16(*tensors: Tensor) -> bool:
    return all(bool((x.abs() <= torch.finfo(torch.float16).max).all()) for x in tensors)


def _joined(parts: list) -> NamedTuple:
    # of one kind
    return type(parts[0])(*map(joined, zip(*parts, strict=True)))


def _padded(x: Tensor) -> Tensor:
    # (..., P) -> (..., 64 tiles)
    return F.pad(x, (0, -x.shape[-1] % TILE))


def _tiles(x: Tensor) -> Tensor:
    # (C, P) -> (tiles, C, 64)
    return _padded(x).unflatten(1, (-1, TILE)).transpose(0, 1)


class _Affine(NamedTuple):
    """x -> x @ matrix + constant, and what follows it."""

    matrix: Tensor
    constant: Tensor

    def __matmul__(self, other: Tensor) -> _Affine:
        return _Affine(self.matrix @ other, self.constant @ other)

    def __mul__(self, scale: Tensor) -> _Affine:
        return _Affine(self.matrix * scale, self.constant * scale)

    def __add__(self, constant: Tensor) -> _Affine:
        return _Affine(self.matrix, self.constant + constant)


class _Projections:
    """Weights of an attention in float64, (in, out)."""

    def __init__(self, attention: Attention) -> None:
        self.q, self.k, self.v, self.out = (
            layer.weight.double().T
            for layer in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
        )
        self.q_bias, self.v_bias = attention.q_proj.bias.double(), attention.v_proj.bias.double()
        self.out_bias = attention.out_proj.bias.double()


class _Image:
    """The image side of one layer of the two-way transformer, in float64."""

    def __init__(self, layer: nn.Module) -> None:
        self.to_image = _Projections(layer.cross_attn_token_to_image)
        self.to_token = _Projections(layer.cross_attn_image_to_token)
        self.gamma, self.beta = layer.norm4.weight.double(), layer.norm4.bias.double()
