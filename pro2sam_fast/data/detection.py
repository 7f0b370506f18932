"""The image-level labels of detection data sets: PASCAL VOC and COCO. Photos can have several classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from .annotations import Corners, load_coco, voc_objects
from .labelled import LabelledPhoto, LocalizationDataset
from .tables import require_files, rows

__all__ = ["COCO", "VOC", "coco_files", "coco_labels", "voc_labels", "voc_splits"]


class VOC(LocalizationDataset):
    """PASCAL VOC, see `voc_labels`. Few-shot photos are chosen by their first class."""

    def __init__(
        self, root: str | Path, split: str = "trainval", class_names: Sequence[str] | None = None, **options: Any
    ) -> None:
        super().__init__(*voc_labels(root, split, class_names), **options)


class COCO(LocalizationDataset):
    """COCO, see `coco_labels`. Few-shot photos are chosen by their first class."""

    def __init__(
        self, images: str | Path, annotations: str | Path, class_names: Sequence[str] | None = None, **options: Any
    ) -> None:
        super().__init__(*coco_labels(images, annotations, class_names), **options)


def voc_labels(
    root: str | Path, split: str = "trainval", class_names: Sequence[str] | None = None
) -> tuple[list[LabelledPhoto], list[str]]:
    """PASCAL VOC: photos of ``ImageSets/Main/<split>.txt`` with all their classes as ``labels`` (the first is
    ``label``), boxes from the XML files, and the class names, in alphabetical order if not given."""
    root = Path(root)
    stems = [fields[0] for _, fields in rows(root / "ImageSets" / "Main" / f"{split}.txt", range(1, 3))]
    listed = []
    for stem in stems:
        xml = root / "Annotations" / f"{stem}.xml"
        listed.append((stem, root / "JPEGImages" / f"{stem}.jpg", xml, voc_objects(xml)))
    names = sorted({name for *_, things in listed for name, _ in things}) if class_names is None else [*class_names]
    return _several(root, listed, names), names


def voc_splits(root: Path) -> tuple[str, str]:
    """The splits to learn from and to evaluate on: the test split where it is there."""
    return ("trainval", "test") if (root / "ImageSets" / "Main" / "test.txt").exists() else ("train", "val")


def coco_labels(
    images: str | Path, annotations: str | Path, class_names: Sequence[str] | None = None
) -> tuple[list[LabelledPhoto], list[str]]:
    """COCO: the photos of an instances or panoptic file with all their classes and boxes; and the class names,
    in the order of their ids if not given. Photos without annotation are left out."""
    root, path = Path(images), Path(annotations)
    coco = load_coco(path)
    if not coco.class_names:
        raise DataError(f"{path}: not a COCO annotation file: it has no categories.")
    listed = []
    for key, things in coco.things.items():
        named = [(coco.class_names[category], box) for category, box in things]
        listed.append((str(key), root / coco.files[key], path, named))
    names = list(coco.class_names.values() if class_names is None else class_names)
    return _several(root, listed, names), names


def coco_files(root: Path, train: bool) -> tuple[Path, Path]:
    """Photos and annotations of a split in COCO's layout: ``annotations/{instances,panoptic}_train2017.json`` with
    ``train2017`` or ``images/train2017``."""
    split = "train" if train else "val"
    for kind in ("instances", "panoptic"):
        for path in sorted((root / "annotations").glob(f"{kind}_{split}*.json")):
            name = path.stem.partition("_")[2]
            for folder in (root / name, root / "images" / name):
                if folder.is_dir():
                    return folder, path
    raise DataError(f"{root}: no annotations/instances_{split}*.json with a folder of photos of that name.")


def _several(
    root: Path, listed: Iterable[tuple[str, Path, Path, list[tuple[str, Corners]]]], names: list[str]
) -> list[LabelledPhoto]:
    index = {name: i for i, name in enumerate(names)}
    photos = []
    for key, path, source, things in listed:
        if unknown := [name for name, _ in things if name not in index]:
            raise DataError(f"{source}: the class {unknown[0]!r} of photo {key} is none of the {len(names)} classes.")
        labels = tuple(dict.fromkeys(index[name] for name, _ in things))
        if labels:
            photos.append(LabelledPhoto(key, path, labels[0], tuple(box for _, box in things), labels=labels))
    require_files(root, [p.path for p in photos])
    return photos
