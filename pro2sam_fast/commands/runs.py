"""What the commands that run over photos share: options, inputs, progress and summary."""

from __future__ import annotations

import os
import sys
import time
from argparse import SUPPRESS
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from ..errors import ConfigError
from ..io import MAX_PIXELS, Source, iter_sources
from ..writers import OUTPUT_FOLDERS
from .parser import INCOMPLETE, OK, number, plain, tell, whole, yes_no

__all__ = [
    "GENERATOR_OPTIONS",
    "Progress",
    "add_generator_options",
    "add_run_options",
    "add_sam_options",
    "chosen",
    "devices",
    "expand",
    "finish",
    "max_pixels",
    "names",
    "number_or",
    "numbers",
    "place_data",
]

_SHOWN_SKIPS = 10


def add_run_options(parser: ArgumentParser):
    """Returns the group, for what one command alone takes."""
    parser.add_argument("--config", action=ActionConfigFile, metavar="FILE", help="YAML file with options by name")
    parser.add_argument(
        "source",
        type=str,
        nargs="*",
        default=SUPPRESS,  # without this no SOURCE would wipe out the config file's
        metavar="SOURCE",
        help="photo, folder (searched recursively) or quoted glob",
    )
    group = parser.add_argument_group("run")
    group.add_argument("--output", type=str, metavar="DIR", help="folder for the results, made if missing")
    group.add_argument(
        "--on-error",
        choices=["skip", "raise"],
        default="skip",
        help="at a photo that can't be used: record the error and go on, or stop",
    )
    group.add_argument("--resume", action=yes_no(), default=False, help="continue the interrupted run in DIR")
    group.add_argument(
        "--device", type=str, default="auto", metavar="NAME", help="auto (a GPU if there is one), cpu, cuda or cuda:N"
    )
    group.add_argument(
        "--devices", type=str, metavar="LIST", help="several GPUs that share the photos, as 0,1: a process for each"
    )
    group.add_argument(
        "--max-pixels",
        type=whole,
        default=MAX_PIXELS,
        metavar="N",
        help="refuse files with more pixels; 0 for no limit",
    )
    group.add_argument("--quiet", action=yes_no(), default=False, help="no progress bar")
    return group


def add_sam_options(group) -> None:
    group.add_argument(
        "--sam",
        choices=["lite", "vit_b", "vit_l", "vit_h"],
        help="make the masks with this SAM instead; vit_* need --sam-checkpoint",
    )
    group.add_argument(
        "--sam-checkpoint",
        type=str,
        metavar="FILE",
        help="weights for --sam, or 'official' to download them (0.4 to 2.6 GB)",
    )


GENERATOR_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "points_per_side": ({"type": whole, "metavar": "N"}, "ask SAM at N x N points; more find smaller things, slower"),
    "points_per_batch": ({"type": whole, "metavar": "N"}, "points at a time, a bound on memory"),
    "pred_iou_thresh": ({"type": number, "metavar": "X"}, "keep masks that SAM rates above this quality (0 to 1)"),
    "stability_score_thresh": ({"type": number, "metavar": "X"}, "keep masks at least this stable (0 to 1)"),
    "stability_score_offset": ({"type": number, "metavar": "X"}, "logit shift that stability is measured with"),
    "box_nms_thresh": (
        {"type": number, "metavar": "X"},
        "of two masks whose boxes overlap more (IoU), keep the better",
    ),
    "crop_n_layers": (
        {"type": whole, "metavar": "N"},
        "also segment N layers of ever smaller crops, for small things",
    ),
    "min_mask_region_area": ({"type": whole, "metavar": "N"}, "fill holes and drop islands of fewer pixels"),
    "dtype": ({"choices": ["float32", "bfloat16", "float16"]}, "precision of the networks"),
}


def add_generator_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("mask gallery", "Which masks there are to choose from. Defaults are the model's.")
    for name, (kind, text) in GENERATOR_OPTIONS.items():
        group.add_argument(f"--{name.replace('_', '-')}", help=text, **kind)


