"""Other people's programs, run on our weights and inputs; imported only when they are asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from case import Skip

from pro2sam_fast.errors import ConfigError

__all__ = ["attempt", "compiled"]


def attempt(build: Callable[[], Callable[[], object]]) -> Callable[[], object] | Skip:
    """The call that `build` makes, or why this peer can't run here."""
    try:
        return build()
    except (ImportError, ConfigError) as error:
        return Skip(str(error))


def compiled(build: Callable[[Callable], Callable[[], object]], device: torch.device) -> Callable[[], object] | Skip:
    """The call that `build(torch.compile)` makes; a machine without a compiler skips it. It compiles when first run."""
    if reason := _no_compiler(device):
        return Skip(reason)
    torch._dynamo.reset()  # else earlier cases count against the number of shapes that one function may have
    return build(functools.partial(torch.compile, dynamic=False))


@functools.cache
def _no_compiler(device: torch.device) -> str | None:
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler may fail with
        return f"torch.compile: {(str(error).strip() or type(error).__name__).splitlines()[0][:200]}"
    return None
