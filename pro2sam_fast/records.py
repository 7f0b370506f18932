"""An output folder that survives interrupts: a log with one JSON line per input, in input order, and safe file
names."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from .errors import ConfigError, DataError
from .io import Source, write_atomic

try:
    import fcntl
except ImportError:  # no advisory locks on this platform
    fcntl = None

__all__ = ["OutputNames", "RecordLog"]


class RecordLog:
    """Append-only `<stem>.jsonl` next to `<stem>.run.json`, which holds the options the records were made with.

    A record is committed when its line, newline included, is on disk; a torn last line is what a killed run leaves and
    is dropped on resuming. One process at a time may write a log.

    folder: made if missing. config: JSON-ready options; resuming demands the same ones. resume: keep the records that
    are there and go on after them; otherwise an earlier log is set aside as `<stem>.jsonl.old`.
    Raises ConfigError (folder unusable, other options, other inputs, log in use) and DataError (damaged log).
    """

    def __init__(self, folder: str | os.PathLike, stem: str, config: dict[str, Any], *, resume: bool = False):
        self.folder = os.fspath(folder)
        self.path = os.path.join(self.folder, f"{stem}.jsonl")
        self.config_path = os.path.join(self.folder, f"{stem}.run.json")
        config = json.loads(json.dumps(config))
        try:
            os.makedirs(self.folder, exist_ok=True)
            self._file = open(self.path, "ab+")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise ConfigError(f"cannot use the output folder '{self.folder}': {error.strerror}") from None
        try:
            self._lock()
            if resume and os.path.getsize(self.path):
                self._check_config(config)
                self.paths = self._recover()
            else:
                self._start_afresh(config)
                self.paths: list[str | None] = []
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        return len(self.paths)

    def append(self, record: dict[str, Any]) -> None:
        """Commit one record (a JSON-ready dictionary with a `path`)."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.paths.append(record["path"])

    def remaining(self, sources: Iterable[Source]) -> Iterator[tuple[bool, Source]]:
        """Pair every input with whether its record is already there, checking that these are the inputs of the log."""
        done = list(self.paths)
        count = 0
        for count, source in enumerate(sources, 1):
            if count > len(done):
                yield False, source
                continue
            if source.path != done[count - 1]:
                raise ConfigError(
                    f"cannot resume: input {count} is '{source.path}' but line {count} of '{self.path}' is for "
                    f"'{done[count - 1]}'; give the same inputs in the same order, or start again without resume"
                )
            yield True, source
        if count < len(done):
            raise ConfigError(
                f"cannot resume: '{self.path}' has {len(done)} records but there are only {count} inputs; "
                "give the same inputs, or start again without resume"
            )

    def records(self) -> Iterator[dict[str, Any]]:
        """Read the committed records back, one at a time."""
        with open(self.path, "rb") as file:
            for line in file:
                yield json.loads(line)

    def close(self) -> None:
        self._file.close()

    def _lock(self) -> None:
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"another run writes '{self.path}': wait for it or choose another folder") from None
            except OSError:  # a file system without locks
                pass

    def _start_afresh(self, config: dict[str, Any]) -> None:
        if os.path.getsize(self.path):
            os.replace(self.path, f"{self.path}.old")
            self._file.close()
            self._file = open(self.path, "ab+")  # noqa: SIM115 - closed by close()
            self._lock()
        write_atomic(self.config_path, json.dumps(config, indent=2).encode() + b"\n")

    def _check_config(self, config: dict[str, Any]) -> None:
        try:
            with open(self.config_path, "rb") as file:
                before = json.load(file)
        except FileNotFoundError:
            raise ConfigError(f"cannot resume: '{self.config_path}' is missing; start again without resume") from None
        except ValueError as error:
            raise DataError(f"cannot resume: '{self.config_path}' is damaged ({error})") from None
        for key in sorted({*before, *config}):
            if before.get(key) != config.get(key):
                raise ConfigError(
                    f"cannot resume: option {key} was {before.get(key)!r} and is now {config.get(key)!r}; "
                    "give the same options, or start again without resume"
                )

    def _recover(self) -> list[str | None]:
        """Paths of the committed records; cuts a torn tail off the file."""
        paths = []
        end = number = 0
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                paths.append(json.loads(line)["path"])
            except (ValueError, KeyError, TypeError) as error:
                self._require_tail(number, end + len(line), error)
                break
            end += len(line)
        self._file.truncate(end)
        return paths

    def _require_tail(self, number: int, end: int, error: Exception) -> None:
        if end != os.path.getsize(self.path):
            raise DataError(f"'{self.path}', line {number}: not a record ({error}); remove the line or start again")


class OutputNames:
    """Gives every input its own relative name for output files, without extension.

    `cats/tom.jpg` becomes `cats/tom`; a second `cats/tom.png` becomes `cats/tom-2`. Deterministic in the order of the
    inputs; names that differ in case only count as equal, so that they stay apart on every file system.
    """

    def __init__(self):
        self._taken: set[str] = set()

    def claim(self, name: str) -> str:
        parts = [part for part in pathlib.PurePath(name).parts if part not in ("..", ".", os.sep)]
        stem = os.path.splitext(os.path.join(*parts))[0] if parts else "image"
        folder, stem = os.path.split(stem)
        while len(os.fsencode(stem)) > 200:
            stem = stem[:-1]
        candidate, count = os.path.join(folder, stem or "image"), 1
        while candidate.casefold() in self._taken:
            count += 1
            candidate = os.path.join(folder, f"{stem}-{count}")
        self._taken.add(candidate.casefold())
        return candidate


def make_parent(path: str) -> None:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
