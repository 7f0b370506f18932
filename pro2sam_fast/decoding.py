"""Low-resolution masks of many point prompts on photos, a group at a time."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .decoding_ahead import masks_ahead
from .memory import in_chunks, joined
from .models.cache import states_of
from .models.graphs import GraphCache
from .models.sam import DecodedTokens, GridDecoder, Sam
from .models.sam.grid_decoder import DecodedGrid, ImageBases
from .models.sam.prompt_encoder import PromptEncoder
from .ops.decode_sweeps import fast_operands
from .predictor import encode_resized, photos_per_pass
from .transfer import Upload, queues

__all__ = ["DecodedMasks", "PointDecoder"]

# Matrix products of different sizes round differently, so prompts are decoded and masks upscaled in groups of a fixed
# size (the last one filled up with copies): a mask does not depend on how many others are asked for with it.
_PROMPTS_PER_GRID = {"cpu": 64}
_PROMPTS_PER_GRID_ELSEWHERE = 256
# Tokens are made of up to so many times so many prompts, 48 KiB of results each, before the first masks.
_PROMPTS_AHEAD = 1024
_RANGES_AHEAD = 8
_PROMPTS_PER_DECODE = {"cpu": 16}
_PROMPTS_PER_UPSCALE = {"cpu": 8}
_PROMPTS_PER_GROUP_ELSEWHERE = 64


class DecodedMasks(NamedTuple):
    """Masks of one image.

    image: which. prompts: int64 (K,), theirs. logits: float32 (K, 4e, 4e). iou: float32 (K,). alive: how many prompts
    these are.
    """

    image: int
    prompts: Tensor
    logits: Tensor
    iou: Tensor
    alive: int


@dataclass(frozen=True)
class PointDecoder:
    """Low-resolution masks of point prompts: by `GridDecoder`, where it knows the model and has fast kernels, else by
    the mask decoder in groups of fixed size."""

    sam: Sam
    dtype: torch.dtype
    pred_iou_thresh: float
    # By grid: the state of the parameters that graphs may read, and the graphs of its tokens.
    _recorded: dict[GridDecoder, tuple[tuple, GraphCache]] = field(default_factory=dict, init=False, compare=False)

    def __call__(
        self, embeddings: Tensor, coords: Sequence[Tensor], points_per_batch: int, wide: bool = False
    ) -> Iterator[DecodedMasks]:
        """Masks that pass the filter by predicted IoU, image by image and in order, in groups of up to
        ``points_per_batch`` prompts (more where the groups are fixed).

        Where :attr:`narrow` holds, an IoU of NaN tells that a number of the image was beyond the range of float16: its
        masks are void then, those of a ``wide`` call are not.

        Args:
            embeddings: (B, D, e, e).
            coords: float64 (G, 2) in the input frame, of each image.
        """
        if self._grid is not None and queues(embeddings.device):
            grid = self._wide_grid if wide and self.narrow else self._grid
            yield from self._decode_ahead(grid, embeddings, coords, points_per_batch)
            return
        for image, points in enumerate(coords):
            embedding = embeddings[image : image + 1]
            if self._grid is not None:
                parts = self._decode_grid(embedding, points, points_per_batch)
            else:
                parts = self._decode_groups(embedding, points)
            yield from (DecodedMasks(image, *part) for part in parts)

    @property
    def narrow(self) -> bool:
        """Whether operands are float16."""
        return self._grid is not None and self._grid.dtype == torch.float16

    @functools.cached_property
    def _grid(self) -> GridDecoder | None:
        operands = fast_operands(self.sam.device.type, self.dtype)
        if operands is None or not GridDecoder.supports(self.sam):
            return None
        return GridDecoder(self.sam, operands, _PROMPTS_PER_GRID.get(self.sam.device.type, _PROMPTS_PER_GRID_ELSEWHERE))

    @functools.cached_property
    def _wide_grid(self) -> GridDecoder:
        """Takes over what is beyond the range of float16."""
        return GridDecoder(self.sam, torch.bfloat16, self._grid.prompts_per_group, self._grid.backend)

    def _wanted(self, iou: Tensor) -> Tensor:
        return iou > self.pred_iou_thresh if self.pred_iou_thresh > 0.0 else torch.ones_like(iou, dtype=torch.bool)

    def _decode_grid(self, embedding: Tensor, coords: Tensor, points_per_batch: int) -> Iterator[tuple[Tensor, ...]]:
        bases = self._grid.bases(embedding)
        for start in range(0, len(coords), self._grid.prompts_per_group):
            index = torch.arange(start, min(start + self._grid.prompts_per_group, len(coords)))
            sparse, _ = _embedded(self.sam.prompt_encoder, coords[_filled(index, self._grid.prompts_per_group)])

            def tokens(start: int, stop: int, sparse=sparse) -> DecodedGrid:
                return self._grid.tokens(bases, sparse[start:stop])

            decoded = _joined(in_chunks(tokens, len(index), len(index)))
            keep = self._wanted(decoded.iou)
            keep[:, 0] = False
            alive = keep.any(dim=1).nonzero().squeeze(1)
            for part in alive.split(points_per_batch) if len(alive) else ():  # nothing splits into one empty part
                chosen, wanted = decoded.select(part), keep[part]
                prompts = index[part].repeat_interleave(wanted.sum(dim=1))
                yield prompts, self._grid_masks(bases, chosen, wanted), chosen.iou[wanted], len(part)

    def _decode_ahead(
        self, grid: GridDecoder, embeddings: Tensor, coords: Sequence[Tensor], points_per_batch: int
    ) -> Iterator[DecodedMasks]:
        bases, tokens = grid.bases(embeddings), self._tokens(grid)
        ranges = [
            (image, start, points[start : start + _PROMPTS_AHEAD])
            for image, points in enumerate(coords)
            for start in range(0, len(points), _PROMPTS_AHEAD)
        ]
        for first in range(0, len(ranges), _RANGES_AHEAD):
            chosen = ranges[first : first + _RANGES_AHEAD]
            parts, owners, before = [], [], 0
            for image, start, points in chosen:
                for i in range(0, len(points), points_per_batch):
                    parts.append((before + i, before + min(i + points_per_batch, len(points))))
                    owners.append((image, start - before))
                before += len(points)
            decoded = _joined([_image_tokens(tokens, bases, image, points) for image, _, points in chosen])
            keep = self._wanted(decoded.iou)
            if grid.dtype == torch.float16:
                keep |= decoded.iou.isnan()
            keep[:, 0] = False
            for masks in masks_ahead(grid, bases, decoded, keep, parts):
                image, shift = owners[masks.part]
                yield DecodedMasks(image, masks.index // keep.shape[1] + shift, *masks[2:])

    def _tokens(self, grid: GridDecoder) -> Callable[..., DecodedGrid]:
        """:func:`_point_tokens` of ``coords`` and bases, on a GPU as a CUDA graph."""
        modules = self.sam.prompt_encoder, self.sam.mask_decoder
        state = tuple(itertools.chain.from_iterable(map(states_of, modules)))
        if grid not in self._recorded or self._recorded[grid][0] != state:
            tokens = functools.partial(_point_tokens, self.sam.prompt_encoder, grid)  # holds no reference to us
            self._recorded[grid] = state, GraphCache(tokens)
        graphs = self._recorded[grid][1]
        return graphs if self.sam.mask_decoder.cuda_graphs else graphs.function

    def _grid_masks(self, bases: ImageBases, decoded: DecodedGrid, wanted: Tensor) -> Tensor:
        def upscale(start: int, stop: int) -> Tensor:
            return self._grid.upscale(bases, decoded.select(slice(start, stop)), wanted[start:stop])

        return joined(in_chunks(upscale, len(wanted), len(wanted)))

    def _decode_groups(self, embedding: Tensor, coords: Tensor) -> Iterator[tuple[Tensor, ...]]:
        device = embedding.device
        decode_size = _PROMPTS_PER_DECODE.get(device.type, _PROMPTS_PER_GROUP_ELSEWHERE)
        upscale_size = _PROMPTS_PER_UPSCALE.get(device.type, _PROMPTS_PER_GROUP_ELSEWHERE)
        image_pe = self.sam.prompt_encoder.get_dense_pe()
        pending: list[tuple[Tensor, ...]] = []
        waiting = 0
        for start in range(0, len(coords), decode_size):
            index = torch.arange(start, min(start + decode_size, len(coords)), device=device)
            decoded = self._decode(embedding, image_pe, coords[_filled(index, decode_size)])
            iou = decoded.iou[: len(index), 1:].float()
            alive = self._wanted(iou).any(dim=1).nonzero().squeeze(1)
            pending.append((index[alive], iou[alive], decoded.mask_tokens[alive], decoded.image[alive]))
            waiting += len(alive)
            while waiting >= upscale_size:
                group, pending = _split(pending, upscale_size)
                waiting -= upscale_size
                yield self._group_masks(group, upscale_size, decoded.size)
        if waiting:
            group, _ = _split(pending, waiting)
            yield self._group_masks(group, upscale_size, decoded.size)

    def _autocast(self, reduced: bool = True) -> torch.autocast:
        return torch.autocast(self.sam.device.type, self.dtype, enabled=reduced and self.dtype != torch.float32)

    def encode(self, photos: Iterable[Upload]) -> Iterator[Tensor]:
        """The embeddings of photos, float32 (B, D, e, e), see :func:`pro2sam_fast.predictor.encode_resized`; a pass at
        a time, as they are asked for."""
        photos = iter(photos)
        while chosen := list(itertools.islice(photos, photos_per_pass(self.sam.device))):
            with self._autocast(getattr(self.sam.image_encoder, "reduced_precision", True)):
                embeddings = encode_resized(self.sam, chosen)
            yield embeddings.float()

    def _decode(self, embedding: Tensor, image_pe: Tensor, coords: Tensor) -> DecodedTokens:
        sparse, dense = _embedded(self.sam.prompt_encoder, coords)

        def decode(start: int, stop: int) -> DecodedTokens:
            # one dense embedding for all prompts: no mask input
            return self.sam.mask_decoder.decode_tokens(embedding, image_pe, sparse[start:stop], dense[:1])

        with self._autocast():
            parts = in_chunks(decode, len(sparse), len(sparse))
        *columns, sizes = zip(*parts, strict=True)
        return DecodedTokens(*map(joined, columns), sizes[0])

    def _group_masks(
        self, group: tuple[Tensor, ...], group_size: int, embedding_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        # of prompts one of whose masks is wanted: their indices (n,), IoU (n, 3) and what they are upscaled from
        index, iou, tokens, image = group
        fill = _filled(torch.arange(len(index), device=index.device), group_size)

        def upscale(start: int, stop: int) -> Tensor:
            part = fill[start:stop]
            decoded = DecodedTokens(tokens[part], image[part], iou[part], embedding_size)
            return self.sam.mask_decoder.upscale(decoded, slice(1, None))

        with self._autocast():
            low_res = joined(in_chunks(upscale, group_size, group_size))
        wanted = self._wanted(iou)
        return index[:, None].expand_as(iou)[wanted], low_res[: len(index)].float()[wanted], iou[wanted], len(index)


def _embedded(encoder: PromptEncoder, coords: Tensor) -> tuple[Tensor, Tensor]:
    labels = torch.ones(len(coords), 1, dtype=torch.int32, device=coords.device)
    # Fourier features always in full precision
    return encoder(points=(coords.unsqueeze(1), labels), boxes=None, masks=None)


def _point_tokens(encoder: PromptEncoder, grid: GridDecoder, coords: Tensor, *bases: Tensor) -> DecodedGrid:
    # of points (G, 2) on one image: from a group of prompts on, so that it doesn't matter how many others there are
    size = grid.prompts_per_group
    groups = torch.arange(len(coords), device=coords.device).split(size)
    sparse = joined([_embedded(encoder, coords[_filled(group, size)])[0][: len(group)] for group in groups])
    return grid.tokens(ImageBases(*bases), sparse)


def _image_tokens(tokens: Callable[..., DecodedGrid], bases: ImageBases, image: int, coords: Tensor) -> DecodedGrid:
    own = [x[image : image + 1] for x in bases]
    decoded = _joined(in_chunks(lambda start, stop: tokens(coords[start:stop], *own), len(coords), len(coords)))
    return decoded._replace(image=torch.full_like(decoded.image, image))


def _joined(parts: list[DecodedGrid]) -> DecodedGrid:
    return DecodedGrid(*map(joined, zip(*parts, strict=True)))


def _filled(index: Tensor, size: int) -> Tensor:
    # (n,) -> (size,), the last entry repeated
    return torch.cat([index, index[-1:].expand(size - len(index))])


def _split(parts: list[tuple[Tensor, ...]], count: int) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, ...]]]:
    columns = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    return tuple(x[:count] for x in columns), [tuple(x[count:] for x in columns)]
