"""`pro2sam-fast bench`."""

from __future__ import annotations

import json
import sys

from jsonargparse import ArgumentParser, Namespace

from .parser import OK, Parser, number, tell, yes_no

__all__ = ["HELP", "parser", "run"]

HELP = "say how fast this machine is"

_DESCRIPTION = """Say how fast this machine is: back ends, photos/s of localize, where the time goes, peak memory.

On the photos of FOLDER, or without one on generated photos of 480 x 640. Takes less than two minutes.

examples:
  pro2sam-fast bench
  pro2sam-fast bench photos --device cuda --dtype bfloat16
  pro2sam-fast bench --json
"""


def parser() -> ArgumentParser:
    parser = Parser(description=_DESCRIPTION, usage="pro2sam-fast bench [FOLDER] [options]")
    parser.add_argument("folder", type=str, nargs="?", metavar="FOLDER", help="photo, folder or quoted glob")
    parser.add_argument(
        "--device", type=str, default="auto", metavar="NAME", help="auto (a GPU if there is one), cpu, cuda or cuda:N"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="precision of SAM")
    parser.add_argument("--seconds", type=number, default=20.0, metavar="X", help="time to measure (default: 20)")
    parser.add_argument("--json", action=yes_no(), default=False, help="print JSON for programs")
    return parser


def run(arguments: Namespace) -> int:
    from ..bench import measure, text

    options = {name: arguments[name] for name in ("device", "dtype", "seconds")}
    found = measure(arguments.folder, **options)
    for line in [json.dumps(found)] if arguments.json else text(found).splitlines():
        tell(line, sys.stdout)
    return OK
