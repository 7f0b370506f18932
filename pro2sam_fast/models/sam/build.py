"""SAM by name: the three official ViT sizes, the bundled `lite`, and the way back to `segment_anything`."""

from __future__ import annotations

import copy
import os
import urllib.error
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import nn

from ...errors import CheckpointError, ConfigError
from ..checkpoints import load_into, load_state_dict
from .image_encoder import ImageEncoderViT
from .mask_decoder import MaskDecoder
from .prompt_encoder import PromptEncoder
from .sam import Sam
from .transformer import TwoWayTransformer

__all__ = ["build_sam", "build_vit_sam", "sam_model_registry", "to_segment_anything"]

# Kirillov et al. 2023, appendix A
_VIT = {
    "vit_b": {"embed_dim": 768, "depth": 12, "num_heads": 12, "global_attn_indexes": (2, 5, 8, 11)},
    "vit_l": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "global_attn_indexes": (5, 11, 17, 23)},
    "vit_h": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "global_attn_indexes": (7, 15, 23, 31)},
}

# The last part of each name is the start of the file's SHA-256.
OFFICIAL_URLS = {
    "vit_b": "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth",
    "vit_l": "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_l_0b3195.pth",
    "vit_h": "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth",
}


def build_sam(name: str, checkpoint: str | os.PathLike | None = None) -> Sam:
    """A SAM in evaluation mode on the CPU.

    Args:
        name: ``vit_b``, ``vit_l``, ``vit_h`` or ``lite``.
        checkpoint: a local `.pth` or `.safetensors` file with the official names; ``"official"`` downloads the
            official weights once into the torch hub cache and checks their hash; None leaves the ViT sizes with random
            weights and gives ``lite`` its bundled ones (so does ``"official"``).

    Raises:
        ConfigError: unknown name.
        CheckpointError: the weights can't be had, or do not fit.
    """
    if name == "lite":
        from .lite import build_sam_lite

        return build_sam_lite(None if checkpoint == "official" else checkpoint)
    if name not in _VIT:
        raise ConfigError(f"Unknown SAM {name!r}; choose one of {', '.join([*_VIT, 'lite'])}.")
    state_dict = None
    if checkpoint is not None:
        path = _download_official(name) if checkpoint == "official" else Path(checkpoint)
        state_dict = load_state_dict(path)
        _check_size(name, state_dict, path)
    sam = build_vit_sam(name=name, **_VIT[name])
    if state_dict is not None:
        load_into(sam, state_dict, path)
    return sam


sam_model_registry: dict[str, Callable[..., Sam]] = {name: partial(build_sam, name) for name in (*_VIT, "lite")}
sam_model_registry["default"] = sam_model_registry["vit_h"]


def build_vit_sam(
    *,
    embed_dim: int,
    depth: int,
    num_heads: int,
    global_attn_indexes: tuple[int, ...],
    window_size: int = 14,
    img_size: int = 1024,
    patch_size: int = 16,
    width: int = 256,
    decoder_mlp_dim: int = 2048,
    name: str = "custom",
) -> Sam:
    """A SAM with a ViT image encoder of any size and random weights, in evaluation mode.

    Args:
        embed_dim, depth, num_heads, global_attn_indexes, window_size, img_size, patch_size: of the image encoder.
        width: D of prompt encoder and mask decoder, a multiple of 16.
        decoder_mlp_dim: hidden width of the MLPs in the two-way transformer.
        name: kept as ``Sam.name``.
    """
    grid = img_size // patch_size
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            out_chans=width,
            window_size=window_size,
            global_attn_indexes=global_attn_indexes,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=width,
            image_embedding_size=(grid, grid),
            input_image_size=(img_size, img_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=width,
            transformer=TwoWayTransformer(depth=2, embedding_dim=width, num_heads=8, mlp_dim=decoder_mlp_dim),
        ),
        name=name,
    ).eval()


def _check_size(name: str, state_dict: dict[str, torch.Tensor], path: Path) -> None:
    # A file of another size is told by the width of its patch embedding, before a model is built.
    weight = state_dict.get("image_encoder.patch_embed.proj.weight")
    if weight is None or weight.ndim != 4 or weight.shape[0] == _VIT[name]["embed_dim"]:
        return
    other = next((n for n, config in _VIT.items() if config["embed_dim"] == weight.shape[0]), None)
    if other is not None:
        raise CheckpointError(f"Checkpoint {path} belongs to {other}, not to {name}; build {other} with it.")


