"""Losses of GTFormer (Pro2SAM, ECCV 2024) and SAT (ICCV 2023): classification, region (batch area) and edge
(normalisation).

With M the coarse map in [0, 1], tau the expected foreground share and K a fixed 3x3 blur with zero padding:

    L_area(M) = | mean over batch and pixels of M - tau |        c = K * M;  L_edge(M) = mean of c (1 - c)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError

__all__ = [
    "AREA_TARGETS",
    "LOSS_PRESETS",
    "LossConfig",
    "all_reduce_mean",
    "area_loss",
    "blur",
    "edge_kernel",
    "edge_loss",
    "localization_loss",
]

AREA_TARGETS = {"cub": 0.25, "ilsvrc": 0.35}
SCHEMES = ("official", "mean_map_only", "sat")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the total loss.

    Attributes:
        scheme: "official" (released code): CE + lambda1 (area(M) + edge(M)) + lambda2 sum over tokens of (area(M_g) +
            edge(M_g)); "mean_map_only" (the paper's figure): CE + lambda1 edge(M) + lambda2 area(M);
            "sat": CE + lambda1 (area(M) + edge(M)).
        area_target: tau in [0, 1]; 0.25 for CUB-200-2011, 0.35 for ILSVRC.
        lambda1, lambda2: the weights above.
    """

    scheme: str = "official"
    area_target: float = 0.35
    lambda1: float = 1.0
    lambda2: float = 0.5

    def __post_init__(self):
        if self.scheme not in SCHEMES:
            raise ConfigError(f"loss scheme must be one of {', '.join(SCHEMES)}, got {self.scheme!r}")
        if not 0 <= self.area_target <= 1:
            raise ConfigError(f"area_target must lie in [0, 1], got {self.area_target!r}")
        if not (math.isfinite(self.lambda1) and math.isfinite(self.lambda2)):
            raise ConfigError(f"loss weights must be finite, got {self.lambda1!r} and {self.lambda2!r}")


LOSS_PRESETS = {
    "default": LossConfig(),
    "official": LossConfig(),
    "paper": LossConfig(scheme="mean_map_only"),
    "sat": LossConfig(scheme="sat", lambda2=0.0),
    "cam": LossConfig(lambda1=0.0, lambda2=0.0),
}


def _edge_taps() -> tuple[float, float, float]:
    # masses of a standard normal between -49/6, -49/18, 49/18, 49/6 (3 taps, nsig 6); square root of their outer
    # product, normalised
    cdf = [0.5 * (1.0 + math.erf(x / math.sqrt(2.0))) for x in (-49 / 6, -49 / 18, 49 / 18, 49 / 6)]
    roots = [math.sqrt(b - a) for a, b in itertools.pairwise(cdf)]
    side = (roots[0] + roots[2]) / 2
    total = 2 * side + roots[1]
    return side / total, roots[1] / total, side / total


EDGE_TAPS = _edge_taps()


def edge_kernel(dtype: torch.dtype = torch.float64) -> Tensor:
    """The 3x3 blur kernel K, the outer product of `EDGE_TAPS` with itself; sums to 1."""
    taps = torch.tensor(EDGE_TAPS, dtype=torch.float64)
    return torch.outer(taps, taps).to(dtype)


def blur(maps: Tensor) -> Tensor:
    """K * maps over the last two dimensions with zero padding; any shape (..., h, w), float32 or float64 arithmetic."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    side, centre, _ = EDGE_TAPS
    padded = F.pad(maps, (0, 0, 1, 1))
    maps = centre * maps + side * (padded[..., :-2, :] + padded[..., 2:, :])
    padded = F.pad(maps, (1, 1))
    return centre * maps + side * (padded[..., :-2] + padded[..., 2:])


def area_loss(maps: Tensor, target: float, *, reducer: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Region loss: distance of the batch's mean map value from `target`.

    Images may differ in area as long as the batch average is right, so a batch of one is another objective; with
    gradient accumulation the mean is that of each micro-batch.

    Args:
        maps: (B, h, w), or any shape; all values count alike.
        target: tau in [0, 1].
        reducer: maps the scalar local mean to the mean to compare, e.g. `all_reduce_mean` over equal shards. None
            compares the local mean.

    Returns:
        Scalar; its gradient is sign(mean - tau) / count, 0 at equality.
    """
    mean = maps.to(torch.promote_types(maps.dtype, torch.float32)).mean()
    return ((mean if reducer is None else reducer(mean)) - target).abs()


def edge_loss(maps: Tensor) -> Tensor:
    """Edge loss: mean of c (1 - c) of the blurred maps (B, h, w), any leading shape. Pushes them to 0 and 1. Scalar."""
    return _spread(blur(maps)).mean()


def localization_loss(
    outputs: Mapping[str, Tensor],
    labels: Tensor,
    config: LossConfig | str = "default",
    *,
    reducer: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Total training loss and its terms.

    Args:
        outputs: of GTFormer: "logits" (B, C), "maps" (B, G, h, w), "map" (B, h, w).
        labels: (B,) int64 classes, or (B, C) class probabilities.
        config: weights, or the name of a preset in `LOSS_PRESETS`.
        reducer: batch scope of the area terms. None: the local batch, as the released distributed code.
            `all_reduce_mean`: the global batch. It gets one tensor of G means (1 for the schemes without token terms)
                and returns the same shape.

    Returns:
        Scalars "loss", "ce", "area", "edge" of the mean map, and for scheme "official" the sums over tokens
        "token_area", "token_edge". Only "loss" is weighted.

    Raises:
        ConfigError: unknown preset.
    """
    if isinstance(config, str):
        if config not in LOSS_PRESETS:
            raise ConfigError(f"unknown loss preset {config!r}, choose from {', '.join(LOSS_PRESETS)}")
        config = LOSS_PRESETS[config]
    logits = outputs["logits"]
    ce = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)

    # the mean map's area and blur are means over the tokens', so one reduction and one blur serve all terms
    tokens = config.scheme == "official"
    maps = outputs["maps"] if tokens else outputs["map"].unsqueeze(1)
    blurred = blur(maps)
    means = maps.to(blurred.dtype).mean((0, 2, 3))
    if reducer is not None:
        means = reducer(means)
    area = (means.mean() - config.area_target).abs()
    edge = _spread(blurred.mean(1)).mean()
    terms = {"ce": ce, "area": area, "edge": edge}
    if config.scheme == "mean_map_only":
        loss = ce + config.lambda1 * edge + config.lambda2 * area
    else:
        loss = ce + config.lambda1 * (area + edge)
    if tokens:
        terms["token_area"] = (means - config.area_target).abs().sum()
        terms["token_edge"] = _spread(blurred).mean((0, 2, 3)).sum()
        loss = loss + config.lambda2 * (terms["token_area"] + terms["token_edge"])
    return {"loss": loss, **terms}


def all_reduce_mean(values: Tensor) -> Tensor:
    """Mean of a tensor over the ranks of the default process group, differentiable; the identity without a process
    group.

    The backward pass averages the gradients over the ranks too, so with gradients averaged by DistributedDataParallel
    the result is the gradient of the loss of the global batch. Shards must have equal size.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    return _AllReduceMean.apply(values)


class _AllReduceMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        return _mean_over_ranks(values)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _mean_over_ranks(grad)


def _mean_over_ranks(values: Tensor) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _spread(values: Tensor) -> Tensor:
    return values * (1.0 - values)
