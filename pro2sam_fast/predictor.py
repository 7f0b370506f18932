"""Promptable segmentation: encode photos once, then ask for masks as often as wanted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError, Pro2SamError
from .memory import in_chunks, joined
from .models.sam import PromptDecoder, Sam
from .ops import mask_pack, unpack_masks
from .postprocess import upsample_logits
from .transfer import Upload
from .transforms import ResizeLongestSide, check_rgb

__all__ = ["ImageNotSetError", "SamPredictor", "encode_image", "encode_images", "encode_resized", "photos_per_pass"]


class ImageNotSetError(Pro2SamError, RuntimeError):
    """A prediction was asked for before an image was set."""


def photos_per_pass(device: torch.device) -> int:
    """How many photos the image encoder takes at a time: on a CPU one, so that none depends on its neighbours (matrix
    products of another size round differently) and all its memory is for one; elsewhere enough to fill the device."""
    return 1 if device.type == "cpu" else 8


def encode_image(sam: Sam, image: np.ndarray, transform: ResizeLongestSide) -> tuple[Tensor, tuple[int, int]]:
    """RGB uint8 (H, W, 3) -> embedding (1, D, e, e) and the (h, w) of the resized photo in the input frame."""
    embeddings, (size,) = encode_images(sam, [image], transform)
    return embeddings, size


@torch.no_grad()
def encode_images(
    sam: Sam, images: Sequence[np.ndarray], transform: ResizeLongestSide
) -> tuple[Tensor, list[tuple[int, int]]]:
    """One or more photos RGB uint8 (H, W, 3) of any sizes -> embeddings (B, D, e, e) and the (h, w) of each in the
    input frame, `photos_per_pass` at a time."""
    resized = [transform.apply_image(image) for image in images]
    embeddings = encode_resized(sam, [Upload(torch.from_numpy(image), sam.device) for image in resized])
    return embeddings, [tuple(image.shape[:2]) for image in resized]


@torch.no_grad()
def encode_resized(sam: Sam, photos: Sequence[Upload]) -> Tensor:
    """Photos RGB uint8 (h, w, 3), resized to the input frame -> embeddings (B, D, e, e), `photos_per_pass` at a time.

    Resizing is exact on the host only; normalising and padding are left to the device.
    """

    def encode(start: int, stop: int) -> Tensor:
        pixels = [photo.result().permute(2, 0, 1) for photo in photos[start:stop]]
        return sam.image_encoder(joined([sam.preprocess(x).unsqueeze(0) for x in pixels]))

    return joined(in_chunks(encode, len(photos), photos_per_pass(sam.device)))


class SamPredictor:
    """Masks for point, box and mask prompts on one photo or a list of photos.

    Signatures and returns are those of `segment_anything.SamPredictor`; :meth:`set_images` and the argument
    ``image_index`` are added. On a CPU photos are encoded one by one, so that an embedding does not depend on its
    neighbours; a GPU takes several at a time, whose products may round as those of another number do.

    Args:
        sam_model: put in evaluation mode.
    """

    def __init__(self, sam_model: Sam) -> None:
        self.model = sam_model.eval()
        self.transform = ResizeLongestSide(sam_model.image_encoder.img_size)
        self._decoder = PromptDecoder(sam_model)
        self.reset_image()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def reset_image(self) -> None:
        """Forgets the photos."""
        self._decoder.forget()
        self.features: Tensor | None = None
        self.original_sizes: list[tuple[int, int]] = []
        self.input_sizes: list[tuple[int, int]] = []

    @property
    def is_image_set(self) -> bool:
        return self.features is not None

    @property
    def original_size(self) -> tuple[int, int]:
        """(H, W) of the first photo."""
        self._require_image()
        return self.original_sizes[0]

    @property
    def input_size(self) -> tuple[int, int]:
        """(h, w) of the first photo in the input frame."""
        self._require_image()
        return self.input_sizes[0]

    def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
        """Encodes a photo: uint8 (H, W, 3), channels in the order ``image_format``, ``"RGB"`` or ``"BGR"``.

        Raises:
            ImageReadError: not such an array.
            ConfigError: another ``image_format``.
        """
        self.set_images([image], image_format)

    def set_images(self, images: Sequence[np.ndarray], image_format: str = "RGB") -> None:
        """Encodes several photos of any sizes; :meth:`predict` then takes their ``image_index``."""
        if image_format not in ("RGB", "BGR"):
            raise ConfigError(f"image_format must be RGB or BGR, got {image_format!r}.")
        if isinstance(images, np.ndarray) or len(images) == 0:
            raise ConfigError("images must be a list of one or more arrays; use set_image for a single one.")
        for i, image in enumerate(images):
            check_rgb(image, "image" if len(images) == 1 else f"images[{i}]")
        if image_format != self.model.image_format:
            images = [image[..., ::-1] for image in images]
        self.reset_image()
        features, self.input_sizes = encode_images(self.model, images, self.transform)
        self.original_sizes = [tuple(image.shape[:2]) for image in images]
        self.features = features

    @torch.no_grad()
    def set_torch_image(self, transformed_image: Tensor, original_image_size: tuple[int, int]) -> None:
        """Encodes a photo that is already in the input frame.

        Args:
            transformed_image: RGB (B, 3, h, w) with values 0..255 and the long side S.
            original_image_size: (H, W) before the transform, the same for all B.
        """
        size = self.model.image_encoder.img_size
        shape = tuple(transformed_image.shape)
        if len(shape) != 4 or shape[0] == 0 or shape[1] != 3 or max(shape[2:]) != size:
            raise ConfigError(f"transformed_image must have shape (B, 3, h, w) with long side {size}, got {shape}.")
        self.reset_image()
        x = self.model.preprocess(transformed_image)
        features = torch.cat([self.model.image_encoder(part) for part in x.split(photos_per_pass(x.device))])
        self.original_sizes = [tuple(original_image_size)] * shape[0]
        self.input_sizes = [shape[2:]] * shape[0]
        self.features = features

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        image_index: int = 0,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks for one prompt, which may combine points, a box and a mask.

        Args:
            point_coords: (N, 2) points (x, y) in pixels of the photo.
            point_labels: (N,), 1 foreground, 0 background.
            box: (4,) XYXY in pixels of the photo.
            mask_input: (1, 4e, 4e) low-resolution logits of an earlier prediction.
            multimask_output: three masks for an ambiguous prompt instead of one.
            return_logits: logits instead of bool masks.
            image_index: which photo of :meth:`set_images`.

        Returns:
            Masks (C, H, W) bool or float32 logits, predicted IoU float32 (C,), low-resolution logits (C, 4e, 4e).

        Raises:
            ImageNotSetError: no photo was set.
            ConfigError: a prompt has a wrong shape or value.
        """
        index = self._index(image_index)
        size = self.original_sizes[index]
        coords = labels = boxes = masks = None
        if point_coords is not None:
            if point_labels is None:
                raise ConfigError("point_labels must be given with point_coords.")
            point_coords = _numbers("point_coords", point_coords, (None, 2))
            point_labels = _numbers("point_labels", point_labels, (len(point_coords),))
            coords = self._tensor(self.transform.apply_coords(point_coords, size))[None]
            labels = self._tensor(point_labels).to(torch.int32)[None]
        elif point_labels is not None:
            raise ConfigError("point_coords must be given with point_labels.")
        if box is not None:
            box = _numbers("box", np.asarray(box).reshape(-1), (4,))
            boxes = self._tensor(self.transform.apply_boxes(box, size))
        if mask_input is not None:
            size = self.model.prompt_encoder.mask_input_size
            masks = self._tensor(_numbers("mask_input", mask_input, (1, *size)))[None]
        outputs = self.predict_torch(coords, labels, boxes, masks, multimask_output, return_logits, index)
        return tuple(x[0].cpu().numpy() for x in outputs)

    @torch.no_grad()
    def predict_torch(
        self,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        image_index: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Masks for B prompts whose coordinates are already in the input frame (see ``transform``).

        Args:
            point_coords: (B, N, 2). point_labels: (B, N). boxes: (B, 4). mask_input: (B, 1, 4e, 4e).
            multimask_output, return_logits, image_index: as in :meth:`predict`.

        Returns:
            Masks (B, C, H, W) bool or float32 logits, predicted IoU (B, C), low-resolution logits (B, C, 4e, 4e).
        """
        index = self._index(image_index)
        model = self.model
        points = None if point_coords is None else (point_coords, point_labels)
        low_res, iou = self._decoder(self.features, index, points, boxes, mask_input, multimask_output)
        logits = low_res.flatten(0, 1).float()
        frame = model.image_encoder.img_size, self.input_sizes[index], self.original_sizes[index]
        if return_logits:
            masks = upsample_logits(logits, *frame)
        else:
            masks = unpack_masks(mask_pack(logits, *frame, model.mask_threshold), frame[-1][1])
        return masks.unflatten(0, low_res.shape[:2]), iou, low_res

    def get_image_embedding(self, image_index: int = 0) -> Tensor:
        """Embedding (1, D, e, e) of a photo that was set."""
        index = self._index(image_index)
        return self.features[index : index + 1]

    def _require_image(self) -> None:
        if self.features is None:
            raise ImageNotSetError("An image must be set with .set_image(...) before mask prediction.")

    def _index(self, image_index: int) -> int:
        self._require_image()
        if not 0 <= image_index < len(self.original_sizes):
            raise ConfigError(f"image_index must be 0 to {len(self.original_sizes) - 1}, got {image_index}.")
        return image_index

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)


def _numbers(name: str, array: np.ndarray, shape: tuple[int | None, ...]) -> np.ndarray:
    array = np.asarray(array)
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    if not fits:
        wanted = "(" + ", ".join("N" if n is None else str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"
        raise ConfigError(f"{name} must have shape {wanted}, got {array.shape}.")
    if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
        raise ConfigError(f"{name} must hold finite numbers.")
    return array
