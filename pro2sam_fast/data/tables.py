"""Reading the files of data sets: every complaint names the file and the line."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from PIL import Image

from ..errors import DataError

T = TypeVar("T")


def lines(path: Path, hint: str = "") -> list[str]:
    """Lines of a text file; DataError if it can't be read."""
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: can't be read ({reason}).{' ' + hint if hint else ''}") from error


def rows(
    path: Path, columns: int | range, separator: str | None = None, hint: str = ""
) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and the fields of every line that isn't empty.

    Args:
        columns: how many fields a line has, or a range of allowed numbers.
        separator: None for white space.
    """
    allowed = range(columns, columns + 1) if isinstance(columns, int) else columns
    for number, line in enumerate(lines(path, hint), 1):
        if not line.strip():
            continue
        fields = line.split() if separator is None else line.strip().split(separator)
        if len(fields) not in allowed:
            wanted = f"{allowed[0]}" if len(allowed) == 1 else f"{allowed[0]} to {allowed[-1]}"
            raise DataError(f"{path}, line {number}: expected {wanted} columns, found {len(fields)}: {line[:80]!r}.")
        yield number, fields


def convert(path: Path, line: int, values: list[str], kind: Callable[[str], T]) -> list[T]:
    """Every field as ``kind`` (int or float); DataError if one isn't, or isn't finite."""
    try:
        found = [kind(value) for value in values]
    except ValueError as error:
        raise DataError(f"{path}, line {line}: {error}.") from error
    if kind is float and not all(map(math.isfinite, found)):
        raise DataError(f"{path}, line {line}: expected finite numbers, found {' '.join(values)}.")
    return found


def class_index(path: Path, line: int, value: str, classes: int, first: int = 0) -> int:
    """A class's number as index 0 ... classes - 1; DataError if it isn't one of ``classes``, counted from ``first``."""
    (label,) = convert(path, line, [value], int)
    if not first <= label < first + classes:
        raise DataError(f"{path}, line {line}: class {label} isn't one of {first} to {first + classes - 1}.")
    return label - first


def load_json(path: Path, what: str) -> dict:
    """A JSON object; DataError if the file isn't one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable {what} ({error}).") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a {what}: the top level must be an object.")
    return content


def require_files(root: Path, paths: list[Path]) -> None:
    """DataError that counts and names the missing ones."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        shown = ", ".join(str(p.relative_to(root) if p.is_relative_to(root) else p) for p in missing[:5])
        more = ", ..." if len(missing) > 5 else ""
        raise DataError(f"{root}: {len(missing)} of {len(paths)} photos are missing: {shown}{more}.")


def open_image(path: Path) -> Image.Image:
    """A decoded image as the file stores it: EXIF orientation is ignored, as by everyone who annotates pixels."""
    with _reading(path):
        image = Image.open(path)
        image.load()
    return image


def image_size(path: Path) -> tuple[int, int]:
    """(W, H) of what `open_image` gives, from the file's header."""
    with _reading(path), Image.open(path) as image:
        return image.size


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # decoders raise SyntaxError, struct.error, zlib.error, DecompressionBombError, ...
        raise DataError(f"{path}: not a readable image ({str(error) or type(error).__name__}).") from error
