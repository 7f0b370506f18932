"""Mask decoder of SAM (Kirillov et al. 2023, appendix A).

The work is in two halves, so that a caller can look at the predicted IoU before it pays for masks:
:meth:`MaskDecoder.decode_tokens` (tokens, image, IoU) and :meth:`MaskDecoder.upscale` (low-resolution logits).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import MLP, LayerNorm2d


class DecodedTokens(NamedTuple):
    """What the transformer made of B prompts.

    mask_tokens: (B, M, D) output tokens of the M masks. image: (B, h*w, D) image as seen by each prompt.
    iou: (B, M) predicted IoU. size: (h, w).
    """

    mask_tokens: Tensor
    image: Tensor
    iou: Tensor
    size: tuple[int, int]


class MaskDecoder(nn.Module):
    """Predicts masks and their IoU from image and prompt embeddings.

    Args:
        transformer_dim: width D.
        transformer: the two-way transformer.
        num_multimask_outputs: masks offered for an ambiguous prompt (mask 0 is the single-mask output besides them).
        iou_head_depth, iou_head_hidden_dim: shape of the IoU head.
    """

    # On a GPU: tokens of point prompts on an image are made by replays of a CUDA graph, see `decoding`.
    cuda_graphs = True

    def __init__(
        self,
        *,
        transformer_dim: int,
        transformer: nn.Module,
        num_multimask_outputs: int = 3,
        activation: type[nn.Module] = nn.GELU,
        iou_head_depth: int = 3,
        iou_head_hidden_dim: int = 256,
    ) -> None:
        super().__init__()
        d = transformer_dim
        self.transformer_dim = d
        self.transformer = transformer
        self.num_multimask_outputs = num_multimask_outputs
        self.num_mask_tokens = num_multimask_outputs + 1
        self.iou_token = nn.Embedding(1, d)
        self.mask_tokens = nn.Embedding(self.num_mask_tokens, d)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(d, d // 4, kernel_size=2, stride=2),
            LayerNorm2d(d // 4),
            activation(),
            nn.ConvTranspose2d(d // 4, d // 8, kernel_size=2, stride=2),
            activation(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(d, d, d // 8, 3) for _ in range(self.num_mask_tokens))
        self.iou_prediction_head = MLP(d, iou_head_hidden_dim, self.num_mask_tokens, iou_head_depth)

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Low-resolution mask logits and predicted IoU.

        Args:
            image_embeddings: (1, D, h, w), or (Bi, D, h, w) with the prompts grouped by image, B / Bi each.
            image_pe: (1, D, h, w) from :meth:`PromptEncoder.get_dense_pe`.
            sparse_prompt_embeddings: (B, T, D).
            dense_prompt_embeddings: (B, D, h, w), or (1, D, h, w) where it is the same for all prompts.
            multimask_output: masks 1..3 for an ambiguous prompt; else mask 0 alone.

        Returns:
            Logits (B, 3 or 1, 4h, 4w), predicted IoU (B, 3 or 1).
        """
        decoded = self.decode_tokens(image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings)
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        return self.upscale(decoded, chosen), decoded.iou[:, chosen]

    def decode_tokens(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
    ) -> DecodedTokens:
        """The transformer and the IoU head, without any mask. Arguments as in :meth:`forward`."""
        batch = sparse_prompt_embeddings.shape[0]
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight], dim=0)
        tokens = torch.cat([output_tokens.expand(batch, -1, -1), sparse_prompt_embeddings], dim=1)
        images, dense = image_embeddings.shape[0], dense_prompt_embeddings.shape[0]
        if dense not in (1, images) and images != 1:
            image_embeddings = image_embeddings.repeat_interleave(dense // images, dim=0)
        hs, keys = self.transformer(image_embeddings + dense_prompt_embeddings, image_pe, tokens)
        return DecodedTokens(
            mask_tokens=hs[:, 1 : 1 + self.num_mask_tokens],
            image=keys,
            iou=self.iou_prediction_head(hs[:, 0]),
            size=tuple(image_embeddings.shape[-2:]),
        )

    def upscale(self, decoded: DecodedTokens, masks: slice = slice(None)) -> Tensor:
        """Low-resolution logits (B, len(masks), 4h, 4w) of the chosen mask tokens.

        The stride-2 transposed convolutions with kernel 2 do not overlap, so each is one matrix product per pixel:
        every pixel of the image embedding makes its own 4 x 4 block of every mask.
        """
        deconv1, norm, act1, deconv2, act2 = self.output_upscaling
        h, w = decoded.size
        # (B, P, D) -> (B, P, 2*2, D/4): column order sub-pixel row, sub-pixel column, channel
        x = F.linear(decoded.image, deconv1.weight.permute(2, 3, 1, 0).flatten(0, 2), deconv1.bias.repeat(4))
        x = x.unflatten(-1, (4, -1))
        x = act1(F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps))
        # -> (B, P, 4, 4, D/8)
        x = F.linear(x, deconv2.weight.permute(2, 3, 1, 0).flatten(0, 2), deconv2.bias.repeat(4))
        x = act2(x.unflatten(-1, (4, -1)))
        tokens = decoded.mask_tokens[:, masks]
        mlps = list(self.output_hypernetworks_mlps)[masks]
        hyper = torch.stack([mlp(tokens[:, i]) for i, mlp in enumerate(mlps)], dim=1)
        # (B, m, D/8) x (B, P*16, D/8) -> (B, m, P*16)
        logits = hyper @ x.flatten(1, 3).transpose(1, 2)
        # (B, m, h, w, i, j, k, l) -> rows h,i,k and columns w,j,l
        logits = logits.reshape(-1, tokens.shape[1], h, w, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
        return logits.reshape(-1, tokens.shape[1], 4 * h, 4 * w)
