"""Reading DeiT, Pro2SAM and SAT checkpoints and renaming their keys to ours. Knows tensors and names, not the model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .checkpoints import read_file

__all__ = ["ARCHS", "convert_official", "copy_deit", "download_deit", "read_state_dict"]

ARCHS: dict[str, dict] = {
    "deit_tiny": {"embed_dim": 192, "num_heads": 3, "depth": 12, "mlp_ratio": 4.0},
    "deit_small": {"embed_dim": 384, "num_heads": 6, "depth": 12, "mlp_ratio": 4.0},
    "deit_base": {"embed_dim": 768, "num_heads": 12, "depth": 12, "mlp_ratio": 4.0},
}

NOT_IN_DEIT = {"head.weight", "head.bias", "query_pos", "query_token", "query_embed.weight", "query_embed.bias"}


def read_state_dict(source: str | os.PathLike | Mapping) -> tuple[dict[str, Tensor], dict, str]:
    """State dict of a checkpoint file or its loaded content, without running code from the file.

    Args:
        source: path of a `.safetensors` or PyTorch file (zip or legacy), or a mapping; `{"model": state_dict, ...}` is
            unwrapped and the prefix `module.` of data-parallel wrappers is dropped.

    Returns:
        The state dict on the CPU, the other entries of a wrapped checkpoint, and a name for error messages.

    Raises:
        CheckpointError: missing or corrupt file, content that isn't a dictionary of named tensors.
    """
    if isinstance(source, Mapping):
        content, name = source, "the given state dict"
    else:
        name = os.fspath(source)
        content = _read_file(name)
    info = {}
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        info = {key: value for key, value in content.items() if key != "model"}
        content = content["model"]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{name} doesn't hold a state dict")
    state = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{name} doesn't hold a state dict: entry {key!r} isn't a named tensor")
        key = key.removeprefix("module.")
        if key in state:
            raise CheckpointError(f"{name} holds {key} twice")
        state[key] = value.detach()
    return state, info, name


def _read_file(path: str) -> object:
    if not os.path.isfile(path):
        raise CheckpointError(f"checkpoint {path} doesn't exist or isn't a file")
    try:
        return read_file(path)
    except Exception as error:  # a hostile or damaged file can fail anywhere inside the reader
        reason = "is damaged or holds objects other than tensors and plain values"
        if isinstance(error, OSError):
            reason = f"can't be read ({error.strerror or type(error).__name__})"
        raise CheckpointError(f"checkpoint {path} {reason}") from error


def convert_official(state: Mapping[str, Tensor], name: str) -> tuple[str, dict, dict[str, Tensor]]:
    """Rename a state dict of the released Pro2SAM or SAT code.

    Returns:
        The arch; the fields of `GTFormerConfig` that the shapes decide (`num_classes`, `num_query_tokens`,
        `query_source`); the state dict in our names. Pro2SAM's projections come as the two that its forward uses:
        `query_embed.weight` (2, D, 768), `.bias` (2, D), the second for all query tokens but the first. Its unused
        projections and the stored blur kernel are dropped.

    Raises:
        CheckpointError: not one of the two layouts, a missing, unexpected or misshapen entry, or non-finite values.
    """
    image = "glo_embed" in state
    if image == ("loc_embed" in state):
        found = "both" if image else "neither"
        raise CheckpointError(f"{name} isn't a Pro2SAM or SAT checkpoint: it has {found} of glo_embed and loc_embed")
    for key, rank in (("cls_token", 3), ("head.weight", 4)):
        if key not in state or state[key].ndim != rank:
            raise CheckpointError(f"{name} lacks {key} or has it in another shape")
    dim, num_classes = state["cls_token"].shape[-1], state["head.weight"].shape[0]
    arch = next((key for key, value in ARCHS.items() if value["embed_dim"] == dim), None)
    if arch is None:
        raise CheckpointError(f"{name} has width {dim}, which is none of the DeiT widths")
    num_queries = 4 if image else 1

    expected = _trunk_shapes(dim, ARCHS[arch]["depth"])
    expected |= {"head.weight": (num_classes, dim, 3, 3), "head.bias": (num_classes,)}
    conv = {"weight": (dim, 3, 16, 16), "bias": (dim,)}
    if image:
        expected["glo_embed"] = (1, num_queries, dim)
        expected |= {f"patch_merging.proj{i}.{part}": shape for i in (0, 1) for part, shape in conv.items()}
    else:
        expected |= {"loc_token": (1, 1, dim), "loc_embed": (1, 1, dim)}
    unused = re.compile(r"weight|patch_merging\.proj[23]\.(weight|bias)" if image else r"weight")
    check_tensors({key: value for key, value in state.items() if not unused.fullmatch(key)}, expected, name)

    rename = {"glo_embed": "query_pos", "loc_embed": "query_pos", "loc_token": "query_token"}
    trunk = [key for key in expected if not key.startswith("patch_merging.")]
    ours = {rename.get(key, key): state[key] for key in trunk}
    if image:
        projections = [[state[f"patch_merging.proj{i}.{part}"].float() for i in (0, 1)] for part in conv]
        ours["query_embed.weight"] = torch.stack(projections[0]).flatten(2)
        ours["query_embed.bias"] = torch.stack(projections[1])
    source = "image" if image else "learned"
    return arch, {"num_classes": num_classes, "num_query_tokens": num_queries, "query_source": source}, ours


def check_tensors(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Raise CheckpointError unless `state` has exactly the `expected` keys and shapes, with finite float values."""
    if missing := [key for key in expected if key not in state]:
        raise CheckpointError(f"{name} lacks {_list(missing)}")
    if unexpected := [key for key in state if key not in expected]:
        raise CheckpointError(f"{name} has unexpected entries: {_list(unexpected)}")
    for key, shape in expected.items():
        value = state[key]
        if tuple(value.shape) != tuple(shape):
            raise CheckpointError(f"{name} has {key} of shape {tuple(value.shape)} where {tuple(shape)} is needed")
        # a stored tensor can claim more elements than the file has by zero strides
        dense = (
            value.layout == torch.strided and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
        )
        if not dense or not value.is_floating_point():
            raise CheckpointError(f"{name} has {key} as something else than a dense floating point tensor")
        if not torch.isfinite(value.sum(dtype=torch.float64)):
            raise CheckpointError(f"{name} has values in {key} that aren't finite")


