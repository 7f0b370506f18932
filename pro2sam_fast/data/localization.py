"""Data sets of weakly supervised localization: photos with image-level labels, and boxes or masks to evaluate on.

    CUB200          CUB-200-2011 in its official layout (Wah et al. 2011), whole or cut to fewer classes
    ILSVRC          ImageNet-1k: train folders; val photos with a list of labels and boxes as XML files or one CSV
    WSOLMetadata    photos by the metadata folders of wsolevaluation (Choe et al. 2020): CUB, ILSVRC, OpenImages
    ImageFolder     your own photos, a folder for each class; boxes from a CSV, COCO or VOC annotation, or none
    FlatFolder      ImageNet photos in one folder, n01440764_tench.JPEG: one image per class
    VOC, COCO       the image-level labels of detection data sets

All hold a list of `LabelledPhoto` and raise DataError with file and line for what is malformed or missing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from .annotations import with_boxes
from .cub import CUB200
from .detection import COCO, VOC, coco_files, coco_labels, voc_labels, voc_splits
from .imagenet import ILSVRC, FlatFolder
from .labelled import (
    WNID,
    LabelledPhoto,
    LocalizationDataset,
    class_folders,
    class_key,
    few_shot,
    folders,
    photos_in,
)
from .tables import class_index, convert, lines, require_files, rows

__all__ = [
    "COCO",
    "CUB200",
    "ILSVRC",
    "VOC",
    "FlatFolder",
    "ImageFolder",
    "LabelledPhoto",
    "LocalizationDataset",
    "WSOLMetadata",
    "class_key",
    "coco_labels",
    "few_shot",
    "kind_of",
    "open_dataset",
    "voc_labels",
]


class WSOLMetadata(LocalizationDataset):
    """Photos by a metadata folder of wsolevaluation, ``metadata/<set>/<split>``, with image_ids.txt, class_labels.txt
    and localization.txt (boxes, or mask files for OpenImages).

    Args:
        root: the photos; ids are paths relative to it.
        metadata: the folder.
        masks: folder of the mask files, ``root`` if None.
        class_names: else the labels' numbers.
    """

    def __init__(
        self,
        root: str | Path,
        metadata: str | Path,
        masks: str | Path | None = None,
        class_names: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        root, folder = Path(root), Path(metadata)
        path, labels = folder / "class_labels.txt", {}
        limit = 1 << 31 if class_names is None else len(class_names)
        for number, (name, label) in rows(path, 2, ","):
            labels[name] = class_index(path, number, label, limit)
        boxes, files, ignores = defaultdict(list), defaultdict(list), {}
        path = folder / "localization.txt"
        for number, fields in rows(path, range(2, 6), ",") if path.exists() else ():
            name = fields[0]
            if len(fields) == 5:
                boxes[name].append(tuple(convert(path, number, fields[1:], float)))
            elif len(fields) in (2, 3):
                files[name].append(Path(masks or root) / fields[1])
                if len(fields) == 3 and fields[2]:
                    ignores[name] = Path(masks or root) / fields[2]
            else:
                raise DataError(f"{path}, line {number}: expected a box or mask files, found {len(fields)} columns.")
        photos = []
        for number, name in enumerate(lines(folder / "image_ids.txt"), 1):
            if name not in labels:
                raise DataError(f"{folder / 'image_ids.txt'}, line {number}: {name!r} is not in class_labels.txt.")
            photos.append(
                LabelledPhoto(
                    name, root / name, labels[name], tuple(boxes[name]), tuple(files[name]), ignores.get(name)
                )
            )
        if class_names is None:
            class_names = [str(i) for i in range(max(labels.values(), default=-1) + 1)]
        require_files(root, [p.path for p in photos])
        require_files(Path(masks or root), [m for p in photos for m in p.masks])
        super().__init__(photos, class_names, **options)


class ImageFolder(LocalizationDataset):
    """Your own photos: ``root/<class>/**``. Classes are the folders' names, sorted.

    Args:
        root: see above.
        boxes: None; a CSV whose rows are ``path,x0,y0,x1,y1`` with paths relative to ``root`` (a header is fine, a
            photo may have several rows); a COCO annotation file; or a folder of VOC XML files with the photos' stems,
            in folders like theirs where two photos share one.
        class_names: of another data set, e.g. the training split, so that indices agree.
    """

    def __init__(
        self,
        root: str | Path,
        boxes: str | Path | None = None,
        class_names: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        root = Path(root)
        found = [p.name for p in folders(root)]
        names = list(class_names) if class_names is not None else found
        if strangers := sorted(set(found) - set(names)):
            raise DataError(f"{root}: the folder {strangers[0]!r} is none of the {len(names)} classes.")
        photos = class_folders(root, names)
        super().__init__(photos if boxes is None else with_boxes(photos, Path(boxes)), names, **options)


_ARGUMENTS = {
    "cub": (),
    "ilsvrc": ("boxes", "val_list"),
    "wsol": ("metadata", "boxes", "class_names"),
    "folder": ("boxes", "class_names"),
    "flat": ("boxes", "class_names"),
    "voc": ("class_names",),
    "coco": ("boxes", "class_names"),
}


def kind_of(root: str | Path) -> str:
    """The kind of data that a folder holds, by its layout: "cub", "voc", "coco", "ilsvrc", "flat", else "folder"."""
    root = Path(root)
    if any((root / name).exists() for name in ("images.txt", "test_list.txt")):
        return "cub"
    if (root / "ImageSets" / "Main").is_dir():
        return "voc"
    if any(path.name.startswith(("instances_", "panoptic_")) for path in (root / "annotations").glob("*.json")):
        return "coco"
    if (root / "train").is_dir() and any(WNID.fullmatch(p.name) for p in folders(root / "train")):
        return "ilsvrc"
    return "flat" if any(WNID.match(p.name) for p in photos_in(root)) else "folder"


def open_dataset(
    kind: str,
    root: str | Path,
    train: bool,
    *,
    boxes: str | Path | None = None,
    val_list: str | Path | None = None,
    metadata: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> LocalizationDataset:
    """A data set by the name of its kind: "cub", "ilsvrc", "wsol" (with ``metadata``), "folder", "flat", "voc", "coco".

    Args:
        train: the part with labels to learn from, or the one to evaluate on ("wsol", "folder" and "flat" have what
            ``root`` and ``metadata`` name). Of "voc" trainval and test, or train and val where there is no test split.
        boxes: of "ilsvrc", "folder" and "flat"; of "wsol" the folder of the masks; of "coco" the file of instances or
            the panoptic one, and ``root`` then holds the photos.
        val_list: of "ilsvrc".
        class_names: of those that take them; the others have an order of their own.
        options: of `LocalizationDataset`.

    Raises:
        ConfigError: an unknown kind, or an argument that the kind doesn't have.
    """
    if kind not in _ARGUMENTS:
        raise ConfigError(f"the kind of data must be one of {', '.join(_ARGUMENTS)}, got {kind!r}")
    given = {"boxes": boxes, "val_list": val_list, "metadata": metadata, "class_names": class_names}
    given = {name: value for name, value in given.items() if value is not None}
    if surplus := [name for name in given if name not in _ARGUMENTS[kind] and name != "class_names"]:
        raise ConfigError(f"data of kind {kind!r} takes no {surplus[0]}")
    named = {"class_names": class_names}
    if kind == "cub":
        return CUB200(root, "train" if train else "test", **options)
    if kind == "ilsvrc":
        return ILSVRC(root, "train", **options) if train else ILSVRC(root, "val", boxes, val_list, **options)
    if kind == "wsol":
        if metadata is None:
            raise ConfigError("data of kind 'wsol' needs metadata, the folder with image_ids.txt")
        return WSOLMetadata(root, metadata, boxes, **named, **options)
    if kind == "voc":
        return VOC(root, voc_splits(Path(root))[0 if train else 1], **named, **options)
    if kind == "coco":
        images, annotations = (root, boxes) if boxes is not None else coco_files(Path(root), train)
        return COCO(images, annotations, **named, **options)
    return (FlatFolder if kind == "flat" else ImageFolder)(root, boxes, **named, **options)