def expand(arguments: Namespace) -> list[Source]:
    """All inputs. A folder without photos or a glob without match is wrong usage, found before anything is loaded.

    Files that searching finds below the folders this program writes are its own outputs and left out.
    """
    if not arguments.get("source"):
        raise ConfigError("give at least one SOURCE: a photo, a folder or a quoted glob")
    if not arguments.output:
        raise ConfigError("give a folder for the results with --output DIR")
    outputs = tuple(os.path.join(os.path.realpath(arguments.output), name, "") for name in OUTPUT_FOLDERS)
    explicit = set(arguments.source)
    sources, left_out = [], 0
    for source in iter_sources(arguments.source):
        if source.error is not None:
            raise ConfigError(str(source.error))
        if source.path not in explicit and os.path.realpath(source.path).startswith(outputs):
            left_out += 1
        else:
            sources.append(source)
    if left_out:
        tell(f"left out {left_out} pictures below '{arguments.output}': they are outputs", sys.stderr)
    return sources


def chosen(arguments: Namespace, names) -> dict[str, Any]:
    """The options that were given; the others keep the model's defaults."""
    return {name: arguments[name] for name in names if arguments[name] is not None}


def devices(arguments: Namespace) -> list[str]:
    """The device, or those that share the photos."""
    if arguments.devices is None:
        return [arguments.device]
    if arguments.device != "auto":
        raise ConfigError("give --device or --devices, not both")
    from ..sharding import check_devices

    return check_devices(names(arguments.devices))


def names(text: str) -> list[str]:
    return [name for name in map(str.strip, text.split(",")) if name]


def numbers(arguments: Namespace, option: str) -> list[float]:
    """The comma-separated numbers of an option."""
    try:
        return [number(text) for text in names(arguments[option])]
    except ValueError as error:
        raise ConfigError(f"--{option.replace('_', '-')}: {error}") from None


def place_data(arguments: Namespace) -> None:
    """``--data FOLDER`` without ``--root`` is that folder, of the kind that its layout shows."""
    if arguments.root is not None:
        return
    if not os.path.isdir(arguments.data):
        raise ConfigError(f"--root DIR is missing, the folder of the data set; '{arguments.data}' is none")
    from ..data.localization import kind_of

    arguments.root, arguments.data = arguments.data, kind_of(arguments.data)


def number_or(text: str, word: str, option: str) -> int | str:
    if text == word:
        return text
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise ConfigError(f"{option} must be '{word}' or a whole number of at least 1, not '{text}'")


def max_pixels(arguments: Namespace) -> int | None:
    if arguments.max_pixels < 0:
        raise ConfigError(f"--max-pixels must be 0 (no limit) or a number of pixels, not {arguments.max_pixels}")
    return arguments.max_pixels or None


class Progress:
    """Progress bar with photos/s on stderr, and what was skipped; a context manager."""

    def __init__(self, total: int, done: int, quiet: bool):
        from tqdm import tqdm

        self.done, self.skipped = 0, 0
        self._start = time.perf_counter()
        self._bar = tqdm(total=total, initial=done, unit="photo", disable=quiet, file=sys.stderr, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()

    def advance(self, error: str | None) -> None:
        self.done += 1
        if error is not None:
            self.skipped += 1
            if self.skipped <= _SHOWN_SKIPS:
                self._bar.write(plain(f"skipped: {error}", sys.stderr), file=sys.stderr)
            elif self.skipped == _SHOWN_SKIPS + 1:
                self._bar.write("more photos are being skipped, see the records' error", file=sys.stderr)
        self._bar.update()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start


def finish(run: Progress, records, output: str) -> int:
    """Print the summary. The status counts photos skipped by the interrupted part of a resumed run as well."""
    errors = [record["error"] is not None for record in records]
    rate = f"{run.done / run.seconds:.2f} photos/s" if run.done else "nothing left to do"
    skipped = sum(errors)
    summary = f"{len(errors) - skipped} of {len(errors)} photos done, {skipped} skipped ({rate}); results in {output}"
    tell(summary, sys.stdout)
    return INCOMPLETE if any(errors) else OK
