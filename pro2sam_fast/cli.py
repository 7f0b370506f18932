"""The command `pro2sam-fast`: localize, masks, doctor, train."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import yaml
from jsonargparse import (
    ActionConfigFile,
    ActionYesNo,
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
    get_loader,
    set_loader,
)

from . import __version__
from .errors import ConfigError, Pro2SamError
from .io import MAX_PIXELS, Source, iter_sources
from .writers import FORMATS, OUTPUT_FOLDERS, GalleryWriter, LocalizationWriter, check_formats

__all__ = ["main"]

OK, INCOMPLETE, USAGE, INTERRUPTED = 0, 1, 2, 130

_DESCRIPTION = """Find the object in photos: box, pixel mask and label, without a click.

examples:
  pro2sam-fast localize photos --output out
  pro2sam-fast localize 'photos/*.jpg' --output out --format coco,yolo --masks
  pro2sam-fast masks photo.jpg --output out
  pro2sam-fast doctor
"""

_LOCALIZE = """Find the object in every photo and write it to a folder.

DIR/localizations.jsonl gets one record per input, in input order; DIR/overlays a picture per photo. An interrupted run
keeps its finished photos: repeat the command with --resume.

examples:
  pro2sam-fast localize photos --output out
  pro2sam-fast localize cat.jpg 'dogs/*.png' --output out --format coco,voc,yolo,labelstudio
  pro2sam-fast localize photos --output out --coarse gtformer.pth --sam vit_h --sam-checkpoint sam_vit_h_4b8939.pth
  pro2sam-fast localize --config run.yaml

exit status: 0 all photos done, 1 some were skipped or the run failed, 2 wrong usage, 130 interrupted
"""

_MASKS = """Segment everything in every photo.

DIR/masks.jsonl gets one record per input with all its masks (COCO RLE) and their scores; DIR/galleries a picture per
photo with every mask in its own colour.

examples:
  pro2sam-fast masks photos --output out
  pro2sam-fast masks street.jpg --output out --points-per-side 64 --min-mask-region-area 100

exit status: 0 all photos done, 1 some were skipped or the run failed, 2 wrong usage, 130 interrupted
"""

_TRAIN = """Train the bundled `lite` models again.

SAM-lite learns from photos with masks, GTFormer-lite from image-level labels alone. DATA holds coco200, bsds500, cub10,
caltech101_24, imagenet1k_one_per_class and foreground; the model card (pro2sam_fast/weights/README.md) describes them.
RUN/lite.safetensors is the result: `pro2sam-fast localize photos --model RUN --output out`. Hours on a CPU.
Needs: pip install "pro2sam-fast[train]"

example:
  pro2sam-fast train lite --data data --run runs/lite
"""

_SHOWN_SKIPS = 10


class _Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help as written: line breaks kept, choices and defaults shown where they say something, no Python types."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"max_help_position": 36, "width": 110, **kwargs})

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        if not default or default == argparse.SUPPRESS or not isinstance(default, (str, int)) or default is True:
            return text
        return f"{text} (default: %(default)s)"


class _Parser(ArgumentParser):
    """Says in one sentence what is wrong with the command line or the configuration file."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=_Help, parser_mode=_CONFIG_MODE, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = " ".join(message.split()).rstrip(".")
        message = re.sub(r'Parser key "([\w.]+)"', lambda key: "--" + key[1].replace("_", "-"), message)
        message = re.sub("^Problems parsing config", "--config", message)
        program = self.prog.replace(" [options]", "")
        _tell(f"{program}: {message}; see {program} --help", sys.stderr)
        self.exit(USAGE)


class _BadValue(argparse.ArgumentTypeError, ValueError):
    """What an option's type raises: argparse and the configuration reader look for different classes."""


def _whole(value: Any) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise _BadValue(f"expected a whole number, not '{value}'") from None


def _number(value: Any) -> float:
    try:
        return float(str(value))
    except ValueError:
        raise _BadValue(f"expected a number, not '{value}'") from None


def _true_or_false(value: Any) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise _BadValue(f"expected true or false, not '{value}'")
    return str(value).lower() == "true"


_CONFIG_MODE = "pro2sam-fast"


def _load_yaml(text: str) -> Any:
    """YAML in which `source` may be one path instead of a list."""
    loaded = get_loader("yaml")(text)
    if isinstance(loaded, dict) and "source" in loaded:
        source = loaded["source"]
        loaded["source"] = source = [source] if isinstance(source, str) else source
        if not isinstance(source, list) or not all(isinstance(path, str) for path in source):
            raise ValueError("source must be a path or a list of paths")
    return loaded


