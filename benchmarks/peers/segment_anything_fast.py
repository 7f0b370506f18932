"""The `segment_anything_fast` package over our weights: SAM compiled, in bfloat16, with its own attention kernel."""

from __future__ import annotations

import importlib.util
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from case import Skip
from workloads import shared

__all__ = ["generator"]


def generator(name: str, device: torch.device, **options):
    """A SamAutomaticMaskGenerator with the weights of `shared.sam(name)`, or why there is none."""
    if (problem := _problem(name, device)) is not None:
        return Skip(problem)
    import segment_anything_fast as package

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "sam.pth")
        torch.save(shared.sam(name, device).state_dict(), checkpoint)
        sam = package.sam_model_fast_registry[name](checkpoint=checkpoint)
    return package.SamAutomaticMaskGenerator(sam.to(device), process_batch_size=1, **options)


def _problem(name: str, device: torch.device) -> str | None:
    if importlib.util.find_spec("segment_anything_fast") is None:
        try:
            found = version("segment-anything-fast")
        except PackageNotFoundError:
            return "the package segment_anything_fast isn't installed"
        return (
            f"the registry's segment-anything-fast {found} is FastSAM (module fastsam, a YOLO network of its own) and "
            "has no module segment_anything_fast, so it can't run SAM's weights"
        )
    if not name.startswith("vit_"):
        return f"it has no image encoder for {name}"
    if device.type != "cuda":
        return "its attention kernel runs on a GPU only"
    return None
