"""Reads small files whose place others can write to: never waits for a writer, never reads without an end.

A FIFO's reader waits for its writer, a device may have no end, and either would hold up everything that comes
after it in the same thread.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


class UnfitFileError(Exception):
    """It is there, and cannot be what is looked for; the text goes on after the file's name."""


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file of at most `most`. Raises UnfitFileError and OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        require_regular(descriptor)
        content = b""
        while len(content) <= most:
            found = os.read(descriptor, most + 1 - len(content))
            if not found:
                return content
            content += found
    finally:
        os.close(descriptor)
    raise UnfitFileError(f"is larger than {most} bytes")


def require_regular(descriptor: int) -> None:
    """Raises UnfitFileError for anything but a regular file."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise UnfitFileError("is not a regular file")
