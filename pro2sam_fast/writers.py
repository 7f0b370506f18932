"""Results on disk, in the formats that labelling and training tools read.

    DIR/localizations.jsonl         one record per input, in input order; always written
    DIR/overlays/<name>.jpg         photo with box, mask contour and label
    DIR/masks/<name>.png            8-bit mask, 0 and 255
    DIR/coco.json                   COCO: images, annotations with boxes and RLE masks, the categories that occur
    DIR/voc/<name>.xml              Pascal VOC: one object, corners in VOC's 1-based inclusive pixels
    DIR/yolo/labels/<name>.txt      `class xc yc w h`, fractions of the photo; with yolo/classes.txt, yolo/data.yaml
    DIR/labelstudio.json            Label Studio tasks with rectangle pre-annotations

    DIR/masks.jsonl                 segment everything: one record per input, all its masks as COCO RLE
    DIR/galleries/<name>.jpg        photo with every mask in its own colour

`<name>` is the input's place below its folder source, or its file name; equal names get `-2`, `-3`, ... Without a
class label the class is called `object`. Every file is put in place whole.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from .draw import draw_gallery
from .errors import ConfigError
from .io import Source, atomic_file, write_atomic
from .records import OutputNames, RecordLog, make_parent
from .results import Localization, coco_annotation, encode_image, encode_mask_png, overlay_suffix

if TYPE_CHECKING:
    from .gallery import MaskGallery

__all__ = ["FORMATS", "OUTPUT_FOLDERS", "GalleryWriter", "LocalizationWriter"]

FORMATS = ("jsonl", "coco", "voc", "yolo", "labelstudio")
OUTPUT_FOLDERS = ("overlays", "masks", "voc", "yolo", "galleries")


class _RunFolder:
    """What one run writes into a folder: a log, and files that never replace an input."""

    def __init__(
        self, folder: str | os.PathLike, stem: str, config: dict[str, Any], resume: bool, inputs: Iterable[str]
    ) -> None:
        self.folder = os.fspath(folder)
        self._protected = protected_inputs(self.folder, inputs)
        self._names = OutputNames()
        self._target(f"{stem}.jsonl")
        self.log = RecordLog(self.folder, stem, config, resume=resume)

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.log.close()

    def remaining(self, sources: Iterable[Source]) -> Iterator[Source]:
        """The inputs that still need work. Raises ConfigError if the first ones aren't those of the resumed run."""
        for done, source in self.log.remaining(sources):
            if done:
                self._names.claim(source.name)
            else:
                yield source

    def _put(self, relative: str, content: bytes) -> None:
        path = self._target(relative)
        make_parent(path)
        write_atomic(path, content)

    def _target(self, relative: str) -> str:
        path = os.path.join(self.folder, relative)
        if os.path.realpath(path) in self._protected:
            raise ConfigError(f"refusing to write over the input '{path}': choose another output folder")
        return path


class LocalizationWriter(_RunFolder):
    """Writes the results of one run into a folder, in input order; a context manager.

    folder: made if missing. formats: out of `FORMATS`. overlay, masks: write pictures, mask files.
    config: JSON-ready options that make the results what they are, kept in `localizations.run.json`; with `resume`
    they must be the same. class_names: names of all classes, for YOLO's class list; by default those that occur.
    inputs: files that must not be written over.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        formats: Sequence[str] = ("jsonl",),
        overlay: bool = True,
        masks: bool = False,
        config: dict[str, Any] | None = None,
        resume: bool = False,
        class_names: Sequence[str] | None = None,
        inputs: Iterable[str] = (),
    ):
        self.formats = check_formats(formats)
        self.overlay, self.masks, self.class_names = overlay, masks, class_names
        outputs = {"format": sorted(self.formats), "overlay": overlay, "masks": masks}
        super().__init__(folder, "localizations", {**(config or {}), **outputs}, resume, inputs)

    def __exit__(self, *exception) -> None:
        try:
            self.write_collections()
        finally:
            super().__exit__(*exception)

    def write(self, result: Localization) -> None:
        """Write the photo's own files, then commit its record. Call in input order, skipped photos included."""
        name = self._names.claim(result.name or result.path or "image")
        record = result.to_dict()
        if result.error is None:
            if self.overlay:
                picture = result.plot()
                suffix = overlay_suffix(picture.size)
                self._put(f"overlays/{name}{suffix}", encode_image(picture, suffix))
            if self.masks:
                self._put(f"masks/{name}.png", encode_mask_png(result.mask))
            if "voc" in self.formats:
                self._put(f"voc/{name}.xml", voc_xml(record))
            if "yolo" in self.formats:
                self._put(f"yolo/labels/{name}.txt", yolo_line(record))
        self.log.append(record)

    def write_collections(self) -> None:
        """Write the files that cover all records so far; leaving the context does it, after an interrupt too."""
        if "coco" in self.formats:
            self._stream("coco.json", coco_chunks(self.log))
        if "labelstudio" in self.formats:
            self._stream("labelstudio.json", labelstudio_chunks(self.log))
        if "yolo" in self.formats:
            names = yolo_names(self.log, self.class_names)
            self._put("yolo/classes.txt", "".join(f"{name}\n" for name in names).encode())
            rows = "".join(f"  {index}: {json.dumps(name)}\n" for index, name in enumerate(names))
            self._put("yolo/data.yaml", f"nc: {len(names)}\nnames:\n{rows}".encode())

    def _stream(self, relative: str, chunks: Iterable[str]) -> None:
        with atomic_file(self._target(relative)) as file:
            for chunk in chunks:
                file.write(chunk.encode())


