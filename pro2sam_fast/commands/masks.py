"""`pro2sam-fast masks`."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from .. import __version__
from ..errors import ImageReadError
from ..io import Source, read_sources
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
    import numpy as np

    from ..gallery import MaskGallery
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

    from ..sharding import photos_at_a_time, workers

    where = devices(arguments)
    size = 1 if where[0] == "cpu" else photos_at_a_time(where, "auto", len(sources))
    build = functools.partial(_build, model, options, limit, arguments.on_error)
    with workers(build, where, size) as (segmented, _):
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
    from ..background import attempted
    from ..gallery import galleries_to_host
    from ..memory import results_or_reasons
    from ..predictor import photos_per_pass
    from ..transfer import queues

    def prepared(image: np.ndarray) -> tuple[np.ndarray, Any]:
        return image, attempted(generator.prepare, image) if ahead else None

    def galleries(photos: Sequence[tuple[np.ndarray, Any]]) -> list[MaskGallery]:
        return galleries_to_host(generator.generate(*map(list, zip(*photos, strict=True))))

    device = generator.sam.device
    size = photos_per_pass(device)
    # a GPU leaves the processor time to read and prepare the next pass
    ahead = size if queues(device) else 0
    photos = read_sources(sources, limit, ahead, prepared)
    while chunk := list(itertools.islice(photos, size)):
        readable = [photo for _, photo, _ in chunk if not isinstance(photo, ImageReadError)]
        started = time.perf_counter()
        found = iter(results_or_reasons(galleries, readable, on_error == "raise"))
        share = 1e3 * (time.perf_counter() - started) / max(len(readable), 1)
        for _, photo, read in chunk:
            if isinstance(photo, ImageReadError):
                if on_error == "raise":
                    raise photo
                yield None, str(photo)
                continue
            gallery = next(found)
            if isinstance(gallery, str):
                yield None, gallery
            else:
                yield (photo[0], gallery, {"read": read, "gallery": share, "total": read + share}), None
