"""Augmented photos with sampled prompts and their target masks, the batches of promptable-segmentation training.

A batch is a pure function of (photos, configuration, seed, step), so a resumed run sees what an unbroken one sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from .segments import SegmentedPhoto

# share of a batch drawn from each kind of source
KIND_WEIGHTS = {"coco": 0.32, "bsds": 0.16, "foreground": 0.52}
# probability of 0, 1, 2, ... objects of other photos pasted on a photo
PASTED = (0.45, 0.25, 0.18, 0.12)
TARGETS = 3
_MIN_AREA = 24
_MIN_PASTED = 32 * 32


@dataclass
class PromptBatch:
    """Bi photos, n prompts each, B = Bi * n, grouped by photo. S is the input size, m = S / 4 the logits' size.

    images: float (Bi, 3, S, S), RGB in 0..255, zero padded; valid: bool (Bi, S, S), False on padding.
    labels: uint8 (Bi, S, S), one annotator's label map, 0 unlabelled.
    points: float (B, N, 2) as (x, y); point_labels: int64 (B, N); boxes: float (B, 4); use_box: bool (B,).
    targets: float (B, 3, m, m) in [0, 1] (share of the cell that is covered); target_valid: bool (B, 3).
    mode: ``single`` (one click or a box), ``multi`` (three clicks) or ``mask`` (a click and a rough mask).
    rough: float (B, 1, m, m) mask logits in mode ``mask``, else None.
    """

    images: Tensor
    valid: Tensor
    labels: Tensor
    points: Tensor
    point_labels: Tensor
    boxes: Tensor
    use_box: Tensor
    targets: Tensor
    target_valid: Tensor
    mode: str
    rough: Tensor | None


class PromptDataset(torch.utils.data.Dataset):
    """Item ``step`` is the :class:`PromptBatch` of that training step."""

    def __init__(
        self, photos: list[SegmentedPhoto], steps: int, batch: int, prompts: int, size: int, seed: int = 0
    ) -> None:
        self.photos = photos
        self.by_kind = {k: [i for i, p in enumerate(photos) if p.kind == k] for k in KIND_WEIGHTS}
        self.kinds = [k for k in KIND_WEIGHTS if self.by_kind[k]]
        weights = np.array([KIND_WEIGHTS[k] for k in self.kinds])
        self.weights = weights / weights.sum()
        self.things = [(i, t) for i, p in enumerate(photos) for t in p.things if (p.maps[0] == t).sum() >= _MIN_PASTED]
        self.steps, self.batch, self.prompts, self.size, self.seed = steps, batch, prompts, size, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> PromptBatch:
        rng = np.random.default_rng((self.seed, step))
        mode = str(rng.choice(["single", "multi", "mask"], p=[0.76, 0.12, 0.12]))
        images, valid, labels, prompts = [], [], [], []
        for _ in range(self.batch):
            kind = self.kinds[rng.choice(len(self.kinds), p=self.weights)]
            photo = self.photos[int(rng.choice(self.by_kind[kind]))]
            for _ in range(rng.choice(len(PASTED), p=PASTED) if self.things else 0):
                other, thing = self.things[rng.integers(len(self.things))]
                photo = _copy_paste(photo, self.photos[other], thing, rng)
            image, maps, inside = augment(photo, self.size, rng)
            images.append(image)
            valid.append(inside)
            labels.append(maps[0])
            prompts += [_sample_prompt(maps, photo, mode, rng) for _ in range(self.prompts)]
        points, point_labels, boxes, use_box, targets, target_valid = (np.stack(x) for x in zip(*prompts))
        targets = _shrink4(targets)
        return PromptBatch(
            images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float(),
            valid=torch.from_numpy(np.stack(valid)),
            labels=torch.from_numpy(np.stack(labels)),
            points=torch.from_numpy(points),
            point_labels=torch.from_numpy(point_labels),
            boxes=torch.from_numpy(boxes),
            use_box=torch.from_numpy(use_box),
            targets=torch.from_numpy(targets),
            target_valid=torch.from_numpy(target_valid),
            mode=mode,
            rough=torch.from_numpy(_rough_logits(targets[:, :1], rng)) if mode == "mask" else None,
        )


def _shrink4(masks: np.ndarray) -> np.ndarray:
    # bool (..., S, S) -> float32 (..., S/4, S/4), covered share
    *lead, h, w = masks.shape
    return masks.reshape(*lead, h // 4, 4, w // 4, 4).mean((-3, -1), dtype=np.float32)


def augment(photo: SegmentedPhoto, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random crop, scale, flip and colour -> uint8 (S, S, 3), uint8 (A, S, S), bool (S, S), padded right and bottom."""
    h, w = photo.image.shape[:2]
    x0, y0, cw, ch = 0, 0, w, h
    if rng.random() < 0.55:
        scale, aspect = np.sqrt(rng.uniform(0.2, 1.0)), np.exp(rng.uniform(-0.35, 0.35))
        cw, ch = (max(16, min(s, int(s * scale * a))) for s, a in ((w, aspect), (h, 1 / aspect)))
        cw, ch = min(cw, w), min(ch, h)
        x0, y0 = int(rng.integers(0, w - cw + 1)), int(rng.integers(0, h - ch + 1))
    long_side = size if rng.random() < 0.7 else int(size * rng.uniform(0.6, 1.0))
    ratio = long_side / max(cw, ch)
    nw, nh = max(1, int(cw * ratio + 0.5)), max(1, int(ch * ratio + 0.5))
    window = (x0, y0, x0 + cw, y0 + ch)
    image = Image.fromarray(photo.image).resize((nw, nh), Image.BILINEAR, box=window)
    for enhance, span in ((ImageEnhance.Brightness, 0.3), (ImageEnhance.Contrast, 0.3), (ImageEnhance.Color, 0.4)):
        if rng.random() < 0.4:
            image = enhance(image).enhance(1 + rng.uniform(-span, span))
    if rng.random() < 0.05:
        image = image.convert("L").convert("RGB")
    maps = [np.asarray(Image.fromarray(m).resize((nw, nh), Image.NEAREST, box=window)) for m in photo.maps]
    pixels = np.asarray(image)
    if rng.random() < 0.5:
        pixels, maps = pixels[:, ::-1], [m[:, ::-1] for m in maps]
    order = rng.permutation(len(maps))
    out = np.zeros((size, size, 3), np.uint8)
    out_maps = np.zeros((len(maps), size, size), np.uint8)
    inside = np.zeros((size, size), bool)
    out[:nh, :nw] = pixels
    inside[:nh, :nw] = True
    for k, i in enumerate(order):
        out_maps[k, :nh, :nw] = maps[i]
    return out, out_maps, inside


