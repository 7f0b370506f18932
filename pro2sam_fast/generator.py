"""Segment everything: a grid of point prompts, SAM's masks for them, filters, and what is left as a gallery."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import ops
from .background import in_background
from .decoding import DecodedMasks, PointDecoder
from .errors import ConfigError
from .gallery import MaskGallery
from .memory import in_chunks, items_per_chunk, joined
from .models.sam import Sam
from .ops import mask_clean, mask_pack, popcount
from .ops.mask_measure import boxes_of_packed
from .ops.packing import words_per_row
from .postprocess import Frame, nms, score_masks, select
from .predictor import photos_per_pass
from .transfer import Reading, Upload, queues, to_device
from .transforms import ResizeLongestSide, check_rgb

__all__ = ["MaskGenerator", "crop_boxes", "point_grid"]

# Logits gathered before masks are written take this part of the memory bound: a copy that leaves the cache costs more
# than what is done with it.
_PART_FOR_LOGITS = 16
# of a CPU the logits of so many prompts are still in the cache when they are filtered
_AUTO_POINTS_PER_BATCH = {"cpu": 16}
_AUTO_POINTS_PER_BATCH_ELSEWHERE = 1024
# A grid of up to so many points passes all filters before anything waits for a GPU, at the price of the logits of the
# masks that don't pass (at most 805 MB of a SAM's).
_POINTS_WITHOUT_WAITING = 1024
# 16 million prompts, 87 thousand crops: beyond that the grids alone fill the memory
_MOST_POINTS_PER_SIDE = 4096
_MOST_CROP_LAYERS = 8
_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def point_grid(points_per_side: int) -> np.ndarray:
    """The centres of an n x n grid over the unit square, row by row: float64 (n*n, 2) as (x, y)."""
    offset = 1 / (2 * points_per_side)
    side = np.linspace(offset, 1 - offset, points_per_side)
    x, y = np.meshgrid(side, side)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def crop_boxes(
    image_size: tuple[int, int], n_layers: int, overlap_ratio: float
) -> list[tuple[int, int, int, int, int]]:
    """The image and its overlapping crops, as (x0, y0, x1, y1, layer), half-open.

    Layer 0 is the whole image, layer i has ``2**i`` crops a side that overlap by ``overlap_ratio`` of the short side
    over ``2**(i-1)``. Columns come before rows. Crops without area (of images a few pixels wide) are left out.
    """
    h, w = image_size
    boxes = [(0, 0, w, h, 0)]
    for layer in range(1, n_layers + 1):
        per_side = 2**layer
        overlap = int(overlap_ratio * min(h, w) * (2 / per_side))
        crop_w, crop_h = (math.ceil((overlap * (per_side - 1) + side) / per_side) for side in (w, h))
        for x0 in ((crop_w - overlap) * i for i in range(per_side)):
            for y0 in ((crop_h - overlap) * i for i in range(per_side)):
                if x0 < w and y0 < h:
                    boxes.append((x0, y0, min(x0 + crop_w, w), min(y0 + crop_h, h), layer))
    return boxes


class _Crop(NamedTuple):
    """Where a crop is, and which of the grids it gets."""

    frame: Frame
    layer: int


class _Candidates(NamedTuple):
    """K masks before they are written at full resolution: logits (K, 4e, 4e), IoU (K,), points (K, 2) float64."""

    low_res: Tensor
    iou: Tensor
    points: Tensor


def _joined(parts: list[_Candidates]) -> _Candidates:
    return _Candidates(*map(joined, zip(*parts, strict=True)))


class _Measured(NamedTuple):
    """Candidates and their measures: also stability float32 (K,), boxes int64 (K, 4) in the crop's pixels, areas int64
    (K,), and whether they pass the filters, bool (K,). Logits (K, 4e, 4e) or a list of K."""

    low_res: Tensor | list[Tensor]
    iou: Tensor
    points: Tensor
    stability: Tensor
    boxes: Tensor
    areas: Tensor
    keep: Tensor


def _drops(device: torch.device, points: int) -> bool:
    return not queues(device) or points > _POINTS_WITHOUT_WAITING


def _scaled(points: Tensor, x: float, y: float) -> Tensor:
    # the factors don't have to be copied to the device
    return torch.stack([points[:, 0] * x, points[:, 1] * y], dim=1)


def _take(parts: list[Tensor], index: Tensor) -> Tensor | list[Tensor]:
    """The entries at ``index`` (k,) of tensors joined along their first dimension. Each tensor is let go, out of
    ``parts``, as soon as what is wanted of it is copied."""
    if len(parts) == 1:
        return parts.pop()[index]
    index = index.tolist()
    wanted, taken, first = set(index), {}, 0
    parts.reverse()
    while parts:
        part = parts.pop()
        taken.update({first + i: entry.clone() for i, entry in enumerate(part) if first + i in wanted})
        first += len(part)
    return [taken[i] for i in index]


class MaskGenerator:
    """All masks of a photo: prompts on a grid, three masks a prompt, filters, non-maximum suppression.

    Gives the masks of `segment_anything.SamAutomaticMaskGenerator` in the same order, in float32. A gallery does not
    depend on ``points_per_batch`` or on the other photos of a call, but that a GPU encodes several together, whose
    products may round as those of another number do. Where the other package fails or wavers, this one
    doesn't: no survivors give an empty gallery (there: IndexError with crops), box coordinates stay integers, very
    thin photos work, rows longer than 32767 pixels are counted without overflow, scores tied in NMS keep the order of
    the candidates however many they are, and the resizing does not depend on the number of threads.

    Memory: decoded masks are filtered by predicted IoU before they are upscaled; logits of the stable ones are kept
    at low resolution, ``(4e)**2 * 4`` bytes each, and only the masks that survive NMS are written, bit-packed. A step
    that doesn't fit the memory goes on in halves; results stay the same, but for the rounding of logits
    where prompts are decoded in groups of fixed size (not by `GridDecoder`).

    Args:
        sam: the model, put in evaluation mode; parameters in float32.
        points_per_side: n of the n x n grid, at most 4096; None if ``point_grids`` is given.
        points_per_batch: prompts whose masks are filtered together, a bound on memory; ``"auto"`` chooses.
        pred_iou_thresh: masks need a predicted IoU above this; 0 or less switches the filter off.
        stability_score_thresh: masks need at least this stability score; 0 or less switches the filter off.
        stability_score_offset: shift of the cutoff when the stability score is computed, in logits.
        box_nms_thresh: box IoU above which the mask with the lower predicted IoU is dropped, inside a crop.
        crop_n_layers: layers of crops segmented besides the whole photo, ``4**i`` in layer i, at most 8.
        crop_nms_thresh: box IoU above which a mask from a larger crop is dropped for one from a smaller.
        crop_overlap_ratio: overlap of the first layer's crops, as a part of the short side, in [0, 1).
        crop_n_points_downscale_factor: layer i has ``points_per_side / factor**i`` points a side.
        point_grids: explicit points for each layer, (n, 2) as (x, y) in [0, 1], instead of ``points_per_side``.
        min_mask_region_area: holes and islands of fewer pixels are removed, then NMS runs again; 0 switches it off.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"`` (or the torch dtype) for encoder and decoder through
            autocast; filters, resizing and the encoder of ``lite`` always work in float32. On a CPU the decoder takes
            bfloat16 operands where the processor multiplies them (AVX512-BF16), else float32; on a GPU float16 for both
            reduced types, and bfloat16 where numbers are beyond its range. There PyTorch rounds the operands of
            convolutions in float32, the encoder's, to TF32 unless ``torch.backends.cudnn.allow_tf32`` is False.

    Raises:
        ConfigError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        sam: Sam,
        points_per_side: int | None = 32,
        points_per_batch: int | str = "auto",
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: Sequence[np.ndarray] | None = None,
        min_mask_region_area: int = 0,
        dtype: str | torch.dtype = torch.float32,
    ) -> None:
        if not isinstance(sam, Sam):
            raise ConfigError(f"sam must be a model from build_sam, got {type(sam).__name__}.")
        if any(p.dtype != torch.float32 for p in sam.parameters()):
            raise ConfigError("sam must keep its parameters in float32; use the argument dtype for reduced precision.")
        self.sam = sam.eval()
        self.transform = ResizeLongestSide(sam.image_encoder.img_size)
        self.crop_n_layers = _integer("crop_n_layers", crop_n_layers, 0, _MOST_CROP_LAYERS)
        factor = _integer("crop_n_points_downscale_factor", crop_n_points_downscale_factor, 1)
        self.point_grids = _point_grids(points_per_side, point_grids, self.crop_n_layers, factor)
        self.points_per_batch = (
            points_per_batch if points_per_batch == "auto" else _integer("points_per_batch", points_per_batch, 1)
        )
        self.pred_iou_thresh = _real("pred_iou_thresh", pred_iou_thresh)
        self.stability_score_thresh = _real("stability_score_thresh", stability_score_thresh)
        self.stability_score_offset = _real("stability_score_offset", stability_score_offset, 0)
        self.box_nms_thresh = _real("box_nms_thresh", box_nms_thresh, 0)
        self.crop_nms_thresh = _real("crop_nms_thresh", crop_nms_thresh, 0)
        self.crop_overlap_ratio = _real("crop_overlap_ratio", crop_overlap_ratio, 0)
        if self.crop_overlap_ratio >= 1:
            raise ConfigError(f"crop_overlap_ratio must be less than 1, got {crop_overlap_ratio}.")
        self.min_mask_region_area = _real("min_mask_region_area", min_mask_region_area, 0)
        self.dtype = _dtype(dtype)
        self._decoder = PointDecoder(self.sam, self.dtype, self.pred_iou_thresh)
        self._grids: dict[tuple[int, torch.device], Tensor] = {}

    @torch.no_grad()
    def generate(
        self, images: np.ndarray | Sequence[np.ndarray], prepared: Sequence[list[Upload] | None] = (None,)
    ) -> list[MaskGallery]:
        """The galleries of photos of any sizes, in order.

        Args:
            images: list of RGB uint8 arrays (H, W, 3); a single array counts as a list of one.
            prepared: what :meth:`prepare` made of each photo, if of all. Else that is done here, for a GPU in the
                background.

        Raises:
            ImageReadError: an entry is not such an array; nothing has been computed then.
        """
        if not isinstance(images, (np.ndarray, Iterable)):
            check_rgb(images, "images")
        images = [images] if isinstance(images, np.ndarray) and images.ndim != 4 else list(images)
        for i, image in enumerate(images):
            check_rgb(image, f"images[{i}]")
        crops = [self._crops(image.shape[:2]) for image in images]
        if None in prepared:
            views = ((image, crop) for image, own in zip(images, crops) for crop in own)
            device = self.sam.device
            ahead = photos_per_pass(device) if queues(device) else 0
            photos = in_background(lambda view: self._resized(*view), views, ahead)
        else:
            photos = itertools.chain.from_iterable(prepared)
        return self._galleries(crops, self._decoder.encode(photos))

    def prepare(self, image: np.ndarray) -> list[Upload]:
        """A photo's crops as the image encoder takes them, on their way to the device. May be called in any thread."""
        return [self._resized(image, crop) for crop in self._crops(image.shape[:2])]

    def _resized(self, image: np.ndarray, crop: _Crop) -> Upload:
        x0, y0, x1, y1 = crop.frame.crop_box
        return Upload(torch.from_numpy(self.transform.apply_image(image[y0:y1, x0:x1])), self.sam.device)

    @torch.no_grad()
    def generate_from_embeddings(
        self, embeddings: Tensor, original_sizes: Sequence[tuple[int, int]]
    ) -> list[MaskGallery]:
        """The galleries of photos that are already encoded.

        Args:
            embeddings: float (B, D, e, e) from the image encoder of this SAM.
            original_sizes: (H, W) of each photo before it was resized.

        Raises:
            ConfigError: shapes do not fit the model, values are not finite, or crops are asked for (their embeddings
                need the pixels).
        """
        if self.crop_n_layers:
            raise ConfigError("crop_n_layers must be 0 to work from embeddings: crops are encoded from the photo.")
        prompt = self.sam.prompt_encoder
        shape = (len(original_sizes), prompt.embed_dim, *prompt.image_embedding_size)
        if not isinstance(embeddings, Tensor) or tuple(embeddings.shape) != shape:
            found = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise ConfigError(f"embeddings of {shape[0]} images must be a tensor of shape {shape}, got {found}.")
        if not embeddings.is_floating_point() or not bool(embeddings.isfinite().all()):
            raise ConfigError("embeddings must be finite floating-point numbers.")
        for size in original_sizes:
            if len(size) != 2 or any(not isinstance(n, Integral) or n < 1 for n in size):
                raise ConfigError(f"original_sizes must be pairs (H, W) of positive integers, got {size!r}.")
        embeddings = embeddings.to(self.sam.device, torch.float32)
        passes = embeddings.split(photos_per_pass(embeddings.device)) if len(embeddings) else ()
        return self._galleries([self._crops(size) for size in original_sizes], passes)

    def _crops(self, image_size: Sequence[int]) -> list[_Crop]:
        h, w = (int(n) for n in image_size)
        crops = []
        for x0, y0, x1, y1, layer in crop_boxes((h, w), self.crop_n_layers, self.crop_overlap_ratio):
            input_size = self.transform.get_preprocess_shape(y1 - y0, x1 - x0, self.transform.target_length)
            crops.append(_Crop(Frame(self.transform.target_length, input_size, (x0, y0, x1, y1), (h, w)), layer))
        return crops

    def _galleries(self, crops: Sequence[list[_Crop]], passes: Iterable[Tensor]) -> list[MaskGallery]:
        """The galleries of images with these crops, whose embeddings come in passes (B, D, e, e)."""
        waiting, numbers = itertools.chain.from_iterable(crops), deque(map(len, crops))
        galleries, found = [], []
        for embeddings in passes:
            chosen = list(itertools.islice(waiting, len(embeddings)))

            def decode(start: int, stop: int, e=embeddings, c=chosen) -> list[MaskGallery]:
                return self._crop_galleries(e[start:stop], c[start:stop])

            found += itertools.chain.from_iterable(in_chunks(decode, len(chosen), len(chosen)))
            whole = []
            while numbers and len(found) >= numbers[0]:
                count = numbers.popleft()
                whole.append(MaskGallery.cat(found[:count]))
                del found[:count]
            galleries += self._finish(whole)
        return galleries

    def _points(self, layer: int, device: torch.device) -> Tensor:
        """The grid of a layer on the device, in [0, 1]; copied there once."""
        if (layer, device) not in self._grids:
            self._grids[layer, device] = torch.from_numpy(self.point_grids[layer]).to(device)
        return self._grids[layer, device]

    def _batch_size(self, device: torch.device) -> int:
        if self.points_per_batch != "auto":
            return self.points_per_batch
        return _AUTO_POINTS_PER_BATCH.get(device.type, _AUTO_POINTS_PER_BATCH_ELSEWHERE)

    def _crop_galleries(self, embeddings: Tensor, crops: list[_Crop], wide: bool = False) -> list[MaskGallery]:
        """Of crops of any images, (B, D, e, e), all in one go."""
        device = embeddings.device
        points, coords = [], []
        for frame, layer in crops:
            h, w = frame.crop_size
            points.append(_scaled(self._points(layer, device), w, h))
            coords.append(_scaled(points[-1], frame.input_size[1] / w, frame.input_size[0] / h))
        size = self._batch_size(device)
        decoded = self._decoder(embeddings, coords, size, wide)
        found = {
            i: self._measured(self._batches(parts, points[i], size), crops[i].frame, _drops(device, len(points[i])))
            for i, parts in itertools.groupby(decoded, key=lambda part: part.image)
        }
        chosen = {i: select(x.keep, x.boxes, x.iou, self.box_nms_thresh) for i, (x, _) in found.items()}
        numbers = [n for i, (_, void) in found.items() for n in (chosen[i][1], void.long())]
        numbers = Reading(torch.stack(numbers)).result().tolist() if found else []
        counts, void = (dict(zip(found, part, strict=True)) for part in (numbers[::2], numbers[1::2]))
        again = [i for i in found if void[i] and self._decoder.narrow and not wide]
        boxes = to_device(torch.tensor([crop.frame.crop_box for crop in crops]), device)
        galleries = [
            self._write(found.pop(i)[0], chosen[i][0][: counts[i]], frame, boxes[i])
            if counts.get(i) and i not in again
            else MaskGallery.empty(frame.image_size, device)
            for i, (frame, _) in enumerate(crops)
        ]
        if again:
            warnings.warn("numbers beyond float16: masks are decoded with bfloat16", RuntimeWarning, stacklevel=2)
            parts = torch.cat([embeddings[i : i + 1] for i in again]), [crops[i] for i in again]
            for i, gallery in zip(again, self._crop_galleries(*parts, wide=True), strict=True):
                galleries[i] = gallery
        return galleries

    def _candidates(self, embedding: Tensor, coords: Tensor) -> Iterator[_Candidates]:
        """Of one image, (1, D, e, e), whose points are given in the input frame, (G, 2)."""
        size = self._batch_size(embedding.device)
        return self._batches(self._decoder(embedding, [coords], size), coords, size)

    def _batches(self, parts: Iterable[DecodedMasks], points: Tensor, size: int) -> Iterator[_Candidates]:
        waiting: list[_Candidates] = []
        prompts = 0
        for part in parts:
            waiting.append(_Candidates(part.logits, part.iou, points[part.prompts]))
            prompts += part.alive
            if prompts >= size:
                yield _joined(waiting)
                waiting, prompts = [], 0
        if waiting:
            yield _joined(waiting)

    def _measured(self, batches: Iterable[_Candidates], frame: Frame, drop: bool) -> tuple[_Measured, Tensor]:
        """All masks of a crop, and whether an IoU is NaN, bool ()."""
        measured, void = [], []
        for batch in batches:
            measured.append(self._measure(batch, frame, drop))
            void.append(batch.iou.isnan().any())
        low_res, *columns = zip(*measured, strict=True)
        return _Measured(list(low_res), *map(joined, columns)), torch.stack(void).any()

    def _measure(self, batch: _Candidates, frame: Frame, drop: bool) -> _Measured:
        # `drop`: masks that don't pass the filters are left out, for whose number the device is waited for
        cuts = self.sam.mask_threshold, self.stability_score_offset, self.stability_score_thresh

        def measure(start: int, stop: int) -> _Measured:
            part = _Candidates(*(x[start:stop] for x in batch))
            keep, *measures = score_masks(part.low_res, frame, *cuts)
            found = _Measured(*part, *measures, keep)
            return _Measured(*(x[keep] for x in found)) if drop else found

        parts = in_chunks(measure, len(batch.iou), len(batch.iou)) or [measure(0, 0)]
        return _Measured(*map(joined, zip(*parts, strict=True)))

    def _write(self, found: _Measured, index: Tensor, frame: Frame, crop_box: Tensor) -> MaskGallery:
        """The masks at ``index`` (K,); logits of others are let go. ``crop_box``: that of the frame, int64 (4,)."""
        x0, y0, _, _ = frame.crop_box
        h, w = frame.image_size
        low_res = _take(found.low_res, index)
        iou, points, stability, boxes, areas = (x[index] for x in found[1:6])
        masks = boxes.new_empty((len(index), h, words_per_row(w)))

        def write(start: int, stop: int) -> None:
            part = low_res[start:stop]
            masks[start:stop] = mask_pack(
                part if isinstance(part, Tensor) else torch.stack(part),
                frame.img_size,
                frame.input_size,
                frame.crop_size,
                self.sam.mask_threshold,
                frame.image_size,
                (y0, x0),
            )

        gathered = isinstance(low_res, Tensor)
        in_chunks(write, len(masks), len(masks) if gathered else items_per_chunk(_PART_FOR_LOGITS * low_res[0].nbytes))
        return MaskGallery(
            size=frame.image_size,
            masks=masks,
            boxes=boxes + crop_box[:2].repeat(2),
            areas=areas,
            predicted_iou=iou,
            stability=stability,
            points=points + crop_box[:2],
            crop_boxes=crop_box.expand(len(index), 4),
        )

    def _finish(self, galleries: list[MaskGallery]) -> list[MaskGallery]:
        """Of the masks of images' crops those that stay."""
        if self.crop_n_layers and galleries:
            kept = []
            for gallery in galleries:
                # smaller crops first
                x0, y0, x1, y1 = gallery.crop_boxes.unbind(1)
                kept.append(ops.nms(gallery.boxes.float(), 1 / ((x1 - x0) * (y1 - y0)), self.crop_nms_thresh))
            counts = Reading(torch.stack([count for _, count in kept])).result().tolist()
            galleries = [x.select(index[:n]) for x, (index, _), n in zip(galleries, kept, counts, strict=True)]
        if self.min_mask_region_area > 0:
            galleries = [self._clean(gallery) for gallery in galleries]
        return galleries

    def _clean(self, gallery: MaskGallery) -> MaskGallery:
        """Removes small regions; masks that had any give way to equal ones that had none."""
        masks, changed = mask_clean(gallery.masks, gallery.size[1], self.min_mask_region_area)
        boxes, areas = gallery.boxes, gallery.areas  # the gallery is ours to change
        boxes[changed] = boxes_of_packed(masks[changed], gallery.size[1])
        areas[changed] = popcount(masks[changed])
        keep = nms(boxes, (~changed).float(), max(self.box_nms_thresh, self.crop_nms_thresh))
        cleaned = MaskGallery(
            size=gallery.size,
            masks=masks,
            boxes=boxes,
            areas=areas,
            predicted_iou=gallery.predicted_iou,
            stability=gallery.stability,
            points=gallery.points,
            crop_boxes=gallery.crop_boxes,
        )
        return cleaned.select(keep)


