"""Training of GTFormer-lite from image-level labels only, over frozen trunk features that are computed once."""

from __future__ import annotations

import csv
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..data.views import normalised
from ..models.gtformer import GRID, GTFormer
from ..models.trunk import EfficientNetLite0
from .losses import LossConfig, localization_loss
from .optimizer import decay_groups


@dataclass
class GTFormerLiteConfig:
    """views: cached views a photo for each source (the first is the plain 224 x 224 resize). seed_*: the loss that ties
    the map to the trunk's class activation map, see `seed_loss`."""

    views: tuple[int, ...] = (8, 3, 3)
    steps: int = 450
    batch: int = 90
    lr: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.05
    losses: LossConfig = field(default_factory=lambda: LossConfig(area_target=0.3))
    seed_weight: float = 2.0
    seed_background: float = 0.15
    seed_foreground: float = 0.6
    seed: int = 6


@dataclass
class LabelledPhotos:
    """paths[i] has label labels[i] in a problem with ``classes`` classes; each source is its own softmax."""

    name: str
    paths: list[Path]
    labels: list[int]
    classes: list[str]


def make_view(image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
    """None: the whole photo at 224 x 224, aspect ignored. Else a random crop of at least 60 % of each side, flipped
    at random."""
    if rng is None:
        return image.resize((224, 224), Image.BILINEAR)
    w, h = image.size
    cw, ch = w * rng.uniform(0.6, 1.0), h * rng.uniform(0.6, 1.0)
    x, y = rng.uniform(0, w - cw), rng.uniform(0, h - ch)
    view = image.resize((224, 224), Image.BILINEAR, box=(x, y, x + cw, y + ch))
    return view.transpose(Image.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else view


def cache_features(model: GTFormer, photos: LabelledPhotos, views: int, seed: int) -> dict[str, Tensor]:
    """Frozen inputs of n photos: f16 (n, views, 112, 14, 14), f32 (n, views, 320, 7, 7), phases (n, views, G, 768)."""
    rng = np.random.default_rng(seed)
    embed = model.patch_embed
    trunk, embed.trunk = embed.trunk, embed.trunk.folded()
    out: dict[str, list[Tensor]] = {"f16": [], "f32": [], "phases": []}
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for path in photos.paths:
                with Image.open(path) as im:
                    image = im.convert("RGB")
                x = torch.stack([normalised(make_view(image, rng if v else None)) for v in range(views)])
                f16, f32 = embed.features(x)
                out["f16"].append(f16.bfloat16().contiguous())
                out["f32"].append(f32.bfloat16().contiguous())
                out["phases"].append(model.query_embed.phases(x).bfloat16())
    finally:
        embed.trunk = trunk
    return {k: torch.stack(v) for k, v in out.items()}


def forward_cached(model: GTFormer, f16: Tensor, f32: Tensor, phases: Tensor) -> dict[str, Tensor]:
    """`GTFormer.forward` from cached inputs."""
    return model.forward_tokens(model.patch_embed.embed([f16, f32]), model.query_embed.project(phases))


@torch.no_grad()
def class_activation_map(trunk: EfficientNetLite0, f32: Tensor, classes: int = 20) -> Tensor:
    """CAM (Zhou et al. 2016) of the trunk's own ImageNet head: (B, 320, 7, 7) -> (B, 14, 14), min 0 and max 1.

    The maps of the likeliest classes, rectified and weighted by their probabilities: no label is needed beyond those
    the trunk was trained with.
    """
    net = trunk.net
    h = trunk.head(f32)
    scores = net.classifier(h.mean((2, 3))).softmax(1)
    weight, index = scores.topk(min(classes, scores.shape[1]), dim=1)
    maps = torch.einsum("bkd,bdhw->bkhw", net.classifier.weight[index], h).relu()
    cam = (maps * weight[:, :, None, None]).sum(1)
    low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
    cam = (cam - low) / (high - low).clamp(min=1e-6)
    return F.interpolate(cam.unsqueeze(1), size=(GRID, GRID), mode="bilinear", align_corners=False)[:, 0]


def seed_loss(maps: Tensor, cam: Tensor, background: float, foreground: float) -> Tensor:
    """Cross entropy of maps (B, h, w) where the CAM is sure; both sides weigh the same in every photo.

    Without it nothing says which of two complementary maps is the object: trunk features carry the class everywhere,
    so the classification loss is content with either.
    """
    maps = maps.clamp(1e-4, 1 - 1e-4)
    inside, outside = (cam > foreground).float(), (cam < background).float()
    fg = -(maps.log() * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
    bg = -((1 - maps).log() * outside).sum((1, 2)) / outside.sum((1, 2)).clamp(min=1)
    return (fg + bg).mean() / 2


def train_gtformer_lite(
    model: GTFormer, sources: list[tuple[LabelledPhotos, dict[str, Tensor]]], config: GTFormerLiteConfig, log: Path
) -> None:
    """Trains ``model`` in place; its head holds the sources' classes one after the other."""
    rng = np.random.default_rng(config.seed)
    torch.manual_seed(config.seed)
    model.train()
    model.requires_grad_(True)
    model.patch_embed.trunk.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(decay_groups(parameters, config.weight_decay), lr=config.lr)
    offsets = np.cumsum([0] + [len(s.classes) for s, _ in sources]).tolist()
    column_source = torch.repeat_interleave(torch.arange(len(sources)), torch.tensor(offsets).diff())
    share = config.batch // len(sources)
    trunk = model.patch_embed.trunk.folded()
    sums = np.zeros(5)
    clock = time.perf_counter()
    with log.open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["step", "seconds", "loss", "accuracy", "area", "edge", "seed"])
        for step in range(1, config.steps + 1):
            warm = min(1.0, step / config.warmup)
            lr = config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps)) + 1e-6
            for group in optimizer.param_groups:
                group["lr"] = lr
            parts = []
            for source, cached in sources:
                i = torch.from_numpy(rng.integers(0, len(source.paths), share))
                v = torch.from_numpy(rng.integers(0, cached["f16"].shape[1], share))
                parts.append((cached["f16"][i, v], cached["f32"][i, v], cached["phases"][i, v], i))
            inputs = [torch.cat([p[k] for p in parts]).float() for k in range(3)]
            with torch.autocast("cpu", torch.bfloat16):
                out = forward_cached(model, *inputs)
            # each source is a softmax of its own: other sources' columns are impossible
            labels = torch.cat([torch.tensor(s.labels)[p[3]] + o for (s, _), p, o in zip(sources, parts, offsets)])
            foreign = column_source[labels][:, None] != column_source
            out["logits"] = out["logits"].float().masked_fill(foreign, float("-inf"))
            terms = localization_loss(out, labels, config.losses)
            cam = class_activation_map(trunk, inputs[1])
            seed = seed_loss(out["map"], cam, config.seed_background, config.seed_foreground)
            loss = terms["loss"] + config.seed_weight * seed
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            right = (out["logits"].argmax(1) == labels).float().mean()
            sums += [loss.item(), right.item(), out["map"].mean().item(), terms["edge"].item(), seed.item()]
            if step % 50 == 0:
                seconds = (time.perf_counter() - clock) / 50
                writer.writerow([step, f"{seconds:.3f}", *(f"{s / 50:.4f}" for s in sums)])
                f.flush()
                sums, clock = np.zeros(5), time.perf_counter()
    model.eval()