set_loader(_CONFIG_MODE, _load_yaml, exceptions=(yaml.YAMLError, ValueError))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's) and return its exit status."""
    parser, run = _parsers()
    arguments = parser.parse_args(None if argv is None else list(argv))
    command = arguments.subcommand
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # damaged metadata, in photos that can be read
            return run[command](arguments[command])
    except KeyboardInterrupt:
        print("interrupted; finished photos are kept, continue with --resume", file=sys.stderr)
        return INTERRUPTED
    except ConfigError as error:
        _tell(f"pro2sam-fast {command}: {error}", sys.stderr)
        return USAGE
    except Pro2SamError as error:
        _tell(f"pro2sam-fast {command}: {error}", sys.stderr)
        return INCOMPLETE
    except OSError as error:
        where = f"'{error.filename}': " if error.filename else ""
        _tell(f"pro2sam-fast {command}: cannot write {where}{error.strerror or error}", sys.stderr)
        return INCOMPLETE


def _plain(text: str, stream) -> str:
    """One line that the stream can take, whatever characters file names bring."""
    text = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _tell(text: str, stream) -> None:
    print(_plain(text, stream), file=stream)


def _parsers() -> tuple[ArgumentParser, dict[str, Callable[[Namespace], int]]]:
    parser = _Parser(prog="pro2sam-fast", description=_DESCRIPTION, version=__version__, default_env=False)
    commands = parser.add_subcommands(required=True, dest="subcommand", metavar="COMMAND")
    commands.add_subcommand("localize", _localize_parser(), help="find the object in every photo")
    commands.add_subcommand("masks", _masks_parser(), help="segment everything in every photo")
    doctor = _Parser(description="Say which back ends loaded, which didn't and why.")
    commands.add_subcommand("doctor", doctor, help="say what runs on this machine")
    commands.add_subcommand("train", _train_parser(), help="train the bundled models again")
    return parser, {"localize": _localize, "masks": _masks, "doctor": _doctor, "train": _train}


def _localize_parser() -> ArgumentParser:
    parser = _Parser(
        description=_LOCALIZE,
        usage="pro2sam-fast localize SOURCE... --output DIR [options]",
    )
    _add_run_options(parser)
    group = parser.add_argument_group("results")
    group.add_argument(
        "--format",
        type=str,
        default="jsonl",
        metavar="NAMES",
        help=f"comma-separated, out of {', '.join(FORMATS)}; jsonl is always written",
    )
    group.add_argument(
        "--overlay", action=_yes_no(), default=True, help="write a picture per photo to DIR/overlays (default: yes)"
    )
    group.add_argument("--masks", action=_yes_no(), default=False, help="write masks as PNG files to DIR/masks")
    group = parser.add_argument_group("model")
    group.add_argument("--model", type=str, default="lite", metavar="NAME", help="'lite' (bundled) or a model folder")
    group.add_argument(
        "--coarse",
        type=str,
        metavar="FILE",
        help="find the object's rough place with this official GTFormer or SAT checkpoint instead",
    )
    _add_sam_options(group)
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
        type=_number,
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
        type=_true_or_false,
        metavar="{true,false}",
        help="never choose a mask that reaches all four borders",
    )
    group.add_argument(
        "--min-score", type=_number, metavar="X", help="use the coarse map itself if no mask matches better than this"
    )
    group.add_argument(
        "--box",
        choices=["otsu_union", "largest"],
        help="box around all regions of the mask, or its largest one",
    )
    _add_generator_options(parser)
    return parser


def _masks_parser() -> ArgumentParser:
    parser = _Parser(
        description=_MASKS,
        usage="pro2sam-fast masks SOURCE... --output DIR [options]",
    )
    _add_run_options(parser)
    group = parser.add_argument_group("results")
    group.add_argument(
        "--overlay", action=_yes_no(), default=True, help="write a picture per photo to DIR/galleries (default: yes)"
    )
    group = parser.add_argument_group("model")
    _add_sam_options(group)
    _add_generator_options(parser)
    return parser