def _download_official(name: str) -> Path:
    url = OFFICIAL_URLS[name]
    file_name = Path(urlparse(url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if path.is_file():
        return path
    hash_prefix = path.stem.rsplit("_", 1)[1]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # into a temporary file beside it, hashed, then renamed
        torch.hub.download_url_to_file(url, str(path), hash_prefix=hash_prefix, progress=True)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise CheckpointError(
            f"The weights of {name} could not be downloaded from {url} ({getattr(error, 'reason', error)}); "
            f"check the network, or download the file elsewhere and pass its path as checkpoint."
        ) from error
    except RuntimeError as error:
        raise CheckpointError(
            f"The file downloaded from {url} is not the official one (its SHA-256 does not start with {hash_prefix}); "
            "try again or pass a local file as checkpoint."
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"The weights of {name} could not be stored as {path} ({error.strerror or error}); "
            "free some space or set TORCH_HOME to another folder."
        ) from error
    return path


def to_segment_anything(sam: Sam) -> nn.Module:
    """The same model made of the `segment_anything` package's own modules, with copies of the weights.

    An image encoder that package does not have (`lite`) is used as it is, as a copy.

    Returns:
        A `segment_anything.modeling.Sam` on the device of ``sam``, in evaluation mode.

    Raises:
        ConfigError: the package `segment_anything` is not installed.
    """
    try:
        from segment_anything import modeling
    except ImportError as error:
        raise ConfigError(
            "to_segment_anything needs the package segment_anything; install it with `pip install segment-anything`."
        ) from error
    prompt, decoder = sam.prompt_encoder, sam.mask_decoder
    attention = decoder.transformer.final_attn_token_to_image
    iou_head = decoder.iou_prediction_head.layers
    theirs = modeling.Sam(
        image_encoder=_their_image_encoder(sam.image_encoder, modeling),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=prompt.embed_dim,
            image_embedding_size=prompt.image_embedding_size,
            input_image_size=prompt.input_image_size,
            mask_in_chans=prompt.mask_downscaling[3].out_channels,
        ),
        mask_decoder=modeling.MaskDecoder(
            num_multimask_outputs=decoder.num_multimask_outputs,
            transformer=modeling.TwoWayTransformer(
                depth=len(decoder.transformer.layers),
                embedding_dim=decoder.transformer_dim,
                num_heads=attention.num_heads,
                mlp_dim=decoder.transformer.layers[0].mlp.lin1.out_features,
                attention_downsample_rate=decoder.transformer_dim // attention.internal_dim,
            ),
            transformer_dim=decoder.transformer_dim,
            iou_head_depth=len(iou_head),
            iou_head_hidden_dim=iou_head[0].out_features,
        ),
        pixel_mean=sam.pixel_mean.flatten().tolist(),
        pixel_std=sam.pixel_std.flatten().tolist(),
    )
    theirs.mask_threshold = sam.mask_threshold
    theirs.image_format = sam.image_format
    theirs.load_state_dict(sam.state_dict(), strict=True)
    return theirs.to(sam.device).eval()


def _their_image_encoder(encoder: nn.Module, modeling) -> nn.Module:
    if not isinstance(encoder, ImageEncoderViT):
        return copy.deepcopy(encoder)
    first = encoder.blocks[0]
    width = first.norm1.normalized_shape[0]
    return modeling.ImageEncoderViT(
        img_size=encoder.img_size,
        patch_size=encoder.patch_embed.proj.kernel_size[0],
        in_chans=encoder.patch_embed.proj.in_channels,
        embed_dim=width,
        depth=len(encoder.blocks),
        num_heads=first.attn.num_heads,
        mlp_ratio=first.mlp.lin1.out_features / width,
        out_chans=encoder.neck[0].out_channels,
        qkv_bias=first.attn.qkv.bias is not None,
        norm_layer=partial(nn.LayerNorm, eps=first.norm1.eps),
        act_layer=type(first.mlp.act),
        use_rel_pos=first.attn.use_rel_pos,
        window_size=max(block.window_size for block in encoder.blocks),
        global_attn_indexes=tuple(i for i, block in enumerate(encoder.blocks) if block.window_size == 0),
    )
