"""`pro2sam-fast masks`."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from .. import __version__
from ..errors import Pro2SamError
from ..io import Source
from ..writers import GalleryWriter
from .parser import Parser, yes_no
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
)

if TYPE_CHECKING:
    from ..generator import MaskGenerator

__all__ = ["HELP", "parser", "run"]

HELP = "segment everything in every photo"

_DESCRIPTION = """Segment everything in every photo.

DIR/masks.jsonl gets one record per input with all its masks (COCO RLE) and their scores; DIR/galleries a picture per
photo with every mask in its own colour.

examples:
  pro2sam-fast masks photos --output out
  pro2sam-fast masks street.jpg --output out --points-per-side 64 --min-mask-region-area 100

exit status: 0 all photos done, 1 some were skipped or the run failed, 2 wrong usage, 130 interrupted
"""


def parser() -> ArgumentParser:
    parser = Parser(
        description=_DESCRIPTION,
        usage="pro2sam-fast masks SOURCE... --output DIR [options]",
    )
    add_run_options(parser)
    group = parser.add_argument_group("results")
    group.add_argument(
        "--overlay", action=yes_no(), default=True, help="write a picture per photo to DIR/galleries (default: yes)"
    )
    group = parser.add_argument_group("model")
    add_sam_options(group)
    add_generator_options(parser)
    return parser


def run(arguments: Namespace) -> int:
    sources = expand(arguments)
    model = {name: arguments[name] for name in ("sam", "sam_checkpoint")}
    options = chosen(arguments, GENERATOR_OPTIONS)
    limit = max_pixels(arguments)

    from ..sharding import workers

    where = devices(arguments)
    build = functools.partial(_build, model, options, limit, arguments.on_error)
    with workers(build, where, 1) as (segmented, _):
        writer = GalleryWriter(
            arguments.output,
            overlay=arguments.overlay,
            config={"version": __version__, **model, **options},
            resume=arguments.resume,
            inputs=[source.path for source in sources],
        )
        progress = Progress(len(sources), len(writer.log), arguments.quiet)
        with writer, progress:
            remaining = list(writer.remaining(sources))
            for source, (found, error) in zip(remaining, segmented(remaining)):
                if error is None:
                    writer.write(source, *found)
                else:
                    writer.write_error(source, error)
                progress.advance(error)
    return finish(progress, writer.log.records(), arguments.output)


def _build(model: dict[str, Any], options: dict[str, Any], limit: int | None, on_error: str, device: str):
    from ..api import load_sam
    from ..generator import MaskGenerator
    from ..pipelines.pro2sam import resolve_device

    sam, defaults = load_sam(model["sam"], model["sam_checkpoint"])
    generator = MaskGenerator(sam.to(resolve_device(device)), **{**defaults, **options})
    return functools.partial(_segment, generator, limit, on_error), None


def _segment(generator: MaskGenerator, limit: int | None, on_error: str, sources: Iterable[Source]) -> Iterator:
    """For each photo ((pixels, gallery, milliseconds), None), or (None, why there is no gallery)."""
    from ..memory import is_out_of_memory

    for source in sources:
        started = time.perf_counter()
        try:
            image = source.read(limit)
            read = time.perf_counter()
            (gallery,) = generator.generate([image])
        except (Pro2SamError, MemoryError, RuntimeError) as error:
            short = is_out_of_memory(error)
            if on_error == "raise" or not (short or isinstance(error, Pro2SamError)):
                raise
            yield None, "the photo doesn't fit the memory" if short else str(error)
            continue
        done = time.perf_counter()
        speed = {"read": read - started, "gallery": done - read, "total": done - started}
        yield (image, gallery.to("cpu"), {stage: 1e3 * value for stage, value in speed.items()}), None