def _copy_paste(photo: SegmentedPhoto, other: SegmentedPhoto, thing: int, rng: np.random.Generator) -> SegmentedPhoto:
    # a thing of the other photo, scaled, at a random place of this one, as a segment of its own in every map
    mask = other.maps[0] == thing
    ys, xs = np.nonzero(mask)
    box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
    h, w = photo.image.shape[:2]
    scale = np.exp(rng.uniform(np.log(0.12), np.log(0.7))) * max(h, w) / max(box[2] - box[0], box[3] - box[1])
    nw, nh = (max(4, min(int(s * scale), lim)) for s, lim in ((box[2] - box[0], w), (box[3] - box[1], h)))
    patch = np.asarray(Image.fromarray(other.image).resize((nw, nh), Image.BILINEAR, box=box))
    alpha = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize((nw, nh), Image.BILINEAR, box=box))
    x, y = int(rng.integers(0, w - nw + 1)), int(rng.integers(0, h - nh + 1))
    image, maps = photo.image.copy(), photo.maps.copy()
    pasted = max(3, min(255, int(maps.max()) + 1))  # 2 is background in a foreground photo, whether seen or not
    region = image[y : y + nh, x : x + nw]
    share = alpha[..., None].astype(np.float32) / 255
    image[y : y + nh, x : x + nw] = (region * (1 - share) + patch * share + 0.5).astype(np.uint8)
    maps[:, y : y + nh, x : x + nw][:, alpha > 127] = pasted
    return SegmentedPhoto(image, maps, photo.kind, (*photo.things, pasted))


