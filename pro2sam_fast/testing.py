"""What the tests of every op share: unkind inputs, back ends to try, the one table of tolerances."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import _native
from .ops._backends import interpreting, unavailable

__all__ = [
    "TOLERANCES",
    "UNKIND_COUNTS",
    "UNKIND_SIZES",
    "BackendCase",
    "Tolerance",
    "assert_matches",
    "backend_cases",
    "forced_isa",
    "random_masks",
]

UNKIND_COUNTS = (0, 1, 3, 66)
UNKIND_SIZES = ((0, 0), (1, 1), (1, 64), (5, 0), (63, 65), (2, 129), (17, 320))


@dataclass(frozen=True)
class Tolerance:
    """`rtol` and `atol` of `torch.testing.assert_close`; both 0 means the same bits."""

    rtol: float = 0.0
    atol: float = 0.0


# By the dtype in which an op computes. "exact" is for ops whose result every back end must return bit for bit. These
# don't soften for a machine, a back end or CI: an op that needs more gets a row here, with its reason.
TOLERANCES = {
    "exact": Tolerance(),
    torch.float64: Tolerance(rtol=1e-10, atol=1e-12),
    torch.float32: Tolerance(rtol=1e-5, atol=1e-6),
    torch.bfloat16: Tolerance(rtol=1.6e-2, atol=1e-3),
    torch.float16: Tolerance(rtol=2e-3, atol=1e-4),
    # Against wider ones, where factors of long sums are rounded to this dtype on the way: the error goes with the
    # summands, not with the sum.
    "bfloat16 products": Tolerance(rtol=1.6e-2, atol=8e-3),
    "float16 products": Tolerance(rtol=2e-3, atol=1e-3),
    # float32 factors as sums of two TF32 numbers, three products of four: 21 bits instead of 24.
    "TF32 products": Tolerance(rtol=1e-5, atol=5e-6),
    # Long chains of products whose sums cancel, so an error is relative to the terms and not to the result. With
    # operands of 16 bits the probabilities are rounded too, which the reference doesn't do.
    "decode float32": Tolerance(rtol=1e-4, atol=2e-5),
    "decode bfloat16": Tolerance(rtol=2e-2, atol=3e-2),
    "decode float16": Tolerance(rtol=2.5e-3, atol=4e-3),
}


def assert_matches(actual: object, expected: object, tolerance: torch.dtype | str) -> None:
    """Fails unless tensors, or tuples of tensors, agree in shape, dtype and, within a row of `TOLERANCES`, in value."""
    row = TOLERANCES[tolerance]
    torch.testing.assert_close(actual, expected, rtol=row.rtol, atol=row.atol, check_device=False)


@dataclass(frozen=True)
class BackendCase:
    """One way to run an op. `device` is where its tensors go, `isa` the CPU instruction set to force, if any."""

    backend: str
    device: str
    isa: str | None = None

    @property
    def problem(self) -> str | None:
        """Why this case can't run here, or None."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        problem = unavailable(self.backend, self.device)
        if problem is None and self.isa is not None and self.isa not in _native._cpu.isa_available():
            problem = f"this processor or build has no {self.isa}"
        return problem

    def __str__(self) -> str:
        return self.isa or (f"{self.backend}-{self.device}" if self.backend in ("reference", "auto") else self.backend)


def backend_cases() -> tuple[BackendCase, ...]:
    """Every back end on every device that it takes, the CPU kernels once per instruction set."""
    return (
        BackendCase("auto", "cpu"),
        *(BackendCase("cpu", "cpu", isa) for isa in ("scalar", "avx2", "avx512", "avx512bf16")),
        BackendCase("triton", "cpu" if interpreting() else "cuda"),
        BackendCase("reference", "cuda"),
        BackendCase("auto", "cuda"),
        BackendCase("cuda", "cuda"),
    )


@contextlib.contextmanager
def forced_isa(name: str | None) -> Iterator[None]:
    """CPU kernels use instruction set `name` inside the block; None changes nothing."""
    if name is None:
        yield
        return
    before = _native._cpu.isa_active()
    _native._cpu.isa_force(name)
    try:
        yield
    finally:
        _native._cpu.isa_force(before)


def random_masks(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """bool (count, height, width); every mask has its own density, from empty to full."""
    generator = torch.Generator().manual_seed(seed)
    density = torch.rand((count, 1, 1), generator=generator) * 1.4 - 0.2
    return torch.rand((count, height, width), generator=generator) < density
