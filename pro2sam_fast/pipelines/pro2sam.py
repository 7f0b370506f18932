"""Pro2SAM (ECCV 2024): a coarse localisation map picks, by mask matching, the object out of SAM's grid-point
gallery."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..background import attempted, in_background
from ..boxes import tight_box
from ..errors import BackendError, ConfigError, ImageReadError
from ..gallery import MaskGallery
from ..generator import MaskGenerator
from ..io import MAX_PIXELS, Source, iter_sources, read_sources
from ..memory import results_or_reasons
from ..models.lite import map_and_label
from ..results import Localization
from ..transfer import Upload, in_step, queues, to_device, to_host
from .matching import MatchResult, NoMaskError, match, matching

__all__ = ["AUTO_BATCH", "Localizer", "PhotoNet", "check_batch_size", "resolve_device"]

BOX_RULES = ("otsu_union", "largest")
_MAX_SAM_INPUT = 8192
AUTO_BATCH = {"cpu": 4, "cuda": 16}
_AUTO_PIXELS = {"cpu": 8_000_000, "cuda": 32_000_000}  # a batch holds no more than this, or one photo


class PhotoNet:
    """A network on resized photos, as the localizer's coarse stage or its classifier.

    model: maps a normalised (B, 3, size, size) batch to `{"map": (B, h, w), "logits": (B, C), ...}`, for instance
    GTFormer. Where it has `coarse_map(x) -> (B, h, w)` and logits aren't wanted, that is called instead.
    The photo is resized to size x size with Pillow's bilinear filter, the aspect ignored, scaled to 0..1 and
    normalised.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        size: int = 224,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ):
        self.model = model.eval()
        self.size = size
        self.input_format = (size, tuple(mean), tuple(std))
        self._mean = np.asarray(mean, np.float32)
        self._std = np.asarray(std, np.float32)

    def to(self, device: torch.device | str) -> PhotoNet:
        self.model.to(device)
        return self

    def prepare(self, rgb: np.ndarray) -> Tensor:
        """uint8 (H, W, 3) RGB -> float32 (3, size, size), normalised."""
        resized = Image.fromarray(rgb).resize((self.size, self.size), Image.Resampling.BILINEAR)
        scaled = (np.asarray(resized, np.float32) / 255 - self._mean) / self._std
        return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))

    def __call__(self, batch: Tensor, *, logits: bool = True) -> dict[str, Tensor]:
        """(B, 3, size, size) -> {"map": (B, h, w) in 0..1, "logits": (B, C) if wanted and there are any}."""
        if not logits and hasattr(self.model, "coarse_map"):
            return {"map": self.model.coarse_map(batch)}
        return self.model(batch)


class _Prepared(NamedTuple):
    """What the networks get of a photo, on its way to the device.

    coarse: the coarse stage's input. label: the classifier's; None if that is the same, or without a classifier.
    view: uint8 (H, W, 3), what SAM sees. sam: the generator's uploads of it; None for a generator without them.
    """

    coarse: Upload
    label: Upload | None
    view: np.ndarray
    sam: list[Upload] | None


class _Photo(NamedTuple):
    """RGB uint8 (H, W, 3), and what was made of it while others were worked on."""

    image: np.ndarray
    prepared: _Prepared | None = None


