"""CAM, SAT and GTFormer, trained from labels under one recipe, alone and matched with SAM-lite's masks.

    python benchmarks/run.py study --data DATA --runs RUNS [--seeds 0,1,2] [--epochs 25] [--images-per-class K]
    python benchmarks/run.py study --data DATA --runs RUNS --train imagenet1k_one_per_class --epochs 12 --seeds 0

DATA is a CUB-200-2011 folder, whole or cut to fewer classes. The networks are those of arch "lite": frozen
EfficientNet-Lite0 features, so that a CPU will do. A map's threshold is the best on the training photos' boxes, never
on those it is scored on. With --train the labels come from another data set, and only boxes are scored on DATA. Runs
that were interrupted go on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from rows import RESULTS, append, environment

METHODS = ("cam", "sat", "gtformer")
RECIPE = {"epochs": 25, "batch_size": 30, "lr": 1e-3, "lr_schedule": "cosine"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=RECIPE["epochs"])
    parser.add_argument("--images-per-class", type=int)
    parser.add_argument("--train", type=Path, help="folder of another data set to learn from")
    parser.add_argument("--output", type=Path, default=RESULTS / "accuracy.jsonl")


def trained(
    method: str, seed: int, data, run: Path, epochs: int, area_target: float
) -> tuple[torch.nn.Module, list[str]]:
    """The method's model after training, in evaluation mode, as an images -> map and logits module, and its classes.

    "bundled" is the coarse model of `lite` as it is: its recipe ties the map to the trunk's class activation map.
    """
    from pro2sam_fast.eval.baselines import ClassActivation
    from pro2sam_fast.models.lite import load_lite
    from pro2sam_fast.models.trained import ModelSpec, build_trained, load_trained
    from pro2sam_fast.train.gtformer import TrainConfig, train_gtformer
    from pro2sam_fast.train.losses import LOSS_PRESETS

    if method == "bundled":
        lite = load_lite()
        return lite.coarse, lite.coarse_class_names
    preset = "default" if method == "gtformer" else method
    spec = ModelSpec("lite", tuple(data.class_names), preset)
    losses = replace(LOSS_PRESETS[preset], area_target=area_target)
    if not (run / "last.safetensors").exists():
        torch.manual_seed(seed)
        model = build_trained(spec, trunk=load_lite().classifier.trunk)
        config = TrainConfig(**{**RECIPE, "epochs": epochs}, seed=seed, losses=losses)
        train_gtformer(model, data, run, config, metadata=spec.metadata())
    model = load_trained(run / "last.safetensors")[0]
    return (ClassActivation(model) if method == "cam" else model).eval(), data.class_names


def run(arguments: argparse.Namespace) -> int:
    from pro2sam_fast.api import load_sam
    from pro2sam_fast.data.localization import CUB200, kind_of, open_dataset
    from pro2sam_fast.eval.gallery_cache import GalleryCache
    from pro2sam_fast.eval.maps import evaluate_maps, predict_maps, shared_classes
    from pro2sam_fast.eval.masks import evaluate_masks
    from pro2sam_fast.generator import MaskGenerator
    from pro2sam_fast.train.losses import AREA_TARGETS

    source, area = arguments.train or arguments.data, AREA_TARGETS["ilsvrc" if arguments.train else "cub"]
    train = open_dataset(kind_of(source), source, True, images_per_class=arguments.images_per_class)
    boxed, test = CUB200(arguments.data, "train"), CUB200(arguments.data, "test")
    sam, defaults = load_sam()
    galleries = GalleryCache(MaskGenerator(sam, **defaults), arguments.runs / "galleries", defaults)
    options = {"train": arguments.train and arguments.train.name, "images-per-class": arguments.images_per_class}
    options = {name: value for name, value in options.items() if value is not None}
    taught = "labels" if arguments.train is None else f"{len(train)} labels of {arguments.train.name}"
    if arguments.images_per_class is not None:
        taught += f", {arguments.images_per_class} a class"
    table: dict[str, list[dict[str, float]]] = {}
    for method in arguments.methods.split(","):
        for seed in map(int, arguments.seeds.split(",")):
            folder = arguments.runs / "_".join([method, *map(str, options.values()), str(seed)])
            model, known = trained(method, seed, train, folder, arguments.epochs, area)
            classes = shared_classes(known, test.class_names)
            threshold = evaluate_maps(predict_maps(model, boxed, classes=classes), boxed).threshold
            maps = predict_maps(model, test, classes=classes)
            report = evaluate_maps(maps, test, selection="val_split", threshold=threshold)
            maps = predict_maps(model, test, "direct224", classes=classes)
            matched = evaluate_masks(maps, test, galleries, sam_input="native")
            metrics = {"threshold": threshold, **_short(report.metrics, "map"), **_short(matched.metrics, "matched")}
            print(json.dumps({"method": method, "seed": seed, **metrics}), flush=True)
            table.setdefault(method, []).append(metrics)
        command = f"python benchmarks/run.py study --data CUB --runs RUNS --methods {method} --seeds {arguments.seeds} "
        command += f"--epochs {arguments.epochs}" + "".join(f" --{name} {value}" for name, value in options.items())
        row = {
            "kind": "accuracy",
            "what": "study",
            "case": f"{method} from {taught}; CUB-10 test boxes",
            "model": f"{method} of arch lite" + (f", {arguments.epochs} epochs" if method != "bundled" else ""),
            "dtype": "float32",
            "photos": len(test),
            "metrics": _spread(table[method]),
            **environment(torch.device("cpu")),
            "command": command,
        }
        append(arguments.output, row)
    return 0


def _short(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    wanted = ("Top-1 Cls", "Top-1 Loc", "box_acc@0.5", "box_acc@0.7", "box_acc@0.9")
    return {f"{prefix} {name}": metrics[name] for name in wanted if name in metrics}


def _spread(runs: list[dict[str, float]]) -> dict[str, float]:
    """Mean over seeds, and the standard deviation as "± name"."""
    result = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        result[name] = round(statistics.mean(values), 2)
        if len(values) > 1:
            result[f"± {name}"] = round(statistics.stdev(values), 2)
    return result
