"""`pro2sam-fast train`."""

from __future__ import annotations

import sys

from jsonargparse import ArgumentParser, Namespace

from ..errors import ConfigError
from .parser import OK, Parser, tell
from .runs import names

__all__ = ["HELP", "parser", "run"]

HELP = "train the bundled models again"

_DESCRIPTION = """Train the bundled `lite` models again.

SAM-lite learns from photos with masks, GTFormer-lite from image-level labels alone. DATA holds coco200, bsds500, cub10,
caltech101_24, imagenet1k_one_per_class and foreground; the model card (pro2sam_fast/weights/README.md) describes them.
RUN/lite.safetensors is the result: `pro2sam-fast localize photos --model RUN --output out`. Hours on a CPU.
Needs: pip install "pro2sam-fast[train]"

example:
  pro2sam-fast train lite --data data --run runs/lite
"""


def parser() -> ArgumentParser:
    parser = Parser(
        description=_DESCRIPTION,
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


def run(arguments: Namespace) -> int:
    for name in ("data", "run"):
        if arguments[name] is None:
            raise ConfigError(f"--{name} DIR is missing")

    from ..train.lite import train_lite

    weights = train_lite(arguments.data, arguments.run, names(arguments.stages), start=arguments.start)
    tell(str(weights or arguments.run), sys.stdout)
    return OK
