"""Low-resolution masks of many point prompts on one photo, a group at a time."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .decoding_ahead import MasksAhead, OutOfRangeError, masks_ahead
from .memory import in_chunks, joined
from .models.sam import DecodedTokens, GridDecoder, Sam
from .models.sam.grid_decoder import DecodedGrid, ImageBases
from .ops.decode_sweeps import fast_operands
from .predictor import encode_images, photos_per_pass
from .transforms import ResizeLongestSide

__all__ = ["PointDecoder"]

# Matrix products of different sizes round differently, so prompts are decoded and masks upscaled in groups of a fixed
# size (the last one filled up with copies): a mask does not depend on how many others are asked for with it.
_PROMPTS_PER_GRID = {"cpu": 64}
_PROMPTS_PER_GRID_ELSEWHERE = 256
_PROMPTS_AHEAD = 1024  # whose tokens are made before the first masks, 48 KiB of results each
_PROMPTS_PER_DECODE = {"cpu": 16}
_PROMPTS_PER_UPSCALE = {"cpu": 8}
_PROMPTS_PER_GROUP_ELSEWHERE = 64


@dataclass(frozen=True)
class PointDecoder:
    """Low-resolution masks of point prompts: by `GridDecoder`, where it knows the model and has fast kernels, else by
    the mask decoder in groups of fixed size."""

    sam: Sam
    dtype: torch.dtype
    pred_iou_thresh: float

    def __call__(self, embedding: Tensor, coords: Tensor, points_per_batch: int) -> Iterator[tuple[Tensor, ...]]:
        """Masks that pass the filter by predicted IoU, in order, in groups of up to ``points_per_batch`` prompts (more
        where the groups are fixed).

        Args:
            embedding: (1, D, e, e).
            coords: float64 (G, 2) in the input frame.

        Yields:
            Indices (K,) of their prompts, logits (K, 4e, 4e), IoU (K,), and how many prompts these are.
        """
        if self._grid is not None:
            decode = self._decode_grid if embedding.device.type == "cpu" else self._decode_ahead
            yield from decode(embedding, coords, points_per_batch)
            return
        for index, low_res, iou in self._decode_groups(embedding, coords):
            keep = self._wanted(iou)
            prompts = index[:, None].expand_as(iou)
            yield prompts[keep], low_res[keep], iou[keep], len(index)

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

    def _sparse(self, coords: Tensor) -> tuple[Tensor, Tensor]:
        labels = torch.ones(len(coords), 1, dtype=torch.int32, device=coords.device)
        # Fourier features always in full precision
        return self.sam.prompt_encoder(points=(coords.unsqueeze(1), labels), boxes=None, masks=None)

    def _decode_grid(self, embedding: Tensor, coords: Tensor, points_per_batch: int) -> Iterator[tuple[Tensor, ...]]:
        bases = self._grid.bases(embedding)
        for start in range(0, len(coords), self._grid.prompts_per_group):
            index = torch.arange(start, min(start + self._grid.prompts_per_group, len(coords)))
            sparse, _ = self._sparse(coords[_filled(index, self._grid.prompts_per_group)])
            decoded = self._grid_tokens(self._grid, bases, sparse[: len(index)])
            keep = self._wanted(decoded.iou)
            keep[:, 0] = False
            alive = keep.any(dim=1).nonzero().squeeze(1)
            for part in alive.split(points_per_batch) if len(alive) else ():  # nothing splits into one empty part
                chosen, wanted = decoded.select(part), keep[part]
                prompts = index[part].repeat_interleave(wanted.sum(dim=1))
                yield prompts, self._grid_masks(bases, chosen, wanted), chosen.iou[wanted], len(part)

    def _decode_ahead(self, embedding: Tensor, coords: Tensor, points_per_batch: int) -> Iterator[tuple[Tensor, ...]]:
        grid, done = self._grid, 0
        while done < len(coords):
            try:
                for masks in self._ahead(grid, embedding, coords, done, points_per_batch):
                    done = masks.stop
                    yield masks[1:]
                return
            except OutOfRangeError:
                warnings.warn("numbers beyond float16: masks are decoded with bfloat16", RuntimeWarning, stacklevel=2)
                grid = self._wide_grid

    def _ahead(
        self, grid: GridDecoder, embedding: Tensor, coords: Tensor, start: int, points_per_batch: int
    ) -> Iterator[MasksAhead]:
        # of the prompts from `start` on
        bases = grid.bases(embedding)
        for first in range(start, len(coords), _PROMPTS_AHEAD):
            index = torch.arange(first, min(first + _PROMPTS_AHEAD, len(coords)), device=coords.device)
            groups = index.split(grid.prompts_per_group)
            sparse = [self._sparse(coords[_filled(group, grid.prompts_per_group)])[0][: len(group)] for group in groups]
            decoded = self._grid_tokens(grid, bases, joined(sparse))
            keep = self._wanted(decoded.iou)
            keep[:, 0] = False
            for masks in masks_ahead(grid, bases, decoded, keep, points_per_batch):
                yield masks._replace(stop=first + masks.stop, prompts=first + masks.prompts)

    def _grid_tokens(self, grid: GridDecoder, bases: ImageBases, sparse: Tensor) -> DecodedGrid:
        parts = in_chunks(lambda a, b: grid.tokens(bases, sparse[a:b]), len(sparse), len(sparse))
        return DecodedGrid(*map(joined, zip(*parts, strict=True)))

    def _grid_masks(self, bases: ImageBases, decoded: DecodedGrid, wanted: Tensor) -> Tensor:
        def upscale(start: int, stop: int) -> Tensor:
            return self._grid.upscale(bases, decoded.select(slice(start, stop)), wanted[start:stop])

        return joined(in_chunks(upscale, len(wanted), len(wanted)))

    def _decode_groups(self, embedding: Tensor, coords: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Groups of surviving prompts: their indices (n,), logits (n, 3, 4e, 4e), IoU (n, 3). A prompt survives if one
        of its masks may."""
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
                yield self._upscale(group, upscale_size, decoded.size)
        if waiting:
            group, _ = _split(pending, waiting)
            yield self._upscale(group, upscale_size, decoded.size)

    def _autocast(self, reduced: bool = True) -> torch.autocast:
        return torch.autocast(self.sam.device.type, self.dtype, enabled=reduced and self.dtype != torch.float32)

    def encode(
        self, images: Iterable[np.ndarray], transform: ResizeLongestSide
    ) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """The embedding, float32 (1, D, e, e), and input size of each photo, see
        :func:`pro2sam_fast.predictor.encode_images`; a pass at a time, as they are asked for."""
        images = iter(images)
        while photos := list(itertools.islice(images, photos_per_pass(self.sam.device))):
            with self._autocast(getattr(self.sam.image_encoder, "reduced_precision", True)):
                embeddings, input_sizes = encode_images(self.sam, photos, transform)
            yield from zip(embeddings.float().split(1), input_sizes, strict=True)

    def _decode(self, embedding: Tensor, image_pe: Tensor, coords: Tensor) -> DecodedTokens:
        sparse, dense = self._sparse(coords)

        def decode(start: int, stop: int) -> DecodedTokens:
            # one dense embedding for all prompts: no mask input
            return self.sam.mask_decoder.decode_tokens(embedding, image_pe, sparse[start:stop], dense[:1])

        with self._autocast():
            parts = in_chunks(decode, len(sparse), len(sparse))
        *columns, sizes = zip(*parts, strict=True)
        return DecodedTokens(*map(joined, columns), sizes[0])

    def _upscale(
        self, group: tuple[Tensor, ...], group_size: int, embedding_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        index, iou, tokens, image = group
        fill = _filled(torch.arange(len(index), device=index.device), group_size)

        def upscale(start: int, stop: int) -> Tensor:
            part = fill[start:stop]
            decoded = DecodedTokens(tokens[part], image[part], iou[part], embedding_size)
            return self.sam.mask_decoder.upscale(decoded, slice(1, None))

        with self._autocast():
            low_res = joined(in_chunks(upscale, group_size, group_size))
        return index, low_res[: len(index)].float(), iou


def _filled(index: Tensor, size: int) -> Tensor:
    # (n,) -> (size,), the last entry repeated
    return torch.cat([index, index[-1:].expand(size - len(index))])


def _split(parts: list[tuple[Tensor, ...]], count: int) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, ...]]]:
    columns = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    return tuple(x[:count] for x in columns), [tuple(x[count:] for x in columns)]
