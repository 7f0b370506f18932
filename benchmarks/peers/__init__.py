"""Other people's programs, run on our weights and inputs; imported only when they are asked for."""

from __future__ import annotations

from collections.abc import Callable

from case import Skip

from pro2sam_fast.errors import ConfigError

__all__ = ["attempt"]


def attempt(build: Callable[[], Callable[[], object]]) -> Callable[[], object] | Skip:
    """The call that `build` makes, or why this peer can't run here."""
    try:
        return build()
    except (ImportError, ConfigError) as error:
        return Skip(str(error))
