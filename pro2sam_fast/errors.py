"""Exceptions of the package. Every one derives from `Pro2SamError`; messages are one sentence a person can act on."""

from __future__ import annotations

import os

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ImageReadError",
    "Pro2SamError",
]


class Pro2SamError(Exception):
    """Base of every error this package raises on purpose."""


class ImageReadError(Pro2SamError, ValueError):
    """An input image can't be used. `path` is the file, or a description of the in-memory source, or None."""

    def __init__(self, message: str, path: str | os.PathLike | None = None):
        super().__init__(message)
        self.path = None if path is None else os.fspath(path)

    def __reduce__(self):
        return type(self), (self.args[0], self.path)


class CheckpointError(Pro2SamError, ValueError):
    """A checkpoint is missing, corrupt, unsafe to load or doesn't fit the model."""


class ConfigError(Pro2SamError, ValueError):
    """An unknown model or option, or an argument out of its range."""


class BackendError(Pro2SamError, RuntimeError):
    """A requested back end can't run here; the message carries the reason."""


class DataError(Pro2SamError, ValueError):
    """A data set file is malformed; the message names the file and the line, or the entry of a JSON file."""