def _integer(name: str, value: object, least: int, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}.")
    if most is not None and value > most:
        raise ConfigError(f"{name} must be at most {most}, got {value!r}.")
    return int(value)


def _real(name: str, value: object, least: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < least:
        wanted = "a finite number" if least == -math.inf else f"a finite number of at least {least}"
        raise ConfigError(f"{name} must be {wanted}, got {value!r}.")
    return float(value)


def _dtype(dtype: object) -> torch.dtype:
    dtype = _DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in _DTYPES.values():
        raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    return dtype


def _point_grids(
    points_per_side: int | None, point_grids: Sequence[np.ndarray] | None, n_layers: int, factor: int
) -> list[np.ndarray]:
    if (points_per_side is None) == (point_grids is None):
        raise ConfigError("Exactly one of points_per_side and point_grids must be given; set the other to None.")
    if point_grids is None:
        side = _integer("points_per_side", points_per_side, 1, _MOST_POINTS_PER_SIDE)
        sides = [int(side / factor**i) for i in range(n_layers + 1)]
        if sides[-1] < 1:
            raise ConfigError(
                f"crop_n_points_downscale_factor {factor} leaves no points in crop layer {n_layers} "
                f"of a grid with {points_per_side} points_per_side."
            )
        return [point_grid(n) for n in sides]
    grids = [np.asarray(grid) for grid in point_grids]
    if len(grids) <= n_layers:
        raise ConfigError(f"point_grids must have one grid for each of the {n_layers + 1} layers, got {len(grids)}.")
    for grid in grids:
        if grid.ndim != 2 or grid.shape[1] != 2 or grid.dtype.kind not in "biuf":
            raise ConfigError(f"point_grids must be numeric arrays of shape (n, 2), got {grid.dtype} {grid.shape}.")
        if not ((grid >= 0) & (grid <= 1)).all():
            raise ConfigError("point_grids must hold coordinates in [0, 1].")
    return [grid.astype(np.float64) for grid in grids]
