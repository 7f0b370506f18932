"""GTFormer, the coarse localizer of Pro2SAM (ECCV 2024), and SAT (ICCV 2023) as a configuration of it.

A DeiT trunk gets G query tokens behind the class and patch tokens. In the gated blocks the query tokens score every key
as foreground and the score scales the values. The mean score of the patches over the gated blocks is the coarse map;
class logits come from a 3x3 convolution over the patch outputs. Token order: class, 196 patches row-major, G query
tokens.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from . import gtformer_weights as weights
from .cpu import apply_linear
from .gated_attention import attention, gated_attention, query_maps

__all__ = ["ARCHS", "PRESETS", "GTFormer", "GTFormerConfig", "build_gtformer", "load_official"]

IMAGE_SIZE = 224
PATCH_SIZE = 16
GRID = IMAGE_SIZE // PATCH_SIZE
NUM_PATCHES = GRID * GRID
PATCH_VALUES = 3 * PATCH_SIZE * PATCH_SIZE

ARCHS = weights.ARCHS

PRESETS: dict[str, dict] = {
    "default": {},
    "official": {"global_proj": "official_shared"},
    "paper": {},
    "sat": {"num_query_tokens": 1, "query_source": "learned"},
    "cam": {"gate": "none"},
}


@dataclass(frozen=True)
class GTFormerConfig:
    """Every choice that shapes the model. Defaults are GTFormer-S with 1,000 classes.

    Attributes:
        num_classes: C.
        embed_dim, depth, num_heads, mlp_ratio: trunk width D, blocks L, heads H, hidden width of the MLP over D.
        num_query_tokens: G. From the image it must be a square, 1 to 196 (the tokens are the sqrt(G) x sqrt(G) phases
            of the small image).
        query_source: "image" embeds phases of the down-sampled image (GTFormer), "learned" is one parameter for all
            images (SAT).
        global_proj: "independent" projections for the G phases (paper), or "official_shared": one for the first phase
            and one shared by all others (released code).
        global_downsample: "bilinear" without antialias, or "area".
        gated_blocks: indices of the blocks with global-token attention; None for the last three.
        gate: "sigmoid_mean", or "none" for the ablation that computes the maps but never scales the values.
        drop_path: rate of the last block; block l has rate drop_path * l / (L - 1).
    """

    num_classes: int = 1000
    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    num_query_tokens: int = 4
    query_source: str = "image"
    global_proj: str = "independent"
    global_downsample: str = "bilinear"
    gated_blocks: tuple[int, ...] | None = None
    gate: str = "sigmoid_mean"
    drop_path: float = 0.1

    def __post_init__(self):
        for name in ("num_classes", "embed_dim", "depth", "num_heads", "num_query_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if self.embed_dim % self.num_heads:
            raise ConfigError(f"embed_dim {self.embed_dim} isn't a multiple of num_heads {self.num_heads}")
        if not self.mlp_ratio > 0 or int(self.embed_dim * self.mlp_ratio) < 1:
            raise ConfigError(f"mlp_ratio must be positive, got {self.mlp_ratio!r}")
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"drop_path must lie in [0, 1), got {self.drop_path!r}")
        for name, choices in (
            ("query_source", ("image", "learned")),
            ("global_proj", ("independent", "official_shared")),
            ("global_downsample", ("bilinear", "area")),
            ("gate", ("sigmoid_mean", "none")),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        root = math.isqrt(self.num_query_tokens)
        if self.query_source == "image" and (root * root != self.num_query_tokens or root > GRID):
            raise ConfigError(f"num_query_tokens must be a square from 1 to 196, got {self.num_query_tokens}")
        gated = range(max(0, self.depth - 3), self.depth) if self.gated_blocks is None else self.gated_blocks
        if isinstance(gated, int) or not gated or not all(isinstance(i, int) and 0 <= i < self.depth for i in gated):
            raise ConfigError(f"gated_blocks must name blocks from 0 to {self.depth - 1}, got {self.gated_blocks!r}")
        object.__setattr__(self, "gated_blocks", tuple(sorted(set(gated))))


FIELDS = frozenset(field.name for field in fields(GTFormerConfig))


class PatchEmbed(nn.Module):
    """16x16 convolution with stride 16: (B, 3, 224, 224) -> (B, 196, D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH_SIZE, PATCH_SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class QueryEmbed(nn.Module):
    """Query tokens from the image: phases of a small copy of the image, each projected to one token.

    The image is resized to 16r x 16r, r = sqrt(G), half-pixel bilinear without antialias, and split into its r x r
    stride-r phases. Phase (dy, dx) is token r*dx + dy. `weight` is (G, D, 768), or (2, D, 768) when shared, with
    columns (channel, row, column).
    """

    def __init__(self, dim: int, num_tokens: int, shared: bool, downsample: str):
        super().__init__()
        self.root = math.isqrt(num_tokens)
        self.downsample = downsample
        slots = min(num_tokens, 2) if shared else num_tokens
        self.slots = [min(g, slots - 1) for g in range(num_tokens)]
        bound = 1.0 / math.sqrt(PATCH_VALUES)
        self.weight = nn.Parameter(torch.empty(slots, dim, PATCH_VALUES).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(slots, dim).uniform_(-bound, bound))

    def phases(self, x: Tensor) -> Tensor:
        """Image (B, 3, 224, 224) -> flattened phases (B, G, 768)."""
        r = self.root
        side = PATCH_SIZE * r
        ratio, rest = divmod(IMAGE_SIZE, side)
        if self.downsample == "area":
            small = F.adaptive_avg_pool2d(x, side)
        elif rest == 0 and ratio % 2 == 1:
            # an odd integer ratio puts every sample on a pixel: (i + 1/2) * ratio - 1/2 = ratio * i + (ratio - 1) / 2
            small = x[:, :, ratio // 2 :: ratio, ratio // 2 :: ratio]
        else:
            small = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
        small = small.reshape(x.shape[0], 3, PATCH_SIZE, r, PATCH_SIZE, r)  # b c u dy v dx
        return small.permute(0, 5, 3, 1, 2, 4).reshape(x.shape[0], r * r, PATCH_VALUES)

    def project(self, phases: Tensor) -> Tensor:
        """Flattened phases (B, G, 768) -> tokens (B, G, D)."""
        weight, bias = self.weight, self.bias
        if len(self.slots) != weight.shape[0]:
            weight, bias = weight[self.slots], bias[self.slots]
        return torch.matmul(phases.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1) + bias

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, 3, 224, 224) -> tokens (B, G, D)."""
        return self.project(self.phases(x))


class Attention(nn.Module):
    """Projections around attention; rows of `qkv.weight` are [Q; K; V], each H chunks of d."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, num_queries: int, gated: bool, gate: bool, rows: slice):
        """Normalised tokens (B, N, D) -> the R tokens `rows` (B, R, D), and the maps (B, G, N) or None if not gated."""
        q, k, v = apply_linear(self.qkv, x).chunk(3, dim=-1)
        if not gated:
            return apply_linear(self.proj, attention(q, k, v, self.num_heads)[:, rows]), None
        out, maps = gated_attention(q, k, v, self.num_heads, num_queries, gate=gate, query_rows=rows)
        return apply_linear(self.proj, out), maps

    def patch_maps(self, x: Tensor, num_queries: int) -> Tensor:
        """Normalised tokens (B, N, D) -> maps (B, G, 196), projecting only patch keys and query-token queries."""
        dim = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(x[:, -num_queries:], weight[:dim], bias[:dim])
        k = F.linear(x[:, 1:-num_queries], weight[dim : 2 * dim], bias[dim : 2 * dim])
        return query_maps(q, k, self.num_heads)


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return apply_linear(self.fc2, apply_linear(self.fc1, x, self.act))


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth; the two residual branches draw their per-sample masks
    independently."""

    def __init__(self, dim: int, num_heads: int, hidden: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)
        self.drop_path = drop_path

    def drop(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0.0:
            return x
        keep = 1.0 - self.drop_path
        return x * x.new_empty((x.shape[0], 1, 1)).bernoulli_(keep).div_(keep)

    def forward(self, x: Tensor, num_queries: int, gated: bool, gate: bool, rows: slice):
        """Tokens (B, N, D) -> the tokens `rows` after the block, and the maps (B, G, N), None if not gated."""
        out, maps = self.attn(self.norm1(x), num_queries, gated, gate, rows)
        x = x[:, rows] + self.drop(out)
        return x + self.drop(self.mlp(self.norm2(x))), maps


class PooledHead(nn.Module):
    """3x3 convolution D -> C with zero padding, followed by global average pooling, without building the class maps.

    Convolution and mean are linear, so for kernel tap (a, b) only the window sum T_ab of the inputs that the tap sees
    is needed: rows 0..h-2, 0..h-1 or 1..h-1 for a = 0, 1, 2, and the same for columns.
    `weight` (C, D, 3, 3), `bias` (C).
    """

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        bound = 1.0 / math.sqrt(9 * dim)
        self.weight = nn.Parameter(torch.empty(num_classes, dim, 3, 3).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_classes).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, h, w, D) -> logits (B, C)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        rows = x.sum(1)  # (B, w, D)
        rows = torch.stack([rows - x[:, -1], rows, rows - x[:, 0]], dim=1)  # (B, 3, w, D)
        sums = rows.sum(2)
        sums = torch.stack([sums - rows[:, :, -1], sums, sums - rows[:, :, 0]], dim=2)  # (B, 3, 3, D)
        sums = sums.permute(0, 3, 1, 2).flatten(1) / (x.shape[1] * x.shape[2])
        return F.linear(sums.to(self.weight.dtype), self.weight.flatten(1), self.bias)

    def class_maps(self, x: Tensor) -> Tensor:
        """Features (B, h, w, D) -> class maps (B, C, h, w), whose spatial means are the logits."""
        return F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, padding=1)


class GTFormer(nn.Module):
    """Image classifier whose query tokens give a coarse foreground map.

    Args:
        config: the model's choices; None for the defaults.
        patch_embed: module mapping the image (B, 3, 224, 224) to patch tokens (B, 196, D), row-major over the 14x14
            grid, for hybrids; None for the 16x16 convolution.
        overrides: fields of `GTFormerConfig` to change.

    Raises:
        ConfigError: an unknown field or a value out of range.
    """

    def __init__(self, config: GTFormerConfig | None = None, *, patch_embed: nn.Module | None = None, **overrides):
        super().__init__()
        config = _replace(config or GTFormerConfig(), overrides)
        dim, num_queries = config.embed_dim, config.num_query_tokens
        self.config = config
        self.patch_embed = PatchEmbed(dim) if patch_embed is None else patch_embed
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + NUM_PATCHES, dim))
        self.query_pos = nn.Parameter(torch.empty(1, num_queries, dim))
        if config.query_source == "image":
            self.query_embed = QueryEmbed(
                dim, num_queries, config.global_proj == "official_shared", config.global_downsample
            )
        else:
            self.query_token = nn.Parameter(torch.empty(1, num_queries, dim))
            nn.init.normal_(self.query_token, std=0.02)
        rates = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        hidden = int(dim * config.mlp_ratio)
        self.blocks = nn.ModuleList(Block(dim, config.num_heads, hidden, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = PooledHead(dim, config.num_classes)
        # the reference truncates these normals at 100 standard deviations, which never happens
        for parameter in (self.cls_token, self.pos_embed, self.query_pos):
            nn.init.normal_(parameter, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, *, class_maps: bool = False) -> dict[str, Tensor]:
        """Logits and maps.

        Args:
            x: (B, 3, 224, 224) floating point RGB in [0, 1], normalised with the ImageNet mean and standard deviation.
            class_maps: also build the class maps, a convolution that the logits don't need.

        Returns:
            "logits" (B, C); "maps" (B, G, 14, 14), one map in (0, 1) for each query token, mean over the gated blocks;
            "map" (B, 14, 14), their mean; with `class_maps` also "class_maps" (B, C, 14, 14). Maps are float32 or
            wider.

        Raises:
            ConfigError: another shape or an integer image.
        """
        return self.forward_tokens(*self.embed(x), class_maps=class_maps)

    def forward_tokens(self, patches: Tensor, queries: Tensor, *, class_maps: bool = False) -> dict[str, Tensor]:
        """As `forward`, from what `embed` returns: patch tokens (B, 196, D), query tokens (B, G, D), no positions."""
        config = self.config
        z = self._sequence(patches, queries)
        maps = []
        all_rows, patch_rows = slice(None), slice(1, -config.num_query_tokens)
        for index, block in enumerate(self.blocks):
            # outputs of the class and query tokens are unused after the last block
            rows = patch_rows if index == config.depth - 1 else all_rows
            z, block_maps = block(z, config.num_query_tokens, index in config.gated_blocks, config.gate != "none", rows)
            if block_maps is not None:
                maps.append(block_maps[:, :, patch_rows])
        features = self.norm(z).unflatten(1, (GRID, GRID))
        maps = torch.stack(maps).mean(0).unflatten(-1, (GRID, GRID))
        outputs = {"logits": self.head(features), "maps": maps, "map": maps.mean(1)}
        if class_maps:
            outputs["class_maps"] = self.head.class_maps(features)
        return outputs

    def coarse_map(self, x: Tensor) -> Tensor:
        """The coarse map alone: (B, 3, 224, 224) -> (B, 14, 14), equal to `forward(x)["map"]` up to rounding.

        The last gated block is reduced to the keys of the patches and the queries of the query tokens; nothing runs
        after it.
        """
        return self.coarse_map_of_tokens(*self.embed(x))

    def coarse_map_of_tokens(self, patches: Tensor, queries: Tensor) -> Tensor:
        """As `coarse_map`, from what `embed` returns."""
        config = self.config
        num_queries, last = config.num_query_tokens, config.gated_blocks[-1]
        z = self._sequence(patches, queries)
        maps = []
        for index, block in enumerate(self.blocks[:last]):
            z, block_maps = block(z, num_queries, index in config.gated_blocks, config.gate != "none", slice(None))
            if block_maps is not None:
                maps.append(block_maps[:, :, 1:-num_queries])
        block = self.blocks[last]
        maps.append(block.attn.patch_maps(block.norm1(z), num_queries))
        return torch.stack(maps).mean(0).unflatten(-1, (GRID, GRID)).mean(1)

    def embed(self, x: Tensor, features: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Image (B, 3, 224, 224) -> patch tokens (B, 196, D) and query tokens (B, G, D), both without positions.

        features: what `patch_embed.features(x)` returned, for a hybrid that splits so; None to compute it.
        """
        if x.ndim != 4 or x.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE) or not x.is_floating_point():
            raise ConfigError(
                f"GTFormer takes floating point images of shape (B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), "
                f"got {x.dtype} {tuple(x.shape)}"
            )
        patches = self.patch_embed(x) if features is None else self.patch_embed.embed(features)
        shape = (x.shape[0], NUM_PATCHES, self.config.embed_dim)
        if patches.shape != shape:
            raise ConfigError(f"patch_embed must return tokens of shape {shape}, got {tuple(patches.shape)}")
        return patches, self.query_tokens(x)

    def query_tokens(self, x: Tensor) -> Tensor:
        """Query tokens (B, G, D) of the images (B, 3, 224, 224), without positions."""
        if self.config.query_source == "image":
            return self.query_embed(x)
        return self.query_token.expand(x.shape[0], -1, -1)

    def _sequence(self, patches: Tensor, queries: Tensor) -> Tensor:
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(patches.shape[0], -1, -1)
        return torch.cat([cls_token, patches + self.pos_embed[:, 1:], queries + self.query_pos], dim=1)


