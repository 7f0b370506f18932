"""`pro2sam-fast train`."""

from __future__ import annotations

import sys
from dataclasses import replace

from jsonargparse import ArgumentParser, Namespace

from ..errors import ConfigError
from .parser import OK, Parser, number, tell, whole, yes_no
from .runs import names, place_data

__all__ = ["HELP", "parser", "run"]

HELP = "train GTFormer or SAT on your photos, or the bundled models again"

_DESCRIPTION = """Train a localizer from image-level labels, or the bundled `lite` models again.

gtformer and sat learn from photos with labels alone; cam, the baseline, is the same network without gate and without
losses on maps, whose class maps `evaluate --coarse cam:RUN` takes. RUN gets args.yaml, summary.csv, checkpoints,
last.safetensors and, with photos to choose by, best.safetensors. The same command continues an interrupted run. The
result is for `pro2sam-fast localize photos --coarse RUN`. Under torchrun all GPUs share every batch.

Data are CUB-200-2011 (cub), ImageNet (ilsvrc), metadata of wsolevaluation (wsol), a folder for each class (folder), or
photos in one folder that begin with their WordNet id, n01440764_tench.JPEG (flat): with one photo of each class that is
the one-image-per-class setting. In VOC and COCO (voc, coco) the classes of a photo share its label. `pro2sam-fast
evaluate` takes RUN and any photos with boxes; where their classes are others, it measures localization alone.

lite trains the bundled pair: SAM-lite from photos with masks, GTFormer-lite from labels. DATA holds coco200, bsds500,
cub10, caltech101_24, imagenet1k_one_per_class and foreground, as the model card (pro2sam_fast/weights/README.md) says.
RUN/lite.safetensors is the result. Hours on a CPU. Needs: pip install "pro2sam-fast[train]"

examples:
  pro2sam-fast train gtformer --data folder --root photos --arch lite --run runs/mine
  pro2sam-fast train gtformer --data cub --root CUB_200_2011 --pretrained --amp --run runs/cub
  torchrun --nproc-per-node 4 --no-python pro2sam-fast train gtformer --data ilsvrc --root imagenet --run runs/in
  pro2sam-fast train gtformer --data imagenet1k_one_per_class --arch lite --run runs/one
  pro2sam-fast train lite --data data --run runs/lite
"""

_TRAINED = ("gtformer", "sat", "cam")


