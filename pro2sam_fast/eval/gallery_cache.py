"""Mask galleries on disk, so that studies of maps, thresholds and matching don't segment a photo twice."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..gallery import MaskGallery
from ..generator import MaskGenerator
from ..io import write_atomic

__all__ = ["GalleryCache", "fingerprint"]

_NAMES = tuple(field.name for field in fields(MaskGallery))[1:]


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers, names and shapes included."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class GalleryCache:
    """Galleries of a generator, found again by the content of the photo.

    A file's name is the hash of the photo's pixels, of the SAM's weights and of the generator's options, so that
    nothing stale is ever found; a file that can't be read is made again.

    Args:
        generator: makes galleries that aren't there.
        folder: of the files, bit-packed masks compressed; None keeps nothing.
        options: the generator's, as they were given to it.
    """

    def __init__(
        self, generator: MaskGenerator, folder: str | Path | None, options: Mapping[str, Any] | None = None
    ) -> None:
        self.generator, self.folder = generator, None if folder is None else Path(folder)
        self.made = self.found = 0
        described = json.dumps(dict(options or {}), sort_keys=True, default=str)
        self._prefix = hashlib.sha256(f"{fingerprint(generator.sam)} {described}".encode()).digest()

    def generate(self, images: Sequence[np.ndarray]) -> list[MaskGallery]:
        """As `MaskGenerator.generate`; the galleries are on the CPU."""
        return [self._one(image) for image in images]

    def _one(self, image: np.ndarray) -> MaskGallery:
        if self.folder is None:
            self.made += 1
            return self.generator.generate([image])[0].to("cpu")
        pixels = np.ascontiguousarray(image)
        key = hashlib.sha256(self._prefix + repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        path = self.folder / key[:2] / f"{key}.npz"
        if (gallery := _read(path)) is not None:
            self.found += 1
            return gallery
        gallery = self.generator.generate([image])[0].to("cpu")
        self.made += 1
        content = io.BytesIO()
        np.savez_compressed(content, size=gallery.size, **{n: getattr(gallery, n).numpy() for n in _NAMES})
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content.getvalue())
        return gallery


def _read(path: Path) -> MaskGallery | None:
    try:
        with np.load(path) as arrays:
            size = tuple(int(n) for n in arrays["size"])
            return MaskGallery(size, *(torch.from_numpy(arrays[name]) for name in _NAMES))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