def _train_parser() -> ArgumentParser:
    parser = _Parser(
        description=_TRAIN,
        usage="pro2sam-fast train lite --data DIR --run DIR [--stages NAMES]",
    )
    parser.add_argument("what", choices=["lite"], metavar="lite", help="the bundled GTFormer-lite and SAM-lite")
    parser.add_argument("--data", type=str, metavar="DIR", help="folder with the data sets")
    parser.add_argument("--run", type=str, metavar="DIR", help="folder for logs, checkpoints and the result")
    parser.add_argument(
        "--stages",
        type=str,
        default="sam,gtformer,bundle",
        metavar="NAMES",
        help="comma-separated, to run a part; an interrupted stage continues where it stopped",
    )
    parser.add_argument(
        "--start",
        type=str,
        metavar="NAME",
        help="begin SAM-lite with these weights: 'lite' (bundled) or a lite file or folder; random if not given",
    )
    return parser


def _yes_no() -> ActionYesNo:
    return ActionYesNo(yes_prefix="", no_prefix="no-")


def _add_run_options(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action=ActionConfigFile, metavar="FILE", help="YAML file with options by name")
    parser.add_argument(
        "source",
        type=str,
        nargs="*",
        default=argparse.SUPPRESS,  # without this no SOURCE would wipe out the config file's
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
    group.add_argument("--resume", action=_yes_no(), default=False, help="continue the interrupted run in DIR")
    group.add_argument(
        "--device", type=str, default="auto", metavar="NAME", help="auto (a GPU if there is one), cpu, cuda or cuda:N"
    )
    group.add_argument("--batch-size", type=str, default="auto", metavar="N", help="photos per pass, or auto")
    group.add_argument(
        "--max-pixels",
        type=_whole,
        default=MAX_PIXELS,
        metavar="N",
        help="refuse files with more pixels; 0 for no limit",
    )
    group.add_argument("--quiet", action=_yes_no(), default=False, help="no progress bar")


def _add_sam_options(group) -> None:
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


_GENERATOR_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "points_per_side": ({"type": _whole, "metavar": "N"}, "ask SAM at N x N points; more find smaller things, slower"),
    "points_per_batch": ({"type": _whole, "metavar": "N"}, "points at a time, a bound on memory"),
    "pred_iou_thresh": ({"type": _number, "metavar": "X"}, "keep masks that SAM rates above this quality (0 to 1)"),
    "stability_score_thresh": ({"type": _number, "metavar": "X"}, "keep masks at least this stable (0 to 1)"),
    "stability_score_offset": ({"type": _number, "metavar": "X"}, "logit shift that stability is measured with"),
    "box_nms_thresh": (
        {"type": _number, "metavar": "X"},
        "of two masks whose boxes overlap more (IoU), keep the better",
    ),
    "crop_n_layers": (
        {"type": _whole, "metavar": "N"},
        "also segment N layers of ever smaller crops, for small things",
    ),
    "min_mask_region_area": ({"type": _whole, "metavar": "N"}, "fill holes and drop islands of fewer pixels"),
    "dtype": ({"choices": ["float32", "bfloat16", "float16"]}, "precision of the networks"),
}
_MATCHING_OPTIONS = ("prompt_threshold", "match_resolution", "drop_full_frame", "min_score", "box")


def _add_generator_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("mask gallery", "Which masks there are to choose from. Defaults are the model's.")
    for name, (kind, text) in _GENERATOR_OPTIONS.items():
        group.add_argument(f"--{name.replace('_', '-')}", help=text, **kind)


def _localize(arguments: Namespace) -> int:
    formats = check_formats(_names(arguments.format))
    sources = _expand(arguments)
    model = {name: arguments[name] for name in ("model", "coarse", "sam", "sam_checkpoint")}
    options = _chosen(arguments, (*_GENERATOR_OPTIONS, *_MATCHING_OPTIONS))
    options["sam_input"] = _number_or(arguments.sam_input, "native", "--sam-input")
    options["max_pixels"] = _max_pixels(arguments)
    batch_size = _number_or(arguments.batch_size, "auto", "--batch-size")

    from .api import load

    localizer = load(
        model["model"],
        coarse=model["coarse"],
        sam=model["sam"],
        sam_checkpoint=model["sam_checkpoint"],
        device=arguments.device,
        candidates=0,
        **options,
    )
    writer = LocalizationWriter(
        arguments.output,
        formats=formats,
        overlay=arguments.overlay,
        masks=arguments.masks,
        config={"version": __version__, **model, **options},
        resume=arguments.resume,
        class_names=localizer.class_names,
        inputs=[source.path for source in sources],
    )
    run = _Progress(len(sources), len(writer.log), arguments.quiet)
    with writer, run:
        remaining = writer.remaining(sources)
        for result in localizer(remaining, batch_size=batch_size, stream=True, on_error=arguments.on_error):
            writer.write(result)
            run.advance(result.error)
    return _finish(run, writer.log.records(), arguments.output)


