"""The program that made the bundled `lite` weights, from public photos and image-level labels.

    pro2sam-fast train lite --data DATA --run RUN

DATA holds the folders named in :data:`SOURCES`. Stages: ``sam`` trains SAM-lite in phases of growing resolution,
``gtformer`` trains GTFormer-lite from labels alone, ``bundle`` writes ``RUN/lite.safetensors``, which
``pro2sam_fast.load(RUN)`` opens, and its SHA-256 into ``RUN/weights.json``. An interrupted stage continues where it
stopped.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..data.cub import load_cub
from ..data.segments import SegmentedPhoto, bsds, coco_panoptic, foreground
from ..errors import ConfigError, DataError
from ..io import write_atomic
from ..models.gtformer import GTFormer
from ..models.lite import LabelHead, LiteModel, load_sam_lite, make_gtformer_lite, save_lite
from ..models.sam import Sam
from ..models.sam.lite import make_sam_lite
from ..models.trunk import EfficientNetLite0, load_pretrained_trunk
from .checkpoint import load_latest, save_checkpoint
from .lite_gtformer import GTFormerLiteConfig, LabelledPhotos, cache_features, train_gtformer_lite
from .lite_sam import SamLiteConfig, train_sam_lite, trainable_state

SOURCES = {
    "coco200": "COCO 2017 photos with panoptic annotations (images/, annotations/panoptic_*)",
    "bsds500": "BSDS500 photos with label maps (train/images, train/segments)",
    "cub10/CUB_200_2011": "CUB-200-2011 in its official layout, whole or fewer classes",
    "caltech101_24": "Caltech-101, a folder for each category",
    "imagenet1k_one_per_class": "one photo for each ImageNet class; sorted names are class indices",
    "foreground": "8-bit foreground masks for cub10, caltech101_24 and imagenet1k_one_per_class",
}
LITE_DEFAULTS = {
    "points_per_side": 14,
    "pred_iou_thresh": 0.4,
    "stability_score_thresh": 0.6,
    "min_mask_region_area": 100,
    "border_sigma": 1.5,
}
STAGES = ("sam", "gtformer", "bundle")


def sam_phases() -> list[SamLiteConfig]:
    """A start at 256 pixels, where a step is cheap, the rest at the 512 pixels of inference; at last two stages of the
    trunk learn too."""
    late = {
        "size": 512,
        "batch": 6,
        "prompts": 8,
        "warmup": 60,
        "final_lr": 1e-5,
        "iou_weight": 3,
        "save_every": 100,
    }
    return [
        SamLiteConfig(steps=4500, stop_at=2179, size=256, batch=16, prompts=8, lr=5e-4, final_lr=1e-4),
        SamLiteConfig(
            steps=2100, size=512, batch=6, prompts=6, lr=3e-4, warmup=50, final_lr=1e-5, seed=1, save_every=100
        ),
        SamLiteConfig(steps=2000, lr=3e-4, seed=2, **late),
        SamLiteConfig(steps=2600, lr=3e-4, seed=3, tuned=(3, 4), **late),
        SamLiteConfig(steps=850, lr=2e-4, seed=4, tuned=(3, 4), **late),
        SamLiteConfig(steps=2500, stop_at=2242, lr=3e-4, seed=5, tuned=(3, 4), follows=2, **late | {"iou_weight": 2}),
    ]


@dataclass
class LiteRecipe:
    """Everything that shapes the bundled weights besides the data.

    sam: phases. souped: of so many last ones the bundle holds the mean of the weights (model soup; Wortsman et al.,
    ICML 2022). defaults: options of generator, matching and localizer that the bundle asks for.
    """

    sam: list[SamLiteConfig] = field(default_factory=sam_phases)
    souped: int = 3
    gtformer: GTFormerLiteConfig = field(default_factory=GTFormerLiteConfig)
    defaults: dict = field(default_factory=lambda: dict(LITE_DEFAULTS))


def segmented_photos(data: Path) -> list[SegmentedPhoto]:
    """Training photos with masks: COCO and BSDS train splits, and the photos with foreground masks."""
    photos = [*coco_panoptic(data / "coco200", "train"), *bsds(data / "bsds500", "train")]
    masks = data / "foreground"
    for folder, name in (
        (data / "cub10/CUB_200_2011/images", "cub10"),
        (data / "imagenet1k_one_per_class", "imagenet1k_one_per_class"),
        (data / "caltech101_24", "caltech101_24"),
    ):
        photos += foreground(folder, masks / name, long_side=384)
    return photos


def labelled_photos(data: Path) -> list[LabelledPhotos]:
    """Training photos with image-level labels: CUB train split, Caltech-101, one photo for each ImageNet class."""
    cub, cub_names = load_cub(data / "cub10/CUB_200_2011")
    train = [p for p in cub if p.train]
    caltech = data / "caltech101_24"
    categories = sorted(p.name for p in caltech.iterdir() if p.is_dir())
    pairs = [(path, i) for i, name in enumerate(categories) for path in sorted((caltech / name).glob("*.jpg"))]
    imagenet = sorted((data / "imagenet1k_one_per_class").iterdir())
    return [
        LabelledPhotos("cub10", [p.path for p in train], [p.label for p in train], cub_names),
        LabelledPhotos("caltech101", [p for p, _ in pairs], [i for _, i in pairs], categories),
        LabelledPhotos("imagenet1k", imagenet, list(range(len(imagenet))), imagenet_names(imagenet)),
    ]


def imagenet_names(paths: Sequence[Path]) -> list[str]:
    """``n01440764_tench.JPEG`` -> ``tench``, in order."""
    return [path.stem.split("_", 1)[1].replace("_", " ") for path in paths]


def train_sam_stage(
    data: Path, run: Path, recipe: LiteRecipe, trunk: EfficientNetLite0, start: dict[str, torch.Tensor] | None = None
) -> None:
    """The phases of SAM-lite; ``start`` holds weights to begin with instead of random ones."""
    photos = segmented_photos(data)
    for number, config in enumerate(recipe.sam):
        torch.manual_seed(config.seed)
        sam = make_sam_lite(copy.deepcopy(trunk))
        if number > 0:
            start = _mean_of_phases(run, range(number)[-config.follows :], sam)
        if start is not None:
            sam.load_state_dict(start, strict=False)
        train_sam_lite(sam, photos, config, run / f"sam{number}")


def _mean_of_phases(run: Path, numbers: Sequence[int], sam: Sam) -> dict[str, torch.Tensor]:
    """Of their averaged weights; what a phase left as it was counts as in ``sam``, a model without any training."""
    phases, untrained = [_latest(run / f"sam{number}")["average"] for number in numbers], sam.state_dict()
    names = set().union(*phases)
    return {k: sum(phase.get(k, untrained[k]) for phase in phases) / len(phases) for k in names}


def train_gtformer_stage(data: Path, run: Path, recipe: LiteRecipe, trunk: EfficientNetLite0) -> None:
    config, folder = recipe.gtformer, run / "gtformer"
    folder.mkdir(parents=True, exist_ok=True)
    if load_latest(folder) is not None:
        return
    sources = labelled_photos(data)
    torch.manual_seed(config.seed)
    model = make_gtformer_lite(sum(len(s.classes) for s in sources), trunk)
    cached = [
        (source, cache_features(model, source, views, config.seed))
        for source, views in zip(sources, config.views, strict=True)
    ]
    train_gtformer_lite(model, cached, config, folder / "log.csv")
    own = {k: v for k, v in model.state_dict().items() if ".trunk." not in k}
    save_checkpoint(folder, config.steps, {"model": own, "step": config.steps})


def bundle(data: Path, run: Path, recipe: LiteRecipe, trunk: EfficientNetLite0) -> Path:
    """SAM-lite as the mean of its last phases, GTFormer-lite (its head without the ImageNet columns, which the trunk's
    own head serves better) and the trunk in one file."""
    sources = labelled_photos(data)
    kept = sources[:-1]
    classes = [name for source in kept for name in source.classes]
    sam = make_sam_lite(copy.deepcopy(trunk))
    sam.load_state_dict(_mean_of_phases(run, range(len(recipe.sam))[-recipe.souped :], sam), strict=False)
    state = _latest(run / "gtformer")["model"]
    state["head.weight"], state["head.bias"] = state["head.weight"][: len(classes)], state["head.bias"][: len(classes)]
    coarse: GTFormer = make_gtformer_lite(len(classes), trunk)
    coarse.load_state_dict(state, strict=False)
    path = run / "lite.safetensors"
    card = {"recipe": asdict(recipe), "sources": SOURCES}
    model = LiteModel(coarse, sam, LabelHead(trunk), sources[-1].classes, classes, recipe.defaults, card)
    save_lite(path, model)
    content = path.read_bytes()
    known = {path.name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}}
    write_atomic(path.with_name("weights.json"), f"{json.dumps(known, indent=2)}\n".encode())
    return path


def _latest(folder: Path) -> dict:
    state = load_latest(folder)
    if state is None:
        raise ConfigError(f"{folder} holds no checkpoint; run the stages before `bundle` first.")
    return state


def train_lite(
    data: str | Path,
    run: str | Path,
    stages: Sequence[str] = STAGES,
    recipe: LiteRecipe | None = None,
    start: str | Path | None = None,
) -> Path | None:
    """Runs the stages, see the module; returns the weights file if it was bundled.

    ``start``: weights SAM-lite begins with, ``lite`` (the bundled ones) or a lite file or folder; None for random.

    Raises:
        CheckpointError: ``start`` can't be used.
        DataError: a folder of :data:`SOURCES` is missing, or a file in it is malformed.
        ConfigError: unknown stage, a stage whose predecessor has not run, or a phase that drops tuned stages.
    """
    data, run = Path(data), Path(run)
    missing = [f"{data / name} ({what})" for name, what in SOURCES.items() if not (data / name).is_dir()]
    if missing:
        raise DataError(f"Training data is missing: {'; '.join(missing)}.")
    unknown = [s for s in stages if s not in STAGES]
    if unknown:
        raise ConfigError(f"unknown stage {unknown[0]!r}: choose from {', '.join(STAGES)}")
    recipe = recipe or LiteRecipe()
    for number, (phase, later) in enumerate(itertools.pairwise(recipe.sam), 1):
        if lost := set(phase.tuned) - set(later.tuned):
            raise ConfigError(f"SAM phase {number} must tune stages {sorted(lost)} too, as the phase before it does")
    run.mkdir(parents=True, exist_ok=True)
    trunk = load_pretrained_trunk()
    if "sam" in stages:
        weights = None
        if start is not None:
            tuned = [stage for config in recipe.sam for stage in config.tuned]
            weights = trainable_state(load_sam_lite(None if str(start) == "lite" else start), tuned)
        train_sam_stage(data, run, recipe, trunk, weights)
    if "gtformer" in stages:
        train_gtformer_stage(data, run, recipe, trunk)
    return bundle(data, run, recipe, trunk) if "bundle" in stages else None