class GalleryWriter(_RunFolder):
    """Writes whole mask galleries into a folder, in input order; a context manager.

    Arguments as for `LocalizationWriter`; the pictures are those of the galleries.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        overlay: bool = True,
        config: dict[str, Any] | None = None,
        resume: bool = False,
        inputs: Iterable[str] = (),
    ):
        self.overlay = overlay
        super().__init__(folder, "masks", {**(config or {}), "overlay": overlay}, resume, inputs)

    def write(self, source: Source, image: np.ndarray, gallery: MaskGallery, speed: dict[str, float]) -> None:
        """Write the picture, then commit the record: path, height, width, masks (records in COCO RLE), speed, error."""
        name = self._names.claim(source.name)
        if self.overlay:
            picture = draw_gallery(image, gallery_patches(gallery))
            suffix = overlay_suffix(picture.size)
            self._put(f"galleries/{name}{suffix}", encode_image(picture, suffix))
        height, width = image.shape[:2]
        self._append(source.path, height, width, gallery.to_records("coco_rle"), speed, None)

    def write_error(self, source: Source, error: str) -> None:
        """Commit the record of a photo that couldn't be used."""
        self._names.claim(source.name)
        self._append(source.path, None, None, None, {}, error)

    def _append(self, path, height, width, masks, speed, error) -> None:
        speed = {stage: round(value, 3) for stage, value in speed.items()}
        record = {"path": path, "height": height, "width": width, "masks": masks, "speed": speed, "error": error}
        self.log.append(record)


def gallery_patches(gallery: MaskGallery) -> Iterator[tuple[int, int, np.ndarray]]:
    """(x, y, bool (h, w)) of every mask of a gallery that isn't empty, cropped to its box."""
    from .rle import packed_to_dense

    masks = packed_to_dense(gallery.masks, gallery.size[1])
    for mask, box, area in zip(masks, gallery.boxes.tolist(), gallery.areas.tolist(), strict=True):
        if area:
            x0, y0, x1, y1 = box
            yield x0, y0, mask[y0 : y1 + 1, x0 : x1 + 1].copy()


def check_formats(formats: Sequence[str]) -> tuple[str, ...]:
    for name in formats:
        if name not in FORMATS:
            raise ConfigError(f"unknown format '{name}': choose from {', '.join(FORMATS)}")
    return tuple(dict.fromkeys(formats))


def protected_inputs(folder: str, inputs: Iterable[str]) -> frozenset[str]:
    """Real paths of the inputs that lie below the output folder."""
    root = os.path.join(os.path.realpath(folder), "")
    real = (os.path.realpath(path) for path in inputs)
    return frozenset(path for path in real if path.startswith(root))


def class_name(record: dict[str, Any]) -> str:
    if record["label"] is None:
        return "object"
    return record["label_name"] or f"class {record['label']}"


