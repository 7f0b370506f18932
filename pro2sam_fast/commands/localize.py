"""`pro2sam-fast localize`."""

from __future__ import annotations

import functools
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from .. import __version__
from ..writers import FORMATS, LocalizationWriter, check_formats
from .parser import Parser, number, true_or_false, yes_no
from .runs import (
    GENERATOR_OPTIONS,
    Progress,
    add_generator_options,
    add_run_options,
    add_sam_options,
    chosen,
    devices,
    expand,
    finish,
    max_pixels,
    names,
    number_or,
)

__all__ = ["HELP", "parser", "run"]

HELP = "find the object in every photo"

_DESCRIPTION = """Find the object in every photo and write it to a folder.

DIR/localizations.jsonl gets one record per input, in input order; DIR/overlays a picture per photo. An interrupted run
keeps its finished photos: repeat the command with --resume.

examples:
  pro2sam-fast localize photos --output out
  pro2sam-fast localize cat.jpg 'dogs/*.png' --output out --format coco,voc,yolo,labelstudio
  pro2sam-fast localize photos --output out --coarse gtformer.pth --sam vit_h --sam-checkpoint sam_vit_h_4b8939.pth
  pro2sam-fast localize --config run.yaml

exit status: 0 all photos done, 1 some were skipped or the run failed, 2 wrong usage, 130 interrupted
"""

_MATCHING_OPTIONS = ("prompt_threshold", "match_resolution", "drop_full_frame", "border_sigma", "min_score", "box")


def parser() -> ArgumentParser:
    parser = Parser(
        description=_DESCRIPTION,
        usage="pro2sam-fast localize SOURCE... --output DIR [options]",
    )
    add_run_options(parser).add_argument(
        "--batch-size", type=str, default="auto", metavar="N", help="photos per pass, or auto"
    )
    group = parser.add_argument_group("results")
    group.add_argument(
        "--format",
        type=str,
        default="jsonl",
        metavar="NAMES",
        help=f"comma-separated, out of {', '.join(FORMATS)}; jsonl is always written",
    )
    group.add_argument(
        "--overlay", action=yes_no(), default=True, help="write a picture per photo to DIR/overlays (default: yes)"
    )
    group.add_argument("--masks", action=yes_no(), default=False, help="write masks as PNG files to DIR/masks")
    group = parser.add_argument_group("model")
    group.add_argument("--model", type=str, default="lite", metavar="NAME", help="'lite' (bundled) or a model folder")
    group.add_argument(
        "--coarse",
        type=str,
        metavar="FILE",
        help="find the object's rough place with this official GTFormer or SAT checkpoint instead",
    )
    add_sam_options(group)
    group.add_argument(
        "--sam-input",
        type=str,
        default="native",
        metavar="N",
        help="what SAM sees: the photo as it is ('native'), or squeezed to N x N pixels (224 in the paper)",
    )
    group = parser.add_argument_group("matching")
    group.add_argument(
        "--prompt-threshold",
        type=number,
        metavar="X",
        help="what the coarse map (0 to 1) must exceed to count as object",
    )
    group.add_argument(
        "--match-resolution",
        choices=["mask", "official14"],
        help="compare at the photo's resolution, or on a 14 x 14 grid as the authors' code does",
    )
    group.add_argument(
        "--drop-full-frame",
        type=true_or_false,
        metavar="{true,false}",
        help="never choose a mask that reaches all four borders",
    )
    group.add_argument(
        "--border-sigma",
        type=number,
        metavar="X",
        help="the smaller, the less are masks chosen that lie along the photo's borders (1.5 in 'lite', else off)",
    )
    group.add_argument(
        "--min-score", type=number, metavar="X", help="use the coarse map itself if no mask matches better than this"
    )
    group.add_argument(
        "--box",
        choices=["otsu_union", "largest"],
        help="box around all regions of the mask, or its largest one",
    )
    add_generator_options(parser)
    return parser


def run(arguments: Namespace) -> int:
    formats = check_formats(names(arguments.format))
    sources = expand(arguments)
    model = {name: arguments[name] for name in ("model", "coarse", "sam", "sam_checkpoint")}
    options = chosen(arguments, (*GENERATOR_OPTIONS, *_MATCHING_OPTIONS))
    options["sam_input"] = number_or(arguments.sam_input, "native", "--sam-input")
    options["max_pixels"] = max_pixels(arguments)
    batch_size = number_or(arguments.batch_size, "auto", "--batch-size")

    from ..sharding import photos_at_a_time, workers

    where = devices(arguments)
    calls = {"batch_size": batch_size, "on_error": arguments.on_error, "stream": True}
    build = functools.partial(_build, model, options, calls)
    with workers(build, where, photos_at_a_time(where, batch_size, len(sources))) as (localized, class_names):
        writer = LocalizationWriter(
            arguments.output,
            formats=formats,
            overlay=arguments.overlay,
            masks=arguments.masks,
            config={"version": __version__, **model, **options},
            resume=arguments.resume,
            class_names=class_names,
            inputs=[source.path for source in sources],
        )
        progress = Progress(len(sources), len(writer.log), arguments.quiet)
        with writer, progress:
            for result in localized(writer.remaining(sources)):
                writer.write(result)
                progress.advance(result.error)
    return finish(progress, writer.log.records(), arguments.output)


def _build(model: dict[str, Any], options: dict[str, Any], calls: dict[str, Any], device: str):
    from ..api import load

    name, *others = model.values()
    pair = dict(zip(("coarse", "sam", "sam_checkpoint"), others, strict=True))
    localizer = load(name, **pair, device=device, candidates=0, **options)
    return functools.partial(localizer, **calls), localizer.class_names