def copy_deit(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Copy a DeiT ImageNet checkpoint into the trunk of `model`, in place.

    `head.*` and `head_dist.*` are dropped; every other key is copied by name and all trunk keys must be there.

    Raises:
        CheckpointError: a missing, unexpected or misshapen entry.
    """
    state = {key: value for key, value in state.items() if not key.startswith(("head.", "head_dist."))}
    ours = model.state_dict()
    check_tensors(state, {key: tuple(value.shape) for key, value in ours.items() if key not in NOT_IN_DEIT}, name)
    model.load_state_dict(state, strict=False)


def download_deit(arch: str) -> dict[str, Tensor]:
    """ImageNet-1k weights of `arch` through timm.

    Raises:
        CheckpointError: timm isn't installed or the download failed.
    """
    try:
        import timm

        return timm.create_model(f"{arch}_patch16_224", pretrained=True).state_dict()
    except Exception as error:  # hub, network and cache errors have no common base
        raise CheckpointError(
            f"can't get the pre-trained {arch} weights through timm ({type(error).__name__}); "
            "pass the path of a local DeiT file instead"
        ) from error


def _trunk_shapes(dim: int, depth: int) -> dict[str, tuple[int, ...]]:
    shapes = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 197, dim),
        "patch_embed.proj.weight": (dim, 3, 16, 16),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    layers = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    for i in range(depth):
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.weight": (dim,), f"blocks.{i}.{norm}.bias": (dim,)}
        for layer, shape in layers.items():
            shapes |= {f"blocks.{i}.{layer}.weight": shape, f"blocks.{i}.{layer}.bias": shape[:1]}
    return shapes


def _list(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
