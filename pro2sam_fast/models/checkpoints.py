"""One way to read weights: `.pth`/`.pt` without running code from the file, and `.safetensors`."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

__all__ = ["load_into", "load_state_dict"]

# Names under which training programs store the weights next to optimizer, epoch, ...
_NESTED = ("state_dict", "model", "model_state_dict")
_SHOWN = 3


def load_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Reads a checkpoint into CPU memory.

    `.safetensors` files are read as such, everything else with ``torch.load(weights_only=True)``, which builds tensors
    and plain containers (and the `argparse.Namespace` that many training programs add) and refuses all other code.
    A file that keeps its weights under ``state_dict``, ``model`` or ``model_state_dict`` is unwrapped.

    Args:
        path: a local file.

    Returns:
        Parameter name -> tensor.

    Raises:
        CheckpointError: the file is missing, unreadable, corrupt, unsafe or holds something else than named tensors.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"Checkpoint {path} does not exist; check the path.")
    if not path.is_file():
        raise CheckpointError(f"Checkpoint {path} is not a file; give the .pth, .pt or .safetensors file itself.")
    try:
        loaded = read_file(path)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise CheckpointError(
                f"Checkpoint {path} contains more than tensors and loading it could run code, so it was refused; "
                "save its state dict alone, best as .safetensors."
            ) from error
        raise CheckpointError(
            f"Checkpoint {path} is corrupt or no checkpoint that can be loaded safely; download or copy it again."
        ) from error
    except OSError as error:
        raise CheckpointError(f"Checkpoint {path} can't be read: {error.strerror or error}.") from error
    except Exception as error:
        # torch and safetensors report damaged files through a dozen types (RuntimeError, EOFError, KeyError, ...)
        raise CheckpointError(
            f"Checkpoint {path} is corrupt or not a checkpoint; download or copy it again."
        ) from error
    return _named_tensors(loaded, path)


def read_file(path: str | os.PathLike) -> object:
    """Content of a weights file on the CPU, raising whatever its reader raises. No code of the file runs.

    Training programs store their options next to the weights, so `argparse.Namespace` passes.
    """
    path = Path(path)
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path, device="cpu")
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _named_tensors(loaded: object, path: Path) -> dict[str, Tensor]:
    for _ in range(2):
        if isinstance(loaded, Mapping) and not _is_state_dict(loaded):
            loaded = next((loaded[name] for name in _NESTED if isinstance(loaded.get(name), Mapping)), loaded)
    if not isinstance(loaded, Mapping) or not _is_state_dict(loaded):
        raise CheckpointError(f"Checkpoint {path} holds no state dict (names with tensors); give another file.")
    return dict(loaded)


def _is_state_dict(mapping: Mapping) -> bool:
    return len(mapping) > 0 and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in mapping.items())


def load_into(module: nn.Module, state_dict: Mapping[str, Tensor], source: str | os.PathLike) -> None:
    """Loads a state dict strictly: all names and shapes must be those of the module.

    Args:
        module: receives the values, cast to the types of its own parameters.
        state_dict: parameter name -> tensor.
        source: where the weights came from, for the message.

    Raises:
        CheckpointError: names or shapes differ (the message lists the first few), or values aren't finite. The module
            is then unchanged.
    """
    for name, value in state_dict.items():
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise CheckpointError(f"Checkpoint {source} is unusable: {name} isn't a dense tensor; convert it.")
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"Checkpoint {source} holds NaN or infinite values in {name}; use other weights.")
    own = module.state_dict()
    differences = [
        ("missing", [name for name in own if name not in state_dict]),
        ("unexpected", [name for name in state_dict if name not in own]),
        (
            "of another shape",
            [
                f"{name} {tuple(state_dict[name].shape)} instead of {tuple(value.shape)}"
                for name, value in own.items()
                if name in state_dict and state_dict[name].shape != value.shape
            ],
        ),
    ]
    found = [f"{len(names)} {kind} ({_first(names)})" for kind, names in differences if names]
    if found:
        kind = getattr(module, "name", None) or type(module).__name__
        raise CheckpointError(
            f"Checkpoint {source} does not fit the model {kind}: {'; '.join(found)}; use weights made for this model."
        )
    module.load_state_dict(state_dict, strict=True)


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
