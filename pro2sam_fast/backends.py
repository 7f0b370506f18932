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

__all__ = ["BackendState", "SelfCheck", "backends", "report", "self_checks"]


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


@dataclass(frozen=True)
class SelfCheck:
    """One op of one back end against the reference, on a small case.

    Attributes:
        op, backend, device: names.
        reason: what is wrong, or None if it passed.
    """

    op: str
    backend: str
    device: str
    reason: str | None

    def __bool__(self) -> bool:
        return self.reason is None


def self_checks() -> list[SelfCheck]:
    """Every op on every back end that can run here, on every device that it takes."""
    import torch

    from .ops import _backends

    found = []
    for backend in list(_PROBES)[1:]:
        on_cpu = _backends.unavailable(backend, "cpu") is None
        devices = ["cpu"] if on_cpu else [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        if not backends[backend]:
            continue
        for op in _backends.REGISTRATIONS.values():
            if backend not in op.implementations:
                continue
            for device in devices:
                try:
                    reason = op.self_check(backend, torch.device(device))
                except Exception as error:  # no memory
                    reason = _backends.one_line(error)
                found.append(SelfCheck(op.name, backend, device, reason))
    return found


def self_check_table(checks: list[SelfCheck]) -> str:
    """A line for each op, a column for each back end, and what is wrong."""
    columns = list(dict.fromkeys((check.backend, check.device) for check in checks))
    if not columns:
        return "self-checks: nothing but the reference can run here"
    outcomes = {(check.op, check.backend, check.device): "passed" if check else "FAILED" for check in checks}
    titles = [backend if device == "cpu" == backend else f"{backend} on {device}" for backend, device in columns]
    lines = ["self-checks, each kernel against the reference", f"  {'':<26}{''.join(f'{t:<18}' for t in titles)}"]
    for op in dict.fromkeys(check.op for check in checks):
        cells = "".join(f"{outcomes.get((op, *column), 'no kernel'):<18}" for column in columns)
        lines.append(f"  {op:<26}{cells}")
    lines += [f"  FAILED {c.op}, {c.backend} on {c.device}: {c.reason}" for c in checks if not c]
    return "\n".join(line.rstrip() for line in lines)


def report() -> str:
    """The text of `python -m pro2sam_fast`: versions, back ends with their reasons, the CPU instruction set, and which
    kernels this process has stopped using."""
    import torch

    from .ops import _backends

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
    for op in _backends.REGISTRATIONS.values():
        lines.extend(f"  {op.name}, {name} on {device}: {why}" for (name, device), why in op.failures().items())
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