def build_gtformer(
    arch: str = "deit_small",
    num_classes: int = 1000,
    preset: str = "default",
    pretrained: bool | str | os.PathLike | Mapping = False,
    *,
    patch_embed: nn.Module | None = None,
    **overrides,
) -> GTFormer:
    """A GTFormer or SAT with a DeiT trunk.

    Args:
        arch: "deit_tiny", "deit_small" or "deit_base".
        num_classes: C.
        preset: "default" (GTFormer), "official" (the released code's shared projection), "paper", "sat",
            "cam" (the same network without gate, for the baseline of that name).
        pretrained: True downloads the ImageNet-1k DeiT weights through timm; a path or a state dict gives a local DeiT
            checkpoint. The head, the query tokens and their positions keep their initialisation.
        patch_embed, overrides: see `GTFormer`; overrides win over arch and preset.

    Raises:
        ConfigError: unknown arch, preset or field, or pre-training asked for a hybrid.
        CheckpointError: the weights can't be downloaded or read, or don't fit.
    """
    if arch not in ARCHS:
        raise ConfigError(f"unknown arch {arch!r}, choose from {', '.join(ARCHS)}")
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}, choose from {', '.join(PRESETS)}")
    options = {**ARCHS[arch], **PRESETS[preset], "num_classes": num_classes, **overrides}
    model = GTFormer(patch_embed=patch_embed, **options)
    if pretrained is False or pretrained is None:
        return model
    if patch_embed is not None:
        raise ConfigError("DeiT weights don't fit a custom patch_embed; use pretrained=False")
    if pretrained is True:
        state, name = weights.download_deit(arch), f"the downloaded {arch} checkpoint"
    else:
        state, _, name = weights.read_state_dict(pretrained)
    weights.copy_deit(model, state, name)
    return model


