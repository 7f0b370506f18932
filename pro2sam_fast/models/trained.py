"""GTFormer and SAT models that this package trained: their description travels in the weights' file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import CheckpointError, ConfigError
from .checkpoints import load_into, load_state_dict
from .gtformer import ARCHS, build_gtformer
from .lite import GTFORMER_LITE, HybridEmbed
from .trunk import EfficientNetLite0

__all__ = ["ModelSpec", "build_trained", "load_trained", "read_spec"]

_KEY = "pro2sam_fast_model"


@dataclass(frozen=True)
class ModelSpec:
    """What it takes to build a model.

    arch: "deit_tiny", "deit_small", "deit_base", or "lite" (four blocks of width 128 over EfficientNet-Lite0's frozen
    features). preset: see `build_gtformer`. class_names: in the order of the logits. options: of `GTFormerConfig`.
    """

    arch: str
    class_names: tuple[str, ...]
    preset: str = "default"
    options: dict[str, Any] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """For a safetensors file."""
        return {_KEY: json.dumps(asdict(self))}


def build_trained(
    spec: ModelSpec, pretrained: bool | str | os.PathLike | Mapping = False, trunk: EfficientNetLite0 | None = None
) -> nn.Module:
    """The model with fresh weights, or with pre-trained ones in its trunk.

    Args:
        pretrained: as for `build_gtformer`; "lite" has none, its ``trunk`` comes with weights.
        trunk: of "lite"; None makes one with random weights. It doesn't learn.
    """
    if spec.arch != "lite":
        if spec.arch not in ARCHS:
            raise ConfigError(f"unknown arch {spec.arch!r}, choose from {', '.join([*ARCHS, 'lite'])}")
        return build_gtformer(spec.arch, len(spec.class_names), spec.preset, pretrained, **spec.options)
    if pretrained:
        raise ConfigError("the arch 'lite' takes a trunk, not pretrained weights")
    sizes = dict(GTFORMER_LITE)
    embed = HybridEmbed(sizes["embed_dim"], EfficientNetLite0() if trunk is None else trunk)
    options = {**sizes, **spec.options}
    model = build_gtformer("deit_tiny", len(spec.class_names), spec.preset, patch_embed=embed, **options)
    model.patch_embed.trunk.requires_grad_(False)
    return model


def read_spec(path: str | os.PathLike) -> ModelSpec | None:
    """The description in a weights' file; None if it has none."""
    try:
        with safe_open(path, "pt") as f:
            text = (f.metadata() or {}).get(_KEY)
    except (OSError, SafetensorError):
        return None
    if text is None:
        return None
    try:
        values = json.loads(text)
        return ModelSpec(**{**values, "class_names": tuple(values["class_names"])})
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"Checkpoint {path} has a damaged description; use a file that training wrote."
        ) from error


def load_trained(path: str | os.PathLike) -> tuple[nn.Module, ModelSpec]:
    """A model from ``best.safetensors`` or ``last.safetensors`` of a run (or the run's folder), in evaluation mode.

    Raises:
        CheckpointError: the file is missing, or training didn't write it.
    """
    path = Path(path)
    if path.is_dir():
        best = path / "best.safetensors"
        path = best if best.exists() else path / "last.safetensors"
    spec = read_spec(path)
    if spec is None:
        raise CheckpointError(f"Checkpoint {path} has no description of its model; use a file that training wrote.")
    model = build_trained(spec)
    load_into(model, load_state_dict(path), path)
    return model.eval(), spec
