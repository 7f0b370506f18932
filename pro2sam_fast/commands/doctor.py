"""`pro2sam-fast doctor`."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from .parser import INCOMPLETE, OK, Parser

__all__ = ["HELP", "parser", "run"]

HELP = "say what runs on this machine"


_DESCRIPTION = """Say which back ends loaded, which didn't and why, and check every kernel that can run here against the
plain reference.

exit status: 0 every kernel agrees with the reference, 1 one doesn't
"""


def parser() -> ArgumentParser:
    return Parser(description=_DESCRIPTION)


def run(arguments: Namespace) -> int:
    from ..backends import report, self_check_table, self_checks

    print(report(), end="\n\n", flush=True)
    checks = self_checks()
    print(self_check_table(checks))
    return OK if all(checks) else INCOMPLETE
