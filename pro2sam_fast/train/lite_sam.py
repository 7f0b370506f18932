"""Training of SAM-lite: prompt encoder, mask decoder and the neck of the image encoder over a trunk that is frozen, or
of which a few stages learn.

Losses: binary cross entropy + dice on the low-resolution logits, the best of three masks per target (Kirillov et al.
2023, appendix A), squared error on the predicted IoU, and a dense auxiliary loss that asks embedding pixels of one
segment to agree (pixel affinity).
"""

from __future__ import annotations

import csv
import math
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.prompts import PromptBatch, PromptDataset
from ..models.sam import Sam
from ..models.sam.lite import SAM_TRUNK
from ..models.trunk import EfficientNetLite0
from .checkpoint import load_latest, save_checkpoint
from .gtformer import TrainingDivergedError
from .optimizer import decay_groups


@dataclass
class SamLiteConfig:
    """One phase of the schedule.

    follows: a later phase begins with the mean of the averaged weights of so many phases before it. steps: length of
    the learning-rate schedule; stop_at: end earlier on it. size: input pixels of the long side (the embedding is
    size / 16). batch: photos a step. prompts: prompts a photo. tuned: stages of the trunk that learn, at ``trunk_lr``
    times the learning rate; their batch norms keep their statistics. Later phases must name them too.
    """

    follows: int = 1
    steps: int = 4000
    stop_at: int | None = None
    size: int = 256
    batch: int = 16
    prompts: int = 8
    lr: float = 5e-4
    warmup: int = 150
    final_lr: float = 2e-5
    weight_decay: float = 0.02
    clip: float = 1.0
    ema: float = 0.998
    affinity_weight: float = 0.3
    iou_weight: float = 1.0
    tuned: tuple[int, ...] = ()
    trunk_lr: float = 0.2
    seed: int = 0
    save_every: int = 200


