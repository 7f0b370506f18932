"""The native modules `_cpu` and `_cuda`. One that failed to load becomes an object that explains itself when called."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

from .errors import BackendError

__all__ = ["MissingModule", "_cpu", "_cuda"]

ISA_VARIABLE = "PRO2SAM_CPU_ISA"


class MissingModule(ModuleType):
    """Stands in for a native module. `reason` says why it isn't there; calling any of its functions raises that."""

    def __init__(self, name: str, reason: str):
        super().__init__(name)
        self.reason = reason

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def explain(*args, **kwargs):
            raise BackendError(f"{self.__name__}.{name} can't run: {self.reason}")

        return explain

    def __repr__(self) -> str:
        return f"<missing native module {self.__name__!r}: {self.reason}>"


def _load(stem: str) -> ModuleType:
    name = f"{__package__}.{stem}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        reason = f"{name} isn't built here; `pip install .` builds it"
        if stem == "_cuda":
            reason += " where nvcc is found (PRO2SAM_CUDA=on makes a missing nvcc an error)"
    except ImportError as error:
        reason = f"{name} didn't load: {error}"
    return _missing(stem, reason)


def _missing(stem: str, reason: str) -> MissingModule:
    module = MissingModule(f"{__package__}.{stem}", reason)
    sys.modules[module.__name__] = module
    setattr(sys.modules[__package__], stem, module)
    return module


def _load_cpu() -> ModuleType:
    module = _load("_cpu")
    isa = os.environ.get(ISA_VARIABLE)
    if isa and not isinstance(module, MissingModule):
        try:
            module.isa_force(isa)
        except RuntimeError as error:
            return _missing("_cpu", f"{ISA_VARIABLE}={error}")
    return module


_cpu = _load_cpu()
_cuda = _load("_cuda")
