"""benchmarks/KERNELS.md: registers, spills, shared memory and matrix instructions of every GPU kernel. Needs no GPU.

    python benchmarks/kernels.py            # compile them all and write the page
    python benchmarks/kernels.py --check    # exit status 1 unless the page lists exactly today's kernels

Both fail if a kernel spills or a compiler warns. The check compares the numbers too where the page was made with the
versions that are here, and leaves out what can't be compiled here (Triton without triton, CUDA without nvcc).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import ahead_of_time  # noqa: E402
from ahead_of_time import Resources  # noqa: E402

__all__ = ["PAGE", "differences", "listed", "render", "versions"]

PAGE = ROOT / "benchmarks" / "KERNELS.md"
PARTS = ("Triton", "CUDA")
TITLES = ("kernel", "types", "target", "registers", "spills", "static", "dynamic", "tensor cores")
KEY = 3  # the first columns say which kernel a row is of
SPILLS = TITLES.index("spills")

Row = tuple[str, ...]


def listed(text: str) -> dict[str, list[Row]]:
    """Rows of the page's tables by part."""
    found: dict[str, list[Row]] = {part: [] for part in PARTS}
    part = None
    for line in text.splitlines():
        if line.startswith("## "):
            part = line.removeprefix("## ").split()[0]
        elif line.startswith("| `"):
            cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            found[part].append(tuple(cells))
    return found


def versions() -> dict[str, str | None]:
    """Of the compilers by part; None for one that isn't here."""
    found: dict[str, str | None] = dict.fromkeys(PARTS)
    try:
        import triton

        found["Triton"] = f"triton {triton.__version__}"
    except ImportError:
        pass
    if nvcc := ahead_of_time.nvcc():
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        found["CUDA"] = f"nvcc {re.search(r'V([0-9.]+)', text)[1]}"
    return found


def compiled(part: str) -> tuple[list[Row], list[str]]:
    """Rows and warnings of one part's kernels."""
    rows, warnings = [], []
    for kernels, said in (_triton if part == "Triton" else _cuda)():
        rows += [_row(kernel) for kernel in kernels]
        warnings += said
    return sorted(rows, key=lambda row: (*row[: KEY - 1], int(re.search(r"\d+", row[KEY - 1])[0]))), warnings


def _triton() -> Iterator[tuple[list[Resources], list[str]]]:
    for entry in ahead_of_time.triton_entries():
        for capability in entry.capabilities:
            with tempfile.TemporaryDirectory() as folder:
                yield [ahead_of_time.compile_triton(entry, capability, True, Path(folder))], []


def _cuda() -> Iterator[tuple[list[Resources], list[str]]]:
    for file in ahead_of_time.CUDA_FILES:
        with tempfile.TemporaryDirectory() as folder:
            yield ahead_of_time.compile_cuda(file, Path(folder))


def _row(kernel: Resources) -> Row:
    dynamic = "at launch" if kernel.dynamic_shared is None else str(kernel.dynamic_shared)
    numbers = (kernel.registers, kernel.spills, kernel.static_shared)
    return (f"`{kernel.kernel}`", kernel.types, kernel.target, *map(str, numbers), dynamic, kernel.tensor_cores)


def render(rows: dict[str, list[Row]], made_with: dict[str, str]) -> str:
    """The page."""
    lines = [
        "# What the GPU kernels take",
        "",
        "Made by `python benchmarks/kernels.py`. Registers a thread; spills in bytes a thread; static and dynamic",
        "shared memory in bytes a block; tensor cores: the matrix instructions in the PTX. Triton compiles for",
        "pointers that 16 divides.",
    ]
    for part in PARTS:
        lines += ["", f"## {part} ({made_with[part]})", "", _line(TITLES), _line(["---"] * len(TITLES))]
        lines += [_line(cell.replace("|", "\\|") for cell in row) for row in rows[part]]
    return "\n".join(lines) + "\n"


def _line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def differences(page: list[Row], today: list[Row], numbers: bool) -> list[str]:
    """What the page's rows of one part get wrong; `numbers`: compare more than which kernels there are."""
    then, now = ({row[:KEY]: row for row in rows} for rows in (page, today))
    found = [f"not on the page: {' '.join(key)}" for key in now.keys() - then.keys()]
    found += [f"no such kernel any more: {' '.join(key)}" for key in then.keys() - now.keys()]
    found += [f"spills on the page: {' '.join(row)}" for row in page if row[SPILLS] != "0"]
    if numbers:
        changed = (key for key in now.keys() & then.keys() if now[key] != then[key])
        found += [f"changed: {' '.join(then[key])} is now {' '.join(now[key][KEY:])}" for key in changed]
    return sorted(found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(argv).check
    here = versions()
    absent = [part for part in PARTS if here[part] is None]
    if absent and not check:
        parser.error(f"no compiler for the kernels of {', '.join(absent)}")
    text = PAGE.read_text(encoding="utf-8") if check else ""
    problems: list[str] = []
    rows: dict[str, list[Row]] = {}
    for part in PARTS:
        if here[part] is None:
            print(f"{part}: left out, its compiler isn't here")
            continue
        rows[part], warnings = compiled(part)
        problems += [f"warning: {warning}" for warning in warnings]
        problems += [f"spills: {' '.join(row)}" for row in rows[part] if row[SPILLS] != "0"]
        if check:
            problems += differences(listed(text)[part], rows[part], f"## {part} ({here[part]})" in text)
    if not check:
        PAGE.write_text(render(rows, here), encoding="utf-8")
    print("\n".join(problems) or f"{sum(map(len, rows.values()))} rows, no spills, no warnings")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
