"""Coarse maps and class scores on disk, so that an evaluation can be computed again without the model.

A map is ``<folder>/<photo id>.npy``, as wsolevaluation has its score maps; the id may lack its extension. Class scores
are ``logits.npz`` with ``ids`` and ``logits`` beside them. What `save_maps` writes for several views is in ``view256``
and ``view224``; without these folders the maps are those of every view.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np

from ..data.localization import LabelledPhoto, LocalizationDataset
from ..data.tables import image_size
from ..errors import DataError
from ..io import write_atomic
from .maps import Predictions
from .protocols import Protocol

__all__ = ["load_maps", "read_scores", "save_maps"]

_SCORES = "logits.npz"


def save_maps(folder: str | Path, found: Predictions, rules: Protocol) -> Path:
    """Writes the maps, and the class scores if there are any, and returns their folder."""
    folder = Path(folder) / f"view{rules.resize}"
    for key, coarse in zip(found.ids, found.maps, strict=True):
        path = _place(folder, f"{key}.npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.save(content, coarse)
        write_atomic(path, content.getvalue())
    if found.scores is not None:
        content = io.BytesIO()
        np.savez_compressed(content, ids=np.array(found.ids), logits=found.scores)
        write_atomic(folder / _SCORES, content.getvalue())
    return folder


def load_maps(folder: str | Path, data: LocalizationDataset, rules: Protocol) -> Predictions:
    """The stored maps of all photos of ``data``, with the precision that the files have.

    Raises:
        DataError: a map is missing, or isn't a two-dimensional array of finite numbers of the others' shape.
    """
    folder = Path(folder)
    if (view := folder / f"view{rules.resize}").is_dir():
        folder = view
    paths = [_find(folder, photo) for photo in data.photos]
    if missing := [photo.id for photo, path in zip(data.photos, paths) if path is None]:
        raise DataError(f"{folder}: {len(missing)} photos have no map, the first is {missing[0]!r}.")
    maps = [_read(path) for path in paths]
    if strange := [path for path, one in zip(paths, maps) if one.shape != maps[0].shape]:
        raise DataError(f"{strange[0]}: the map's shape isn't {maps[0].shape}, which {paths[0].name} has.")
    scores = read_scores(folder / _SCORES, data) if (folder / _SCORES).exists() else None
    ids = [photo.id for photo in data.photos]
    scores = None if scores is None else np.stack([scores[key] for key in ids])
    return Predictions(ids, np.stack(maps), scores, [image_size(photo.path) for photo in data.photos])


def read_scores(path: str | Path, data: LocalizationDataset) -> dict[str, np.ndarray]:
    """Class scores by photo id from an ``.npz`` file with ``ids`` and ``logits``.

    Raises:
        DataError: the file is malformed, lacks a photo, or is of another number of classes.
    """
    try:
        with np.load(path) as arrays:
            scores = dict(zip(arrays["ids"].tolist(), arrays["logits"], strict=True))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: expected an .npz file with ids and logits ({error}).") from error
    if missing := [p.id for p in data.photos if p.id not in scores]:
        raise DataError(f"{path}: {len(missing)} photos have no scores, the first is {missing[0]!r}.")
    if other := {row.shape for row in scores.values()} - {(len(data.class_names),)}:
        raise DataError(f"{path}: expected scores of {len(data.class_names)} classes, found shape {other.pop()}.")
    return scores


def _place(folder: Path, name: str) -> Path:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"the photo id {name!r} can't name a file.")
    return folder / name


def _find(folder: Path, photo: LabelledPhoto) -> Path | None:
    choices = (f"{photo.id}.npy", Path(photo.id).with_suffix(".npy").as_posix())
    return next((path for name in choices if (path := _place(folder, name)).is_file()), None)


def _read(path: Path) -> np.ndarray:
    try:
        values = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a readable array ({error}).") from error
    if values.ndim != 2 or 0 in values.shape or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise DataError(f"{path}: expected a two-dimensional array of finite numbers, found {values.shape}.")
    return values.astype(np.promote_types(values.dtype, np.float32))
