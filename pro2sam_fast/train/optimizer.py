"""What the training programs share about their optimizers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def decay_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict]:
    """Parameter groups: matrices and larger decay, biases and other vectors do not."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
