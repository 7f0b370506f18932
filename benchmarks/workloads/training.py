"""Training steps of GTFormer-S and SAT-S: forward, losses, backward, AdamW."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from case import Case, Runs
from torch import Tensor

from pro2sam_fast.models import gtformer
from pro2sam_fast.models.gated_attention import gated_attention_reference
from pro2sam_fast.train.losses import localization_loss
from pro2sam_fast.train.optimizer import decay_groups

from . import Options, shared

__all__ = ["cases"]

TESTS = ("tests/models/test_gtformer.py", "tests/train/test_losses.py")
BATCHES = (32, 64, 128, 256)
PRESETS = {"GTFormer-S": "default", "SAT-S": "sat"}  # also the names of their losses


def cases(options: Options) -> Iterator[Case]:
    for batch in BATCHES:
        for name, preset in PRESETS.items():
            build = functools.partial(_step, options, preset, batch)
            default = batch == BATCHES[0] or options.device.type == "cuda"
            yield Case(name, f"train step batch={batch}", options.dtype, TESTS, build, default=default)


def _step(options: Options, preset: str, batch: int) -> Runs:
    torch.manual_seed(0)
    model = gtformer.build_gtformer("deit_small", preset=preset).train()
    photos = torch.randn(batch, 3, gtformer.IMAGE_SIZE, gtformer.IMAGE_SIZE).to(options.device)
    labels = torch.randint(model.config.num_classes, (batch,)).to(options.device)
    facts: dict[str, object] = {}

    def step(name: str) -> Callable[[], None]:
        own = copy.deepcopy(model).to(options.device)
        optimizer = torch.optim.AdamW(decay_groups(list(own.parameters()), 0.05), lr=5e-5)

        def run() -> None:
            with shared.in_dtype(options):
                outputs = own(photos)
            loss = localization_loss(outputs, labels, preset)["loss"]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            facts[f"last loss {name}"] = round(loss.item(), 4)

        return run

    return Runs(
        {"auto": step("ours")},
        {"materialised attention": _materialised(step("materialised attention"))},
        facts,
        ("photos", batch),
    )


def _materialised(call: Callable[[], None]) -> Callable[[], None]:
    """The call with the published method's attention in all blocks: H x N x N weights in memory, then gated."""

    def run() -> None:
        with shared.replaced(gtformer, attention=_attention, gated_attention=_gated_attention):
            call()

    return run


def _attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def _gated_attention(q, k, v, num_heads: int, num_queries: int, *, gate: bool, query_rows: slice):
    out, maps = gated_attention_reference(q, k, v, num_heads, num_queries, gate=gate)
    return out[:, query_rows], maps
