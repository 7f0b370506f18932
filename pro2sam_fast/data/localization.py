"""Data sets of weakly supervised localization: photos with image-level labels, and boxes or masks to evaluate on.

    CUB200          CUB-200-2011 in its official layout (Wah et al. 2011), whole or cut to fewer classes
    ILSVRC          ImageNet-1k: train folders; val photos with a list of labels and boxes as XML files or one CSV
    WSOLMetadata    photos by the metadata folders of wsolevaluation (Choe et al. 2020): CUB, ILSVRC, OpenImages
    ImageFolder     your own photos, a folder for each class; boxes from a CSV, COCO or VOC annotation, or none
    FlatFolder      ImageNet photos in one folder, n01440764_tench.JPEG: one image per class
    voc_labels, coco_labels    the image-level labels of detection data sets

All hold a list of `LabelledPhoto` and raise DataError with file and line for what is malformed or missing.
"""

from __future__ import annotations

import csv
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import ConfigError, DataError
from ..io import IMAGE_EXTENSIONS
from .cub import load_cub
from .tables import convert, lines, load_json, open_image, require_files, rows

__all__ = [
    "CUB200",
    "ILSVRC",
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


@dataclass(frozen=True)
class LabelledPhoto:
    """A photo and what is known of it.

    id: unique in the data set. label: class index. boxes: (x0, y0, x1, y1) in the photo's pixels as the data set's
    files have them, not clipped; empty if unknown. masks: files of instance masks. ignore: file of the region that
    counts for nothing, or None. labels: all classes of the photo where it can have several.
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


def _split(name: str, choices: Sequence[str]) -> str:
    if name not in choices:
        raise ConfigError(f"split must be one of {', '.join(choices)}, got {name!r}")
    return name


class CUB200(LocalizationDataset):
    """CUB-200-2011. ``root`` holds images.txt, image_class_labels.txt, train_test_split.txt, bounding_boxes.txt,
    classes.txt and images/; ``split`` is train or test. Boxes have x1 = x + w, as every evaluator takes them.

    The layout of SAT's and Pro2SAM's code will do, too: class folders in train/ and test/, lines ``<path>;<label>`` in
    test_list.txt, and ``<x0> <y0> <x1> <y1> <H> <W>`` for each of them in test_gt.txt.
    """

    def __init__(self, root: str | Path, split: str = "train", **options: Any) -> None:
        wanted = _split(split, ("train", "test")) == "train"
        if (Path(root) / "test_list.txt").exists() and not (Path(root) / "images.txt").exists():
            super().__init__(*_listed_cub(Path(root), wanted), **options)
            return
        photos, names = load_cub(root)
        chosen = [LabelledPhoto(p.id, p.path, p.label, (p.box,)) for p in photos if p.train == wanted]
        super().__init__(chosen, names, **options)


def _listed_cub(root: Path, train: bool) -> tuple[list[LabelledPhoto], list[str]]:
    names = [p.name for p in _folders(root / "train")]
    if train:
        return _class_folders(root / "train", names), names
    listed, boxes = root / "test_list.txt", root / "test_gt.txt"
    paths = [(path, convert(listed, n, [label], int)[0]) for n, (path, label) in rows(listed, 2, ";")]
    corners = [tuple(convert(boxes, n, fields[:4], float)) for n, fields in rows(boxes, 6)]
    if len(paths) != len(corners):
        raise DataError(f"{boxes}: holds {len(corners)} boxes, {listed.name} {len(paths)} photos.")
    photos = [LabelledPhoto(p, root / "test" / p, label, (box,)) for (p, label), box in zip(paths, corners)]
    require_files(root / "test", [photo.path for photo in photos])
    return photos, names


class ILSVRC(LocalizationDataset):
    """ImageNet-1k for localization; classes are WordNet ids in ascending order: the folders of ``root/train``, or those
    that ``boxes`` names where there is no such folder.

    train: ``root/train/<wnid>/*``. val: ``root/val`` holds the photos, in one folder or by class.

    Args:
        root: see above; the folder may cover fewer classes.
        split: "train" or "val".
        boxes: annotations of val: a folder with one XML a photo; a CSV with the header ImageId,PredictionString and
            groups of ``wnid xmin ymin xmax ymax``; or a ``.txt`` whose lines are those of SAT's val_gt.txt,
            ``<wnid>\\\\<file> <W> <H> ; x0 y0 x1 y1 ...``, or TS-CAM's, ``<wnid>/<file> <label> x0 y0 x1 y1 ...``. They
            also give the labels of val photos.
        val_list: lines ``<wnid>/<file>;<label>``, instead of the labels from ``boxes``.
    """

    single_precision = True

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        boxes: str | Path | None = None,
        val_list: str | Path | None = None,
        **options: Any,
    ) -> None:
        root = Path(root)
        train = _split(split, ("train", "val")) == "train"
        if not train and boxes is None and val_list is None:
            raise ConfigError("the val split of ILSVRC needs boxes (XML folder or CSV) or val_list for its labels")
        known = _ilsvrc_boxes(Path(boxes)) if boxes is not None else {}
        if train or not known or (root / "train").is_dir():
            wnids = [p.name for p in _folders(root / "train")]
        else:
            wnids = sorted({wnid for wnid, _ in known.values()})
        if train:
            super().__init__(_class_folders(root / "train", wnids), wnids, **options)
            return
        files = {p.stem: p for p in sorted((root / "val").rglob("*")) if p.suffix.lower() in IMAGE_EXTENSIONS}
        index = {name: i for i, name in enumerate(wnids)}
        listed = _val_list(Path(val_list)) if val_list is not None else [(k, None) for k in sorted(known)]
        require_files(root / "val", [files.get(stem, root / "val" / f"{stem}.JPEG") for stem, _ in listed])
        photos = []
        for stem, label in listed:
            wnid, found = known.get(stem, (None, ()))
            if label is None:
                if wnid not in index:
                    raise DataError(
                        f"{boxes}: photo {stem} has the class {wnid}, which is no folder of {root / 'train'}."
                    )
                label = index[wnid]
            photos.append(LabelledPhoto(stem, files[stem], label, found))
        super().__init__(photos, wnids, **options)


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise DataError(f"{root}: can't be listed ({error.strerror}).") from error


def _class_folders(root: Path, names: Sequence[str]) -> list[LabelledPhoto]:
    photos = []
    for label, name in enumerate(names):
        for path in sorted((root / name).rglob("*")):
            if path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file():
                photos.append(LabelledPhoto(path.relative_to(root).as_posix(), path, label))
    if not photos:
        raise DataError(f"{root}: no photo in the class folders {', '.join(list(names)[:3])}, ...")
    return photos


def _val_list(path: Path) -> list[tuple[str, int]]:
    listed = []
    for number, (name, label) in rows(path, 2, ";"):
        listed.append((Path(name).stem, convert(path, number, [label], int)[0]))
    return listed


def _ilsvrc_boxes(path: Path) -> dict[str, tuple[str, tuple]]:
    # photo -> its class and boxes; in ILSVRC all boxes of a photo share the class
    if path.is_dir():
        return {p.stem: _voc_xml(p) for p in sorted(path.rglob("*.xml"))}
    if path.suffix.lower() == ".txt":
        return {stem: (wnid, boxes) for stem, wnid, boxes in _text_boxes(path)}
    found = {}
    for number, row in enumerate(csv.reader(lines(path)), 1):
        if number == 1 and row[:1] == ["ImageId"]:
            continue
        fields = row[1].split() if len(row) == 2 else []
        if not fields or len(fields) % 5:
            raise DataError(f"{path}, line {number}: expected ImageId,(wnid xmin ymin xmax ymax)+, found {row!r}.")
        boxes = tuple(tuple(convert(path, number, fields[i + 1 : i + 5], float)) for i in range(0, len(fields), 5))
        found[row[0]] = (fields[0], boxes)
    return found


def _text_boxes(path: Path) -> Iterator[tuple[str, str, tuple]]:
    for number, fields in rows(path, range(6, 10_000)):
        *_, wnid, name = ["", *Path(fields[0].replace("\\", "/")).parts]
        corners = fields[4:] if fields[3] == ";" else fields[2:]
        if not corners or len(corners) % 4:
            raise DataError(f"{path}, line {number}: expected four numbers a box, found {len(corners)}.")
        values = convert(path, number, corners, float)
        yield Path(name).stem, wnid, tuple(tuple(values[i : i + 4]) for i in range(0, len(values), 4))


def _voc_xml(path: Path) -> tuple[str, tuple]:
    """Class name of the first object, and the boxes of all."""
    objects = _voc_objects(path)
    if not objects:
        raise DataError(f"{path}: no object is annotated.")
    return objects[0][0], tuple(box for _, box in objects)


def _voc_objects(path: Path) -> list[tuple[str, tuple]]:
    try:
        tree = ElementTree.parse(path)
    except (OSError, ElementTree.ParseError) as error:
        raise DataError(f"{path}: not a readable annotation ({error}).") from error
    objects = []
    for thing in tree.iter("object"):
        name, box = thing.findtext("name"), thing.find("bndbox")
        try:
            corners = tuple(float(box.findtext(k)) for k in ("xmin", "ymin", "xmax", "ymax"))
        except (AttributeError, TypeError, ValueError) as error:
            raise DataError(f"{path}: object {name!r} has no complete bndbox.") from error
        if name is None:
            raise DataError(f"{path}: an object has no name.")
        objects.append((name, corners))
    return objects


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
        labels = {}
        for number, (name, label) in rows(folder / "class_labels.txt", 2, ","):
            labels[name] = convert(folder / "class_labels.txt", number, [label], int)[0]
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
            photo may have several rows); a COCO annotation file; or a folder of VOC XML files with the photos' stems.
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
        folders = [p.name for p in _folders(root)]
        names = list(class_names) if class_names is not None else folders
        if strangers := sorted(set(folders) - set(names)):
            raise DataError(f"{root}: the folder {strangers[0]!r} is none of the {len(names)} classes.")
        photos = _class_folders(root, names)
        super().__init__(photos if boxes is None else _with_boxes(photos, Path(boxes)), names, **options)


_WNID = re.compile(r"n\d{8}")


def class_key(name: str) -> str:
    """What tells classes apart across data sets: the WordNet id that a name begins with, else the name."""
    return found[0] if (found := _WNID.match(name)) else name


class FlatFolder(LocalizationDataset):
    """ImageNet photos in one folder, the class in the file's name: ``root/<wnid>_<name>``, as n01440764_tench.JPEG.

    Classes are the WordNet ids in ascending order, so that all 1,000 have ImageNet's indices. A class is called what
    its first photo is, n01440764_tench, or by the id alone where a number follows, n01440764_18.JPEG.

    Args:
        root: see above.
        boxes: as for `ImageFolder`, or None.
        class_names: of another data set, so that indices agree; they begin with the WordNet id.
    """

    def __init__(
        self,
        root: str | Path,
        boxes: str | Path | None = None,
        class_names: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        root = Path(root)
        paths = _photos_in(root)
        if strangers := [path for path in paths if not _WNID.match(path.name)]:
            raise DataError(
                f"{root}: {len(strangers)} of {len(paths)} photos don't begin with a WordNet id like n01440764_tench, "
                f"the first is {strangers[0].name}."
            )
        first = {class_key(path.stem): path.stem for path in reversed(paths)}
        names = [key if re.fullmatch(r"[\W_]*\d*", name[len(key) :]) else name for key, name in sorted(first.items())]
        names = names if class_names is None else list(class_names)
        index = {class_key(name): label for label, name in enumerate(names)}
        if unknown := sorted(first.keys() - index.keys()):
            raise DataError(f"{root}: {first[unknown[0]]} is of none of the {len(names)} classes.")
        photos = [LabelledPhoto(path.name, path, index[class_key(path.stem)]) for path in paths]
        super().__init__(photos if boxes is None else _with_boxes(photos, Path(boxes)), names, **options)


def _photos_in(root: Path) -> list[Path]:
    try:
        return sorted(p for p in root.iterdir() if p.suffix.lower() in IMAGE_EXTENSIONS and p.is_file())
    except OSError as error:
        raise DataError(f"{root}: can't be listed ({error.strerror}).") from error


def _with_boxes(photos: Sequence[LabelledPhoto], path: Path) -> list[LabelledPhoto]:
    found = _folder_boxes(path, {p.id: p for p in photos})
    return [replace(photo, boxes=tuple(found.get(photo.id, ()))) for photo in photos]


def _folder_boxes(path: Path, photos: dict[str, LabelledPhoto]) -> dict[str, list]:
    found = defaultdict(list)
    if path.is_dir():
        by_stem = {Path(name).stem: name for name in photos}
        for xml in sorted(path.rglob("*.xml")):
            if xml.stem not in by_stem:
                raise DataError(f"{xml}: no photo has this name.")
            found[by_stem[xml.stem]] = [box for _, box in _voc_objects(xml)]
        return found
    if path.suffix.lower() == ".json":
        for name, boxes in _coco_boxes(path).items():
            if name not in photos:
                raise DataError(f"{path}: {name!r} is no photo of the folder.")
            found[name] = boxes
        return found
    for number, row in enumerate(csv.reader(lines(path)), 1):
        if len(row) != 5:
            raise DataError(f"{path}, line {number}: expected path,x0,y0,x1,y1, found {row!r}.")
        if number == 1 and row[1].strip().lower() in ("x0", "xmin", "x1", "x"):
            continue
        if row[0] not in photos:
            raise DataError(f"{path}, line {number}: {row[0]!r} is no photo of the folder.")
        found[row[0]].append(tuple(convert(path, number, row[1:], float)))
    return found


def _coco_boxes(path: Path) -> dict[str, list]:
    data = load_json(path, "COCO annotation file")
    try:
        names = {image["id"]: image["file_name"] for image in data["images"]}
        boxes = defaultdict(list)
        for annotation in data["annotations"]:
            x, y, w, h = annotation["bbox"]
            boxes[names[annotation["image_id"]]].append((x, y, x + w, y + h))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a COCO annotation file ({error!r}).") from error
    return boxes


def voc_labels(root: str | Path, split: str = "trainval") -> tuple[list[LabelledPhoto], list[str]]:
    """PASCAL VOC: photos of ``ImageSets/Main/<split>.txt`` with all their classes as ``labels`` (the first is
    ``label``), boxes from the XML files, and the class names in alphabetical order."""
    root = Path(root)
    stems = [fields[0] for _, fields in rows(root / "ImageSets" / "Main" / f"{split}.txt", range(1, 3))]
    objects = {stem: _voc_objects(root / "Annotations" / f"{stem}.xml") for stem in stems}
    names = sorted({name for things in objects.values() for name, _ in things})
    return _multi_label(root, [(s, root / "JPEGImages" / f"{s}.jpg", objects[s]) for s in stems], names), names


def coco_labels(images: str | Path, annotations: str | Path) -> tuple[list[LabelledPhoto], list[str]]:
    """COCO: the photos of an instances file with all their classes, boxes, and class names in the order of their ids.
    Photos without annotation are left out."""
    root, path = Path(images), Path(annotations)
    data = load_json(path, "COCO annotation file")
    try:
        categories = {c["id"]: c["name"] for c in sorted(data["categories"], key=lambda c: c["id"])}
        things = defaultdict(list)
        for a in data["annotations"]:
            x, y, w, h = a["bbox"]
            things[a["image_id"]].append((categories[a["category_id"]], (x, y, x + w, y + h)))
        listed = [(str(i["id"]), root / i["file_name"], things[i["id"]]) for i in data["images"] if i["id"] in things]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a COCO annotation file ({error!r}).") from error
    return _multi_label(root, listed, list(categories.values())), list(categories.values())


def _multi_label(root: Path, listed: Iterable[tuple], names: list[str]) -> list[LabelledPhoto]:
    index = {name: i for i, name in enumerate(names)}
    photos = []
    for key, path, things in listed:
        labels = tuple(dict.fromkeys(index[name] for name, _ in things))
        if labels:
            photos.append(LabelledPhoto(key, path, labels[0], tuple(box for _, box in things), labels=labels))
    require_files(root, [p.path for p in photos])
    return photos


KINDS = ("cub", "ilsvrc", "wsol", "folder", "flat")


def kind_of(root: str | Path) -> str:
    """The kind of data that a folder holds, by its layout: "cub", "ilsvrc", "flat", else "folder"."""
    root = Path(root)
    if any((root / name).exists() for name in ("images.txt", "test_list.txt")):
        return "cub"
    if (root / "train").is_dir() and any(_WNID.fullmatch(p.name) for p in _folders(root / "train")):
        return "ilsvrc"
    return "flat" if any(_WNID.match(p.name) for p in _photos_in(root)) else "folder"


def open_dataset(
    kind: str,
    root: str | Path,
    train: bool,
    *,
    boxes: str | Path | None = None,
    metadata: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> LocalizationDataset:
    """A data set by the name of its kind: "cub", "ilsvrc", "wsol" (with ``metadata``), "folder" or "flat".

    Args:
        train: the part with labels to learn from, or the one to evaluate on ("wsol", "folder" and "flat" have what
            ``root`` and ``metadata`` name).
        boxes: of "ilsvrc", "folder" and "flat"; of "wsol" the folder of the masks. class_names: of "wsol", "folder" and
            "flat".
        options: of `LocalizationDataset`.

    Raises:
        ConfigError: an unknown kind, or an argument that the kind doesn't have.
    """
    given = {"boxes": boxes, "metadata": metadata, "class_names": class_names}
    named = ("boxes", "class_names")
    taken = {"cub": (), "ilsvrc": ("boxes",), "wsol": ("metadata", *named), "folder": named, "flat": named}
    if kind not in taken:
        raise ConfigError(f"the kind of data must be one of {', '.join(KINDS)}, got {kind!r}")
    if surplus := [n for n, v in given.items() if v is not None and n not in taken[kind] and n != "class_names"]:
        raise ConfigError(f"data of kind {kind!r} takes no {surplus[0]}")
    chosen = {name: given[name] for name in taken[kind]}
    if kind == "cub":
        return CUB200(root, "train" if train else "test", **options)
    if kind == "ilsvrc":
        if train:
            return ILSVRC(root, "train", **options)
        return ILSVRC(root, "val", **chosen, **options)
    if kind == "wsol":
        if metadata is None:
            raise ConfigError("data of kind 'wsol' needs metadata, the folder with image_ids.txt")
        return WSOLMetadata(root, metadata, boxes, class_names, **options)
    return (FlatFolder if kind == "flat" else ImageFolder)(root, **chosen, **options)