class AffinityHead(nn.Module):
    """Auxiliary, training only: do two embedding pixels lie in the same segment?"""

    def __init__(self, dim: int = 256, width: int = 64) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, width)
        self.scale = nn.Parameter(torch.tensor(5.0))
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        """embedding (Bi, D, e, e), labels uint8 (Bi, S, S) -> scalar loss over all pairs of labelled pixels."""
        e = embedding.shape[-1]
        step = labels.shape[-1] // e
        cells = labels[:, step // 2 :: step, step // 2 :: step].flatten(1)
        f = F.normalize(self.proj(embedding.flatten(2).transpose(1, 2)).float(), dim=-1)
        logits = self.scale * (f @ f.transpose(1, 2)) + self.bias
        same = (cells[:, :, None] == cells[:, None, :]).float()
        weight = ((cells[:, :, None] > 0) & (cells[:, None, :] > 0)).float()
        return F.binary_cross_entropy_with_logits(logits, same, weight, reduction="sum") / weight.sum().clamp(min=1)


def forward_batch(sam: Sam, trunk: EfficientNetLite0, batch: PromptBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Low-resolution logits (B, 4, m, m) of all four masks, predicted IoU (B, 4), image embedding (Bi, 256, e, e).

    ``trunk`` is the feature extractor (``sam``'s own, or its copy with folded norms).
    """
    size = batch.images.shape[-1]
    x = (batch.images - sam.pixel_mean) / sam.pixel_std * batch.valid[:, None]
    encoder, prompts = sam.image_encoder, sam.prompt_encoder
    learns = torch.is_grad_enabled() and any(p.requires_grad for p in trunk.parameters())
    with torch.set_grad_enabled(learns):
        features = trunk.features(x)
    embedding = encoder.embed(features)
    pe = prompts.pe_layer((size // 16, size // 16)).unsqueeze(0)
    sparse = prompts.embed_points(batch.points, batch.point_labels, pad=True, input_size=(size, size))
    if batch.use_box.any():
        corners = prompts.embed_boxes(batch.boxes, (size, size))
        sparse = torch.where(batch.use_box[:, None, None], corners, sparse)
    if batch.rough is None:
        dense = prompts.no_mask_embed.weight.reshape(1, -1, 1, 1)
    else:
        dense = prompts.mask_downscaling(batch.rough)
    decoded = sam.mask_decoder.decode_tokens(embedding, pe, sparse, dense)
    return sam.mask_decoder.upscale(decoded), decoded.iou, embedding


def mask_losses(logits: Tensor, iou: Tensor, batch: PromptBatch, iou_weight: float = 1.0) -> dict[str, Tensor]:
    """Mask and IoU losses of a batch; logits (B, 4, m, m), iou (B, 4).

    A target is explained by the best of masks 1..3; mask 0 explains the first target. The other masks get a small
    share of the loss, so that none of them dies.
    """
    prompts = len(logits) // len(batch.valid)
    inside = F.avg_pool2d(batch.valid[:, None].float(), 4).repeat_interleave(prompts, 0).flatten(2)
    x, t = logits.float().flatten(2), batch.targets.flatten(2)
    x = x * inside - 30 * (1 - inside)
    pixels = inside.sum(-1, keepdim=True).clamp(min=1)
    overlap = torch.einsum("bmp,btp->bmt", x * inside, t)
    bce = ((F.softplus(x) * inside).sum(-1, keepdim=True) - overlap) / pixels
    p = x.sigmoid()
    inter = torch.einsum("bmp,btp->bmt", p, t)
    dice = 1 - (2 * inter + 1) / (p.sum(-1)[:, :, None] + t.sum(-1)[:, None, :] + 1)
    pair = bce + dice  # (B, 4, 3)
    valid = batch.target_valid.float()
    best = pair[:, 1:].min(dim=1).values * 0.95 + pair[:, 1:].mean(dim=1) * 0.05
    multi = (best * valid).sum() / valid.sum().clamp(min=1)
    first = (pair[:, 0, 0] * valid[:, 0]).sum() / valid[:, 0].sum().clamp(min=1)
    with torch.no_grad():
        hard, hard_t = (x > 0).float(), (t > 0.5).float()
        inter = torch.einsum("bmp,btp->bmt", hard, hard_t)
        union = hard.sum(-1)[:, :, None] + hard_t.sum(-1)[:, None, :] - inter
        true = inter / union.clamp(min=1) * valid[:, None, :]
        true_best = true.max(dim=2).values  # (B, 4)
    any_target = valid[:, :1]
    iou_loss = ((iou.float() - true_best).square() * any_target).sum() / (4 * any_target.sum().clamp(min=1))
    seen = any_target.sum().clamp(min=1)
    picked = true[:, 1:, 0].gather(1, iou[:, 1:].argmax(1, keepdim=True))
    return {
        "loss": multi + 0.5 * first + iou_weight * iou_loss,
        "mask": multi.detach(),
        "iou_loss": iou_loss.detach(),
        "best_iou": (true[:, 1:, 0].max(1).values.sum() / seen).detach(),
        "picked_iou": (picked.sum() / seen).detach(),
    }


def _ignore_signals(_: int) -> None:
    # a signal to the whole group must not kill the loader before the trainer has saved
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, signal.SIG_IGN)


def learning_rate(step: int, config: SamLiteConfig) -> float:
    """Linear warm-up, then cosine to ``final_lr``."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.final_lr + 0.5 * (config.lr - config.final_lr) * (1 + math.cos(math.pi * progress))


def trainable_state(sam: Sam, tuned: Sequence[int] = ()) -> dict[str, Tensor]:
    """State dict without the trunk, but for the weights of its stages ``tuned``."""
    stages = tuple(f"{SAM_TRUNK}net.blocks.{stage}." for stage in tuned)
    return {
        k: v
        for k, v in sam.state_dict().items()
        if not k.startswith(SAM_TRUNK) or (k.startswith(stages) and k.endswith(("weight", "bias")))
    }


def partly_folded(trunk: EfficientNetLite0, tuned: Sequence[int]) -> EfficientNetLite0:
    """Its folded copy, but with the very stages ``tuned``, whose weights learn."""
    folded = trunk.folded()
    for stage in tuned:
        folded.net.blocks[stage] = trunk.net.blocks[stage].requires_grad_(True)
    return folded


def train_sam_lite(sam: Sam, photos: list, config: SamLiteConfig, run: Path, workers: int = 1) -> Path:
    """Trains ``sam`` in place and returns the newest checkpoint in ``run``; continues there if one exists.

    SIGTERM and SIGINT save before they end the run.
    """
    run.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    sam.requires_grad_(True)
    sam.image_encoder.trunk.requires_grad_(False)
    sam.mask_decoder.train()
    trunk = partly_folded(sam.image_encoder.trunk, config.tuned)
    affinity = AffinityHead()
    stages = [p for p in trunk.parameters() if p.requires_grad]
    rest = [p for name, p in sam.named_parameters() if not name.startswith(SAM_TRUNK)] + list(affinity.parameters())
    parameters = [*rest, *stages]
    groups = [
        {**group, "scale": scale}
        for part, scale in ((rest, 1.0), (stages, config.trunk_lr))
        for group in decay_groups(part, config.weight_decay)
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))
    average = {k: v.clone() for k, v in trainable_state(sam, config.tuned).items()}
    start = 0
    if (state := load_latest(run)) is not None:
        sam.load_state_dict(state["model"], strict=False)
        affinity.load_state_dict(state["affinity"])
        optimizer.load_state_dict(state["optimizer"])
        average, start = state["average"], state["step"]

    def save(step: int) -> Path:
        return save_checkpoint(
            run,
            step,
            {
                "model": trainable_state(sam, config.tuned),
                "affinity": affinity.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average,
                "step": step,
                "config": asdict(config),
            },
        )

    stop = []
    handlers = {s: signal.signal(s, lambda *_: stop.append(1)) for s in (signal.SIGTERM, signal.SIGINT)}
    dataset = PromptDataset(photos, config.steps, config.batch, config.prompts, config.size, config.seed)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(dataset, range(start, config.stop_at or config.steps)),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_ignore_signals,
    )
    log = (run / "log.csv").open("a", newline="")
    writer = csv.writer(log)
    sums: dict[str, float] = {}
    clock, step = time.perf_counter(), start
    try:
        for step, batch in enumerate(loader, start + 1):
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * learning_rate(step - 1, config)
            with torch.autocast("cpu", torch.bfloat16):
                logits, iou, embedding = forward_batch(sam, trunk, batch)
                out = mask_losses(logits, iou, batch, config.iou_weight)
                out["affinity"] = affinity(embedding, batch.labels)
            loss = out["loss"] + config.affinity_weight * out["affinity"]
            if not torch.isfinite(loss):
                culprit = run / f"nan_{step}.pt"
                torch.save(batch, culprit)
                raise TrainingDivergedError(f"Loss is {loss.item()} at step {step}; the batch is in {culprit}.")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            decay = min(config.ema, step / (step + 20))
            with torch.no_grad():
                now = trainable_state(sam, config.tuned)
                torch._foreach_lerp_(list(average.values()), list(now.values()), 1 - decay)
            for k, v in out.items():
                sums[k] = sums.get(k, 0.0) + v.item()
            if step % 50 == 0:
                seconds = (time.perf_counter() - clock) / 50
                row = [step, f"{seconds:.3f}", *(f"{sums[k] / 50:.4f}" for k in sorted(sums))]
                if log.tell() == 0:
                    writer.writerow(["step", "seconds", *sorted(sums)])
                writer.writerow(row)
                log.flush()
                sums, clock = {}, time.perf_counter()
            if step % config.save_every == 0 or stop:
                save(step)
            if stop:
                raise SystemExit(f"Stopped at step {step}; the run continues from there.")
    finally:
        log.close()
        for s, h in handlers.items():
            signal.signal(s, h)
    return save(step)
