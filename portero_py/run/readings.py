"""The configuration as it was read, from whoever reads it to those who go by it.

With several processes one reads, the supervisor, and writes what came of it into a file in memory, which all
of them have from before the fork. So what is in force in the control process and in every worker is one
reading of the files, and they are parsed once. A worker leaves out services and routes: it has them by the
feed.

`Reader` reads, and counts; `Readings` is that file. Whoever finds it half written has been told too early,
or will be told again.
"""

from __future__ import annotations

import os
import pickle
import struct
import time
import zlib
from dataclasses import replace
from typing import Final

from portero_py.config import sources
from portero_py.config.files import Seen
from portero_py.config.model import Config, Reloads
from portero_py.config.sources import Environ, Flags

#: Lengths of the two parts, their checksum, readings that went well, that did not, time of the last good one.
_HEAD: Final = struct.Struct("@QQIIId")


class Reader:
    """Reads the configuration from its sources; `seen` is what the last reading looked at."""

    def __init__(self, flags: Flags, environ: Environ) -> None:
        self._flags = flags
        self._environ = environ
        self.seen = Seen()
        self.reloads = Reloads()

    def __call__(self) -> Config:
        """Read it. Raises `ConfigError`."""
        self.seen = Seen()
        return sources.load(self._flags, self._environ, self.seen)

    def count(self, *, ok: bool, again: bool = True) -> None:
        """What came of it, when it was read `again`."""
        former = self.reloads
        if ok:
            self.reloads = replace(former, ok=former.ok + again, succeeded_at=time.time())
        else:
            self.reloads = replace(former, failed=former.failed + 1)


class Readings:
    """What was read last, in a file in memory. One process writes, its children read."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._descriptor = os.memfd_create("portero-configuration", os.MFD_CLOEXEC)

    def write(self, config: Config, reader: Reader) -> None:
        """Let this be what is in force. Raises OSError: then what was there before still is."""
        common = pickle.dumps(replace(config, services=(), routes=()), pickle.HIGHEST_PROTOCOL)
        rest = pickle.dumps((config.services, config.routes, reader.seen), pickle.HIGHEST_PROTOCOL)
        reloads = reader.reloads
        checksum = zlib.crc32(rest, zlib.crc32(common))
        head = _HEAD.pack(len(common), len(rest), checksum, reloads.ok, reloads.failed, reloads.succeeded_at)
        view = memoryview(head + common + rest)
        os.posix_fallocate(self._descriptor, 0, len(view))  # where there is no room, it fails here
        at = 0
        while at < len(view):
            at += os.pwrite(self._descriptor, view[at:], at)
        os.ftruncate(self._descriptor, len(view))

    def common(self) -> Config | None:
        """What a worker needs; None when nothing whole is there."""
        found = self._read()
        return None if found is None else pickle.loads(found[0])  # noqa: S301 - it is our own

    def whole(self) -> tuple[Config, Seen] | None:
        """All of it; None when nothing whole is there."""
        found = self._read()
        if found is None:
            return None
        services, routes, seen = pickle.loads(found[1])  # noqa: S301
        config: Config = pickle.loads(found[0])  # noqa: S301
        return replace(config, services=services, routes=routes), seen

    @property
    def reloads(self) -> Reloads:
        """How often it was read."""
        head = os.pread(self._descriptor, _HEAD.size, 0)
        return Reloads(*_HEAD.unpack(head)[3:]) if len(head) == _HEAD.size else Reloads()

    def close(self) -> None:
        os.close(self._descriptor)

    # Private

    def _read(self) -> tuple[bytes, bytes] | None:
        head = os.pread(self._descriptor, _HEAD.size, 0)
        if len(head) < _HEAD.size:
            return None
        first, second, checksum, *_ = _HEAD.unpack(head)
        data = b""
        while len(data) < first + second:
            piece = os.pread(self._descriptor, first + second - len(data), _HEAD.size + len(data))
            if not piece:
                return None
            data += piece
        if zlib.crc32(data[first:], zlib.crc32(data[:first])) != checksum:
            return None
        return data[:first], data[first:]
