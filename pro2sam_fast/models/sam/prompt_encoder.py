"""Prompt encoder of SAM (Kirillov et al. 2023, appendix A): points, boxes and mask inputs become embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..cache import state_of
from .layers import LayerNorm2d


class PositionEmbeddingRandom(nn.Module):
    """Fourier features of coordinates with a fixed random 2 x F matrix (a buffer of the checkpoint)."""

    def __init__(self, num_pos_feats: int = 64, scale: float | None = None) -> None:
        super().__init__()
        scale = 1.0 if scale is None or scale <= 0.0 else scale
        self.register_buffer("positional_encoding_gaussian_matrix", scale * torch.randn(2, num_pos_feats))

    def encode(self, coords: Tensor) -> Tensor:
        """coords (..., 2) as (x, y) in [0, 1] -> (..., 2F): all sines, then all cosines, of 2*pi*(2c-1)F."""
        matrix = self.positional_encoding_gaussian_matrix
        angle = (2 * math.pi) * ((2 * coords.to(matrix.dtype) - 1) @ matrix)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    def forward(self, size: tuple[int, int]) -> Tensor:
        """Encoding of the pixel centres of an (h, w) grid -> (2F, h, w)."""
        h, w = size
        matrix = self.positional_encoding_gaussian_matrix
        y = (torch.arange(h, device=matrix.device, dtype=torch.float32) + 0.5) / h
        x = (torch.arange(w, device=matrix.device, dtype=torch.float32) + 0.5) / w
        grid = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1)
        return self.encode(grid).permute(2, 0, 1)

    def forward_with_coords(self, coords: Tensor, image_size: tuple[int, int]) -> Tensor:
        """coords (..., 2) as (x, y) in pixels of the (h, w) input frame -> (..., 2F).

        Divided in the dtype that arrives and rounded once to the matrix's.
        """
        coords = torch.stack([coords[..., 0] / image_size[1], coords[..., 1] / image_size[0]], dim=-1)
        return self.encode(coords)


class PromptEncoder(nn.Module):
    """Points, boxes, masks -> sparse (B, T, D) and dense (B, D, h, w) embeddings.

    Args:
        embed_dim: width D.
        image_embedding_size: (h, w) of the image embedding.
        input_image_size: (H, W) of the padded input frame in which coordinates are given.
        mask_in_chans: hidden channels of the mask-input path.
        activation: activation of the mask-input path.
    """

    def __init__(
        self,
        embed_dim: int,
        image_embedding_size: tuple[int, int],
        input_image_size: tuple[int, int],
        mask_in_chans: int,
        activation: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.input_image_size = input_image_size
        self.image_embedding_size = image_embedding_size
        self.pe_layer = PositionEmbeddingRandom(embed_dim // 2)
        self._dense_pe: tuple[tuple, Tensor] | None = None  # what it was computed from, the encoding
        self.num_point_embeddings = 4
        # negative point, positive point, top-left corner, bottom-right corner
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, embed_dim) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, embed_dim)
        self.mask_input_size = (4 * image_embedding_size[0], 4 * image_embedding_size[1])
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_in_chans // 4, kernel_size=2, stride=2),
            LayerNorm2d(mask_in_chans // 4),
            activation(),
            nn.Conv2d(mask_in_chans // 4, mask_in_chans, kernel_size=2, stride=2),
            LayerNorm2d(mask_in_chans),
            activation(),
            nn.Conv2d(mask_in_chans, embed_dim, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, embed_dim)

    def get_dense_pe(self) -> Tensor:
        """Positional encoding of the image embedding's pixels: (1, D, h, w); computed once, so not to be written."""
        if torch.compiler.is_compiling():
            return self.pe_layer(self.image_embedding_size).unsqueeze(0)
        matrix = self.pe_layer.positional_encoding_gaussian_matrix
        state = state_of(matrix), matrix.device, matrix.dtype
        if self._dense_pe is None or self._dense_pe[0] != state:
            with torch.inference_mode(False), torch.no_grad():  # also for training, whoever comes first
                self._dense_pe = state, self.pe_layer(self.image_embedding_size).unsqueeze(0)
        return self._dense_pe[1]

    def embed_points(
        self, points: Tensor, labels: Tensor, pad: bool, input_size: tuple[int, int] | None = None
    ) -> Tensor:
        """Points (B, N, 2), labels (B, N) -> (B, N, D), or (B, N + 1, D) with ``pad``, in an (H, W) frame."""
        points = points + 0.5
        if pad:
            points = torch.cat([points, points.new_zeros(points.shape[0], 1, 2)], dim=1)
            labels = torch.cat([labels, -labels.new_ones(labels.shape[0], 1)], dim=1)
        embedding = self.pe_layer.forward_with_coords(points, input_size or self.input_image_size)
        labels = labels.unsqueeze(-1)
        # label -1 is no position at all: the encoding is replaced, not shifted
        embedding = torch.where(labels == -1, self.not_a_point_embed.weight, embedding)
        embedding = embedding + (labels == 0) * self.point_embeddings[0].weight
        return embedding + (labels == 1) * self.point_embeddings[1].weight

    def embed_boxes(self, boxes: Tensor, input_size: tuple[int, int] | None = None) -> Tensor:
        """Boxes (B, 4) -> their two corners (B, 2, D), in an (H, W) frame."""
        corners = (boxes + 0.5).reshape(-1, 2, 2)
        embedding = self.pe_layer.forward_with_coords(corners, input_size or self.input_image_size)
        return embedding + torch.stack([self.point_embeddings[2].weight, self.point_embeddings[3].weight], dim=1)

    def _embed_masks(self, masks: Tensor) -> Tensor:
        return self.mask_downscaling(masks)

    def forward(
        self,
        points: tuple[Tensor, Tensor] | None,
        boxes: Tensor | None,
        masks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Embeds a batch of prompts.

        Args:
            points: coordinates (B, N, 2) as (x, y) in input-frame pixels and labels (B, N): 1 foreground,
                0 background, -1 padding.
            boxes: (B, 4) as (x0, y0, x1, y1) in input-frame pixels.
            masks: (B, 1, 4h, 4w) mask logits.

        Returns:
            Sparse embeddings (B, T, D), points first and then corners, and dense embeddings (B, D, h, w).
        """
        batch = 1
        sparse = []
        if points is not None:
            batch = points[0].shape[0]
            sparse.append(self.embed_points(*points, pad=boxes is None))
        if boxes is not None:
            batch = boxes.shape[0]
            sparse.append(self.embed_boxes(boxes))
        if masks is not None:
            batch = masks.shape[0] if not sparse else batch
            dense = self._embed_masks(masks)
        else:
            dense = self.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(batch, -1, *self.image_embedding_size)
        if not sparse:
            sparse.append(self.no_mask_embed.weight.new_empty(batch, 0, self.embed_dim))
        return torch.cat(sparse, dim=1), dense
