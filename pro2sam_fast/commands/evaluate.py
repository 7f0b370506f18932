"""`pro2sam-fast evaluate`."""

from __future__ import annotations

import sys

from jsonargparse import ArgumentParser, Namespace

from ..errors import ConfigError
from .parser import OK, Parser, number, tell, whole, yes_no
from .runs import (
    GENERATOR_OPTIONS,
    add_generator_options,
    add_sam_options,
    chosen,
    names,
    number_or,
    numbers,
    place_data,
)

__all__ = ["HELP", "parser", "run"]

HELP = "measure localization accuracy on photos with boxes"

_DESCRIPTION = """Measure localization accuracy on photos with annotated boxes, under named protocols.

Coarse maps are scored alone and, with --masks, matched with SAM's masks. DIR gets report.md (every protocol spelled
out, the oracle threshold beside fixed ones), summary.json, photos_*.csv with a row a photo from which all numbers can
be computed again, plots, and a contact sheet of the best and worst photos. Mask galleries are kept in --galleries, so
that a second study of the same photos takes seconds. A model of other classes than the data's is measured by its boxes
alone, whatever the class; a baseline's maps are then of the class that it finds likeliest. Photos with masks instead of
boxes (OpenImages) get PxAP. Under torchrun all GPUs share the photos.

examples:
  pro2sam-fast evaluate --data cub --root CUB_200_2011 --coarse runs/cub --output eval
  pro2sam-fast evaluate --data CUB_200_2011 --coarse runs/one,cam:runs/one --output eval
  pro2sam-fast evaluate --data cub --root CUB_200_2011 --masks --galleries galleries --output eval
  pro2sam-fast evaluate --data ilsvrc --root imagenet --boxes val_xml --coarse gtformer.pth --protocol sat,wsoleval \\
      --masks --sam vit_h --sam-checkpoint sam_vit_h_4b8939.pth --sam-input 224 --output eval
  pro2sam-fast evaluate --data folder --root photos --boxes boxes.csv --masks --ablation matching --output eval
  pro2sam-fast evaluate --data CUB_200_2011 --coarse runs/a,runs/b --ablation losses --save-maps --output eval
  pro2sam-fast evaluate --data CUB_200_2011 --coarse maps:eval/maps/runs-a --iou exact --output again
"""

_OF_MASKS, _OF_MODELS = ("matching", "threshold", "points"), ("attention", "losses", "tokens")


