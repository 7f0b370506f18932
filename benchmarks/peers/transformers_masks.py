"""The mask-generation pipeline of `transformers` over our weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from case import Skip
from PIL import Image
from workloads import shared

__all__ = ["generator", "model"]

# our names (segment_anything's) -> those of transformers, in the order in which they are replaced
_RENAMED = (
    ("image_encoder.", "vision_encoder."),
    ("patch_embed.proj.", "patch_embed.projection."),
    (".blocks.", ".layers."),
    ("neck.0.", "neck.conv1."),
    ("neck.1.", "neck.layer_norm1."),
    ("neck.2.", "neck.conv2."),
    ("neck.3.", "neck.layer_norm2."),
    (".norm", ".layer_norm"),
    ("pe_layer.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
    ("point_embeddings.", "point_embed."),
    ("mask_downscaling.0.", "mask_embed.conv1."),
    ("mask_downscaling.1.", "mask_embed.layer_norm1."),
    ("mask_downscaling.3.", "mask_embed.conv2."),
    ("mask_downscaling.4.", "mask_embed.layer_norm2."),
    ("mask_downscaling.6.", "mask_embed.conv3."),
    ("output_upscaling.0.", "upscale_conv1."),
    ("output_upscaling.1.", "upscale_layer_norm."),
    ("output_upscaling.3.", "upscale_conv2."),
)
_PERCEPTRONS = ("output_hypernetworks_mlps.", "iou_prediction_head.")
_PERCEPTRON_LAYERS = ((".layers.0.", ".proj_in."), (".layers.1.", ".layers.0."), (".layers.2.", ".proj_out."))
_POSITIONS = "prompt_encoder.shared_embedding.positional_embedding"


def generator(
    name: str,
    device: torch.device,
    points_per_side: int = 32,
    min_mask_region_area: int = 0,
    **options,
) -> Callable[[np.ndarray], object] | Skip:
    """A call from an RGB photo to its masks, with the weights of `shared.sam(name)`, or why there is none."""
    if not name.startswith("vit_"):
        return Skip(f"its SAM has no image encoder for {name}")
    if min_mask_region_area:
        return Skip("it doesn't clean small regions as asked for")
    from transformers import SamImageProcessor, pipeline

    parts = {"model": model(name, device), "image_processor": SamImageProcessor()}
    pipe = pipeline("mask-generation", device=device, **parts)
    return lambda rgb: pipe(Image.fromarray(rgb), points_per_crop=points_per_side, **options)["masks"]


def model(name: str, device: torch.device):
    """transformers' SamModel with the weights of `shared.sam(name)`."""
    from transformers import SamConfig, SamModel

    sam = shared.sam(name, device)
    blocks = sam.image_encoder.blocks
    width = blocks[0].norm1.normalized_shape[0]
    vision = {
        "hidden_size": width,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "mlp_dim": blocks[0].mlp.lin1.out_features,
        "global_attn_indexes": [i for i, block in enumerate(blocks) if block.window_size == 0],
    }
    theirs = SamModel(SamConfig(vision_config=vision))
    state = {_renamed(key): value for key, value in sam.state_dict().items() if not key.startswith("pixel_")}
    state["shared_image_embedding.positional_embedding"] = state[_POSITIONS]
    theirs.load_state_dict(state, strict=True)
    return theirs.to(device).eval()


def _renamed(key: str) -> str:
    rules = _PERCEPTRON_LAYERS if any(part in key for part in _PERCEPTRONS) else ()
    for ours, theirs in (*_RENAMED, *rules):
        key = key.replace(ours, theirs)
    return key
