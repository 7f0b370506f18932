"""`pro2sam-fast doctor`."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from .parser import OK, Parser

__all__ = ["HELP", "parser", "run"]

HELP = "say what runs on this machine"


def parser() -> ArgumentParser:
    return Parser(description="Say which back ends loaded, which didn't and why.")


def run(arguments: Namespace) -> int:
    from ..backends import report

    print(report())
    return OK
