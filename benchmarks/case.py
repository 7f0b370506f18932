"""What can be measured: a case, the ways to run it, and the least work it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["Case", "Floor", "Runs", "Skip"]


@dataclass(frozen=True)
class Skip:
    """A peer that can't run here; the reason goes into its row."""

    reason: str


@dataclass(frozen=True)
class Floor:
    """The least arithmetic and memory traffic of one call, whatever the algorithm's form.

    Attributes:
        flops: floating-point operations by the dtype that sets the ceiling ("float32", "bfloat16", "float16").
        bytes: bytes read and written once.
        formula: how both follow from the case, in words.
    """

    flops: Mapping[str, float] = field(default_factory=dict)
    bytes: float = 0.0
    formula: str = ""


@dataclass
class Runs:
    """One call each way. All of them do the same work on the same inputs and weights.

    Attributes:
        ours: back end -> call.
        peers: name -> call, or why it can't run here.
        facts: what a reader needs to judge the numbers (share of survivors, masks found, fitted exponent, ...).
        units: what a call produces, with the count ("photos": 5); the rate is added to the row.
        stages: after a call of ours, milliseconds by stage.
        unit: "ms", or "bytes" where a call returns the peak memory that was found instead of being timed.
    """

    ours: dict[str, Callable[[], object]]
    peers: dict[str, Callable[[], object] | Skip] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)
    units: tuple[str, int] | None = None
    stages: Callable[[], dict[str, float]] | None = None
    unit: str = "ms"


@dataclass(frozen=True)
class Case:
    """A measurement that can be repeated by name.

    Attributes:
        what: "mask_match", "encoder", ...
        name: the case among those of `what`, unique, for instance "K=1000 480x640".
        dtype: of the computation, as torch writes it.
        tests: test files that must pass before a number is reported.
        build: makes inputs and calls; nothing heavy happens before.
        floor: see `Floor`; may read the facts that `build` found.
        default: measured when no case is named; the others take long or much memory.
    """

    what: str
    name: str
    dtype: str
    tests: tuple[str, ...]
    build: Callable[[], Runs]
    floor: Callable[[Mapping[str, object]], Floor] = lambda facts: Floor()
    default: bool = True
