"""The folder of a training run: its arguments, a table of epochs, TensorBoard events, progress on the terminal."""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from ..errors import ConfigError
from ..io import write_atomic

__all__ = ["RunLog"]


class RunLog:
    """``args.yaml``, ``summary.csv`` and ``events.*`` in a run folder; quiet unless ``main``.

    Args:
        run: folder, made if missing.
        arguments: what defines the run; plain values.
    """

    def __init__(self, run: Path, arguments: Mapping[str, Any], main: bool = True) -> None:
        self.run, self.main = run, main
        self.arguments = _plain(arguments)
        self.rows: list[dict[str, Any]] = []
        self.sums: dict[str, float] = {}
        self.photos, self.seconds = 0, 0.0
        self.clock = time.perf_counter()
        self.bar: tqdm | None = None
        self.events = None

    def start(self) -> None:
        """A new run: writes the arguments."""
        if self.main:
            self.run.mkdir(parents=True, exist_ok=True)
            write_atomic(self.run / "args.yaml", yaml.safe_dump(self.arguments, sort_keys=False).encode())

    def check(self) -> None:
        """ConfigError unless the folder's arguments are these."""
        path = self.run / "args.yaml"
        try:
            stored = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: can't be read ({error}); choose another folder.") from error
        # what changes speed, not results
        free = ("workers", "micro_batch", "auto_batch", "save_every", "keep_epochs")
        for name in [*self.arguments, *stored]:
            if name not in free and stored.get(name) != self.arguments.get(name):
                raise ConfigError(
                    f"{self.run} holds a run with {name}={stored.get(name)!r}, not {self.arguments.get(name)!r}; "
                    "choose another folder."
                )

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"rows": self.rows, "sums": self.sums, "photos": self.photos, "seconds": self.seconds}

    def restore(self, state: Mapping[str, Any]) -> None:
        """What `state` gave."""
        self.rows, self.sums = list(state["rows"]), dict(state["sums"])
        self.photos, self.seconds = state["photos"], state["seconds"]

    def __enter__(self) -> RunLog:
        self.clock = time.perf_counter()
        if self.main:
            self.events = _event_writer(self.run)
            self.bar = tqdm(unit="step", disable=not sys.stderr.isatty())
        return self

    def __exit__(self, *exception: object) -> None:
        for closing in (self.bar, self.events):
            if closing is not None:
                closing.close()

    def step(self, step: int, steps: int, terms: Mapping[str, float], photos: int) -> None:
        """Counts a step; ``terms`` are means over its ``photos``."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * photos
        now = time.perf_counter()
        self.photos, self.seconds, self.clock = self.photos + photos, self.seconds + now - self.clock, now
        if self.bar is not None:
            if self.bar.total is None:
                self.bar.reset(steps)
                self.bar.initial = self.bar.n = step
            self.bar.set_postfix(
                loss=f"{terms['loss']:.3f}", photos_per_s=f"{self.photos / self.seconds:.1f}", refresh=False
            )
            self.bar.update()
        if self.events is not None:
            for name, value in terms.items():
                self.events.add_scalar(f"train/{name}", value, step)

    def epoch(self, epoch: int, epochs: int, metrics: Mapping[str, float]) -> None:
        """A row of the table: mean losses of the epoch, photos a second, metrics."""
        means = {name: value / self.photos for name, value in self.sums.items()}
        row = {"epoch": epoch, **means, "photos_per_s": self.photos / self.seconds, **metrics}
        if self.bar is not None and self.bar.disable:  # no terminal: a line an epoch instead of the bar
            said = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
            left = timedelta(seconds=round(self.seconds * (epochs - epoch)))
            print(f"epoch {epoch} of {epochs}: {said}; about {left} left", file=sys.stderr, flush=True)
        self.rows.append({name: float(value) if name != "epoch" else value for name, value in row.items()})
        self.sums, self.photos, self.seconds, self.clock = {}, 0, 0.0, time.perf_counter()
        if self.main:
            names = list(dict.fromkeys(name for r in self.rows for name in r))
            text = io.StringIO()
            writer = csv.DictWriter(text, names)
            writer.writeheader()
            writer.writerows(self.rows)
            write_atomic(self.run / "summary.csv", text.getvalue().encode())
        if self.events is not None:
            for name, value in metrics.items():
                self.events.add_scalar(f"evaluation/{name}", value, epoch)


def _event_writer(run: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