def _sample_prompt(maps: np.ndarray, photo: SegmentedPhoto, mode: str, rng: np.random.Generator):
    size = maps.shape[-1]
    # padding and unlabelled pixels count for nothing; a crop can leave an annotator without any segment
    counts = np.bincount(maps[0].ravel(), minlength=4)
    counts[0] = 0
    ids = np.nonzero(counts >= _MIN_AREA)[0]
    targets = np.zeros((TARGETS, size, size), bool)
    target_valid = np.zeros(TARGETS, bool)
    n = 3 if mode == "multi" else 1
    points = np.zeros((n, 2), np.float32)
    point_labels = np.full(n, -1, np.int64)
    box = np.array([0, 0, 1, 1], np.float32)
    if len(ids) == 0:
        return points, point_labels, box, np.bool_(False), targets, target_valid
    if photo.kind == "foreground":
        objects = [i for i in ids if i != 2]
        chosen = int(rng.choice(objects)) if objects and (rng.random() < 0.8 or 2 not in ids) else 2
        chosen = chosen if chosen in ids else int(ids[0])
    else:
        # in half of the cases a countable object, if the source tells; small segments less often than large ones
        things = np.intersect1d(ids, photo.things)
        among = things if len(things) and rng.random() < 0.5 else ids
        weight = np.sqrt(counts[among])
        chosen = int(rng.choice(among, p=weight / weight.sum()))
    mask = maps[0] == chosen
    inside = np.flatnonzero(mask)
    clicks = inside[rng.integers(0, len(inside), 8)]
    xy = np.stack([clicks % size, clicks // size], -1).astype(np.float32)
    ys, xs = inside // size, inside % size
    if rng.random() < 0.5:
        xy = xy[np.argsort(((xy - [xs.mean(), ys.mean()]) ** 2).sum(-1))]
    points[0], point_labels[0] = xy[0], 1
    for k in range(1, n):
        if rng.random() < 0.5:
            points[k], point_labels[k] = xy[k], 1
        else:
            outside = np.flatnonzero((maps[0] != 0) & ~mask)
            if len(outside):
                p = int(outside[rng.integers(len(outside))])
                points[k], point_labels[k] = (p % size, p // size), 0
    targets[0], target_valid[0] = mask, True
    if mode == "single":
        # the other annotators' segments under the same click are as right as this one
        px, py = int(points[0, 0]), int(points[0, 1])
        k = 1
        for other in maps[1:]:
            if k == TARGETS:
                break
            if other[py, px]:
                alternative = other == other[py, px]
                if all((alternative & t).sum() < 0.9 * (alternative | t).sum() for t in targets[:k]):
                    targets[k], target_valid[k] = alternative, True
                    k += 1
    corners = np.array([xs.min(), ys.min(), xs.max(), ys.max()], np.float32)
    side = np.array([corners[2] - corners[0], corners[3] - corners[1]] * 2) + 1
    box = np.clip(corners + np.clip(rng.normal(0, 0.05, 4), -0.1, 0.1) * side, 0, size - 1).astype(np.float32)
    return points, point_labels, box, np.bool_(mode == "single" and rng.random() < 0.2), targets, target_valid


def _rough_logits(targets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # covered share (B, 1, m, m) -> the logits an uncertain earlier round would hand over: blurred, shifted, rescaled
    soft = torch.from_numpy(targets)
    k = int(rng.choice([3, 5, 9]))
    soft = torch.nn.functional.avg_pool2d(soft, k, 1, k // 2, count_include_pad=False).numpy()
    shift = rng.integers(-2, 3, 2)
    soft = np.roll(soft, tuple(shift), (-2, -1))
    gain = rng.uniform(4, 16, (len(soft), 1, 1, 1))
    return ((soft - rng.uniform(0.3, 0.7, gain.shape)) * gain).astype(np.float32)
