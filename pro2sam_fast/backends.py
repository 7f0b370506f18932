"""What can compute here and what can't, and why: `backends["cuda"]` for programs, `report()` for people.

This module is a mapping from names to states, each probed when it is asked for, and a function that returns them all:
`pro2sam_fast.backends["cpu"]`, `list(pro2sam_fast.backends)`, `pro2sam_fast.backends()["cpu"]`.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType, ModuleType

from . import __version__

__all__ = ["BackendState", "backends", "report"]


@dataclass(frozen=True)
class BackendState:
    """State of one back end.

    Attributes:
        name: "reference", "cpu", "cuda" or "triton".
        loaded: its code is installed and loads.
        available: it can run on this machine now.
        reason: one sentence; why it isn't available, or what it runs on.
        details: facts by name, for instance `isa` and `isa_available` of "cpu".
    """

    name: str
    loaded: bool
    available: bool
    reason: str
    details: Mapping[str, object] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """One word: "ready", "loaded" (installed, but this machine can't run it) or "missing"."""
        return "ready" if self.available else "loaded" if self.loaded else "missing"

    def __bool__(self) -> bool:
        return self.available

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}"


def report() -> str:
    """The text of `python -m pro2sam_fast`: versions, back ends with their reasons, the CPU instruction set."""
    import torch

    lines = [
        f"pro2sam-fast {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"  torch {torch.__version__}, "
        + ", ".join(f"{name} {_version(name)}" for name in ("triton", "timm", "numpy", "pillow")),
        "",
        "back ends",
    ]
    for state in backends.values():
        lines.append(f"  {state.name:<10} {state.state:<8} {state.reason}")
        lines.extend(f"  {'':<10} {'':<8} {name}: {_text(value)}" for name, value in state.details.items())
    return "\n".join(lines)


def _reference() -> BackendState:
    import torch

    return BackendState("reference", True, True, "plain torch, every device", {"threads": torch.get_num_threads()})


def _cpu() -> BackendState:
    from . import _native

    if isinstance(_native._cpu, _native.MissingModule):
        return BackendState("cpu", False, False, _native._cpu.reason)
    isa = _native._cpu.isa_active()
    details = {"isa": isa, "isa_available": tuple(_native._cpu.isa_available())}
    return BackendState("cpu", True, True, f"native code, {isa} instruction set", details)


def _cuda() -> BackendState:
    from . import _native
    from .ops._backends import cuda_problem

    if isinstance(_native._cuda, _native.MissingModule):
        return BackendState("cuda", False, False, _native._cuda.reason)
    problem = cuda_problem()
    info = _native._cuda.device_info()
    details = {
        "built_for": _native._cuda.architectures,
        "runtime": _cuda_version(info["runtime_version"]),
        "driver": _cuda_version(info["driver_version"]),
    }
    return BackendState("cuda", True, problem is None, problem or f"native code on {_gpu_name()}", details)


def _triton() -> BackendState:
    from .ops._backends import interpreting, triton_missing, triton_problem

    problem = triton_problem()
    runs_on = "in Triton's interpreter on the CPU (TRITON_INTERPRET=1)" if interpreting() else None
    return BackendState(
        "triton", triton_missing() is None, problem is None, problem or f"runs {runs_on or f'on {_gpu_name()}'}"
    )


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# The back ends that ops can be asked for, fastest last.
_PROBES = {"reference": _reference, "cpu": _cpu, "triton": _triton, "cuda": _cuda}


class _MappingModule(ModuleType, Mapping):
    """The class of this module: `pro2sam_fast.backends` means the module as soon as anybody has imported it."""

    __eq__, __hash__ = object.__eq__, object.__hash__

    def __getitem__(self, name: str) -> BackendState:
        return _PROBES[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(_PROBES)

    def __len__(self) -> int:
        return len(_PROBES)

    def __contains__(self, name: object) -> bool:
        return name in _PROBES

    def __call__(self) -> Mapping[str, BackendState]:
        return MappingProxyType(dict(self))


backends = sys.modules[__name__]
backends.__class__ = _MappingModule
