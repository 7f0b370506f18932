"""Which back ends can run here, and the choice among them. Shared by every op; probing waits until it is needed.

The choice is a ladder, CUDA, Triton, reference on a GPU. A GPU back end is compared with the reference on a small case
before its first call of an op on a device (see `Registration`); one that fails, or raises later, is left for the next.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType

import torch

from .. import _native
from ..errors import BackendError, ConfigError
from ..memory import is_out_of_memory

__all__ = [
    "NAMES",
    "REGISTRATIONS",
    "Registration",
    "check_call",
    "check_packed",
    "register",
    "triton_kernels",
    "unavailable",
]

NAMES = ("auto", "reference", "cpu", "cuda", "triton")
PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
CHECKED = ("cuda", "triton")  # before their first call
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


Examples = Mapping[torch.dtype | str, Callable[[torch.device], tuple]]


class Registration:
    """An op's implementations by back end, and the rule that picks one for a call.

    Attributes:
        name: of the op.
        implementations: back end -> function of the op's arguments.
        examples: row of `testing.TOLERANCES` -> function that makes the arguments of a small call on a device.
        limits: back end -> function of the op's arguments: why the back end doesn't take them, or None.
        verdicts: (back end, device) -> why the self-check failed, or None if it passed. Made once a process.
        dropped: (back end, device) -> what it raised when `auto` called it; `auto` leaves it alone from then on.
    """

    def __init__(
        self,
        name: str,
        implementations: Mapping[str, Callable],
        examples: Examples | None = None,
        limits: Mapping[str, Callable] | None = None,
    ):
        self.name = name
        self.implementations = implementations
        self.examples, self.limits = examples or {}, limits or {}
        self.verdicts: dict[tuple[str, torch.device], str | None] = {}
        self.dropped: dict[tuple[str, torch.device], str] = {}
        self.announced: set[str] = set()
        self.lock = threading.RLock()

    def __call__(self, backend: str, *arguments):
        """Calls the back end of that name, or with "auto" the first that can do it.

        What a kernel raises is the caller's if it is a TypeError, a ValueError or a lack of memory, or if a CUDA graph
        is being captured, which may be why; anything else makes `auto` go to the next back end, with a warning.
        """
        device = arguments[0].device
        while True:
            chosen = self.pick(backend, device, arguments)
            try:
                return self.implementations[chosen](*arguments)
            except (TypeError, ValueError):
                raise
            except Exception as error:  # a failed launch or compilation, or whatever else a driver comes up with
                if backend != "auto" or chosen == "reference" or is_out_of_memory(error) or capturing(device):
                    raise
                self.dropped[chosen, device] = f"it failed: {one_line(error)}"

    def pick(self, backend: str, device: str | torch.device, arguments: tuple = ()) -> str:
        """`auto` takes the first that can run and says once if that isn't the first choice; a name works or raises."""
        device = torch.device(device)
        if backend != "auto":
            reason = self.problem(backend, device) or self.limit(backend, arguments)
            if reason is not None:
                raise BackendError(f"{self.name}: back end {backend!r} can't run: {reason}")
            return backend
        preference = [name for name in PREFERENCE.get(device.type, ()) if name in self.implementations]
        for chosen in (*preference, "reference"):
            reason = self.limit(chosen, arguments) or self.dropped.get((chosen, device)) or self.problem(chosen, device)
            if reason is None:
                return chosen
            self.announce(chosen, device.type, reason)
        raise AssertionError("the reference runs everywhere")

    def problem(self, backend: str, device: torch.device) -> str | None:
        """Why `backend` can't do this op on `device`, or None if it can."""
        reason = unavailable(backend, device.type)
        if reason is None and backend not in self.implementations:
            reason = f"the op has no {backend} kernel"
        if reason is None and backend in CHECKED:
            reason = self.first_use(backend, device)
        return reason

    def limit(self, backend: str, arguments: tuple) -> str | None:
        """Why `backend` doesn't take these arguments, or None."""
        return self.limits[backend](*arguments) if arguments and backend in self.limits else None

    def first_use(self, backend: str, device: torch.device) -> str | None:
        """The verdict of the self-check, which a CUDA graph must not record."""
        key = (backend, device)
        if key not in self.verdicts:
            if capturing(device):
                self.warn(
                    f"capturing {backend}",
                    f"{self.name} on {device.type}: the {backend} back end goes unchecked into the CUDA graph that is "
                    "being captured; call the op once before the capture",
                )
                return None
            with self.lock:
                if key not in self.verdicts:
                    self.verdicts[key] = self.self_check(backend, device)
        return self.verdicts[key]

    def self_check(self, backend: str, device: torch.device) -> str | None:
        """Compares `backend` with the reference on the op's examples, on `device`: what is wrong, or None."""
        from ..testing import assert_matches

        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False), full_precision():
                for tolerance, example in self.examples.items():
                    arguments = example(device)
                    if self.limit(backend, arguments):
                        continue
                    expected = self.implementations["reference"](*arguments)
                    assert_matches(self.implementations[backend](*arguments), expected, tolerance)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return f"its self-check failed: {one_line(error)}"
        return None

    def failures(self) -> dict[tuple[str, torch.device], str]:
        """(back end, device) -> why this process doesn't use it any more."""
        return {key: reason for key, reason in {**self.verdicts, **self.dropped}.items() if reason is not None}

    def announce(self, passed_over: str, device_type: str, reason: str) -> None:
        """One warning a process for each back end that `auto` passes over."""
        text = f"{self.name} on {device_type}: the {passed_over} back end can't run ({reason}); a slower one is used"
        self.warn(passed_over, text)

    def warn(self, about: str, text: str) -> None:
        """Once for each `about`."""
        with self.lock:
            if about in self.announced:
                return
            self.announced.add(about)
        warnings.warn(text, RuntimeWarning, stacklevel=3)


