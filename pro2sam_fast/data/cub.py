"""CUB-200-2011 in its official layout (Wah et al. 2011), whole or cut to fewer classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .tables import convert, require_files, rows

_HINT = "Point to the CUB_200_2011 folder."


@dataclass(frozen=True)
class CubPhoto:
    """id as in ``images.txt``; label 0-based; box (x0, y0, x1, y1) in pixels with x1 = x + w, not clipped."""

    id: str
    path: Path
    label: int
    box: tuple[float, float, float, float]
    train: bool


def _table(path: Path, columns: int, kind: type) -> dict[str, list]:
    return {key: convert(path, n, values, kind) for n, (key, *values) in rows(path, columns, hint=_HINT)}


def load_cub(root: str | Path) -> tuple[list[CubPhoto], list[str]]:
    """All photos and the class names (index = label).

    Raises:
        DataError: a missing or malformed file (with its line), an id without label, split or box, or a missing photo.
    """
    root = Path(root)
    shapes = (("image_class_labels", 2, int), ("train_test_split", 2, int), ("bounding_boxes", 5, float))
    tables = {name: _table(root / f"{name}.txt", columns, kind) for name, columns, kind in shapes}
    path = root / "classes.txt"
    classes = {convert(path, n, [key], int)[0]: name for n, (key, name) in rows(path, 2, hint=_HINT)}
    photos = []
    for number, (key, relative) in rows(root / "images.txt", 2, hint=_HINT):
        for name, table in tables.items():
            if key not in table:
                raise DataError(f"{root / 'images.txt'}, line {number}: image {key} is not in {name}.txt.")
        (label,), (train,), (x, y, w, h) = (table[key] for table in tables.values())
        photos.append(CubPhoto(key, root / "images" / relative, label - 1, (x, y, x + w, y + h), train == 1))
    require_files(root / "images", [photo.path for photo in photos])
    return photos, [name for _, name in sorted(classes.items())]
