"""The bundled `lite` models: GTFormer-lite, SAM-lite and the ImageNet label head over one EfficientNet-Lite0 trunk, of
which SAM-lite has some stages to itself."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import CheckpointError
from ..io import write_atomic
from .checkpoints import load_into, load_state_dict
from .gtformer import GRID, GTFormer
from .sam import Sam
from .sam.layers import LayerNorm2d
from .sam.lite import SAM_TRUNK, make_sam_lite
from .trunk import FEATURE_CHANNELS, PIXEL_MEAN, PIXEL_STD, EfficientNetLite0

WEIGHTS = Path(__file__).parent.parent / "weights" / "lite.safetensors"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_TRUNKS = {"gtformer": "patch_embed.trunk.", "sam": SAM_TRUNK}
GTFORMER_LITE = {"embed_dim": 128, "depth": 4, "num_heads": 2, "mlp_ratio": 4.0, "drop_path": 0.05}


class Renormalise(nn.Module):
    """From ImageNet's mean and standard deviation to the trunk's (x - 127) / 128."""

    def __init__(self) -> None:
        super().__init__()
        mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        trunk_mean, trunk_std = (torch.tensor(v).reshape(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
        self.register_buffer("gain", 255 * std / trunk_std, persistent=False)
        self.register_buffer("offset", (255 * mean - trunk_mean) / trunk_std, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + self.offset


class LabelHead(nn.Module):
    """The trunk as a classifier: (B, 3, 224, 224) with ImageNet normalisation -> logits (B, C)."""

    def __init__(self, trunk: EfficientNetLite0) -> None:
        super().__init__()
        self.trunk = trunk
        self.renormalise = Renormalise()

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(self.renormalise(x))


class HybridEmbed(nn.Module):
    """Patch tokens from the trunk's strides 16 and 32: (B, 3, 224, 224) -> (B, 196, D).

    The image arrives with GTFormer's normalisation (ImageNet mean and standard deviation).
    """

    def __init__(self, dim: int, trunk: EfficientNetLite0) -> None:
        super().__init__()
        self.trunk = trunk
        self.norms = nn.ModuleList(LayerNorm2d(c) for c in FEATURE_CHANNELS[2:])
        self.proj = nn.Conv2d(sum(FEATURE_CHANNELS[2:]), dim, 1)
        self.renormalise = Renormalise()

    def train(self, mode: bool = True) -> HybridEmbed:
        """The trunk is frozen: its normalisation never learns from a batch."""
        super().train(mode)
        self.trunk.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(self.features(x))

    def features(self, x: Tensor) -> list[Tensor]:
        """Frozen part: stride-16 (B, 112, 14, 14) and stride-32 (B, 320, 7, 7) features."""
        return self.trunk.features(self.renormalise(x))[2:]

    def embed(self, features: list[Tensor]) -> Tensor:
        """Trained part: features -> tokens (B, 196, D)."""
        a, b = (norm(f) for norm, f in zip(self.norms, features, strict=True))
        b = F.interpolate(b, size=(GRID, GRID), mode="bilinear", align_corners=False)
        return self.proj(torch.cat([a, b], dim=1)).flatten(2).transpose(1, 2)


def make_gtformer_lite(num_classes: int, trunk: EfficientNetLite0) -> GTFormer:
    """The architecture with random weights; the trunk is shared, not copied."""
    embed = HybridEmbed(GTFORMER_LITE["embed_dim"], trunk)
    return GTFormer(patch_embed=embed, num_classes=num_classes, **GTFORMER_LITE)


def map_and_label(coarse: nn.Module, classifier: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Coarse map (B, 14, 14) and logits (B, C) of (B, 3, 224, 224) with one pass of the trunk that both models share.

    The same values as `coarse.coarse_map(x)` and `classifier(x)`; None if the models don't share a trunk.
    """
    embed = getattr(coarse, "patch_embed", None)
    if not isinstance(embed, HybridEmbed) or not isinstance(classifier, LabelHead):
        return None
    if embed.trunk is not classifier.trunk:
        return None
    features = embed.trunk.features(classifier.renormalise(x))
    return coarse.coarse_map_of_tokens(*coarse.embed(x, features[2:])), embed.trunk.classify(features[-1])


