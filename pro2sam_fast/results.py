"""What a photo gives: `Localization`, its JSON record, COCO annotation and picture."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .draw import draw_localization
from .errors import ConfigError, Pro2SamError
from .io import IMAGE_EXTENSIONS, read_image, write_atomic
from .records import OutputNames, make_parent

if TYPE_CHECKING:
    from PIL import Image

    from .gallery import MaskGallery

__all__ = ["Localization", "decode_rle", "encode_image", "encode_rle"]

RECORD_KEYS = (
    "path",
    "height",
    "width",
    "box",
    "score",
    "label",
    "label_name",
    "label_score",
    "source",
    "mask",
    "speed",
    "error",
)


@dataclass(eq=False)
class Localization:
    """The object found in one photo. Everything is in pixels of the upright photo (EXIF orientation applied).

    path: file of the photo, None for an in-memory image.
    orig_shape: (h, w), None if the photo couldn't be read.
    box: (x0, y0, x1, y1) float, half-open: 0 <= x0 < x1 <= w. None only with `error`.
    mask: bool (h, w), the same object. None only with `error`.
    score: 0..1, IoU of the mask with the binarised coarse map at matching resolution, less for masks along the photo's
        borders with `border_sigma`; 0 unless `source="sam"`.
    label, label_name, label_score: class index, its name, its softmax probability; None without a classifier (or
    names).
    coarse: float32 (h', w'), coarse localisation map, 0..1, stretched over the whole photo.
    candidates: the best gallery masks, best match first, in photo pixels (or the SAM input's pixels if `sam_input` is a
        number); `candidate_scores` float32 (K,) are their matching scores.
    source: where the mask comes from: "sam" (gallery), "coarse" (no gallery mask matched), "full" (whole frame:
    nothing did).
    speed: milliseconds per stage, each photo's share of its batch: read, coarse, gallery, match, total.
    error: one sentence if the photo was skipped (`on_error="skip"`), else None.
    name: relative output name, see `pro2sam_fast.io.Source`.
    image: the photo, uint8 (h, w, 3), while it is kept: always when streaming, else only for in-memory sources.
    """

    path: str | None
    orig_shape: tuple[int, int] | None = None
    box: tuple[float, float, float, float] | None = None
    mask: np.ndarray | None = field(default=None, repr=False)
    score: float | None = None
    label: int | None = None
    label_name: str | None = None
    label_score: float | None = None
    coarse: np.ndarray | None = field(default=None, repr=False)
    candidates: MaskGallery | None = field(default=None, repr=False)
    candidate_scores: np.ndarray | None = field(default=None, repr=False)
    source: str | None = None
    speed: dict[str, float] = field(default_factory=dict, repr=False)
    error: str | None = None
    name: str = field(default="", repr=False)
    image: np.ndarray | None = field(default=None, repr=False)

    def to_dict(self, *, mask: bool = True) -> dict[str, Any]:
        """A JSON-ready record, the line of `localizations.jsonl`.

        Keys: path, height, width, box [x0, y0, x1, y1], score, label, label_name, label_score, source, mask (COCO RLE
        `{"size": [h, w], "counts": str}`, None with `mask=False`), speed, error.
        """
        height, width = self.orig_shape or (None, None)
        values = (
            self.path,
            height,
            width,
            None if self.box is None else [float(value) for value in self.box],
            self.score,
            self.label,
            self.label_name,
            self.label_score,
            self.source,
            encode_rle(self.mask) if mask and self.mask is not None else None,
            {stage: round(value, 3) for stage, value in self.speed.items()},
            self.error,
        )
        return dict(zip(RECORD_KEYS, values, strict=True))

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Localization:
        """Rebuild a result from its record (a parsed line of `localizations.jsonl`)."""
        shape = None if record["height"] is None else (record["height"], record["width"])
        result = cls(record["path"], shape, box=record["box"] and tuple(record["box"]))
        for key in ("score", "label", "label_name", "label_score", "source", "speed", "error"):
            setattr(result, key, record[key])
        result.mask = record["mask"] and decode_rle(record["mask"])
        result.name = os.path.basename(record["path"] or "")
        return result

    def to_coco(self, image_id: int = 1, annotation_id: int = 1, category_id: int | None = None) -> dict[str, Any]:
        """A COCO annotation: bbox [x, y, width, height], area, RLE segmentation, iscrowd 0, score.

        category_id: by default `label + 1` (COCO counts from 1), or 1 without a label.
        Raises Pro2SamError for a skipped photo.
        """
        self._require_result()
        return coco_annotation(self.to_dict(), image_id, annotation_id, category_id)

    def plot(self, image: np.ndarray | Image.Image | None = None, *, caption: str | None = None) -> Image.Image:
        """The photo with the background dimmed, mask contour, box and caption, as a Pillow image of the photo's size.

        image: the photo, if it is neither kept in `self.image` nor readable at `self.path`. caption: instead of the
        label. Raises Pro2SamError for a skipped photo and ImageReadError if the photo can't be read again.
        """
        self._require_result()
        if image is None:
            image = self.image if self.image is not None else self.path
        if image is None:
            raise ConfigError("this result doesn't hold its photo: pass it as plot(image)")
        pixels = read_image(image, max_pixels=None)
        if pixels.shape[:2] != tuple(self.orig_shape):
            raise ConfigError(f"the photo has shape {pixels.shape[:2]}, the result is for {tuple(self.orig_shape)}")
        return draw_localization(pixels, self.mask, self.box, self.caption() if caption is None else caption)

    def caption(self) -> str:
        """Label with its probability, or the matching score where there is no label."""
        if self.label is None:
            return "" if self.score is None else f"object {self.score:.0%}"
        name = self.label_name or f"class {self.label}"
        return name if self.label_score is None else f"{name} {self.label_score:.0%}"

    def save(self, target: str | os.PathLike, image: np.ndarray | Image.Image | None = None) -> list[Path]:
        """Write the result, atomically; never over the photo itself.

        target: a name ending in .json (the record), in an image extension (the overlay of `plot`), or else a folder,
        made if missing and not the photo's own, which gets `<name>.jpg` (overlay), `<name>-mask.png` (0/255) and
        `<name>.json`. Returns the paths written.
        """
        target = Path(target)
        suffix = target.suffix.lower()
        if suffix == ".json":
            return [self._write(target, self._json())]
        if suffix in IMAGE_EXTENSIONS:
            return [self._write(target, encode_image(self.plot(image), suffix))]
        self._require_result()
        stem = str(target / OutputNames().claim(self.name or os.path.basename(self.path or "image")))
        make_parent(stem)
        if self.path is not None and os.path.exists(self.path):
            own = os.path.dirname(self.path) or os.curdir
            if os.path.samefile(own, os.path.dirname(stem)):
                raise ConfigError(f"refusing to write results among the photos of '{own}': choose another folder")
        picture = self.plot(image)
        picture_suffix = overlay_suffix(picture.size)
        return [
            self._write(Path(f"{stem}{picture_suffix}"), encode_image(picture, picture_suffix)),
            self._write(Path(f"{stem}-mask.png"), encode_mask_png(self.mask)),
            self._write(Path(f"{stem}.json"), self._json()),
        ]

    def _json(self) -> bytes:
        return json.dumps(self.to_dict()).encode() + b"\n"

    def _write(self, path: Path, content: bytes) -> Path:
        if self.path is not None and path.exists() and os.path.exists(self.path) and os.path.samefile(path, self.path):
            raise ConfigError(f"refusing to write over the photo '{self.path}': choose another folder or name")
        write_atomic(path, content)
        return path

    def _require_result(self) -> None:
        if self.error is not None:
            raise Pro2SamError(f"there is no result to show: {self.error}")


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """bool (h, w) -> COCO RLE `{"size": [h, w], "counts": str}` (column-major runs, COCO's compressed string)."""
    from .rle import coco_rle

    return coco_rle(mask)


def decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """COCO RLE -> bool (h, w)."""
    from pycocotools import mask as coco

    return coco.decode({"size": rle["size"], "counts": rle["counts"].encode("ascii")}).astype(bool)


def coco_annotation(record: dict[str, Any], image_id: int, annotation_id: int, category_id: int | None = None) -> dict:
    """The COCO annotation of one `to_dict` record that has a result."""
    from pycocotools import mask as coco

    x0, y0, x1, y1 = record["box"]
    rle = record["mask"]
    if category_id is None:
        category_id = 1 if record["label"] is None else record["label"] + 1
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": int(coco.area({"size": rle["size"], "counts": rle["counts"].encode("ascii")})),
        "segmentation": rle,
        "iscrowd": 0,
        "score": record["score"],
    }


def overlay_suffix(size: tuple[int, int]) -> str:
    """.jpg, or .png for pictures longer than JPEG allows (65,500 px a side)."""
    return ".jpg" if max(size) <= 65500 else ".png"


def encode_image(image: Image.Image, suffix: str = ".jpg") -> bytes:
    """Encode a Pillow image by file extension; JPEG at quality 92 without chroma subsampling, so that thin lines stay
    crisp."""
    from PIL import Image as pillow

    kind = pillow.registered_extensions().get(suffix.lower())
    if kind not in pillow.SAVE:
        raise ConfigError(f"can't write pictures of type '{suffix}': use .jpg or .png")
    stream = io.BytesIO()
    image.save(stream, kind, **({"quality": 92, "subsampling": 0} if kind == "JPEG" else {}))
    return stream.getvalue()


def encode_mask_png(mask: np.ndarray) -> bytes:
    """bool (h, w) -> an 8-bit grey PNG, 0 and 255."""
    from PIL import Image as pillow

    return encode_image(pillow.fromarray(mask.astype(np.uint8) * 255), ".png")
