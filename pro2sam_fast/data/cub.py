"""CUB-200-2011 in its official layout (Wah et al. 2011), whole or cut to fewer classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .labelled import LabelledPhoto, LocalizationDataset, check_split, class_folders, folders
from .tables import class_index, convert, require_files, rows

__all__ = ["CUB200", "CubPhoto", "load_cub"]

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
    path = root / "classes.txt"
    classes = {convert(path, n, [key], int)[0]: name for n, (key, name) in rows(path, 2, hint=_HINT)}
    path = root / "image_class_labels.txt"
    found = rows(path, 2, hint=_HINT)
    tables = {path.stem: {key: [class_index(path, n, label, len(classes), 1)] for n, (key, label) in found}}
    for name, columns, kind in (("train_test_split", 2, int), ("bounding_boxes", 5, float)):
        tables[name] = _table(root / f"{name}.txt", columns, kind)
    photos = []
    for number, (key, relative) in rows(root / "images.txt", 2, hint=_HINT):
        for name, table in tables.items():
            if key not in table:
                raise DataError(f"{root / 'images.txt'}, line {number}: image {key} is not in {name}.txt.")
        (label,), (train,), (x, y, w, h) = (table[key] for table in tables.values())
        photos.append(CubPhoto(key, root / "images" / relative, label, (x, y, x + w, y + h), train == 1))
    require_files(root / "images", [photo.path for photo in photos])
    return photos, [name for _, name in sorted(classes.items())]


class CUB200(LocalizationDataset):
    """CUB-200-2011. ``root`` holds images.txt, image_class_labels.txt, train_test_split.txt, bounding_boxes.txt,
    classes.txt and images/; ``split`` is train or test. Boxes have x1 = x + w, as every evaluator takes them.

    The layout of SAT's and Pro2SAM's code will do, too: class folders in train/ and test/, lines ``<path>;<label>`` in
    test_list.txt, and ``<x0> <y0> <x1> <y1> <H> <W>`` for each of them in test_gt.txt.
    """

    def __init__(self, root: str | Path, split: str = "train", **options: Any) -> None:
        wanted = check_split(split, ("train", "test")) == "train"
        if (Path(root) / "test_list.txt").exists() and not (Path(root) / "images.txt").exists():
            super().__init__(*_listed_cub(Path(root), wanted), **options)
            return
        photos, names = load_cub(root)
        chosen = [LabelledPhoto(p.id, p.path, p.label, (p.box,)) for p in photos if p.train == wanted]
        super().__init__(chosen, names, **options)


def _listed_cub(root: Path, train: bool) -> tuple[list[LabelledPhoto], list[str]]:
    names = [p.name for p in folders(root / "train")]
    if train:
        return class_folders(root / "train", names), names
    listed, boxes = root / "test_list.txt", root / "test_gt.txt"
    paths = [(path, class_index(listed, n, label, len(names))) for n, (path, label) in rows(listed, 2, ";")]
    corners = [tuple(convert(boxes, n, fields[:4], float)) for n, fields in rows(boxes, 6)]
    if len(paths) != len(corners):
        raise DataError(f"{boxes}: holds {len(corners)} boxes, {listed.name} {len(paths)} photos.")
    photos = [LabelledPhoto(p, root / "test" / p, label, (box,)) for (p, label), box in zip(paths, corners)]
    require_files(root / "test", [photo.path for photo in photos])
    return photos, names
