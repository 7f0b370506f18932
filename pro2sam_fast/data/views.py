"""What a localizer sees of a photo: square views, aspect ignored, Pillow's bilinear resize, ImageNet normalisation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ConfigError
from ..models.lite import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["TestView", "TrainView", "normalised", "ten_crops"]


def normalised(image: Image.Image) -> Tensor:
    """RGB Pillow image -> float32 (3, h, w), scaled to [0, 1], minus mean, divided by standard deviation."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (x - torch.tensor(IMAGENET_MEAN).reshape(3, 1, 1)) / torch.tensor(IMAGENET_STD).reshape(3, 1, 1)


@dataclass(frozen=True)
class TestView:
    """The photo at resize x resize, of which the central crop x crop is taken: the view of evaluation.

    256/224 is the protocol of SAT and of GTFormer's Table 1, 224/224 that of Pro2SAM's matching and of wsolevaluation.
    """

    __test__ = False

    resize: int = 256
    crop: int = 224

    def __post_init__(self) -> None:
        if not 0 < self.crop <= self.resize:
            raise ConfigError(f"a view needs 0 < crop <= resize, got {self.crop} and {self.resize}")

    def __call__(self, image: Image.Image) -> Tensor:
        return normalised(self.window(image))

    def window(self, image: Image.Image) -> Image.Image:
        """The view as an image."""
        offset = (self.resize - self.crop) // 2
        return _cropped(_squeezed(image, self.resize), offset, offset, self.crop)


@dataclass(frozen=True)
class TrainView:
    """The photo at resize x resize, a random crop x crop of it, flipped in half of the cases: nothing else."""

    resize: int = 256
    crop: int = 224

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        x, y = rng.integers(0, self.resize - self.crop + 1, 2).tolist()
        flip = rng.random() < 0.5
        image = _cropped(_squeezed(image, self.resize), x, y, self.crop)
        return normalised(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)


def ten_crops(image: Image.Image, resize: int = 256, crop: int = 224) -> Tensor:
    """Corners and centre of the photo at resize x resize, then the five flipped: (10, 3, crop, crop).

    With resize = crop only two of them differ, which is what Pro2SAM's evaluator of CUB does.

    Only the class is decided on them, by the mean of the ten softmaxes; maps and boxes come from the central view.
    """
    image = _squeezed(image, resize)
    end, middle = resize - crop, (resize - crop) // 2
    places = [(0, 0), (end, 0), (0, end), (end, end), (middle, middle)]
    five = torch.stack([normalised(_cropped(image, x, y, crop)) for x, y in places])
    return torch.cat([five, five.flip(-1)])


def _squeezed(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.BILINEAR)


def _cropped(image: Image.Image, x: int, y: int, side: int) -> Image.Image:
    return image.crop((x, y, x + side, y + side))
