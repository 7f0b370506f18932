"""Class-free masks from SAM, matched to a coarse localisation map: box, mask and label of the object in a photo.

The public names below are loaded on first use (PEP 562), so `import pro2sam_fast` doesn't import torch.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "BackendError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "GTFormer": "models.gtformer",
    "ImageReadError": "errors",
    "Localization": "results",
    "Localizer": "pipelines.pro2sam",
    "MaskGallery": "gallery",
    "MaskGenerator": "generator",
    "Pro2SamError": "errors",
    "SamPredictor": "predictor",
    "_cpu": "_native",
    "_cuda": "_native",
    "backends": "backends",
    "build_gtformer": "models.gtformer",
    "build_sam": "models.sam.build",
    "load": "api",
    "load_official": "models.gtformer",
    "localize": "api",
    "match": "pipelines.matching",
    "read_image": "io",
    "to_segment_anything": "models.sam.build",
}

__all__ = ["__version__", *sorted(name for name in _PUBLIC if not name.startswith("_"))]


def __getattr__(name: str):
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_PUBLIC})
