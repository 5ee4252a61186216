"""Text files that an operator wrote, read within bounds of size and time, whatever stands in their place.

`Seen` knows which ones a configuration was read from, and whether they are still the same.

They are opened without waiting, and read with a limit and a deadline: a pipe is allowed (a shell's
`<(pass show portero)` is one), and one that nobody ends is an error like any other.
"""

from __future__ import annotations

import glob
import os
import select
import stat
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


def require_listed(pattern: str, source: str) -> None:
    """Raises a `ConfigError` when nothing matches only because a folder cannot be read.

    One that is not there may be meant; one that gives no answer would take all that is in it out of service.
    """
    for folder in _listed(pattern):
        try:
            os.scandir(folder or ".").close()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            why = os.strerror(error.errno or 0)
            raise ConfigError(f"{source}: cannot read {folder}: {why}") from None
        except ValueError:
            raise ConfigError(f"{source}: {values.shown(folder)} is no path") from None


class Seen:
    """The files that a configuration was read from, and the patterns: each as it was just before.

    So that nothing is missed that changes in the middle of a reading.
    """

    def __init__(self) -> None:
        # path -> which file it was, and of when; None: it was not there
        self._files: dict[str, tuple[int, ...] | None] = {}
        self._patterns: dict[str, tuple[str, ...]] = {}  # pattern -> what matched

    def __bool__(self) -> bool:
        return bool(self._files)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seen) and (self._files, self._patterns) == (other._files, other._patterns)

    __hash__ = None  # type: ignore[assignment]  # it changes; typeshed has no word for that

    @property
    def paths(self) -> list[str]:
        """The files and patterns."""
        return [*self._files, *self._patterns]

    def file(self, path: str) -> None:
        """This file is about to be read. A pipe or a device is not remembered: it cannot be read again."""
        state = _state(path)
        if state is None or stat.S_ISREG(state[0]):
            self._files.setdefault(path, state)

    def matches(self, pattern: str) -> tuple[str, ...]:
        """What matches a pattern, in order."""
        return self._patterns.setdefault(pattern, _matches(pattern))

    def again(self) -> Seen:
        """The same files and patterns, as they are now. It looks at each of them."""
        now = Seen()
        now._files = {path: _state(path) for path in self._files}
        now._patterns = {pattern: _matches(pattern) for pattern in self._patterns}
        return now

    def folders(self) -> dict[str, tuple[int, int]]:
        """The folders in which something happens when one of them changes, and which ones these are now.

        Where links lead is among them.
        """
        paths = set()
        for path in self._files:
            paths.add(os.path.dirname(path))  # noqa: PTH120 - text, as it was written
            if os.path.islink(path):  # noqa: PTH114 - as above
                paths.add(os.path.dirname(os.path.realpath(path)))  # noqa: PTH120 - as above
        for pattern in self._patterns:
            paths |= set(_folders(pattern))
        found = {}
        for path in (path or "." for path in paths):
            state = _state(path)
            if state is not None and stat.S_ISDIR(state[0]) and os.access(path, os.R_OK):
                found[path] = state[1], state[2]
        return found


# Private


def _state(path: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - text, as it was written
    except (OSError, ValueError):
        return None
    return found.st_mode, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _matches(pattern: str) -> tuple[str, ...]:
    try:
        return tuple(sorted(glob.glob(pattern)))  # noqa: PTH207 - Path.glob takes no absolute pattern
    except (OSError, ValueError):  # ValueError: a NUL in it
        return ()


def _listed(pattern: str) -> list[str]:
    """The folders in which the matches of a pattern are looked for, by listing them."""
    above, name = os.path.split(pattern)
    is_pattern = glob.has_magic(above)
    inner = _matches(above) if is_pattern else (above,)
    return [*(_listed(above) if is_pattern else ()), *(inner if glob.has_magic(name) else ())]


def _folders(pattern: str) -> list[str]:
    """The folders in which a match of the pattern may come and go."""
    above = os.path.dirname(pattern)  # noqa: PTH120 - a pattern is no path
    if glob.has_magic(above):
        return [*_folders(above), *_matches(above)]
    return [above]


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