def parser() -> ArgumentParser:
    parser = Parser(
        description=_DESCRIPTION,
        usage="pro2sam-fast evaluate --data NAME --root DIR --output DIR [options]",
    )
    parser.add_argument(
        "--data", type=str, metavar="NAME", help="cub, ilsvrc, wsol, folder, flat, voc, coco, or its folder"
    )
    parser.add_argument("--root", type=str, metavar="DIR", help="folder of the data set, if --data names its kind")
    parser.add_argument("--output", type=str, metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--boxes", type=str, metavar="PATH", help="annotations: CSV, COCO file, XML folder; folder of the masks (wsol)"
    )
    parser.add_argument("--val-list", type=str, metavar="FILE", help="labels: val_list.txt or the devkit's (ilsvrc)")
    parser.add_argument("--metadata", type=str, metavar="DIR", help="metadata folder of wsolevaluation (wsol)")
    parser.add_argument("--device", type=str, default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--batch-size", type=whole, default=32, metavar="N", help="photos a pass")
    parser.add_argument("--parquet", action=yes_no(), default=False, help="photos_*.parquet beside the CSV files")
    group = parser.add_argument_group("maps")
    group.add_argument(
        "--coarse",
        type=str,
        default="lite",
        metavar="NAMES",
        help="comma-separated: 'lite' (bundled), 'cam' (its trunk's class activation map), a run folder or weights of "
        "pro2sam-fast train, an official GTFormer or SAT checkpoint; cam:, gradcam: or rollout: before one of these "
        "gives that baseline of it (of the annotated class where the data's classes are the model's); maps:FOLDER are "
        "stored ones, <photo id>.npy, as --save-maps and wsolevaluation write them",
    )
    group.add_argument("--protocol", type=str, default="sat", metavar="NAMES", help="sat, direct224, wsoleval, tscam")
    group.add_argument(
        "--threshold", type=number, metavar="T", help="chosen on other photos; default: the best on these, an oracle"
    )
    group.add_argument(
        "--fixed", type=str, default="0.3,0.4", metavar="LIST", help="thresholds to report beside it (0.3,0.4)"
    )
    group.add_argument("--iou-set", type=str, default="0.5,0.7,0.9", metavar="LIST", help="IoUs of box accuracy")
    group.add_argument(
        "--iou", choices=["plus1", "exact"], default="plus1", help="widths x1 - x0 + 1 as in published code, or x1 - x0"
    )
    group.add_argument("--save-maps", action=yes_no(), default=False, help="keep them, for --coarse maps:DIR/maps/NAME")
    group.add_argument("--val-root", type=str, metavar="DIR", help="photos to choose the threshold on (folder, wsol)")
    group.add_argument("--val-boxes", type=str, metavar="PATH", help="their boxes (folder)")
    group.add_argument("--val-metadata", type=str, metavar="DIR", help="their metadata folder (wsol)")
    group.add_argument(
        "--ten-crop", action=yes_no(), default=None, help="classify with ten crops; default: for cub, as published"
    )
    group.add_argument(
        "--logits", type=str, metavar="FILE", help="class scores of another model: .npz with ids, logits"
    )
    group.add_argument("--classifier", type=str, metavar="NAME", help="timm model for the class, with its own weights")
    group = parser.add_argument_group("masks")
    group.add_argument("--masks", action=yes_no(), default=False, help="match the maps with SAM's masks")
    group.add_argument("--galleries", type=str, metavar="DIR", help="keep mask galleries there")
    group.add_argument(
        "--sam-input", type=str, default="224", metavar="N", help="'native', or photos squeezed to N x N"
    )
    group.add_argument(
        "--ablation",
        type=str,
        default="",
        metavar="NAMES",
        help=f"comma-separated: {', '.join(_OF_MASKS)} of the masks; {', '.join(_OF_MODELS)} list the coarse models",
    )
    add_sam_options(group)
    add_generator_options(parser)
    return parser


def run(arguments: Namespace) -> int:
    for name in ("data", "output"):
        if arguments[name] is None:
            raise ConfigError(f"--{name} is missing")
    place_data(arguments)
    from ..data.localization import open_dataset
    from ..eval.coarse import external_scores
    from ..eval.ranks import ranks, under_torchrun
    from ..eval.study import Study
    from ..pipelines.pro2sam import resolve_device

    files = {name: arguments[name] for name in ("boxes", "val_list", "metadata")}
    data = open_dataset(arguments.data, arguments.root, False, **files)
    val = None
    if any(arguments[name] is not None for name in ("val_root", "val_boxes", "val_metadata")):
        if arguments.data not in ("folder", "wsol"):
            raise ConfigError(
                f"{arguments.data} has no other photos with boxes; take its wsol metadata, or --threshold"
            )
        val = open_dataset(
            arguments.data,
            arguments.val_root or arguments.root,
            False,
            boxes=arguments.val_boxes,
            metadata=arguments.val_metadata,
            class_names=data.class_names,
        )
    ablations = names(arguments.ablation) if arguments.ablation else []
    if unknown := [name for name in ablations if name not in _OF_MASKS + _OF_MODELS]:
        raise ConfigError(f"unknown ablation {unknown[0]!r}, choose from {', '.join(_OF_MASKS + _OF_MODELS)}")
    if set(ablations) & set(_OF_MASKS) and not arguments.masks:
        raise ConfigError(f"--ablation {', '.join(_OF_MASKS)} needs --masks")
    sam_input = number_or(arguments.sam_input, "native", "--sam-input")
    with under_torchrun(resolve_device(arguments.device)) as device:
        study = Study(
            data,
            arguments.output,
            protocols=names(arguments.protocol),
            threshold=arguments.threshold,
            val=val,
            fixed=numbers(arguments, "fixed"),
            ablations=ablations,
            iou_set=numbers(arguments, "iou_set"),
            iou=arguments.iou,
            save_maps=arguments.save_maps,
            parquet=arguments.parquet,
            batch_size=arguments.batch_size,
            ten_crop=arguments.data == "cub" if arguments.ten_crop is None else arguments.ten_crop,
            device=device,
            scores=external_scores(data, arguments.logits, arguments.classifier, device),
        )
        for coarse in names(arguments.coarse):
            study.add_maps(coarse)
        if arguments.masks:
            study.add_masks(
                arguments.sam,
                arguments.sam_checkpoint,
                chosen(arguments, GENERATOR_OPTIONS),
                sam_input=sam_input,
                galleries=arguments.galleries,
            )
        if ranks()[0] == 0:
            tell(str(study.write()), sys.stdout)
    return OK
