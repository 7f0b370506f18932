"""The package `segment_anything` (Kirillov et al. 2023) with the weights of `shared.sam`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from workloads.shared import original

from pro2sam_fast.postprocess import Frame

__all__ = ["decode", "filtered", "generator", "measured", "predictor"]

POINTS_PER_BATCH = 64  # its default; three masks each


def generator(name: str, device: torch.device, **options: object):
    """Its SamAutomaticMaskGenerator over the weights of `shared.sam(name)`."""
    from segment_anything import SamAutomaticMaskGenerator

    return SamAutomaticMaskGenerator(original(name, device), **options)


def predictor(name: str, device: torch.device):
    """Its SamPredictor over the weights of `shared.sam(name)`."""
    from segment_anything import SamPredictor

    return SamPredictor(original(name, device))


@torch.no_grad()
def decode(model, embedding: Tensor, coords: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (n, 3, 4e, 4e) and IoU (n, 3) of point prompts, as its generator decodes them.

    Args:
        model: its Sam.
        embedding: (1, D, e, e). coords: (G, 2) in the input frame.
    """
    for batch in coords.split(POINTS_PER_BATCH):
        labels = torch.ones(len(batch), 1, dtype=torch.int, device=batch.device)
        sparse, dense = model.prompt_encoder(points=(batch[:, None], labels), boxes=None, masks=None)
        yield model.mask_decoder(
            image_embeddings=embedding,
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )


@torch.no_grad()
def measured(model, low_res: Tensor, frame: Frame, offset: float, threshold: float) -> list[tuple[Tensor, Tensor]]:
    """Stability scores and boxes of the stable masks, as its generator finds them, one batch of points at a time.

    Args:
        low_res: (K, 4e, 4e) logits. frame: of the whole photo.
        offset: shift of the cutoff for the stability score. threshold: least score kept.
    """
    from segment_anything.utils.amg import batched_mask_to_box, calculate_stability_score

    found = []
    for part in low_res.split(3 * POINTS_PER_BATCH):
        logits = model.postprocess_masks(part[:, None], frame.input_size, frame.image_size)[:, 0]
        score = calculate_stability_score(logits, model.mask_threshold, offset)
        keep = score >= threshold
        found.append((score[keep], batched_mask_to_box(logits[keep] > model.mask_threshold)))
    return found


def filtered(logits: Tensor, iou: Tensor, points: np.ndarray, threshold: float):
    """Its MaskData after the filter by predicted IoU: logits (K, H, W), IoU (K,), points (K, 2)."""
    from segment_anything.utils.amg import MaskData

    data = MaskData(masks=logits, iou_preds=iou, points=torch.as_tensor(points))
    data.filter(data["iou_preds"] > threshold)
    return data
