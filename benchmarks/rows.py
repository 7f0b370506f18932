"""Rows of results: what ran where, in which versions, and how to repeat it."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import pro2sam_fast

__all__ = ["RESULTS", "ROOT", "append", "environment", "read", "stale_files"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LIBRARIES = (
    "torch", "torchvision", "triton", "numpy", "timm", "pycocotools", "faster-coco-eval", "transformers",
    "segment-anything", "segment-anything-fast",
)  # fmt: skip


def environment(device: torch.device, root: Path = ROOT) -> dict[str, object]:
    """The part of a row that is the same for a whole run. `root` is the checkout that the package was built from."""
    return {
        **_revision(root),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "host": {"cpu": cpu_name(), "cores": os.cpu_count(), "isa": _isa()},
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions()},
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }


def stale_files(root: Path = ROOT) -> list[str]:
    """Files of the imported package that differ from the checkout, and `csrc` if `_cpu` was built from another one."""
    installed = Path(pro2sam_fast.__file__).parent
    stale = []
    for folder, place in ((root / "pro2sam_fast", installed), (root / "kernels", installed / "kernels")):
        for path in sorted(folder.rglob("*.py")):
            twin = place / path.relative_to(folder)
            if not twin.exists() and place.name == "kernels":
                twin = root / "kernels" / path.name  # run from the source tree
            if not twin.exists() or twin.read_bytes() != path.read_bytes():
                stale.append(str(path.relative_to(root)))
    built_from = getattr(pro2sam_fast._cpu, "sources", None)
    if isinstance(built_from, str) and built_from != native_sources(root):
        stale.append("csrc")
    return stale


def native_sources(root: Path) -> str:
    """SHA-256 over the native sources, as CMake computes it for `_cpu.sources`."""
    listing = sorted(path.relative_to(root).as_posix() for path in (root / "csrc").rglob("*.*") if path.is_file())
    lines = (f"{name} {hashlib.sha256((root / name).read_bytes()).hexdigest()}\n" for name in listing)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def append(path: Path, row: dict[str, object]) -> None:
    """One line at the end of `path`, on the disk before this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(row, ensure_ascii=False) + "\n")
        f.flush()
        os.fsync(f.fileno())


def read(folder: Path = RESULTS) -> Iterator[dict[str, object]]:
    """All rows, file by file in alphabetical order, oldest first inside a file; `at` is "file:line"."""
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield json.loads(line) | {"at": f"{path.name}:{number}"}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _isa() -> str | None:
    return pro2sam_fast._cpu.isa_active() if pro2sam_fast.backends["cpu"] else None


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _revision(root: Path) -> dict[str, object]:
    """Of the checkout; without .git what benchmarks/REVISION says, as `git describe --always --dirty` writes it."""
    if (root / ".git").exists():
        status = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return {
            "commit": _git(root, "rev-parse", "--short=10", "HEAD"),
            "committed": _git(root, "log", "-1", "--date=iso-strict-local", "--format=%cd", TZ="UTC"),
            "subject": _git(root, "log", "-1", "--format=%s"),
            "dirty": bool(status),
        }
    file = root / "benchmarks" / "REVISION"
    said = file.read_text(encoding="utf-8").strip() if file.exists() else ""
    dirty = not said or said.endswith("-dirty")
    return {"commit": said.removesuffix("-dirty"), "committed": "", "subject": "", "dirty": dirty}


def _git(root: Path, *arguments: str, **environ: str) -> str:
    command, where = ["git", *arguments], {"cwd": root, "env": os.environ | environ}
    return subprocess.run(command, **where, capture_output=True, text=True, check=False).stdout.strip()
