"""`localize` for one call, `load` for a localizer to keep."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from .errors import ConfigError
from .generator import MaskGenerator
from .io import iter_sources
from .models.gtformer import load_official
from .models.sam import Sam
from .models.sam.build import build_sam, sam_model_registry
from .models.trained import load_trained, read_spec
from .pipelines.matching import match
from .pipelines.pro2sam import Localizer, PhotoNet
from .results import Localization
from .sharding import check_devices, photos_at_a_time, workers

__all__ = ["load", "load_coarse", "load_sam", "localize", "option_names"]


def localize(
    source: Any,
    model: str | os.PathLike | Localizer = "lite",
    device: str = "auto",
    batch_size: int | str = "auto",
    stream: bool = False,
    on_error: str = "raise",
    devices: str | Sequence[str | int] | None = None,
    **options: Any,
) -> list[Localization] | Iterator[Localization]:
    """Find the object in every photo: box, mask, label and score.

    source: path, folder (searched recursively), glob, Pillow image, uint8 RGB array (H, W, 3), tensor (3, H, W), or a
        list or generator that mixes these.
    model: "lite" (bundled), a model folder, or a `Localizer` from `load`.
    device: "auto", "cpu", "cuda", "cuda:1". batch_size: photos a pass or "auto".
    stream: an iterator in constant memory instead of a list.
    on_error: "raise" an ImageReadError at a photo that can't be read, or "skip" it with `Localization.error` set.
    devices: several GPUs, "0,1" or ["cuda:0", "cuda:1"], that share the photos, each with a process of its own that
        loads the model anew: for many photos, and in a script below `if __name__ == "__main__":`. Not with `device`.
    options: those of `load`, not together with a `Localizer`.

    >>> for photo in localize("photos", stream=True):
    ...     print(photo.path, photo.label_name, photo.box)
    """
    if isinstance(model, Localizer):
        given = [*options, *["device"] * (device != "auto"), *["devices"] * (devices is not None)]
        if given:
            raise ConfigError(f"give {', '.join(given)} to load(), not together with a Localizer")
        localizer = model
    elif devices is not None:
        if device != "auto":
            raise ConfigError("give device or devices, not both")
        calls = {"batch_size": batch_size, "on_error": on_error, "stream": stream}
        results = _sharded(source, devices, batch_size, {"name_or_dir": model, **options}, calls)
        return results if stream else list(results)
    elif model == "lite" and not options:
        localizer = _bundled(str(device))
    else:
        localizer = load(model, device=device, **options)
    return localizer(source, batch_size=batch_size, stream=stream, on_error=on_error)


def localizing(model: dict[str, Any], calls: dict[str, Any], device: str) -> tuple[Callable, Any]:
    """For `sharding.workers`: a localizer with these arguments of `load`, called with these, and its class names."""
    localizer = load(**model, device=device)
    return functools.partial(localizer, **calls), localizer.class_names


def _sharded(
    source: Any, devices: str | Sequence[str | int], batch_size: int | str, model: dict[str, Any], calls: dict[str, Any]
) -> Iterator[Localization]:
    names = check_devices(devices)
    size = photos_at_a_time(names, batch_size)

    def results() -> Iterator[Localization]:
        with workers(functools.partial(localizing, model, calls), names, size) as (run, _):
            yield from run(iter_sources(source))

    return results()


def load(
    name_or_dir: str | os.PathLike = "lite",
    *,
    device: str = "auto",
    coarse: Any = None,
    sam: str | nn.Module | None = None,
    sam_checkpoint: str | os.PathLike | None = None,
    classifier: Any = None,
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> Localizer:
    """Load a localizer: a named model, or any pair of coarse localizer and SAM.

    name_or_dir: "lite", or a folder (or file) with lite weights of your own. It gives what isn't named below.
    coarse: a GTFormer or other module, an object with `prepare` and `__call__` (see `Localizer`), or the path of an
        official GTFormer or SAT checkpoint, or of a run of `pro2sam-fast train` or its weights.
    sam: a `Sam`, or "vit_b", "vit_l", "vit_h" with `sam_checkpoint`, or "lite".
    sam_checkpoint: path of the weights for `sam`, or "official" to download them.
    classifier: gives the label, see `Localizer`; "coarse" for the coarse model's own logits. By default the ImageNet
        classifier of "lite", or with another `coarse` its own logits. class_names: the names of the classes.
    options: arguments of `MaskGenerator` (points_per_side, pred_iou_thresh, ...), of `match` (prompt_threshold,
        match_resolution, ...) and of `Localizer` (sam_input, box, candidates, max_pixels, ...) by their names.

    Raises ConfigError for an unknown model or option and CheckpointError for bad weights.

    >>> load("lite")
    >>> load(coarse="gtformer_cub.pth", sam="vit_h", sam_checkpoint="sam_vit_h_4b8939.pth", sam_input=224)
    """
    if not isinstance(name_or_dir, (str, os.PathLike)):
        raise ConfigError(f"the model must be a name, a path or a Localizer, not {type(name_or_dir).__name__}")
    if sam is None and sam_checkpoint is not None:
        raise ConfigError("sam_checkpoint needs sam: 'vit_b', 'vit_l', 'vit_h' or 'lite', the SAM that it is for")
    chosen = _sort_options(options)
    groups: dict[str, dict[str, Any]] = {group: {} for group in chosen}
    own_sam = sam_checkpoint is not None or isinstance(sam, nn.Module) or sam not in (None, "lite")
    if coarse is not None and own_sam and os.fspath(name_or_dir) != "lite":
        raise ConfigError("give a model name or folder, or both coarse and sam, not all three")
    if own_sam:
        sam = _resolve_sam(sam, sam_checkpoint)
    lite = None if coarse is not None and own_sam else _load_lite(name_or_dir)
    if not own_sam:
        sam, groups["generator"] = lite.sam, _sort_options(lite.defaults)["generator"]
    if coarse is None:
        defaults = _sort_options(lite.defaults)
        coarse, groups["matching"], groups["localizer"] = lite.coarse, defaults["matching"], defaults["localizer"]
        if classifier is None:
            classifier = lite.classifier
            class_names = lite.class_names if class_names is None else class_names
        elif isinstance(classifier, str) and classifier == "coarse" and class_names is None:
            class_names = lite.coarse_class_names
    elif isinstance(coarse, (str, os.PathLike)):
        coarse, trained_names = load_coarse(coarse)
        if class_names is None and classifier is None:
            class_names = trained_names
    groups = {group: {**groups[group], **chosen[group]} for group in groups}
    return Localizer(
        coarse,
        sam,
        classifier=None if isinstance(classifier, str) and classifier == "coarse" else classifier,
        class_names=class_names,
        generator=groups["generator"],
        matching=groups["matching"],
        device=device,
        **groups["localizer"],
    )


def load_coarse(path: str | os.PathLike) -> tuple[PhotoNet, Sequence[str] | None]:
    """A coarse stage from an official checkpoint, or from a file or folder of `pro2sam-fast train`; its class names."""
    if os.path.isdir(path) or read_spec(path) is not None:
        model, spec = load_trained(path)
        return PhotoNet(model), spec.class_names
    return PhotoNet(load_official(path)), None


def load_sam(sam: str | None = None, checkpoint: str | os.PathLike | None = None) -> tuple[Sam, dict[str, Any]]:
    """A SAM by name, the bundled one by default, and the options of `MaskGenerator` that suit it."""
    if sam is None and checkpoint is not None:
        raise ConfigError("sam_checkpoint needs sam: 'vit_b', 'vit_l', 'vit_h' or 'lite', the SAM that it is for")
    if checkpoint is None and sam in (None, "lite"):
        lite = _load_lite("lite")
        return lite.sam, _sort_options(lite.defaults)["generator"]
    return _resolve_sam(sam, checkpoint), {}


@functools.lru_cache(maxsize=1)
def _bundled(device: str) -> Localizer:
    """The bundled model, kept for the next call of `localize`."""
    return load("lite", device=device)


def _load_lite(name_or_dir: str | os.PathLike):
    from .models.lite import load_lite

    name = os.fspath(name_or_dir)
    if name == "lite":
        return load_lite()
    if os.path.exists(name):
        return load_lite(name)
    raise ConfigError(f"unknown model '{name}': use 'lite', or the path of a folder or file with lite weights")


def _resolve_sam(sam: str | nn.Module | None, checkpoint: str | os.PathLike | None) -> nn.Module:
    if isinstance(sam, nn.Module):
        if checkpoint is not None:
            raise ConfigError("sam_checkpoint goes with the name of a SAM, not with a model that is already built")
        return sam
    if not isinstance(sam, str) or sam not in sam_model_registry:
        names = ", ".join(f"'{name}'" for name in sam_model_registry if name != "default")
        raise ConfigError(f"unknown SAM {sam!r}: use {names} or a Sam module")
    if checkpoint is None and sam != "lite":
        raise ConfigError(f"sam='{sam}' needs sam_checkpoint: the path of its weights, or 'official' to download them")
    return build_sam(sam, checkpoint=checkpoint)


def _keywords(function: Callable, *leave_out: str) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(function).parameters if name not in leave_out)


def option_names() -> dict[str, tuple[str, ...]]:
    """Names of the options that `load` takes, by what they belong to: generator, matching, localizer."""
    taken = ("self", "coarse", "sam", "classifier", "class_names", "generator", "matching", "device")
    return {
        "generator": _keywords(MaskGenerator.__init__, "self", "sam"),
        "matching": _keywords(match, "gallery", "coarse_map"),
        "localizer": _keywords(Localizer.__init__, *taken),
    }


def _sort_options(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    names = option_names()
    groups: dict[str, dict[str, Any]] = {group: {} for group in names}
    for option, value in options.items():
        group = next((group for group, members in names.items() if option in members), None)
        if group is None:
            known = sorted(name for members in names.values() for name in members)
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"choose from {', '.join(known)}"
            raise ConfigError(f"unknown option '{option}': {hint}")
        groups[group][option] = value
    return groups
