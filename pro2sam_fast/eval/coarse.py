"""Coarse models by name, what they are, and class scores of other models."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from ..api import load_coarse
from ..data.localization import LocalizationDataset
from ..data.tables import open_image
from ..errors import ConfigError
from ..models.gtformer import GTFormer
from ..models.lite import LabelHead, load_lite
from ..pipelines.pro2sam import resolve_device
from ..train.lite_gtformer import class_activation_map
from .baselines import BASELINES
from .ranks import gathered, ranks
from .stored import read_scores

__all__ = ["coarse_model", "external_scores", "model_facts"]


def coarse_model(name: str) -> tuple[nn.Module, Sequence[str]]:
    """A coarse model by name and the names of its classes, numbers if they are unknown.

    "lite", "cam" (class activation map of lite's trunk for its likeliest ImageNet class), a run of `pro2sam-fast
    train`, an official checkpoint, or with "cam:", "gradcam:" or "rollout:" before one of the last two its baseline of
    that name.
    """
    if name in ("cam", "lite"):
        lite = load_lite()
        return (_Cam(lite.classifier), lite.class_names) if name == "cam" else (lite.coarse, lite.coarse_class_names)
    kind, _, path = name.partition(":")
    baseline = BASELINES.get(kind) if path else None
    net, names = load_coarse(path if baseline else name)
    names = [str(i) for i in range(net.model.config.num_classes)] if names is None else names
    return baseline(net.model) if baseline else net.model, names


class _Cam(nn.Module):
    """Zhou et al. 2016; its logits are ImageNet's and stay out of the report."""

    def __init__(self, head: LabelHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.head.trunk.features(self.head.renormalise(x))[-1]
        return {"map": class_activation_map(self.head.trunk, features, classes=1)}


def model_facts(name: str, model: nn.Module) -> dict[str, tuple]:
    """What a model is, by the study's `MODEL_ABLATIONS` that it can be listed in."""
    net = getattr(model, "net", model)
    if not isinstance(net, GTFormer):
        return {}
    config = net.config
    query = "the image" if config.query_source == "image" else "a learned query"
    source = f"query tokens of {query}, {'without gate' if config.gate == 'none' else 'gated'}"
    if model is not net:
        source = {"rollout": "attention alone"}.get(name.partition(":")[0], "class evidence")
    facts: dict[str, tuple] = {
        "attention": (source,),
        "tokens": (config.num_query_tokens, sum(p.numel() for p in net.parameters()) / 1e6),
    }
    path = Path(name if model is net else name.partition(":")[2])
    arguments = (path if path.is_dir() else path.parent) / "args.yaml"
    if name != "lite" and arguments.is_file():
        # another program's file of that name, beside an official checkpoint, says something else
        with suppress(OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
            losses = yaml.safe_load(arguments.read_text())["losses"]
            facts["losses"] = losses["scheme"], f"{losses['lambda1']:g} : {losses['lambda2']:g}"
    return facts


def external_scores(
    data: LocalizationDataset, file: str | None = None, timm_model: str | None = None, device: str = "auto"
) -> dict[str, np.ndarray] | None:
    """Class scores by photo id from a file (``.npz`` with ``ids`` and ``logits``) or a timm model with its weights.

    Raises:
        ConfigError: both are given, or timm doesn't know the model, or it has another number of classes.
        DataError: the file is malformed, or lacks a photo.
    """
    if file is not None and timm_model is not None:
        raise ConfigError("give class scores by file or by timm model, not both")
    if file is not None:
        return read_scores(file, data)
    if timm_model is None:
        return None
    import timm

    try:
        model = timm.create_model(timm_model, pretrained=True).eval().to(resolve_device(device))
    except Exception as error:  # whatever timm and its hub raise
        raise ConfigError(f"timm can't give {timm_model!r} with weights: {error}") from error
    if model.num_classes != len(data.class_names):
        raise ConfigError(f"{timm_model} has {model.num_classes} classes, the data {len(data.class_names)}")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    scores = {}
    rank, world = ranks()
    with torch.inference_mode():
        for photo in data.photos[rank::world]:
            x = transform(open_image(photo.path).convert("RGB")).unsqueeze(0)
            scores[photo.id] = model(x.to(next(model.parameters()).device))[0].float().cpu().numpy()
    return {key: value for part in gathered(scores) for key, value in part.items()}