def coco_chunks(log: RecordLog) -> Iterator[str]:
    """COCO file as text, in pieces: image ids are line numbers of the log, category ids label + 1."""
    categories = {}
    yield '{"info": {"description": "pro2sam_fast localizations"}, "images": ['
    separator = "\n"
    for number, record in enumerate(log.records(), 1):
        if record["error"] is None:
            image = {"id": number, "file_name": record["path"], "height": record["height"], "width": record["width"]}
            yield separator + json.dumps(image)
            separator = ",\n"
    yield '], "annotations": ['
    separator = "\n"
    for number, record in enumerate(log.records(), 1):
        if record["error"] is None:
            annotation = coco_annotation(record, number, number)
            categories[annotation["category_id"]] = class_name(record)
            yield separator + json.dumps(annotation)
            separator = ",\n"
    listed = [{"id": key, "name": name} for key, name in sorted(categories.items())]
    yield f'], "categories": {json.dumps(listed)}}}\n'


def voc_xml(record: dict[str, Any]) -> bytes:
    root = ElementTree.Element("annotation")
    folder, filename = os.path.split(_printable(record["path"] or ""))

    def add(parent, tag, text):
        ElementTree.SubElement(parent, tag).text = str(text)

    add(root, "folder", os.path.basename(folder))
    add(root, "filename", filename)
    add(root, "path", _printable(record["path"] or ""))
    add(ElementTree.SubElement(root, "source"), "database", "pro2sam_fast")
    size = ElementTree.SubElement(root, "size")
    for tag, value in (("width", record["width"]), ("height", record["height"]), ("depth", 3)):
        add(size, tag, value)
    add(root, "segmented", 0)
    thing = ElementTree.SubElement(root, "object")
    for tag, value in (("name", class_name(record)), ("pose", "Unspecified"), ("truncated", 0), ("difficult", 0)):
        add(thing, tag, value)
    x0, y0, x1, y1 = record["box"]
    corners = ElementTree.SubElement(thing, "bndbox")
    # VOC counts pixels from 1 and includes both corners
    inclusive = (math.floor(x0) + 1, math.floor(y0) + 1, math.ceil(x1), math.ceil(y1))
    for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), inclusive, strict=True):
        add(corners, tag, value)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8") + b"\n"


def _printable(text: str) -> str:
    """Text that XML can hold: undecodable bytes and control characters become `?`."""
    clean = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(letter if letter.isprintable() else "?" for letter in clean)


def yolo_line(record: dict[str, Any]) -> bytes:
    x0, y0, x1, y1 = record["box"]
    width, height = record["width"], record["height"]
    values = ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height)
    return f"{record['label'] or 0} {' '.join(f'{value:.6f}' for value in values)}\n".encode()


def yolo_names(log: RecordLog, class_names: Sequence[str] | None) -> list[str]:
    """Names of classes 0..n-1: all known ones, else those that occur, with fillers between."""
    if class_names is not None:
        return list(class_names)
    seen = {record["label"] or 0: class_name(record) for record in log.records() if record["error"] is None}
    return [seen.get(index, f"class {index}") for index in range(max(seen, default=-1) + 1)]


def labelstudio_chunks(log: RecordLog) -> Iterator[str]:
    """Label Studio import: tasks for local file serving, one rectangle each, in percent of the photo."""
    yield "["
    separator = "\n"
    for number, record in enumerate(log.records(), 1):
        if record["error"] is None:
            yield separator + json.dumps(labelstudio_task(record, number))
            separator = ",\n"
    yield "\n]\n"


def labelstudio_task(record: dict[str, Any], number: int) -> dict[str, Any]:
    x0, y0, x1, y1 = record["box"]
    width, height = record["width"], record["height"]
    path = record["path"] and os.path.abspath(record["path"]).lstrip(os.sep)
    rectangle = {
        "x": 100 * x0 / width,
        "y": 100 * y0 / height,
        "width": 100 * (x1 - x0) / width,
        "height": 100 * (y1 - y0) / height,
        "rotation": 0,
        "rectanglelabels": [class_name(record)],
    }
    region = {
        "id": f"box{number}",
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": rectangle,
        "score": record["score"],
    }
    prediction = {"model_version": "pro2sam_fast", "score": record["score"], "result": [region]}
    return {"data": {"image": f"/data/local-files/?d={path}" if path else None}, "predictions": [prediction]}
