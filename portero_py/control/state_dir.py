"""The directory for what outlives a restart. portero owns it: when it is missing, portero makes it, 0700."""

from __future__ import annotations

import os
from pathlib import Path

from portero_py.errors import ConfigError


def existing(directory: str) -> Path:
    """The directory, or what there is above it."""
    path = Path(directory)
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def require_state_dir(directory: str) -> None:
    """Look whether it can be used, or made, and change nothing. Raises ConfigError."""
    place = existing(directory)
    try:
        with os.scandir(place) as entries:
            next(entries, None)
    except OSError as error:
        raise ConfigError(_said("cannot read", str(place), error)) from None
    if place != Path(directory) and not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"--state-dir: cannot make {directory}: {place} cannot be written to")


def make_state_dir(directory: str) -> None:
    """Make it, and what is missing above it, for nobody but its owner. Raises ConfigError."""
    try:
        _make(Path(directory))
    except OSError as error:
        raise ConfigError(_said("cannot make", directory, error)) from None


# Private


def _make(path: Path) -> None:
    if not path.is_dir():
        _make(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


def _said(what: str, path: str, error: OSError) -> str:
    return f"--state-dir: {what} {path}: {os.strerror(error.errno or 0)}"
