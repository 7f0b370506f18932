"""CUB-200-2011 in its official layout (Wah et al. 2011), whole or cut to fewer classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError


@dataclass(frozen=True)
class CubPhoto:
    """id as in ``images.txt``; label 0-based; box (x0, y0, x1, y1) in pixels with x1 = x + w, not clipped."""

    id: str
    path: Path
    label: int
    box: tuple[float, float, float, float]
    train: bool


def _rows(path: Path, columns: int) -> list[list[str]]:
    try:
        lines = path.read_text().splitlines()
    except OSError as e:
        raise DataError(f"{path}: can't be read ({e.strerror}). Point to the CUB_200_2011 folder.") from e
    rows = []
    for number, line in enumerate(lines, 1):
        parts = line.split()
        if len(parts) != columns:
            raise DataError(f"{path}, line {number}: expected {columns} columns, found {len(parts)}: {line!r}.")
        rows.append(parts)
    return rows


def load_cub(root: str | Path) -> tuple[list[CubPhoto], list[str]]:
    """All photos and the class names (index = label).

    Raises:
        DataError: a missing or malformed file (with its line), an id without label, split or box, or a missing photo.
    """
    root = Path(root)
    tables = {}
    for name, columns in (("image_class_labels", 2), ("train_test_split", 2), ("bounding_boxes", 5)):
        path = root / f"{name}.txt"
        try:
            tables[name] = {row[0]: [float(v) for v in row[1:]] for row in _rows(path, columns)}
        except ValueError as e:
            raise DataError(f"{path}: {e}.") from e
    names = [row[1] for row in sorted(_rows(root / "classes.txt", 2), key=lambda row: int(row[0]))]
    photos, missing = [], []
    for number, (key, relative) in enumerate(_rows(root / "images.txt", 2), 1):
        for name, table in tables.items():
            if key not in table:
                raise DataError(f"{root / 'images.txt'}, line {number}: image {key} is not in {name}.txt.")
        x, y, w, h = tables["bounding_boxes"][key]
        label, train = int(tables["image_class_labels"][key][0]) - 1, tables["train_test_split"][key][0] == 1
        path = root / "images" / relative
        if not path.exists():
            missing.append(relative)
        photos.append(CubPhoto(key, path, label, (x, y, x + w, y + h), train))
    if missing:
        raise DataError(f"{root / 'images'}: {len(missing)} photos are missing, the first is {missing[0]}.")
    return photos, names
