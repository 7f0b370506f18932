"""Training of GTFormer and SAT from image-level labels (Pro2SAM, ECCV 2024; SAT, ICCV 2023).

Every step is a pure function of the weights, the optimizer's state, the configuration and the step's number: photos,
augmentation and drop path are drawn from (seed, step), never from a stream of random numbers. So a run that was killed
continues to the very weights of an unbroken one, and a step that ran out of memory is tried again in smaller parts.
"""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..data.localization import LabelledPhoto, LocalizationDataset
from ..data.tables import open_image
from ..data.views import TrainView
from ..errors import ConfigError, Pro2SamError
from ..io import write_atomic
from ..memory import is_out_of_memory
from .checkpoint import load_latest, save_checkpoint
from .losses import LossConfig, localization_loss
from .optimizer import decay_groups
from .run_log import RunLog

__all__ = ["TrainConfig", "TrainingDivergedError", "train_gtformer"]


class TrainingDivergedError(Pro2SamError, FloatingPointError):
    """The loss or its gradient is NaN or infinite; the message names the file with the batch."""


@dataclass
class TrainConfig:
    """How a GTFormer or SAT is trained; the defaults are those for CUB-200-2011.

    Attributes:
        epochs, batch_size: the latter over all ranks.
        micro_batch: photos in memory at a time on a rank; None for all of its share. The losses are those of the whole
            batch however it is split, the area loss too; what drop path drops differs.
        lr, betas, eps, weight_decay: of AdamW. decay_embeddings: tokens and positions decay too, as in the released
            code, whose list of exceptions never takes effect.
        lr_schedule: "constant", or "cosine" to 1e-6, per step, without warm-up.
        losses: see `LossConfig`. area_sync: the area loss is that of all ranks' photos, not of each rank's.
        amp: "bfloat16" autocast, or None.
        ema: decay of an average of the weights, which is evaluated and saved as ``best``; None for none.
        drop_last: leave out the last partial batch of an epoch (ILSVRC).
        resize, crop: of the training view. seed: of everything random. workers: processes that read photos.
        save_every: steps between checkpoints; an epoch's end always makes one. evaluate_every, evaluate_from: epochs.
        keep_epochs: the weights after every epoch stay, as ``epoch_<n>.safetensors``.
        auto_batch: halve ``micro_batch``, on all ranks, where memory runs out, instead of stopping with the advice.
    """

    epochs: int = 30
    batch_size: int = 256
    micro_batch: int | None = None
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    decay_embeddings: bool = True
    lr_schedule: str = "constant"
    losses: LossConfig = field(default_factory=lambda: LossConfig(area_target=0.25))
    area_sync: bool = False
    amp: str | None = None
    ema: float | None = None
    drop_last: bool = False
    resize: int = 256
    crop: int = 224
    seed: int = 6
    workers: int = 0
    save_every: int = 200
    evaluate_every: int = 1
    evaluate_from: int = 0
    keep_epochs: bool = False
    auto_batch: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "save_every", "evaluate_every"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ConfigError(f"micro_batch must be at least 1, got {self.micro_batch!r}")
        for name, kind in (("workers", Integral), ("seed", Integral), ("lr", Real), ("weight_decay", Real)):
            value = getattr(self, name)
            if not isinstance(value, kind) or not 0 <= value < math.inf:
                raise ConfigError(f"{name} must be a number of at least 0, got {value!r}")
        if self.lr_schedule not in ("constant", "cosine"):
            raise ConfigError(f"lr_schedule must be constant or cosine, got {self.lr_schedule!r}")
        if self.amp not in (None, "bfloat16"):
            raise ConfigError(f"amp must be bfloat16 or None, got {self.amp!r}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"ema must lie in (0, 1), got {self.ema!r}")


class _Batches(torch.utils.data.Dataset):
    """Item ``step`` is this rank's share of that step's batch: images (b, 3, S, S), labels (b,), indices (b,).

    Where photos can have several classes, labels are (b, C), a photo's classes sharing its 1.

    The photos of an epoch are a permutation by (seed, epoch); a photo's crop and flip come from (seed, epoch, photo).
    Ranks take every world-th photo of a batch, so that none is seen twice.
    """

    def __init__(self, data: LocalizationDataset, config: TrainConfig, rank: int, world: int) -> None:
        self.data, self.config, self.rank, self.world = data, config, rank, world
        self.view = TrainView(config.resize, config.crop)
        self.several = any(photo.labels for photo in data.photos)
        full, rest = divmod(len(data), config.batch_size)
        self.steps_per_epoch = full if config.drop_last or rest == 0 else full + 1
        if self.steps_per_epoch == 0:
            raise ConfigError(f"{len(data)} photos don't fill a batch of {config.batch_size}, and drop_last is set")
        smallest = config.batch_size if config.drop_last or rest == 0 else rest
        if smallest < world:
            raise ConfigError(f"a batch of {smallest} photos is too small for {world} ranks; change batch_size")

    def __len__(self) -> int:
        return self.steps_per_epoch * self.config.epochs

    def indices(self, step: int) -> np.ndarray:
        """The photos of a step over all ranks."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.data))
        return order[place * self.config.batch_size : (place + 1) * self.config.batch_size]

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        epoch = step // self.steps_per_epoch
        mine = self.indices(step)[self.rank :: self.world]
        views = [self._view(int(i), epoch) for i in mine]
        return torch.stack(views), self._labels([self.data.photos[i] for i in mine]), torch.from_numpy(mine)

    def _labels(self, photos: list[LabelledPhoto]) -> Tensor:
        if not self.several:
            return torch.tensor([photo.label for photo in photos], dtype=torch.int64)
        shares = torch.zeros(len(photos), len(self.data.class_names))
        for row, photo in zip(shares, photos, strict=True):
            classes = list(photo.labels or (photo.label,))
            row[classes] = 1 / len(classes)
        return shares

    def _view(self, index: int, epoch: int) -> Tensor:
        rng = np.random.default_rng((self.config.seed, epoch, index))
        return self.view(open_image(self.data.photos[index].path).convert("RGB"), rng)


def _groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if config.decay_embeddings:
        return decay_groups([p for _, p in named], config.weight_decay)
    embeddings = ("cls_token", "pos_embed", "query_pos", "query_token")
    groups = decay_groups([p for name, p in named if name not in embeddings], config.weight_decay)
    groups[1]["params"] += [p for name, p in named if name in embeddings]
    return groups


def _learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    if config.lr_schedule == "constant":
        return config.lr
    return 1e-6 + 0.5 * (config.lr - 1e-6) * (1 + math.cos(math.pi * step / steps))


class _OutOfMemoryElsewhere(Exception):
    """Another rank begins the step again."""


class _Trainer:
    """Weights, optimizer and the arithmetic of a step."""

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device, rank: int, world: int) -> None:
        self.config, self.device, self.rank, self.world = config, device, rank, world
        self.model = model.to(device)
        if world > 1:
            for value in self.model.state_dict().values():
                dist.broadcast(value, 0)
        self.optimizer = torch.optim.AdamW(
            _groups(self.model, config), lr=config.lr, betas=config.betas, eps=config.eps
        )
        self.average = (
            AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema is not None else None
        )
        self.micro_batch = config.micro_batch

    def state(self) -> dict[str, Any]:
        average = None if self.average is None else self.average.state_dict()
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "average": average}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    @property
    def evaluated(self) -> nn.Module:
        """The model whose accuracy counts."""
        return self.model if self.average is None else self.average.module

    def step(self, step: int, steps: int, images: Tensor, labels: Tensor, total: int) -> dict[str, float]:
        """One update; ``total`` photos over all ranks. Values are means over them."""
        images, labels = images.to(self.device), labels.to(self.device)
        self.model.train()
        while (terms := self._attempt(step, images, labels, total)) is None:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if not all(math.isfinite(value) for value in terms.values()):
            return terms
        for group in self.optimizer.param_groups:
            group["lr"] = _learning_rate(step, steps, self.config)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return terms

    def _attempt(self, step: int, images: Tensor, labels: Tensor, total: int) -> dict[str, float] | None:
        """The terms of `_gradients`; None if memory ran out on any rank, and all take smaller parts from now on."""
        error = None
        try:
            return self._gradients(step, images, labels, total)
        except _OutOfMemoryElsewhere:
            pass
        except Exception as caught:
            if not is_out_of_memory(caught):
                raise
            error = caught
            self._ran_out(True)
        largest = -(-total // self.world)
        used = min(self.micro_batch or largest, largest)
        if used == 1:
            raise ConfigError("Memory ran out with a single photo at a time; use a smaller arch.") from error
        if not self.config.auto_batch:
            raise ConfigError(
                f"Memory ran out with {used} photos at a time; use a micro_batch of {used // 2}, or auto_batch."
            ) from error
        self.micro_batch = used // 2
        return None

    def _ran_out(self, here: bool) -> bool:
        """Whether memory ran out on any rank. Every rank asks before the ranks exchange anything in an attempt at a
        step, and one that failed asks once instead of what is left, so that none waits for it in vain."""
        asks = self.world > 1 and self.config.auto_batch
        return _any_rank(here, self.world, self.device) if asks else here

    def _meet(self) -> None:
        if self._ran_out(False):
            raise _OutOfMemoryElsewhere

    def _gradients(self, step: int, images: Tensor, labels: Tensor, total: int) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)
        parts = self._parts(images, labels)
        rank_share = len(images) / total
        whole = self._shared_means(self._area_means(step, parts), rank_share) if len(parts) > 1 else None

        def reducer(local: Tensor) -> Tensor:
            # the mean over all parts, and over all ranks for area_sync, with the part's gradient
            mean = self._shared_means(local.detach(), rank_share) if whole is None else whole
            return mean + (local - local.detach())

        sums: dict[str, float] = {}
        for number, (x, y) in enumerate(parts):
            terms = localization_loss(self._forward(step, number, x), y, self.config.losses, reducer=reducer)
            share = len(x) / len(images)
            (terms["loss"] * share).backward()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item() * share
        if self.world > 1:
            self._meet()
            self._average_gradients(rank_share, sums)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return {**sums, "gradient_norm": nn.utils.get_total_norm(gradients).item()}

    def _parts(self, images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        size = self.micro_batch or max(1, len(images))
        return list(zip(images.split(size), labels.split(size), strict=True))

    def _forward(self, step: int, number: int, x: Tensor) -> dict[str, Tensor]:
        # drop path is drawn anew for each part, the same way in both passes
        torch.manual_seed(hash((self.config.seed, step, self.rank, number)) % 2**63)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp is not None):
            return self.model(x)

    @torch.no_grad()
    def _area_means(self, step: int, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Mean of each token's map over all parts: the area loss wants it before any part's gradient is known."""
        count = sum(len(x) for x, _ in parts)
        means = []
        for number, (x, _) in enumerate(parts):
            out = self._forward(step, number, x)
            maps = out["maps"] if self.config.losses.scheme == "official" else out["map"].unsqueeze(1)
            maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
            means.append(maps.mean((0, 2, 3)) * (len(x) / count))
        return torch.stack(means).sum(0)

    def _shared_means(self, means: Tensor, rank_share: float) -> Tensor:
        if self.world == 1 or not self.config.area_sync:
            return means
        self._meet()
        means = means * rank_share
        dist.all_reduce(means)
        return means

    def _average_gradients(self, share: float, sums: dict[str, float]) -> None:
        # every rank's gradient is that of its own mean; ranks with more photos of the last batch count for more
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients]) * share
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))
        values = torch.tensor([*sums.values()], dtype=torch.float64, device=flat.device) * share
        dist.all_reduce(values)
        sums.update(zip(sums, values.tolist()))


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Signals SIGTERM and SIGINT of the scope, in a list, instead of their usual effect."""
    received: list[int] = []
    handlers = {}
    try:
        if threading.current_thread() is threading.main_thread():  # others can't have handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                handlers[number] = signal.signal(number, lambda n, _: received.append(n))
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _any_rank(flag: bool, world: int, device: torch.device) -> bool:
    if world == 1:
        return flag
    shared = torch.tensor(int(flag), device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return bool(shared)


def _ignore_signals(_: int) -> None:
    # a signal to the whole group must not kill the readers before the trainer has saved
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def train_gtformer(
    model: nn.Module,
    data: LocalizationDataset,
    run: str | Path,
    config: TrainConfig | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    select: str = "GT-known",
    device: torch.device | str = "cpu",
    resume: bool = True,
) -> Path:
    """Trains a GTFormer or SAT, or anything with its outputs, from image-level labels.

    The run folder gets ``args.yaml``, ``summary.csv`` (a row an epoch), TensorBoard events where tensorboard is
    installed, ``last.safetensors``, ``best.safetensors`` and checkpoints ``step_*.pt``, of which the newest two stay.
    Files are put in place whole. SIGTERM and SIGINT save and end the run with SystemExit; a later call continues.
    Under torchrun the ranks share every batch; photos of a batch are never counted twice.

    Args:
        model: in the configuration that is to be trained; parameters that don't require gradients stay.
        data: photos with labels; ``transform`` is not used, the training view is ``config``'s.
        run: folder.
        metadata: for the weights' files, see `models.trained.ModelSpec`.
        evaluate: gives the metrics of a model on held-out photos; called at the end of epochs. None: none.
        select: the metric by which ``best`` is chosen.
        device: of this process.
        resume: continue from the newest readable checkpoint in ``run``; else a folder with checkpoints is an error.

    Returns:
        Path of ``last.safetensors``.

    Raises:
        TrainingDivergedError: the loss or its gradient isn't finite; the batch is saved.
        ConfigError: the run folder holds another configuration, or memory ran out.
    """
    config, run, device = config or TrainConfig(), Path(run), torch.device(device)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = _Batches(data, config, rank, world)
    steps, per_epoch = len(batches), batches.steps_per_epoch
    trainer = _Trainer(model, config, device, rank, world)
    log = RunLog(run, {**asdict(config), "photos": len(data), "classes": len(data.class_names)}, main=rank == 0)
    state = load_latest(run)
    if state is not None and not resume:
        raise ConfigError(f"{run} holds checkpoints of an earlier run; resume it or choose another folder.")
    start, best = 0, -math.inf
    if state is not None:
        log.check()
        trainer.load(state)
        start, best = state["step"], state["best"]
        log.restore(state["log"])
    else:
        log.start()

    def checkpoint(step: int) -> None:
        if rank == 0:
            save_checkpoint(run, step, {**trainer.state(), "step": step, "best": best, "log": log.state()})

    def weights(name: str, module: nn.Module, **facts: Any) -> Path:
        path = run / f"{name}.safetensors"
        if rank == 0:
            tensors = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
            write_atomic(path, save(tensors, {**(metadata or {}), **{k: json.dumps(v) for k, v in facts.items()}}))
        return path

    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(batches, range(start, steps)),
        batch_size=None,
        num_workers=config.workers,
        worker_init_fn=_ignore_signals,
    )
    with _stop_requests() as stop, log:
        for step, (images, labels, indices) in enumerate(loader, start):
            total = len(batches.indices(step))
            terms = trainer.step(step, steps, images, labels, total)
            if not all(math.isfinite(value) for value in terms.values()):
                path = run / (f"diverged_{step}.pt" if world == 1 else f"diverged_{step}_rank{rank}.pt")
                torch.save({"images": images, "labels": labels, "indices": indices, "terms": terms}, path)
                raise TrainingDivergedError(f"The losses of step {step} are {terms}; the batch is in {path}.")
            log.step(step, steps, terms, total)
            ends_epoch = (step + 1) % per_epoch == 0
            if ends_epoch:
                epoch = (step + 1) // per_epoch
                due = epoch > config.evaluate_from and (epoch % config.evaluate_every == 0 or step + 1 == steps)
                metrics = evaluate(trainer.evaluated.eval()) if evaluate is not None and due else {}
                if metrics.get(select, -math.inf) > best:
                    best = metrics[select]
                    weights("best", trainer.evaluated, epoch=epoch, metrics=metrics)
                if config.keep_epochs:
                    weights(f"epoch_{epoch}", trainer.evaluated, epoch=epoch, metrics=metrics)
                log.epoch(epoch, config.epochs, metrics)
            stops = _any_rank(bool(stop), world, device)
            if ends_epoch or (step + 1) % config.save_every == 0 or stops:
                checkpoint(step + 1)
            if stops:
                raise SystemExit(f"Stopped at step {step + 1} of {steps}; the same command continues there.")
    return weights("last", trainer.model, epoch=config.epochs)
