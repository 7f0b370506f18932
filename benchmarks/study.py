"""CAM, SAT and GTFormer, trained from labels under one recipe, alone and matched with SAM-lite's masks.

    python benchmarks/run.py study --data DATA --runs RUNS [--seeds 0,1,2] [--epochs 25] [--images-per-class K]

DATA is a CUB-200-2011 folder, whole or cut to fewer classes. The networks are those of arch "lite": frozen
EfficientNet-Lite0 features, so that a CPU will do. A map's threshold is the best on the training photos' boxes, never
on those it is scored on. Runs that were interrupted go on.
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
    parser.add_argument("--output", type=Path, default=RESULTS / "accuracy.jsonl")


def trained(method: str, seed: int, data, run: Path, epochs: int) -> torch.nn.Module:
    """The method's model after training, in evaluation mode, as an images -> map and logits module."""
    from pro2sam_fast.eval.baselines import ClassActivation
    from pro2sam_fast.models.lite import load_lite
    from pro2sam_fast.models.trained import ModelSpec, build_trained, load_trained
    from pro2sam_fast.train.gtformer import TrainConfig, train_gtformer
    from pro2sam_fast.train.losses import LOSS_PRESETS

    preset = "default" if method == "gtformer" else method
    spec = ModelSpec("lite", tuple(data.class_names), preset)
    losses = replace(LOSS_PRESETS[preset], area_target=0.25)
    if not (run / "last.safetensors").exists():
        torch.manual_seed(seed)
        model = build_trained(spec, trunk=load_lite().classifier.trunk)
        config = TrainConfig(**{**RECIPE, "epochs": epochs}, seed=seed, losses=losses)
        train_gtformer(model, data, run, config, metadata=spec.metadata())
    model = load_trained(run / "last.safetensors")[0]
    return (ClassActivation(model) if method == "cam" else model).eval()


def run(arguments: argparse.Namespace) -> int:
    from pro2sam_fast.api import load_sam
    from pro2sam_fast.data.localization import CUB200
    from pro2sam_fast.eval.gallery_cache import GalleryCache
    from pro2sam_fast.eval.maps import evaluate_maps, predict_maps
    from pro2sam_fast.eval.masks import evaluate_masks
    from pro2sam_fast.generator import MaskGenerator

    train = CUB200(arguments.data, "train", images_per_class=arguments.images_per_class)
    boxed, test = CUB200(arguments.data, "train"), CUB200(arguments.data, "test")
    sam, options = load_sam()
    galleries = GalleryCache(MaskGenerator(sam, **options), arguments.runs / "galleries", options)
    shots = "" if arguments.images_per_class is None else f", {arguments.images_per_class} photos a class"
    table: dict[str, list[dict[str, float]]] = {}
    for method in arguments.methods.split(","):
        for seed in map(int, arguments.seeds.split(",")):
            folder = arguments.runs / f"{method}{'' if not shots else f'_{arguments.images_per_class}'}_{seed}"
            model = trained(method, seed, train, folder, arguments.epochs)
            threshold = evaluate_maps(predict_maps(model, boxed), boxed).threshold
            report = evaluate_maps(predict_maps(model, test), test, selection="val_split", threshold=threshold)
            maps = predict_maps(model, test, "direct224")
            matched = evaluate_masks(maps, test, galleries, sam_input="native")
            metrics = {"threshold": threshold, **_short(report.metrics, "map"), **_short(matched.metrics, "matched")}
            print(json.dumps({"method": method, "seed": seed, **metrics}), flush=True)
            table.setdefault(method, []).append(metrics)
        command = f"python benchmarks/run.py study --data CUB --runs RUNS --methods {method} --seeds {arguments.seeds} "
        row = {
            "kind": "accuracy",
            "what": "study",
            "case": f"{method} from labels, CUB-10 test boxes{shots}",
            "model": f"{method} of arch lite, {arguments.epochs} epochs",
            "dtype": "float32",
            "photos": len(test),
            "metrics": _spread(table[method]),
            **environment(torch.device("cpu")),
            "command": command
            + f"--epochs {arguments.epochs}"
            + (f" --images-per-class {arguments.images_per_class}" if shots else ""),
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
