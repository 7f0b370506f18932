"""SAM-lite: the standard prompt encoder and mask decoder behind a small convolutional image encoder."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import gated_attention
from ..cpu import apply_linear
from ..trunk import FEATURE_CHANNELS, PIXEL_MEAN, PIXEL_STD, EfficientNetLite0
from .layers import LayerNorm2d, MLPBlock
from .mask_decoder import MaskDecoder
from .prompt_encoder import PromptEncoder
from .sam import Sam
from .transformer import Attention, TwoWayTransformer

IMAGE_SIZE = 512
SAM_TRUNK = "image_encoder.trunk."  # of the trunk's names in a SAM-lite
_STRIDE = 16


class _Lateral(nn.Module):
    """One level of the pyramid to the embedding's grid: (B, C, r*e, r*e) -> (B, D, e, e)."""

    def __init__(self, channels: int, ratio: int, dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if ratio > 1 else None
        self.unshuffle = nn.PixelUnshuffle(ratio)
        self.proj = nn.Conv2d(channels * ratio**2, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.conv is not None:
            x = x + F.gelu(self.conv(x))
        return self.proj(self.unshuffle(x))


class _GlobalBlock(nn.Module):
    """Depthwise 3x3 position encoding, global self attention, MLP; pre-norm on (B, D, h, w)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLPBlock(dim, dim * mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position(x)
        size = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        x = x + self._attend(self.norm1(x))
        x = x + apply_linear(self.mlp.lin2, apply_linear(self.mlp.lin1, self.norm2(x), self.mlp.act))
        return x.transpose(1, 2).unflatten(2, size)

    def _attend(self, x: Tensor) -> Tensor:
        attn = self.attn
        q, k, v = (apply_linear(layer, x) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
        return apply_linear(attn.out_proj, gated_attention(q, k, v, attn.num_heads, 0, gate=False)[0])


class LiteImageEncoder(nn.Module):
    """EfficientNet-Lite0 pyramid to one stride-16 embedding: (B, 3, S, S) -> (B, out_chans, S/16, S/16).

    Strides 4 and 8 enter by space-to-depth, so that an embedding pixel knows the edges inside its 16 x 16 patch;
    stride 32 enters by bilinear upsampling; two global-attention blocks let the object's parts find each other.
    """

    # Its features round badly: in bfloat16 a box in eight moves by more than two pixels, with the decoder alone none.
    reduced_precision = False

    def __init__(
        self,
        trunk: EfficientNetLite0 | None = None,
        img_size: int = IMAGE_SIZE,
        out_chans: int = 256,
        depth: int = 2,
        num_heads: int = 8,
        mlp_ratio: int = 2,
    ) -> None:
        super().__init__()
        self.img_size = img_size
        self.trunk = trunk if trunk is not None else EfficientNetLite0()
        self.laterals = nn.ModuleList(
            _Lateral(c, r, out_chans) for c, r in zip(FEATURE_CHANNELS, (4, 2, 1, 1), strict=True)
        )
        self.blocks = nn.ModuleList(_GlobalBlock(out_chans, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = LayerNorm2d(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(self.trunk.features(x))

    def embed(self, features: list[Tensor]) -> Tensor:
        """The part behind the trunk: maps at strides 4, 8, 16, 32 -> embedding."""
        levels = [lateral(f) for lateral, f in zip(self.laterals, features, strict=True)]
        levels[3] = F.interpolate(levels[3], size=levels[2].shape[-2:], mode="bilinear", align_corners=False)
        x = levels[0] + levels[1] + levels[2] + levels[3]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def make_sam_lite(trunk: EfficientNetLite0 | None = None, img_size: int = IMAGE_SIZE) -> Sam:
    """The architecture with random weights (a given trunk is shared, not copied)."""
    grid = img_size // _STRIDE
    return Sam(
        image_encoder=LiteImageEncoder(trunk, img_size),
        prompt_encoder=PromptEncoder(
            embed_dim=256,
            image_embedding_size=(grid, grid),
            input_image_size=(img_size, img_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
            transformer_dim=256,
        ),
        pixel_mean=PIXEL_MEAN,
        pixel_std=PIXEL_STD,
        name="lite",
    ).eval()


def build_sam_lite(checkpoint: str | None = None) -> Sam:
    """SAM-lite with the bundled weights, or those of a `lite` safetensors file."""
    from ..lite import load_sam_lite

    return load_sam_lite(checkpoint)
