"""Photos with segments (label maps), the training data of a promptable segmenter.

Sources: COCO panoptic PNGs, BSDS500 label maps of several annotators, foreground masks (8-bit alpha).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import DataError
from .tables import load_json, open_image

MAX_SEGMENTS = 255


@dataclass
class SegmentedPhoto:
    """A photo and one or more label maps of the same size.

    image: uint8 (h, w, 3) RGB. maps: uint8 (A, h, w), one per annotator; 0 is unlabelled, other values are segments.
    kind: ``coco``, ``bsds`` or ``foreground`` (1 = foreground, 2 = background). things: ids of countable objects.
    """

    image: np.ndarray
    maps: np.ndarray
    kind: str
    things: tuple[int, ...] = ()


def _shrink(image: Image.Image, long_side: int) -> Image.Image:
    scale = long_side / max(image.size)
    if scale >= 1:
        return image
    return image.resize([max(1, round(s * scale)) for s in image.size], Image.BILINEAR, reducing_gap=2.0)


def _label_map(ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    # int (h, w) with 0 = unlabelled -> uint8 (size) with ids 1.. in order of area, the largest 255 kept
    values, counts = np.unique(ids[ids > 0], return_counts=True)
    values = values[np.argsort(-counts, kind="stable")][:MAX_SEGMENTS]
    lut = np.zeros(int(ids.max()) + 1, np.uint8)
    lut[values] = np.arange(1, len(values) + 1)
    return np.asarray(Image.fromarray(lut[ids]).resize(size, Image.NEAREST)), values


def coco_panoptic(root: Path, split: str, long_side: int = 512) -> Iterable[SegmentedPhoto]:
    """``root/annotations/panoptic_{split}2017.json`` with PNGs; segment id = R + 256 G + 65536 B."""
    index = root / "annotations" / f"panoptic_{split}2017.json"
    data = load_json(index, "COCO panoptic file")
    is_thing = {c["id"]: bool(c["isthing"]) for c in data["categories"]}
    names = {i["id"]: i["file_name"] for i in data["images"]}
    for ann in data["annotations"]:
        image = _shrink(open_image(root / "images" / f"{split}2017" / names[ann["image_id"]]).convert("RGB"), long_side)
        png = np.asarray(open_image(root / "annotations" / f"panoptic_{split}2017" / ann["file_name"]).convert("RGB"))
        ids = png.astype(np.int64) @ np.array([1, 256, 65536])
        values, dense = np.unique(ids, return_inverse=True)
        dense = dense.reshape(ids.shape) + (values[0] != 0)
        values = values if values[0] == 0 else np.concatenate([[0], values])
        label_map, kept = _label_map(dense, image.size)
        thing_ids = {s["id"] for s in ann["segments_info"] if is_thing[s["category_id"]] and not s["iscrowd"]}
        crowd = {s["id"] for s in ann["segments_info"] if s["iscrowd"]}
        label_map = label_map.copy()
        for k, v in enumerate(values[kept], 1):
            if int(v) in crowd:
                label_map[label_map == k] = 0
        things = tuple(k for k, v in enumerate(values[kept], 1) if int(v) in thing_ids)
        yield SegmentedPhoto(np.asarray(image), label_map[None], "coco", things)


def bsds(root: Path, split: str, long_side: int = 512) -> Iterable[SegmentedPhoto]:
    """``root/{split}/images/<id>.jpg`` and ``segments/<id>_<k>.png``, a label map of annotator k."""
    for path in sorted((root / split / "images").glob("*.jpg")):
        image = _shrink(open_image(path).convert("RGB"), long_side)
        maps = []
        for png in sorted((root / split / "segments").glob(f"{path.stem}_*.png")):
            ids = np.asarray(open_image(png)).astype(np.int64)
            maps.append(_label_map(ids + (ids.min() == 0), image.size)[0])
        if not maps:
            raise DataError(f"{path}: no segments/{path.stem}_<k>.png beside it.")
        yield SegmentedPhoto(np.asarray(image), np.stack(maps), "bsds")


def foreground(photos: Path, masks: Path, long_side: int = 512) -> Iterable[SegmentedPhoto]:
    """Every PNG alpha mask below ``masks`` with the photo of the same relative name below ``photos``."""
    for png in sorted(masks.rglob("*.png")):
        stem = photos / png.relative_to(masks).with_suffix("")
        candidates = (stem.with_name(stem.name + suffix) for suffix in (".jpg", ".JPEG", ".jpeg", ".png"))
        path = next((p for p in candidates if p.exists()), None)
        if path is None:
            raise DataError(f"{png}: no photo {stem}.jpg|.JPEG|.jpeg|.png for this mask.")
        image = _shrink(open_image(path).convert("RGB"), long_side)
        alpha = np.asarray(open_image(png).convert("L").resize(image.size, Image.BILINEAR))
        label_map = np.where(alpha > 127, 1, np.where(alpha < 64, 2, 0)).astype(np.uint8)
        # a mask of nearly nothing or nearly everything teaches nothing
        if 0.005 < (label_map == 1).mean() < 0.95:
            yield SegmentedPhoto(np.asarray(image), label_map[None], "foreground", (1,))
