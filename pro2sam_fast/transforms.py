"""From a photo to the input frame of SAM's image encoder: long side resized to S, coordinates scaled alike."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .errors import ImageReadError

__all__ = ["ResizeLongestSide", "check_rgb"]


def check_rgb(image: np.ndarray, name: str = "image") -> np.ndarray:
    """The image itself if it is an (H, W, 3) uint8 array with H, W >= 1.

    Raises:
        ImageReadError: for any other type, rank, channel count or dtype; `path` is ``name``.
    """
    wanted = f"{name} must be an RGB array of shape (H, W, 3) and dtype uint8"
    if not isinstance(image, np.ndarray):
        raise ImageReadError(f"{wanted}, got {type(image).__name__}.", name)
    if image.dtype != np.uint8:
        found = f"dtype {image.dtype}"
        if image.dtype.kind == "f" and np.isnan(image).any():
            found += " with NaN"
        elif image.dtype.kind in "iuf" and image.size and (image.min() < 0 or image.max() > 255):
            found += f" with values {image.min():g} to {image.max():g}"
        raise ImageReadError(f"{wanted}, got {found}.", name)
    if image.ndim != 3 or image.shape[2] != 3:
        raise ImageReadError(f"{wanted}, got shape {image.shape}.", name)
    if 0 in image.shape:
        raise ImageReadError(f"{wanted}, got an empty one of shape {image.shape}.", name)
    return image


class ResizeLongestSide:
    """Scales images, points and boxes so that the long side becomes ``target_length`` pixels.

    Same arithmetic as the transform of the `segment_anything` package, with two differences: a side never becomes
    shorter than one pixel (1 x 4000 photos work), and :meth:`apply_image_torch` reads the size from the last two axes.
    """

    def __init__(self, target_length: int) -> None:
        self.target_length = target_length

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (h, w, 3) uint8, Pillow's antialiased 8-bit bilinear filter."""
        h, w = self.get_preprocess_shape(image.shape[0], image.shape[1], self.target_length)
        return np.array(Image.fromarray(np.ascontiguousarray(image)).resize((w, h), Image.Resampling.BILINEAR))

    def apply_coords(self, coords: np.ndarray, original_size: tuple[int, int]) -> np.ndarray:
        """(..., 2) points (x, y) in pixels of the (H, W) image -> float64 in pixels of the input frame."""
        return np.asarray(coords).astype(np.float64) * self._scale(original_size)

    def apply_boxes(self, boxes: np.ndarray, original_size: tuple[int, int]) -> np.ndarray:
        """(B, 4) or (4,) XYXY boxes -> float64 (B, 4) in pixels of the input frame."""
        return self.apply_coords(np.asarray(boxes).reshape(-1, 2, 2), original_size).reshape(-1, 4)

    def apply_image_torch(self, image: Tensor) -> Tensor:
        """(B, C, H, W) float -> (B, C, h, w); antialiased in floating point, not bit-equal to :meth:`apply_image`."""
        size = self.get_preprocess_shape(image.shape[-2], image.shape[-1], self.target_length)
        return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)

    def apply_coords_torch(self, coords: Tensor, original_size: tuple[int, int]) -> Tensor:
        """(..., 2) points -> float32 in pixels of the input frame."""
        scale_x, scale_y = self._scale(original_size)
        coords = coords.to(torch.float32)
        return torch.stack([coords[..., 0] * scale_x, coords[..., 1] * scale_y], dim=-1)

    def apply_boxes_torch(self, boxes: Tensor, original_size: tuple[int, int]) -> Tensor:
        """(B, 4) XYXY boxes -> float32 (B, 4) in pixels of the input frame."""
        return self.apply_coords_torch(boxes.reshape(-1, 2, 2), original_size).reshape(-1, 4)

    def _scale(self, original_size: tuple[int, int]) -> tuple[float, float]:
        old_h, old_w = original_size
        new_h, new_w = self.get_preprocess_shape(old_h, old_w, self.target_length)
        return new_w / old_w, new_h / old_h

    @staticmethod
    def get_preprocess_shape(oldh: int, oldw: int, long_side_length: int) -> tuple[int, int]:
        """(H, W) of the resized image, each side rounded half up and at least 1."""
        scale = long_side_length * 1.0 / max(oldh, oldw)
        return max(1, int(oldh * scale + 0.5)), max(1, int(oldw * scale + 0.5))
