"""Boxes of photos from the files that people keep them in: PASCAL VOC's XML, COCO's JSON, CSV and text lists."""

from __future__ import annotations

import csv
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import DataError
from .labelled import LabelledPhoto
from .tables import convert, lines, load_json, rows

__all__ = ["Coco", "Corners", "ilsvrc_boxes", "load_coco", "voc_objects", "with_boxes"]

Corners = tuple[float, float, float, float]


def voc_objects(path: Path) -> list[tuple[str, Corners]]:
    """Class name and box of every object in a VOC annotation."""
    try:
        text = path.read_text()
        tree = ElementTree.fromstring(text)
    except (OSError, UnicodeDecodeError, ElementTree.ParseError) as error:
        raise DataError(f"{path}: not a readable annotation ({error}).") from error
    objects = []
    for thing in tree.iter("object"):
        name, box = thing.findtext("name"), thing.find("bndbox")
        try:
            corners = tuple(float(box.findtext(k)) for k in ("xmin", "ymin", "xmax", "ymax"))
            if name is None or not all(map(math.isfinite, corners)):
                raise ValueError
        except (AttributeError, TypeError, ValueError) as error:
            start = [found.start() for found in re.finditer(r"<object\b", text)][len(objects)]
            missing = "name" if name is None else "complete bndbox"
            line = text.count("\n", 0, start) + 1
            raise DataError(f"{path}, line {line}: object {name!r} has no {missing}.") from error
        objects.append((name, corners))
    return objects


def ilsvrc_boxes(path: Path) -> dict[str, tuple[str, tuple[Corners, ...]]]:
    """The class, a WordNet id, and the boxes of every photo, by the stem of its file; see `imagenet.ILSVRC`."""
    if path.is_dir():
        objects = {xml.stem: (xml, voc_objects(xml)) for xml in sorted(path.rglob("*.xml"))}
        if bare := [xml for xml, things in objects.values() if not things]:
            raise DataError(f"{bare[0]}: no object is annotated.")
        # all objects of a photo share the class
        return {stem: (things[0][0], tuple(box for _, box in things)) for stem, (_, things) in objects.items()}
    if path.suffix.lower() == ".txt":
        return {stem: (wnid, boxes) for stem, wnid, boxes in _text_boxes(path)}
    found = {}
    for number, row in enumerate(csv.reader(lines(path)), 1):
        if not row or (number == 1 and row[0] == "ImageId"):
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


def with_boxes(photos: Sequence[LabelledPhoto], path: Path) -> list[LabelledPhoto]:
    """The photos with their boxes from a CSV, a COCO file or a folder of VOC annotations, see `ImageFolder`."""
    found = _boxes(path, {photo.id for photo in photos})
    return [replace(photo, boxes=tuple(found.get(photo.id, ()))) for photo in photos]


def _boxes(path: Path, ids: set[str]) -> dict[str, list[Corners]]:
    found = defaultdict(list)
    if path.is_dir():
        named = defaultdict(list)
        for name in ids:
            for key in {str(Path(name).with_suffix("")), Path(name).stem}:
                named[key].append(name)
        for xml in sorted(path.rglob("*.xml")):
            names = named.get(str(xml.relative_to(path).with_suffix(""))) or named[xml.stem]
            if len(names) != 1:
                raise DataError(f"{xml}: {len(names) or 'no'} photos have this name.")
            if names[0] in found:
                raise DataError(f"{xml}: photo {names[0]!r} has another annotation.")
            found[names[0]] = [box for _, box in voc_objects(xml)]
        return found
    if path.suffix.lower() == ".json":
        coco = load_coco(path)
        for key, things in coco.things.items():
            if (name := coco.files[key]) not in ids:
                raise DataError(f"{path}: {name!r} is no photo of the folder.")
            found[name] += [box for _, box in things]
        return found
    for number, row in enumerate(csv.reader(lines(path)), 1):
        if not row or (number == 1 and row[1:2] and row[1].strip().lower() in ("x0", "xmin", "x1", "x")):
            continue
        if len(row) != 5:
            raise DataError(f"{path}, line {number}: expected path,x0,y0,x1,y1, found {row!r}.")
        if row[0] not in ids:
            raise DataError(f"{path}, line {number}: {row[0]!r} is no photo of the folder.")
        x0, y0, x1, y1 = convert(path, number, row[1:], float)
        if not (x0 < x1 and y0 < y1):
            raise DataError(f"{path}, line {number}: the box must be x0,y0,x1,y1 with x0 < x1 and y0 < y1.")
        found[row[0]].append((x0, y0, x1, y1))
    return found


@dataclass
class Coco:
    """files: by photo id. class_names: by category id, rising. things: category id and box, by photo id."""

    files: dict[int, str]
    class_names: dict[int, str]
    things: dict[int, list[tuple[int | None, Corners]]]


def load_coco(path: Path) -> Coco:
    """COCO's annotations of instances, or panoptic ones, of which things count and stuff doesn't."""
    data = load_json(path, "COCO annotation file")
    place = "images"
    try:
        files = {image["id"]: _text(image["file_name"]) for image in data["images"]}
        place = "categories"
        categories = sorted(data.get("categories", ()), key=lambda category: category["id"])
        class_names = {c["id"]: _text(c["name"]) for c in categories if c.get("isthing", 1)}
        stuff = {c["id"] for c in categories} - class_names.keys()
        things, place = defaultdict(list), "annotations"
        for number, annotation in enumerate(data["annotations"]):
            place = f"annotation {number}"
            files[annotation["image_id"]]
            for thing in annotation.get("segments_info", (annotation,)):
                x, y, w, h = thing["bbox"]
                if not all(math.isfinite(n) for n in (x, y, w, h)):
                    raise ValueError(f"bbox {thing['bbox']} isn't finite")
                category = thing.get("category_id")
                if class_names and category not in class_names and category not in stuff:
                    raise ValueError(f"unknown category {category!r}")
                if category not in stuff:
                    things[annotation["image_id"]].append((category, (x, y, x + w, y + h)))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a COCO annotation file ({place}: {error!r}).") from error
    return Coco(files, class_names, things)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} should be text")
    return value
