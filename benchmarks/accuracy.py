"""Accuracy of the bundled `lite` model (or of a model folder) on annotated photos, as JSON rows.

    python benchmarks/run.py accuracy --data DATA [--model lite] [--parts cub,cam,clicks,regions,things,labels]
        [--options '{"border_sigma": null}']

DATA holds cub10/CUB_200_2011, coco200, bsds500 and imagenet1k_one_per_class (see pro2sam_fast/weights/README.md). Rows
are appended to benchmarks/results/accuracy.jsonl, or to --output, and name the weights by their SHA-256.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch
from rows import RESULTS, append, environment

import pro2sam_fast
from pro2sam_fast.models.lite import LabelHead, weights_file
from pro2sam_fast.models.trunk import load_pretrained_trunk
from pro2sam_fast.pipelines.pro2sam import PhotoNet

PARTS = ("cub", "cam", "clicks", "regions", "things", "labels")


def measure(part: str, localizer, data: Path, split: str) -> tuple[str, int, dict[str, float]]:
    """Case, number of photos, metrics."""
    from pro2sam_fast.eval import lite_accuracy as accuracy  # needs scipy, which the other kinds do without

    if part == "cub":
        photos = accuracy.cub_photos(data / "cub10/CUB_200_2011", split)
        results = localizer([str(p.path) for p in photos])
        metrics = accuracy.localizer_accuracy(results, photos)
        metrics |= {f"source_{s}": sum(r.source == s for r in results) for s in ("sam", "coarse", "full")}
        metrics["median_ms"] = float(torch.tensor([r.speed["total"] for r in results]).median())
        return f"GT-known, CUB-10 {split} boxes", len(photos), metrics
    if part == "cam":
        photos = accuracy.cub_photos(data / "cub10/CUB_200_2011", split)
        metrics = accuracy.cam_accuracy(localizer, photos)
        return f"GT-known, CUB-10 {split} boxes, plain CAM of the trunk at 0.3", len(photos), metrics
    coco_split = "val" if split == "test" else "train"
    if part == "labels":
        paths = sorted((data / "imagenet1k_one_per_class").iterdir())
        heads = {"top1": localizer.classifier, "original_top1": PhotoNet(LabelHead(load_pretrained_trunk()))}
        metrics = {name: accuracy.label_accuracy(head, paths) for name, head in heads.items()}
        return "label, one photo for each ImageNet class", len(paths), metrics
    if part == "regions":
        photos = accuracy.bsds_segments(data / "bsds500", coco_split)
        metrics = accuracy.click_accuracy(localizer.sam, photos)
        return f"one centre click, BSDS {coco_split} segments", len(photos), metrics
    photos = accuracy.coco_things(data / "coco200", coco_split)
    if part == "clicks":
        metrics = accuracy.click_accuracy(localizer.sam, photos)
        return f"one centre click, COCO {coco_split} things", len(photos), metrics
    photos = [(photo, things) for photo, things in photos if things]
    results = localizer([photo.image for photo, _ in photos])
    return f"box hits a thing, COCO {coco_split}", len(photos), {"hit@0.5": accuracy.things_hit(results, photos)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="lite")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--options", type=json.loads, default={}, help="of pro2sam_fast.load, as JSON")
    parser.add_argument("--output", type=Path, default=RESULTS / "accuracy.jsonl")


def run(arguments: argparse.Namespace) -> int:
    device = torch.device("cpu")
    weights = weights_file(None if arguments.model == "lite" else arguments.model)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    localizer = pro2sam_fast.load(arguments.model, device=device, dtype=arguments.dtype, **arguments.options)
    options = json.dumps(arguments.options)
    with_options = f" --options '{options}'" if arguments.options else ""
    for part in arguments.parts.split(","):
        case, photos, metrics = measure(part, localizer, arguments.data, arguments.split)
        if arguments.options:
            case += f", {options}"
        row = {
            "kind": "accuracy",
            "what": "accuracy",
            "case": case,
            "model": arguments.model,
            "weights": digest,
            "dtype": arguments.dtype,
            "options": arguments.options,
            "photos": photos,
            "metrics": {name: round(value, 4) for name, value in metrics.items()},
            **environment(device),
            "command": f"python benchmarks/run.py accuracy --data DATA --model {arguments.model} --parts {part} "
            f"--split {arguments.split} --dtype {arguments.dtype}{with_options}",
        }
        print(json.dumps(row), flush=True)
        append(arguments.output, row)
    return 0
