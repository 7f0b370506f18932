"""The command `pro2sam-fast`: localize, masks, train, evaluate, bench, doctor."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence

from jsonargparse import ArgumentParser, Namespace

from . import __version__
from .commands import bench, doctor, evaluate, localize, masks, train
from .commands.parser import INCOMPLETE, INTERRUPTED, USAGE, Parser, tell
from .errors import ConfigError, Pro2SamError

__all__ = ["main"]

_DESCRIPTION = """Find the object in photos: box, pixel mask and label, without a click.

examples:
  pro2sam-fast localize photos --output out
  pro2sam-fast localize 'photos/*.jpg' --output out --format coco,yolo --masks
  pro2sam-fast masks photo.jpg --output out
  pro2sam-fast train gtformer --data folder --root photos --arch lite --run run
  pro2sam-fast evaluate --data folder --root photos --boxes boxes.csv --coarse run --masks --output eval
  pro2sam-fast bench
  pro2sam-fast doctor
"""

_COMMANDS = {
    "localize": localize,
    "masks": masks,
    "train": train,
    "evaluate": evaluate,
    "bench": bench,
    "doctor": doctor,
}

_TO_CONTINUE = {
    "localize": "; finished photos are kept, continue with --resume",
    "masks": "; finished photos are kept, continue with --resume",
    "train": "; the same command continues",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's) and return its exit status."""
    parser, run = _parsers()
    try:
        arguments = parser.parse_args(None if argv is None else list(argv))
    except UnicodeDecodeError as error:
        parser.error(f"--config must be a file in UTF-8 ({error})")
    command = arguments.subcommand
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # damaged metadata, in photos that can be read
            return run[command](arguments[command])
    except KeyboardInterrupt:
        print(f"interrupted{_TO_CONTINUE.get(command, '')}", file=sys.stderr)
        return INTERRUPTED
    except ConfigError as error:
        tell(f"pro2sam-fast {command}: {error}", sys.stderr)
        return USAGE
    except Pro2SamError as error:
        tell(f"pro2sam-fast {command}: {error}", sys.stderr)
        return INCOMPLETE
    except OSError as error:
        where = f"'{error.filename}': " if error.filename else ""
        tell(f"pro2sam-fast {command}: {where}{error.strerror or error}", sys.stderr)
        return INCOMPLETE


def _parsers() -> tuple[ArgumentParser, dict[str, Callable[[Namespace], int]]]:
    parser = Parser(prog="pro2sam-fast", description=_DESCRIPTION, version=__version__, default_env=False)
    commands = parser.add_subcommands(required=True, dest="subcommand", metavar="COMMAND")
    for name, command in _COMMANDS.items():
        commands.add_subcommand(name, command.parser(), help=command.HELP)
    return parser, {name: command.run for name, command in _COMMANDS.items()}


if __name__ == "__main__":
    sys.exit(main())