class Localizer:
    """The whole pipeline, ready to run on photos.

    coarse: gives the coarse map: an object with `prepare(rgb uint8 (H, W, 3)) -> tensor` and `__call__(batch) ->
        {"map": (B, h, w) in 0..1, "logits": (B, C) if it classifies}`, or a module that `PhotoNet` can wrap
        (GTFormer).
    sam: a `Sam`, whose mask gallery is matched against the map.
    classifier: gives the label: like `coarse`, its call returning `{"logits": (B, C)}` or the logits themselves. By
        default the coarse model's own logits.
    class_names: names of the classifier's classes.
    generator: options of `MaskGenerator`. matching: options of `match`.
    sam_input: "native" shows SAM the upright photo; a number S shows it the photo resized to S x S, the aspect ignored
        (the paper's protocol has 224), and maps the result back.
    box: "otsu_union", the union of the mask's regions of at least `min_region_box` pixels, or "largest", the largest
        region. A mask without such a region gives the box around all of it.
    candidates: how many gallery masks to keep in a result, best match first; None for all.
    max_pixels: limit for reading files, None for no limit.
    device: "auto" (CUDA where it works, else CPU), or what torch.device takes.

    On the CPU results don't depend on the batch size; a GPU may round coarse maps differently. Calling is safe from one
    thread at a time. For a GPU, `prepare` of the stages is called by several threads of our own.
    """

    def __init__(
        self,
        coarse: Any,
        sam: nn.Module,
        *,
        classifier: Any = None,
        class_names: Sequence[str] | None = None,
        generator: Mapping[str, Any] | None = None,
        matching: Mapping[str, Any] | None = None,
        sam_input: str | int = "native",
        box: str = "otsu_union",
        min_region_box: int = 100,
        candidates: int | None = 10,
        max_pixels: int | None = MAX_PIXELS,
        device: str | torch.device = "auto",
    ):
        if sam_input != "native" and not (_is_int(sam_input) and 1 <= sam_input <= _MAX_SAM_INPUT):
            raise ConfigError(f"sam_input must be 'native' or 1 to {_MAX_SAM_INPUT} pixels, not {sam_input!r}")
        if box not in BOX_RULES:
            raise ConfigError(f"box must be one of {', '.join(BOX_RULES)}, not {box!r}")
        for name, value, lowest in (("candidates", candidates, 0), ("max_pixels", max_pixels, 1)):
            if value is not None and not (_is_int(value) and value >= lowest):
                raise ConfigError(f"{name} must be None or a whole number of at least {lowest}, not {value!r}")
        if not _is_int(min_region_box) or min_region_box < 0:
            raise ConfigError(f"min_region_box must be a whole number of pixels, not {min_region_box!r}")
        self.device = resolve_device(device)
        self.coarse = _on_device(_as_stage(coarse, "coarse"), self.device)
        self.classifier = None if classifier is None else _on_device(_as_stage(classifier, "classifier"), self.device)
        if not isinstance(sam, nn.Module):
            raise ConfigError(f"sam must be a model from build_sam, not {type(sam).__name__}")
        self.sam = sam.to(self.device).eval()
        self.generator = MaskGenerator(self.sam, **_known(generator, MaskGenerator.__init__))
        self.matching = _known(matching, match)
        with suppress(NoMaskError):  # check the values now, not at the first photo
            match(MaskGallery.empty((1, 1)), torch.zeros(1, 1), **self.matching)
        self.class_names = _names(class_names)
        self.sam_input, self.box, self.min_region_box = sam_input, box, min_region_box
        self.candidates, self.max_pixels = candidates, max_pixels

    def __call__(
        self,
        source: Any,
        *,
        batch_size: int | str = "auto",
        stream: bool = False,
        on_error: str = "raise",
    ) -> list[Localization] | Iterator[Localization]:
        """Localize the object in every photo of `source`, in order.

        source: anything `pro2sam_fast.io.iter_sources` takes: path, folder, glob, Pillow image, RGB array, tensor, or
            a list or generator of these. `Source` objects pass as they are.
        batch_size: photos a pass; "auto" fits the device, the photo sizes and, on a GPU, the memory.
        stream: True gives an iterator that holds one batch at a time, its results keeping their photo in `image`;
            False a list.
        on_error: "raise" stops at the first photo that can't be read or matched (earlier ones are yielded first when
            streaming); "skip" gives it a `Localization` with `error` set and goes on.
        """
        if on_error not in ("raise", "skip"):
            raise ConfigError(f"on_error must be 'raise' or 'skip', not {on_error!r}")
        check_batch_size(batch_size)
        results = self._stream(iter_sources(source), batch_size, on_error, stream)
        return results if stream else list(results)

    def localize_batch(
        self, images: Sequence[np.ndarray], prepared: Sequence[_Prepared | None] = ()
    ) -> list[Localization]:
        """Localize in photos already read: uint8 (H, W, 3) RGB arrays of any sizes, in one pass.

        prepared: what :meth:`prepare` made of each, if that was done before.
        """
        speed: dict[str, float] = {}
        prepared = [x for x in prepared if x is not None]
        prepared = prepared if len(prepared) == len(images) else []
        with torch.inference_mode():
            with self._timed(speed, "coarse"):
                maps, logits = self._coarse(images, prepared)
            with self._timed(speed, "gallery"):
                views = [x.view for x in prepared] or [self._sam_view(image) for image in images]
                uploads = [x.sam for x in prepared if x.sam is not None]
                galleries = self.generator.generate(views, uploads) if uploads else self.generator.generate(views)
            with self._timed(speed, "match"):
                results = self._results(images, galleries, maps, logits)
        share = {stage: value / len(images) for stage, value in speed.items()}
        for result in results:
            result.speed = dict(share)
        return results

    def prepare(self, image: np.ndarray) -> _Prepared:
        """What can be done for a photo while the device works on others. May be called in any thread."""
        own_label = self.classifier is not None and not _same_input(self.classifier, self.coarse)
        view = self._sam_view(image)
        return _Prepared(
            Upload(self.coarse.prepare(image), self.device),
            Upload(self.classifier.prepare(image), self.device) if own_label else None,
            view,
            self.generator.prepare(view) if isinstance(self.generator, MaskGenerator) else None,
        )

    def _coarse(self, images: Sequence[np.ndarray], prepared: Sequence[_Prepared]) -> tuple[Tensor, Tensor | None]:
        """Maps (B, h, w) and logits (B, C) or None."""
        size = 1 if self.device.type == "cpu" else len(images)  # matrix products of another size round differently
        starts = range(0, len(images), size)
        parts = [self._coarse_pass(*(x[start : start + size] for x in (images, prepared))) for start in starts]
        maps, logits = zip(*parts, strict=True)
        return torch.cat(maps), None if logits[0] is None else torch.cat(logits)

    def _coarse_pass(self, images: Sequence[np.ndarray], prepared: Sequence[_Prepared]) -> tuple[Tensor, Tensor | None]:
        batch = self._inputs(self.coarse, images, [x.coarse for x in prepared])
        if self.classifier is None:
            output = self.coarse(batch)
            return output["map"], output.get("logits")
        wants_map_only, same_input = isinstance(self.coarse, PhotoNet), _same_input(self.classifier, self.coarse)
        if wants_map_only and same_input and isinstance(self.classifier, PhotoNet):
            both = map_and_label(self.coarse.model, self.classifier.model, batch)
            if both is not None:
                return both
        output = self.coarse(batch, logits=False) if wants_map_only else self.coarse(batch)
        if not same_input:
            batch = self._inputs(self.classifier, images, [x.label for x in prepared])
        logits = self.classifier(batch)
        return output["map"], logits["logits"] if isinstance(logits, Mapping) else logits

    def _inputs(self, stage: Any, images: Sequence[np.ndarray], uploads: Sequence[Upload]) -> Tensor:
        if uploads:
            return torch.stack([upload.result() for upload in uploads])
        return to_device(torch.stack([stage.prepare(image) for image in images]), self.device)

    def _photo(self, image: np.ndarray) -> _Photo:
        return _Photo(image, attempted(self.prepare, image))

    def _sam_view(self, image: np.ndarray) -> np.ndarray:
        if self.sam_input == "native":
            return image
        size = (self.sam_input, self.sam_input)
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))

    def _results(
        self, images: Sequence[np.ndarray], galleries: list[MaskGallery], maps: Tensor, logits: Tensor | None
    ) -> list[Localization]:
        tasks = [self._located(gallery, coarse) for gallery, coarse in zip(galleries, maps, strict=True)]
        columns = ((image, *found) for image, found in zip(images, in_step(tasks), strict=True))
        # boxes are the processor's work, which a GPU would wait for
        ahead = len(images) if queues(self.device) else 0
        results = list(in_background(lambda column: self._result(*column), columns, ahead))
        if logits is not None:
            score, label = to_host(logits.float().softmax(dim=1).max(dim=1))
            for result, index, value in zip(results, label.tolist(), score.tolist(), strict=True):
                result.label, result.label_score = index, value
                if self.class_names is not None and index < len(self.class_names):
                    result.label_name = self.class_names[index]
        return results

    def _located(self, gallery: MaskGallery, coarse: Tensor) -> Generator[list[Tensor], list[Tensor], tuple]:
        """What was matched, the masks to keep, best first, the same in scores, and the map; see `in_step`."""
        found = yield from matching(gallery, coarse, **self.matching)
        scores = np.where(found.kept, found.scores, -1.0)
        best = np.argsort(-scores, kind="stable")[: int(np.sum(found.kept))][: self.candidates]
        candidates = gallery.select(torch.from_numpy(best))
        coarse, *tensors = yield [coarse.float(), *candidates.tensors()]
        candidates = MaskGallery(gallery.size, *tensors)
        return found, candidates, scores[best].astype(np.float32), coarse.numpy()

    def _result(
        self, image: np.ndarray, found: MatchResult, candidates: MaskGallery, scores: np.ndarray, coarse: np.ndarray
    ) -> Localization:
        height, width = image.shape[:2]
        box, mask = self._box_of(found), found.mask
        if mask.shape != (height, width):
            box = box * np.array([width / mask.shape[1], height / mask.shape[0]] * 2)
            mask = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
        return Localization(
            path=None,
            orig_shape=(height, width),
            box=tuple(float(value) for value in box),
            mask=mask,
            score=float(found.score),
            coarse=coarse,
            candidates=candidates,
            candidate_scores=scores,
            source=found.source,
        )

    def _box_of(self, found: MatchResult) -> np.ndarray:
        """float64 (4,), half-open, in pixels of the mask."""
        height, width = found.mask.shape
        box = found.box(self.box, self.min_region_box)
        if box == (0, 0, width, height):  # perhaps only because every region is too small
            box = tight_box(found.mask) or box
        return np.asarray(box, np.float64)

    def _stream(
        self, sources: Iterator[Source], batch_size: int | str, on_error: str, stream: bool
    ) -> Iterator[Localization]:
        batch = _Batch(batch_size, self.device.type)
        # a GPU leaves the processor time to read and prepare the next batch
        ahead = batch.size if queues(self.device) else 0
        for source, photo, read_ms in read_sources(sources, self.max_pixels, ahead, self._photo if ahead else _Photo):
            if isinstance(photo, ImageReadError):
                if on_error == "raise":
                    if stream:
                        yield from self._run(batch, on_error, stream)
                    raise photo
                batch.add(source, None, _failed(source, photo), 0.0)
                continue
            if not batch.has_room_for(photo.image):
                yield from self._run(batch, on_error, stream)
            batch.add(source, photo, None, read_ms)
            if batch.full:
                yield from self._run(batch, on_error, stream)
        yield from self._run(batch, on_error, stream)

    def _run(self, batch: _Batch, on_error: str, stream: bool) -> Iterator[Localization]:
        """Results for what the batch holds, in order. Photos stay in the results only if they can't be read again."""
        items = batch.take()
        photos = [item for item in items if item[1] is not None]
        results = iter(self._robust(photos, on_error, batch))
        for source, photo, failed, read_ms in items:
            result = failed or next(results)
            if photo is not None:
                result.path, result.name = source.path, source.name
                if stream or not isinstance(source.item, (str, os.PathLike)):
                    result.image = photo.image
                result.speed = {"read": read_ms, **result.speed}
                result.speed["total"] = sum(result.speed.values())
            yield result

    def _robust(self, photos: list, on_error: str, batch: _Batch) -> list[Localization]:
        """`localize_batch`, in halves where it doesn't fit the memory or where a photo of it fails."""

        def localize(items: list) -> list[Localization]:
            return self.localize_batch([item[1].image for item in items], [item[1].prepared for item in items])

        found = results_or_reasons(localize, photos, on_error == "raise", batch.automatic, batch.shrink)
        return [
            _failed(source, result, photo.image.shape[:2]) if isinstance(result, str) else result
            for (source, photo, *_), result in zip(photos, found, strict=True)
        ]

    @contextmanager
    def _timed(self, speed: dict[str, float], stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        speed[stage] = 1e3 * (time.perf_counter() - start)


class _Batch:
    """Collects (source, photo | None, failed result | None, read ms) until a pass is worth it."""

    def __init__(self, size: int | str, device_type: str):
        self.automatic = size == "auto"
        self.size = AUTO_BATCH.get(device_type, 1) if self.automatic else size
        self._pixel_limit = _AUTO_PIXELS.get(device_type, 0) if self.automatic else None
        self._items: list = []
        self._photos = self._pixels = 0

    @property
    def full(self) -> bool:
        return len(self._items) >= self.size

    def shrink(self, size: int) -> None:
        self.size = size

    def has_room_for(self, image: np.ndarray) -> bool:
        limit = self._pixel_limit
        return limit is None or not self._photos or self._pixels + image.shape[0] * image.shape[1] <= limit

    def add(self, source: Source, photo: _Photo | None, failed: Localization | None, read_ms: float) -> None:
        self._items.append((source, photo, failed, read_ms))
        if photo is not None:
            self._photos += 1
            self._pixels += photo.image.shape[0] * photo.image.shape[1]

    def take(self) -> list:
        items, self._items = self._items, []
        self._photos = self._pixels = 0
        return items


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" -> CUDA where a GPU works, else CPU; anything else as torch.device reads it.

    "cuda" is the current GPU, by its number: in other threads another may be current.

    Raises ConfigError for an unknown device and BackendError for one that isn't there.
    """
    if isinstance(device, str) and device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"unknown device {device!r}: use 'auto', 'cpu', 'cuda' or 'cuda:0'") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise BackendError(f"no device '{device}': torch finds {count} usable CUDA devices; use device='cpu'")
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    elif device.type == "meta":
        raise ConfigError("device 'meta' computes nothing: use 'auto', 'cpu', 'cuda' or 'cuda:0'")
    elif device.type != "cpu":
        try:
            torch.zeros(1, device=device)
        except Exception as error:  # RuntimeError, AssertionError, NotImplementedError: by device type
            reason = str(error).partition("\n")[0]
            raise BackendError(f"no device '{device}': {reason}; use device='cpu'") from error
    return device


def check_batch_size(batch_size: Any) -> None:
    """Raises ConfigError unless it is "auto" or a whole number of at least 1."""
    if batch_size != "auto" and not (_is_int(batch_size) and batch_size >= 1):
        raise ConfigError(f"batch_size must be 'auto' or a whole number of at least 1, not {batch_size!r}")


def _names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ConfigError("class_names must be a list of strings, one for each class")
    return tuple(names)


def _known(options: Mapping[str, Any] | None, function: Callable) -> dict[str, Any]:
    options = dict(options or {})
    if unknown := options.keys() - inspect.signature(function).parameters.keys():
        raise ConfigError(f"unknown option {', '.join(sorted(unknown))} for {function.__qualname__.split('.')[0]}")
    return options


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _as_stage(stage: Any, role: str) -> Any:
    if hasattr(stage, "prepare") and callable(stage):
        return stage
    if isinstance(stage, nn.Module):
        return PhotoNet(stage)
    raise ConfigError(f"{role} must be a module or have prepare(rgb) and __call__(batch), not {type(stage).__name__}")


def _same_input(a: Any, b: Any) -> bool:
    """Whether two stages prepare photos alike."""
    if isinstance(a, PhotoNet) and isinstance(b, PhotoNet):
        return a.input_format == b.input_format
    return a.prepare == b.prepare


def _on_device(stage: Any, device: torch.device) -> Any:
    if isinstance(stage, nn.Module):
        stage.eval()
    return stage.to(device) if hasattr(stage, "to") else stage


def _failed(source: Source, error: Exception | str, shape: tuple[int, int] | None = None) -> Localization:
    return Localization(source.path, shape, error=str(error), name=source.name)