@dataclass
class LiteModel:
    """The bundled models, ready for a `Localizer`.

    coarse: GTFormer-lite. sam: SAM-lite. classifier: the trunk with its ImageNet-1k head. coarse and classifier take
    the photo at 224 x 224 with ImageNet normalisation. All three share the trunk's weights, but for those of stages
    that learned with SAM.
    class_names: of the classifier. coarse_class_names: of the coarse model's own logits. defaults: options of the
    generator, the matching and the localizer that suit these weights. card: how the weights came about.
    """

    coarse: GTFormer
    sam: Sam
    classifier: LabelHead
    class_names: list[str]
    coarse_class_names: list[str]
    defaults: dict
    card: dict


def save_lite(path: str | Path, model: LiteModel) -> None:
    """Writes one safetensors file: float16 weights (normalisation statistics stay float32), the rest as metadata.

    Of the trunks inside the models it holds only what differs from the label head's.
    """
    parts = {"trunk": model.classifier.trunk, "gtformer": model.coarse, "sam": model.sam}
    trunk = model.classifier.trunk.state_dict()
    tensors = {
        f"{part}.{name}": value.contiguous() if _keeps_float32(name) else value.half().contiguous()
        for part, module in parts.items()
        for name, value in module.state_dict().items()
        if not (_of_trunk(part, name) and torch.equal(value, trunk[name.removeprefix(_TRUNKS[part])]))
    }
    metadata = {
        name: json.dumps(getattr(model, name)) for name in ("class_names", "coarse_class_names", "defaults", "card")
    }
    write_atomic(path, save(tensors, metadata))


def weights_file(source: str | Path | None = None) -> Path:
    """The bundled file, or the `lite.safetensors` that ``source`` is or holds."""
    path = WEIGHTS if source is None else Path(source)
    return path / WEIGHTS.name if path.is_dir() else path


def load_lite(source: str | Path | None = None) -> LiteModel:
    """The bundled models, or those of a `lite.safetensors` file or a folder that holds one; float32, evaluation mode.

    Raises:
        CheckpointError: the file is missing, corrupt or made for another architecture.
    """
    path = weights_file(source)
    return _assemble(load_state_dict(path), path)


def _assemble(tensors: dict[str, Tensor], path: Path) -> LiteModel:
    try:
        with safe_open(path, "pt") as f:
            metadata = {k: json.loads(v) for k, v in (f.metadata() or {}).items() if k != "format"}
        class_names, coarse_class_names = metadata["class_names"], metadata["coarse_class_names"]
        defaults, card = metadata["defaults"], metadata["card"]
    except (KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"Checkpoint {path} has no lite metadata; use a file that lite training wrote."
        ) from error
    named = all(_is_names(names) for names in (class_names, coarse_class_names))
    if not named or not isinstance(defaults, dict) or not isinstance(card, dict):
        raise CheckpointError(f"Checkpoint {path} has damaged lite metadata; use a file that lite training wrote.")
    if strangers := [name for name in tensors if not name.startswith(("trunk.", "gtformer.", "sam."))]:
        raise CheckpointError(f"Checkpoint {path} holds '{strangers[0]}', which is no part of lite; use another file.")
    trunk = EfficientNetLite0(len(class_names))
    coarse = make_gtformer_lite(len(coarse_class_names), trunk)
    own = f"sam.{_TRUNKS['sam']}"
    shared = {id(v): v for k, v in trunk.state_dict(keep_vars=True).items() if own + k not in tensors}
    sam = make_sam_lite(copy.deepcopy(trunk, shared))
    for part, module in (("trunk", trunk), ("gtformer", coarse), ("sam", sam)):
        state = {name: value for name, value in module.state_dict().items() if _of_trunk(part, name)}
        state |= {k.removeprefix(f"{part}."): v.float() for k, v in tensors.items() if k.startswith(f"{part}.")}
        load_into(module, state, path)
    return LiteModel(
        coarse.eval(), sam.eval(), LabelHead(trunk).eval(), class_names, coarse_class_names, defaults, card
    )


def load_sam_lite(source: str | Path | None = None) -> Sam:
    """SAM-lite alone: as `load_lite`, or from a `.pth` or `.safetensors` file with SAM's own names."""
    if source is None or Path(source).is_dir():
        return load_lite(source).sam
    tensors = load_state_dict(source)
    if any(name.startswith("sam.") for name in tensors):
        return _assemble(tensors, Path(source)).sam
    sam = make_sam_lite()
    load_into(sam, tensors, source)
    return sam


def _is_names(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(name, str) for name in value)


def _of_trunk(part: str, name: str) -> bool:
    return part in _TRUNKS and name.startswith(_TRUNKS[part])


def _keeps_float32(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))