def parser() -> ArgumentParser:
    parser = Parser(
        description=_DESCRIPTION,
        usage="pro2sam-fast train {gtformer,sat,cam,lite} --data NAME --run DIR [options]",
    )
    parser.add_argument("what", choices=[*_TRAINED, "lite"], metavar="WHAT", help="gtformer, sat, cam or lite")
    parser.add_argument(
        "--data",
        type=str,
        metavar="NAME",
        help="cub, ilsvrc, wsol, folder, flat, voc, coco, or the data set's folder; for lite a folder",
    )
    parser.add_argument("--run", type=str, metavar="DIR", help="folder for logs, checkpoints and the result")
    group = parser.add_argument_group("data of gtformer, sat and cam")
    group.add_argument("--root", type=str, metavar="DIR", help="folder of the data set, if --data names its kind")
    group.add_argument("--boxes", type=str, metavar="FILE", help="COCO's annotations, if not in its layout")
    group.add_argument("--metadata", type=str, metavar="DIR", help="training metadata folder (wsol)")
    group.add_argument("--images-per-class", type=whole, metavar="K", help="few-shot: so many photos of each class")
    group.add_argument(
        "--val-root", type=str, metavar="DIR", help="photos with boxes to choose the best epoch by (folder)"
    )
    group.add_argument("--val-boxes", type=str, metavar="PATH", help="their boxes: CSV, COCO file or XML folder")
    group.add_argument("--val-list", type=str, metavar="FILE", help="their labels: val_list.txt or devkit's (ilsvrc)")
    group.add_argument("--val-metadata", type=str, metavar="DIR", help="their metadata folder (wsol)")
    group.add_argument(
        "--oracle", action=yes_no(), default=False, help="choose on the test split, as the published code does"
    )
    group = parser.add_argument_group("model of gtformer, sat and cam")
    group.add_argument(
        "--arch", type=str, default="deit_small", metavar="NAME", help="deit_tiny, -_small, -_base or lite"
    )
    group.add_argument("--pretrained", type=str, nargs="?", const="download", metavar="FILE", help="DeiT weights")
    group.add_argument("--preset", type=str, metavar="NAME", help="default, official or paper")
    group.add_argument("--query-tokens", type=whole, metavar="G", help="4; 1 or 16 to compare (gtformer)")
    group.add_argument("--drop-path", type=number, metavar="P", help="0.1")
    group.add_argument("--gate", choices=["sigmoid_mean", "none"], help="none: maps without global-token attention")
    group = parser.add_argument_group("training of gtformer, sat and cam")
    for name, kind, text in (
        ("epochs", whole, "30 for CUB, 5 for ILSVRC"),
        ("batch-size", whole, "photos a step over all GPUs"),
        ("micro-batch", whole, "photos in memory at a time"),
        ("lr", number, "learning rate: 1e-4 for CUB, 1.5e-5 for ILSVRC"),
        ("weight-decay", number, "0.05"),
        ("area-target", number, "share of the photo that objects fill: 0.25 for CUB, 0.35 else"),
        ("lambda1", number, "weight of the losses on the mean map: 1 (gtformer, sat)"),
        ("lambda2", number, "weight of those on the tokens' maps, of the area loss in scheme mean_map_only: 0.5"),
        ("loss-scheme", str, "official, mean_map_only (preset paper) or sat"),
        ("ema", number, "decay of averaged weights"),
        ("seed", whole, "6"),
        ("workers", whole, "processes that read photos"),
        ("save-every", whole, "steps between checkpoints"),
        ("lr-schedule", str, "constant, or cosine"),
    ):
        group.add_argument(f"--{name}", type=kind, metavar="N", help=text)
    for name, text in (
        ("area-sync", "the area loss is that of all GPUs' photos, not of each one's (no)"),
        ("decay-embeddings", "weight decay of tokens and positions, as in the released code (yes)"),
    ):
        group.add_argument(f"--{name}", action=yes_no(), default=None, help=text)
    group.add_argument("--amp", action=yes_no(), default=False, help="bfloat16 autocast")
    group.add_argument(
        "--auto-batch", action=yes_no(), default=False, help="smaller micro batches where memory runs out"
    )
    group.add_argument("--device", type=str, default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1")
    group = parser.add_argument_group("lite")
    group.add_argument(
        "--stages",
        type=str,
        default="sam,gtformer,bundle",
        metavar="NAMES",
        help="comma-separated, to run a part; an interrupted stage continues where it stopped",
    )
    group.add_argument(
        "--start",
        type=str,
        metavar="NAME",
        help="begin SAM-lite with these weights: 'lite' (bundled) or a lite file or folder; random if not given",
    )
    return parser


def run(arguments: Namespace) -> int:
    for name in ("data", "run"):
        if arguments[name] is None:
            raise ConfigError(f"--{name} is missing; see pro2sam-fast train --help")
    if arguments.what in _TRAINED:
        return _run_gtformer(arguments)

    from ..train.lite import train_lite

    weights = train_lite(arguments.data, arguments.run, names(arguments.stages), start=arguments.start)
    tell(str(weights or arguments.run), sys.stdout)
    return OK


def _run_gtformer(arguments: Namespace) -> int:
    import torch

    from ..data.localization import open_dataset
    from ..eval.baselines import ClassActivation
    from ..eval.ranks import ranks, under_torchrun
    from ..models.lite import load_lite
    from ..models.trained import ModelSpec, build_trained
    from ..pipelines.pro2sam import resolve_device
    from ..train.gtformer import TrainConfig, train_gtformer
    from ..train.losses import AREA_TARGETS, LOSS_PRESETS

    place_data(arguments)
    files = {"metadata": arguments.metadata, "boxes": arguments.boxes}
    data = open_dataset(
        arguments.data, arguments.root, True, **files, images_per_class=arguments.images_per_class
    )
    cam = arguments.what == "cam"
    preset = arguments.preset or ("default" if arguments.what == "gtformer" else arguments.what)
    if arguments.preset is not None and arguments.what != "gtformer":
        raise ConfigError(f"{arguments.what} has no presets; leave --preset out")
    shape = {"num_query_tokens": arguments.query_tokens, "drop_path": arguments.drop_path, "gate": arguments.gate}
    shape = {name: value for name, value in shape.items() if value is not None}
    spec = ModelSpec(arguments.arch, tuple(data.class_names), preset, shape)
    torch.manual_seed(6 if arguments.seed is None else arguments.seed)
    trunk = load_lite().classifier.trunk if arguments.arch == "lite" else None
    model = build_trained(spec, True if arguments.pretrained == "download" else arguments.pretrained or False, trunk)
    recipe = _recipe(arguments, preset)
    area = arguments.area_target
    if area is None:
        area = AREA_TARGETS["cub" if arguments.data == "cub" else "ilsvrc"]
    losses = {"lambda1": arguments.lambda1, "lambda2": arguments.lambda2, "scheme": arguments.loss_scheme}
    losses = {name: value for name, value in losses.items() if value is not None}
    config = TrainConfig(
        losses=replace(LOSS_PRESETS[preset], area_target=area, **losses),
        amp="bfloat16" if arguments.amp else None,
        auto_batch=arguments.auto_batch,
        **recipe,
    )
    with under_torchrun(resolve_device(arguments.device)) as device:
        weights = train_gtformer(
            model,
            data,
            arguments.run,
            config,
            metadata=spec.metadata(),
            evaluate=_evaluation(arguments, data.class_names, device, ClassActivation if cam else None),
            device=device,
        )
        if ranks()[0] == 0:
            tell(str(weights), sys.stdout)
    return OK


_OPTIONS = ("epochs", "batch_size", "micro_batch", "lr", "weight_decay", "ema", "seed", "workers", "save_every")
_OPTIONS += ("lr_schedule", "area_sync", "decay_embeddings")


def _recipe(arguments: Namespace, preset: str) -> dict:
    """What differs from the recipe for CUB-200-2011: that for ILSVRC, what the paper prints, the user's choice."""
    recipe = {}
    if arguments.data == "ilsvrc":
        # SAT's code leaves its loop after the first epoch
        epochs = 1 if preset == "sat" else 5
        recipe = {"epochs": epochs, "batch_size": 512, "lr": 1.5e-5, "drop_last": True, "keep_epochs": True}
    if preset == "paper":
        recipe |= {"betas": (0.9, 0.99), "weight_decay": 5e-4}
        recipe["batch_size"] = 256 if arguments.data == "ilsvrc" else 128
    return recipe | {name: arguments[name] for name in _OPTIONS if arguments[name] is not None}


def _evaluation(arguments: Namespace, class_names: list[str], device, wrapper):
    """Accuracy of the (wrapped) model on held-out photos, or None where none are named."""
    from ..data.localization import open_dataset
    from ..eval.maps import evaluate_maps, predict_on_all_ranks

    val = {"metadata": arguments.val_metadata, "boxes": arguments.val_boxes, "val_list": arguments.val_list}
    has_split = arguments.data in ("cub", "ilsvrc", "voc", "coco")
    others = arguments.val_root is not None or arguments.val_metadata is not None
    if has_split and others:
        raise ConfigError(f"{arguments.data} takes no other photos to choose the best epoch by; --oracle takes its own")
    if arguments.oracle and not has_split:
        raise ConfigError(f"{arguments.data} has no test split for --oracle; name other photos with --val-root")
    if not (arguments.oracle or others or (arguments.val_boxes is not None and not has_split)):
        return None
    held_out = open_dataset(arguments.data, arguments.val_root or arguments.root, False, **val, class_names=class_names)

    def evaluate(model):
        predictions = predict_on_all_ranks(model if wrapper is None else wrapper(model), held_out, "sat", device=device)
        report = evaluate_maps(predictions, held_out, "sat")
        return {**report.metrics, "threshold": report.threshold}

    return evaluate
