"""A localizer whose answers are known: photos are dark with bright rectangles, the largest of which is the object."""

from __future__ import annotations

import functools

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from pro2sam_fast.gallery import MaskGallery
from pro2sam_fast.models.sam.lite import make_sam_lite
from pro2sam_fast.pipelines.pro2sam import Localizer

COLORS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250)}


def painted(height=60, width=90, box=(20, 10, 70, 40), color="red", extra=((2, 50, 12, 58),)):
    """uint8 (height, width, 3): a rectangle `box` (x0, y0, x1, y1, half-open) and small ones of the same colour."""
    photo = np.full((height, width, 3), 12, np.uint8)
    for x0, y0, x1, y1 in (box, *extra):
        photo[y0:y1, x0:x1] = COLORS[color]
    return photo


def mask_of(height, width, box):
    mask = np.zeros((height, width), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


class ColorMap:
    """Coarse stage: the map is the brightest channel at 28 x 28, the class the dominant colour."""

    def prepare(self, rgb):
        small = np.asarray(Image.fromarray(rgb).resize((28, 28), Image.Resampling.BOX), np.float32) / 255
        return torch.from_numpy(small.transpose(2, 0, 1).copy())

    def __call__(self, batch):
        return {"map": batch.amax(dim=1), "logits": 50 * batch.mean(dim=(2, 3))}


class BrightRegions:
    """Instead of a mask generator: the gallery holds every connected bright region."""

    def generate(self, images):
        return [self._gallery(image) for image in images]

    def _gallery(self, image):
        labels, count = ndimage.label(image.max(axis=2) > 128)
        masks = [labels == index for index in range(1, count + 1)]
        masks = np.stack(masks) if masks else np.zeros((0, *image.shape[:2]), bool)
        return MaskGallery.from_dense(torch.from_numpy(masks))


@functools.cache
def tiny_sam():
    """A SAM with random weights and 64-pixel input."""
    torch.manual_seed(0)
    return make_sam_lite(img_size=64)


def toy_localizer(**options):
    options = {"class_names": tuple(COLORS), "device": "cpu", **options}
    localizer = Localizer(ColorMap(), tiny_sam(), **options)
    localizer.generator = BrightRegions()
    return localizer
