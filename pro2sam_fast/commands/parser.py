"""The parser of all commands, the types of its options, its exit status and its messages."""

from __future__ import annotations

import argparse
import math
import re
import sys
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter, get_loader, set_loader

__all__ = [
    "INCOMPLETE",
    "INTERRUPTED",
    "OK",
    "USAGE",
    "Parser",
    "number",
    "plain",
    "tell",
    "true_or_false",
    "whole",
    "yes_no",
]

OK, INCOMPLETE, USAGE, INTERRUPTED = 0, 1, 2, 130
_CONFIG_MODE = "pro2sam-fast"


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


class Parser(ArgumentParser):
    """Says in one sentence what is wrong with the command line or the configuration file."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=_Help, parser_mode=_CONFIG_MODE, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = " ".join(message.split()).rstrip(".")
        message = re.sub(r'Parser key "([\w.]+)"', lambda key: "--" + key[1].replace("_", "-"), message)
        message = re.sub("^Problems parsing config", "--config", message)
        program = self.prog.replace(" [options]", "")
        tell(f"{program}: {message}; see {program} --help", sys.stderr)
        self.exit(USAGE)


class _BadValue(argparse.ArgumentTypeError, ValueError):
    """What an option's type raises: argparse and the configuration reader look for different classes."""


def whole(value: Any) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise _BadValue(f"expected a whole number, not '{value}'") from None


def number(value: Any) -> float:
    try:
        found = float(str(value))
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise _BadValue(f"expected a number, not '{value}'")
    return found


def true_or_false(value: Any) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise _BadValue(f"expected true or false, not '{value}'")
    return str(value).lower() == "true"


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


def plain(text: str, stream) -> str:
    """One line that the stream can take, whatever characters file names bring."""
    text = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def tell(text: str, stream) -> None:
    print(plain(text, stream), file=stream)


def yes_no() -> ActionYesNo:
    return ActionYesNo(yes_prefix="", no_prefix="no-")
