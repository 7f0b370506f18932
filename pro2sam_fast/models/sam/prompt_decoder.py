"""Masks of any prompts on images that are already encoded, by the decoder that serves them best."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ...memory import in_chunks, items_per_chunk, joined
from ...ops.decode_sweeps import fast_operands
from ..cache import state_of
from .grid_decoder import GridDecoder, ImageBases
from .sam import Sam

__all__ = ["PromptDecoder"]

# A single prompt waits for the token work of a group; larger groups cost less per prompt.
_PROMPTS_PER_GROUP = 8
# A single prompt of more tokens is slower than with the mask decoder (many at once would still be three times as fast).
_MOST_PROMPT_TOKENS = 17
# 27 MB each of a ViT's
_MOST_BASES = 16


class PromptDecoder:
    """Low-resolution masks and IoU of points, boxes and masks.

    In float32 on a CPU `GridDecoder` does the work, for models that it knows and prompts of up to 17 tokens: the first
    prompt on an image costs as much as with the mask decoder, every other one half or less, and no result depends on
    how many prompts are decoded together. In all other cases it is the mask decoder.

    Args:
        sam: the model; changes to its parameters count.
    """

    def __init__(self, sam: Sam) -> None:
        self.sam = sam
        self._grid: GridDecoder | None = None
        self._grid_state: tuple | None = None
        self.forget()

    def forget(self) -> None:
        """Drops what is kept of images."""
        self._images: tuple[Tensor, tuple[int, int]] | None = None
        self._bases: dict[int, ImageBases] = {}

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor,
        index: int,
        points: tuple[Tensor, Tensor] | None,
        boxes: Tensor | None,
        masks: Tensor | None,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Decodes B prompts on one image.

        Args:
            images: float (n, D, e, e) embeddings, of which something is kept until others are given.
            index: which of the images.
            points, boxes, masks: as for :class:`PromptEncoder`.
            multimask_output: as for :class:`MaskDecoder`.

        Returns:
            Logits (B, 3 or 1, 4e, 4e), predicted IoU (B, 3 or 1).
        """
        encoder, decoder = self.sam.prompt_encoder, self.sam.mask_decoder
        counts = {len(x) for x in (*(points or ()), boxes, masks) if x is not None} or {1}
        grid = self._grid_decoder(images) if len(counts) == 1 and 0 not in counts else None
        if grid is not None:
            sparse = self._sparse(points, boxes, *counts)
            if sparse.shape[1] <= _MOST_PROMPT_TOKENS:
                chosen = slice(1, None) if multimask_output else slice(1)
                return self._decode(grid, images, index, sparse, masks, chosen)
        sparse, dense = encoder(points, boxes, masks)
        return decoder(images[index : index + 1], encoder.get_dense_pe(), sparse, dense, multimask_output)

    def _sparse(self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, count: int) -> Tensor:
        """Tokens (count, n, D) of the prompts, like everything else in groups of a fixed size."""
        groups = []
        for start in range(0, count, _PROMPTS_PER_GROUP):
            group = torch.arange(start, start + _PROMPTS_PER_GROUP).clamp(max=count - 1)
            part = None if points is None else tuple(x[group] for x in points), None if boxes is None else boxes[group]
            groups.append(self.sam.prompt_encoder(*part, None)[0].expand(len(group), -1, -1))
        return joined(groups)[:count]

    def _decode(
        self, grid: GridDecoder, images: Tensor, index: int, sparse: Tensor, masks: Tensor | None, chosen: slice
    ) -> tuple[Tensor, Tensor]:
        shared, size = self._bases_of(grid, images, index), len(sparse)
        if masks is not None:
            size = items_per_chunk(2 * sum(x.nbytes for x in shared))  # each image's, and then joined

        def decode(start: int, stop: int) -> tuple[Tensor, Tensor]:
            if masks is None:
                return grid.decode(shared, sparse[start:stop], None, chosen)
            bases = grid.masked_bases(shared, images[index : index + 1], masks[start:stop])
            return grid.decode(bases, sparse[start:stop], torch.arange(stop - start), chosen)

        iou, logits = map(joined, zip(*in_chunks(decode, len(sparse), size), strict=True))
        return logits, iou

    def _bases_of(self, grid: GridDecoder, images: Tensor, index: int) -> ImageBases:
        # the tensor itself is kept, so that no other one takes its address
        if self._images is None or self._images[0] is not images or self._images[1] != state_of(images):
            self._images, self._bases = (images, state_of(images)), {}
        if index not in self._bases:
            while len(self._bases) >= _MOST_BASES:
                self._bases.pop(next(iter(self._bases)))
            self._bases[index] = grid.bases(images[index : index + 1])
        return self._bases[index]

    def _grid_decoder(self, images: Tensor) -> GridDecoder | None:
        sam = self.sam
        floats = {x.dtype for x in (images, *sam.mask_decoder.parameters(), *sam.prompt_encoder.parameters())}
        if floats != {torch.float32} or images.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return None
        if fast_operands("cpu", torch.float32) is None or not GridDecoder.supports(sam):
            return None
        modules = sam.mask_decoder, sam.prompt_encoder
        state = tuple(map(state_of, itertools.chain.from_iterable((*m.parameters(), *m.buffers()) for m in modules)))
        if self._grid_state != state:
            self._grid, self._grid_state = GridDecoder(sam, prompts_per_group=_PROMPTS_PER_GROUP), state
            self.forget()
        return self._grid