REGISTRATIONS: dict[str, Registration] = {}


def capturing(device: torch.device) -> bool:
    """True while a CUDA graph records what is launched on the current stream of `device`."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 matrix products aren't rounded to TF32 or bfloat16 inside the block."""
    products = torch.backends.cuda.matmul
    try:
        before, change, full = torch.get_float32_matmul_precision(), torch.set_float32_matmul_precision, "highest"
    except RuntimeError:  # set with the newer of torch's two interfaces, which don't mix
        before, change, full = products.fp32_precision, functools.partial(setattr, products, "fp32_precision"), "ieee"
    if before != full:
        change(full)
    try:
        yield
    finally:
        if before != full:
            change(before)


def one_line(error: BaseException) -> str:
    """Type and beginning of the message."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def register(
    schema: str,
    check: Callable,
    implementations: Mapping[str, Callable],
    fake: Callable,
    examples: Examples | None = None,
    limits: Mapping[str, Callable] | None = None,
) -> Registration:
    """Define `pro2sam_fast::<schema>` and register its kernels: the reference for every device, faster ones over it.

    Args:
        schema: as for `torch.library.define`; a tensor comes first, and it ends in `*, str backend="auto"`.
        check: raises a TypeError or ValueError unless the op can take these arguments; kernels that see only pointers
            rely on it.
        implementations: back end name -> function of the op's arguments; "reference" is required.
        fake: function of the op's arguments that returns empty outputs.
        examples: what the self-check of a GPU back end compares, see `Registration`: a row of `testing.TOLERANCES` ->
            function of a device that returns the arguments of a small call, always the same, all of whose outputs are
            defined. One for each dtype whose kernels differ.
        limits: back end name -> function of the op's arguments that says why the back end doesn't take them, or None.
    """
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    registration = REGISTRATIONS[name] = Registration(name, implementations, examples, limits)

    def kernel(*arguments, backend="auto"):
        check(*arguments)
        return registration(backend, *arguments)

    def default(*arguments, backend="auto"):
        check(*arguments)
        return registration("reference" if backend == "auto" else backend, *arguments)

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
