"""Photos with image-level labels as a data set, and finding them in folders."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import ConfigError, DataError
from ..io import IMAGE_EXTENSIONS
from .tables import open_image

__all__ = [
    "WNID",
    "LabelledPhoto",
    "LocalizationDataset",
    "check_split",
    "class_folders",
    "class_key",
    "few_shot",
    "folders",
    "is_photo",
    "photos_in",
]

WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class LabelledPhoto:
    """A photo and what is known of it.

    id: unique in the data set. label: class index. boxes: (x0, y0, x1, y1) in the photo's pixels as the data set's
    files have them, not clipped; empty if unknown. masks: files of instance masks. ignore: file of the region that
    counts for nothing, or None. labels: all classes of the photo where it can have several; ``label`` is the first.
    """

    id: str
    path: Path
    label: int
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    masks: tuple[Path, ...] = ()
    ignore: Path | None = None
    labels: tuple[int, ...] = ()


class LocalizationDataset:
    """Photos with labels, a map-style data set for `torch.utils.data.DataLoader`.

    Items are (transform(photo), label, index); ``photos[index]`` has the rest.

    Args:
        photos, class_names: what there is.
        transform: function of the RGB photo as a Pillow image, EXIF orientation ignored; None leaves it.
        images_per_class: keep so many random photos of each class (the few-shot setting), None for all.
        seed: of that choice.

    Attributes:
        single_precision: the published evaluators hold its boxes and sizes in float32.
    """

    single_precision = False

    def __init__(
        self,
        photos: Sequence[LabelledPhoto],
        class_names: Sequence[str],
        transform: Callable[[Image.Image], Any] | None = None,
        images_per_class: int | None = None,
        seed: int = 0,
    ) -> None:
        if not photos:
            raise DataError(f"{type(self).__name__} has no photo.")
        for photo in photos:
            if not 0 <= photo.label < len(class_names):
                raise DataError(f"{photo.path}: label {photo.label} isn't one of {len(class_names)} classes.")
        if len({photo.id for photo in photos}) != len(photos):
            seen: set[str] = set()
            twice = next(p.id for p in photos if p.id in seen or seen.add(p.id))
            raise DataError(f"photo {twice!r} is listed twice.")
        self.photos = list(photos) if images_per_class is None else few_shot(photos, images_per_class, seed)
        self.class_names = list(class_names)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        photo = self.photos[index]
        image = open_image(photo.path).convert("RGB")
        return image if self.transform is None else self.transform(image), photo.label, index

    @property
    def has_boxes(self) -> bool:
        """Whether every photo has an annotated box."""
        return all(photo.boxes for photo in self.photos)


def few_shot(photos: Sequence[LabelledPhoto], images_per_class: int, seed: int = 0) -> list[LabelledPhoto]:
    """So many random photos of each class, in their old order; a class with fewer is an error."""
    if images_per_class < 1:
        raise ConfigError(f"images_per_class must be at least 1, got {images_per_class}")
    by_class = defaultdict(list)
    for i, photo in enumerate(photos):
        by_class[photo.label].append(i)
    kept: list[int] = []
    for label, indices in sorted(by_class.items()):
        if len(indices) < images_per_class:
            raise DataError(f"class {label} has {len(indices)} photos, images_per_class wants {images_per_class}.")
        rng = np.random.default_rng((seed, label))
        kept += rng.permutation(indices)[:images_per_class].tolist()
    return [photos[i] for i in sorted(kept)]


def class_key(name: str) -> str:
    """What tells classes apart across data sets: the WordNet id that a name begins with, else the name."""
    return found[0] if (found := WNID.match(name)) else name


def check_split(name: str, choices: Sequence[str]) -> str:
    """The name of a split, if it is one of the choices."""
    if name not in choices:
        raise ConfigError(f"split must be one of {', '.join(choices)}, got {name!r}")
    return name


def folders(root: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones."""
    try:
        return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise DataError(f"{root}: can't be listed ({error.strerror}).") from error


def is_photo(path: Path) -> bool:
    """Whether a file counts as a photo: by its extension, and not hidden, as what macOS adds to a photo, ._tom.jpg."""
    return path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".") and path.is_file()


def class_folders(root: Path, names: Sequence[str]) -> list[LabelledPhoto]:
    """The photos below ``root/<name>`` of each class, at any depth."""
    photos = []
    for label, name in enumerate(names):
        for path in sorted((root / name).rglob("*")):
            if is_photo(path):
                photos.append(LabelledPhoto(path.relative_to(root).as_posix(), path, label))
    if not photos:
        raise DataError(f"{root}: no photo in the class folders {', '.join(list(names)[:3])}, ...")
    return photos


def photos_in(root: Path) -> list[Path]:
    """The photos in a folder, sorted, none below it."""
    try:
        return sorted(filter(is_photo, root.iterdir()))
    except OSError as error:
        raise DataError(f"{root}: can't be listed ({error.strerror}).") from error
