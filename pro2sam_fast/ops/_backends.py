"""Which back ends can run here, and the choice among them. Shared by every op; probing waits until it is needed."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType

import torch

from .. import _native
from ..errors import BackendError, ConfigError

__all__ = ["NAMES", "Registration", "check_call", "check_packed", "register", "triton_kernels", "unavailable"]

NAMES = ("auto", "reference", "cpu", "cuda", "triton")
PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
MIN_CAPABILITY = (8, 0)

library = torch.library.Library("pro2sam_fast", "DEF")


def interpreting() -> bool:
    """True if Triton kernels run in Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(backend: str, device_type: str) -> str | None:
    """Why `backend` can't take tensors on `device_type`, or None if it can."""
    if backend in ("auto", "reference"):
        return None
    if backend == "triton" and interpreting():
        wanted = "cpu"
    else:
        wanted = "cpu" if backend == "cpu" else "cuda"
    if device_type != wanted:
        hint = " (TRITON_INTERPRET=1 runs Triton kernels on the CPU)" if backend == "triton" else ""
        return f"the {backend} back end takes {wanted} tensors, not {device_type} tensors{hint}"
    return {"cpu": cpu_problem, "cuda": cuda_problem, "triton": triton_problem}[backend]()


def cpu_problem() -> str | None:
    """Why `_cpu` can't run, or None if it can."""
    return _native._cpu.reason if isinstance(_native._cpu, _native.MissingModule) else None


@functools.cache
def cuda_problem() -> str | None:
    """Why `_cuda` can't run, or None if it can."""
    if isinstance(_native._cuda, _native.MissingModule):
        return _native._cuda.reason
    info = _native._cuda.device_info()
    if info["driver_version"] == 0:
        return "no NVIDIA driver is installed"
    if info["device_count"] == 0:
        return f"no CUDA device: {info['error'] or 'the driver reports none'}"
    return gpu_problem()


@functools.cache
def triton_problem() -> str | None:
    """Why the Triton kernels can't run, or None if they can."""
    return triton_missing() or (None if interpreting() else gpu_problem())


def triton_missing() -> str | None:
    """Which part of the Triton back end isn't installed or doesn't load, or None."""
    for module in ("triton.language", f"{__package__.rpartition('.')[0]}.kernels"):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            return f"the package {error.name} isn't installed here"
        except Exception as error:  # whatever its native library or driver search raises
            return f"{module} doesn't load: {error}"
    return None


def gpu_problem() -> str | None:
    """Why torch can't use a GPU that the kernels are built for, or None if it can."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device" if torch.version.cuda else "this torch is built without CUDA"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}; 8.0 or newer is needed"
    return None


def triton_kernels(stem: str) -> ModuleType:
    """The module of `stem`'s Triton kernels."""
    return importlib.import_module(f"..kernels.{stem}", __package__)


def check_call(op: str, backend: str, **tensors: torch.Tensor) -> None:
    """What the dispatcher would word badly: raises ConfigError for an unknown back end, TypeError for a non-tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if backend not in NAMES:
        raise ConfigError(f"backend must be one of {', '.join(NAMES)}, not {backend!r}")


class Registration:
    """An op's implementations by back end, and the rule that picks one for a call."""

    def __init__(self, name: str, implementations: Mapping[str, Callable]):
        self.name = name
        self.implementations = implementations
        self.announced: set[str] = set()

    def pick(self, backend: str, device_type: str) -> Callable:
        """`auto` takes the first that can run and says once if that isn't the first choice; a name works or raises."""
        if backend != "auto":
            reason = unavailable(backend, device_type)
            if reason is None and backend not in self.implementations:
                reason = f"the op has no {backend} kernel"
            if reason is not None:
                raise BackendError(f"{self.name}: back end {backend!r} can't run: {reason}")
            return self.implementations[backend]
        preference = [name for name in PREFERENCE.get(device_type, ()) if name in self.implementations]
        for chosen in (*preference, "reference"):
            reason = unavailable(chosen, device_type)
            if reason is None:
                return self.implementations[chosen]
            self.announce(chosen, device_type, reason)
        raise AssertionError("the reference runs everywhere")

    def announce(self, passed_over: str, device_type: str, reason: str) -> None:
        """One warning a process for each back end that `auto` passes over."""
        if passed_over in self.announced:
            return
        self.announced.add(passed_over)
        warnings.warn(
            f"{self.name} on {device_type}: the {passed_over} back end can't run ({reason}); a slower one is used",
            RuntimeWarning,
            stacklevel=2,
        )


def register(schema: str, check: Callable, implementations: Mapping[str, Callable], fake: Callable) -> Registration:
    """Define `pro2sam_fast::<schema>` and register its kernels: the reference for every device, faster ones over it.

    Args:
        schema: as for `torch.library.define`; a tensor comes first, and it ends in `*, str backend="auto"`.
        check: raises a TypeError or ValueError unless the op can take these arguments; kernels that see only pointers
            rely on it.
        implementations: back end name -> function of the op's arguments; "reference" is required.
        fake: function of the op's arguments that returns empty outputs.
    """
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    registration = Registration(name, implementations)

    def kernel(*arguments, backend="auto"):
        check(*arguments)
        return registration.pick(backend, arguments[0].device.type)(*arguments)

    def default(*arguments, backend="auto"):
        check(*arguments)
        return registration.pick("reference" if backend == "auto" else backend, arguments[0].device.type)(*arguments)

    def checked_fake(*arguments, backend="auto"):
        check(*arguments)
        return fake(*arguments)

    library.impl(name, default, "CompositeExplicitAutograd")
    for device_type, backends in PREFERENCE.items():
        if any(backend in implementations for backend in backends):
            library.impl(name, kernel, device_type.upper())
    torch.library.register_fake(f"pro2sam_fast::{name}", checked_fake, lib=library)
    return registration


def check_packed(op: str, **tensors: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless all are dense int64 tensors on one device."""
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int64:
            raise TypeError(f"{op}: {name} must be int64 (packed masks), got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be dense, got {tensor.layout}")
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: all inputs must be on one device, got {name} on {tensor.device}, not {first.device}"
            )
