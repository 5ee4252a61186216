"""Text files that an operator wrote, read within bounds of size and time, whatever stands in their place.

They are opened without waiting, and read with a limit and a deadline: a pipe is allowed (a shell's
`<(pass show portero)` is one), and one that nobody ends is an error like any other.
"""

from __future__ import annotations

import os
import select
import time
from pathlib import Path
from typing import Final

from portero_py.config import values
from portero_py.errors import ConfigError

#: The most that a secret's file may hold, bytes.
MAX_FILE: Final = 1 << 20
#: Seconds in which all of it must have come, where it is no plain file.
FILE_PATIENCE: Final = 5.0


def read_text(path: Path, source: str, most: int = MAX_FILE) -> str:
    """The UTF-8 text of a file of `most` bytes, or a `ConfigError` that begins with `source`."""
    try:
        data = _read_bytes(path, most)
    except TimeoutError:
        raise ConfigError(f"{source}: {path} had no end within {FILE_PATIENCE:g} s") from None
    except OSError as error:
        raise ConfigError(f"{source}: cannot read {path}: {os.strerror(error.errno or 0)}") from None
    except ValueError:  # a NUL, or a character that this system's file names cannot have
        raise ConfigError(f"{source}: {values.shown(str(path))} is no path") from None
    if len(data) > most:
        raise ConfigError(f"{source}: {path} is larger than {most} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{source}: {path} is not UTF-8 text") from None


# Private


def _read_bytes(path: Path, most: int) -> bytes:
    """At most `most` bytes and one more. TimeoutError when a pipe or a device keeps its end back."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        ready = select.poll()
        ready.register(descriptor, select.POLLIN)
        ends_at = time.monotonic() + FILE_PATIENCE
        parts, length = [], 0
        while length <= most:
            if not ready.poll(max(0.0, ends_at - time.monotonic()) * 1000):
                raise TimeoutError
            part = os.read(descriptor, most + 1 - length)
            if not part:
                break
            parts.append(part)
            length += len(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)