def load_official(
    source: str | os.PathLike | Mapping,
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    preset: str = "default",
    **overrides,
) -> GTFormer:
    """A GTFormer or SAT from a file of the released Pro2SAM or SAT code, in evaluation mode.

    Width, number of query tokens and number of classes come from the shapes in the file. The released Pro2SAM model
    uses its second projection for query tokens 1 to 3; with `global_proj="independent"` it is copied into all three,
    which gives the same outputs.

    Args:
        source: path of a `.pth` or `.safetensors` file, or its content: `{"model": state_dict, "best_thr", "epoch"}` or
            the state dict, with or without the prefix `module.`. Files are read without running code from them.
        arch, num_classes: what the file must contain; None accepts what it has.
        preset: "default", "official" or "paper" for Pro2SAM files; "default" or "sat" for SAT files.
        overrides: fields of `GTFormerConfig` that don't depend on the file: global_proj, gate, gated_blocks, drop_path.

    Returns:
        The model; its attribute `checkpoint_info` has the file's other entries (`best_thr`, `epoch`) where present.

    Raises:
        CheckpointError: missing, corrupt, unsafe or mismatching file.
        ConfigError: unknown arch, preset or field.
    """
    if arch is not None and arch not in ARCHS:
        raise ConfigError(f"unknown arch {arch!r}, choose from {', '.join(ARCHS)}")
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}, choose from {', '.join(PRESETS)}")
    if clash := (overrides.keys() & FIELDS) - {"global_proj", "gate", "gated_blocks", "drop_path"}:
        raise ConfigError(f"the checkpoint decides {', '.join(sorted(clash))}")
    state, info, name = weights.read_state_dict(source)
    file_arch, found, state = weights.convert_official(state, name)
    is_sat = found["query_source"] == "learned"
    if (preset == "sat" and not is_sat) or (preset in ("official", "paper") and is_sat):
        raise CheckpointError(f"{name} holds a {'SAT' if is_sat else 'Pro2SAM'} model, not one of preset {preset!r}")
    if arch not in (None, file_arch):
        raise CheckpointError(f"{name} holds a {file_arch} model, not {arch}")
    if num_classes not in (None, found["num_classes"]):
        raise CheckpointError(f"{name} has {found['num_classes']} classes, not {num_classes}")
    model = GTFormer(**{**PRESETS[preset], **ARCHS[file_arch], **found, **overrides})
    if model.config.query_source == "image":
        slots = [min(slot, 1) for slot in range(len(model.query_embed.weight))]
        for key in ("query_embed.weight", "query_embed.bias"):
            state[key] = state[key][slots]
    model.load_state_dict(state)
    model.checkpoint_info = info
    return model.eval()


def _replace(config: GTFormerConfig, overrides: dict) -> GTFormerConfig:
    if unknown := overrides.keys() - FIELDS:
        raise ConfigError(f"unknown GTFormer option {', '.join(sorted(unknown))}")
    if "depth" in overrides and "gated_blocks" not in overrides:
        overrides = {**overrides, "gated_blocks": None}
    return replace(config, **overrides)