def _train(arguments: Namespace) -> int:
    for name in ("data", "run"):
        if arguments[name] is None:
            raise ConfigError(f"--{name} DIR is missing")

    from .train.lite import train_lite

    weights = train_lite(arguments.data, arguments.run, _names(arguments.stages), start=arguments.start)
    _tell(str(weights or arguments.run), sys.stdout)
    return OK


def _masks(arguments: Namespace) -> int:
    sources = _expand(arguments)
    model = {name: arguments[name] for name in ("sam", "sam_checkpoint")}
    options = _chosen(arguments, _GENERATOR_OPTIONS)
    max_pixels = _max_pixels(arguments)

    from .api import load_sam
    from .generator import MaskGenerator
    from .pipelines.pro2sam import resolve_device

    sam, defaults = load_sam(model["sam"], model["sam_checkpoint"])
    generator = MaskGenerator(sam.to(resolve_device(arguments.device)), **{**defaults, **options})
    writer = GalleryWriter(
        arguments.output,
        overlay=arguments.overlay,
        config={"version": __version__, **model, **options},
        resume=arguments.resume,
        inputs=[source.path for source in sources],
    )
    run = _Progress(len(sources), len(writer.log), arguments.quiet)
    with writer, run:
        for source in writer.remaining(sources):
            started = time.perf_counter()
            try:
                image = source.read(max_pixels)
                read = time.perf_counter()
                (gallery,) = generator.generate([image])
            except Pro2SamError as error:
                if arguments.on_error == "raise":
                    raise
                writer.write_error(source, str(error))
                run.advance(str(error))
                continue
            done = time.perf_counter()
            speed = {"read": read - started, "gallery": done - read, "total": done - started}
            writer.write(source, image, gallery.to("cpu"), {stage: 1e3 * value for stage, value in speed.items()})
            run.advance(None)
    return _finish(run, writer.log.records(), arguments.output)


def _doctor(arguments: Namespace) -> int:
    from .backends import report

    print(report())
    return OK


def _expand(arguments: Namespace) -> list[Source]:
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
        _tell(f"left out {left_out} pictures below '{arguments.output}': they are outputs", sys.stderr)
    return sources


def _chosen(arguments: Namespace, names) -> dict[str, Any]:
    """The options that were given; the others keep the model's defaults."""
    return {name: arguments[name] for name in names if arguments[name] is not None}


def _names(text: str) -> list[str]:
    return [name for name in text.replace(" ", "").split(",") if name]


def _number_or(text: str, word: str, option: str) -> int | str:
    if text == word:
        return text
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise ConfigError(f"{option} must be '{word}' or a whole number of at least 1, not '{text}'")


def _max_pixels(arguments: Namespace) -> int | None:
    if arguments.max_pixels < 0:
        raise ConfigError(f"--max-pixels must be 0 (no limit) or a number of pixels, not {arguments.max_pixels}")
    return arguments.max_pixels or None


class _Progress:
    """Progress bar with photos/s on stderr, and what was skipped; a context manager."""

    def __init__(self, total: int, done: int, quiet: bool):
        from tqdm import tqdm

        self.done, self.skipped = 0, 0
        self._start = time.perf_counter()
        self._bar = tqdm(total=total, initial=done, unit="photo", disable=quiet, file=sys.stderr, dynamic_ncols=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()

    def advance(self, error: str | None) -> None:
        self.done += 1
        if error is not None:
            self.skipped += 1
            if self.skipped <= _SHOWN_SKIPS:
                self._bar.write(_plain(f"skipped: {error}", sys.stderr), file=sys.stderr)
            elif self.skipped == _SHOWN_SKIPS + 1:
                self._bar.write("more photos are being skipped, see the records' error", file=sys.stderr)
        self._bar.update()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start


def _finish(run: _Progress, records, output: str) -> int:
    """Print the summary. The status counts photos skipped by the interrupted part of a resumed run as well."""
    errors = [record["error"] is not None for record in records]
    rate = f"{run.done / run.seconds:.2f} photos/s" if run.done else "nothing left to do"
    skipped = sum(errors)
    summary = f"{len(errors) - skipped} of {len(errors)} photos done, {skipped} skipped ({rate}); results in {output}"
    _tell(summary, sys.stdout)
    return INCOMPLETE if any(errors) else OK


if __name__ == "__main__":
    sys.exit(main())
