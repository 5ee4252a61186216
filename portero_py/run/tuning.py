"""What is done once a process: memory, open files, its name before its event loop starts, and its end.

Descriptors: one process has one table of them, whatever it is used for. So everybody who lets strangers in
has a share (`shares`), and what is left is the process's own: listening sockets, files, ACME's locks.
A client of the data plane counts double, because its exchange needs a connection to a backend.

`mallopt`: every TLS read under uvloop allocates 256 KiB and shrinks it. With glibc's default threshold each
is an mmap, a mremap and a munmap: 39 us instead of 19 for a small TLS request, 13.7 ms instead of 5.0 for
10 MiB (measured on Debian 12, glibc 2.36). Other C libraries do not have the call, and do not need it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3

#: Two descriptors a connection: half a million clients.
_ENOUGH_FILES: Final = 1 << 20

#: Descriptors that nobody gets: for what the process itself opens.
_OWN_FILES: Final = 64
#: Most connections that the registration API and plain HTTP need, whatever the limit.
_REGISTRATION: Final = 256
_PLAIN_HTTP: Final = 4096
#: Most probes at a time, whatever the limit.
_PROBES: Final = 256

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shares:
    """How many connections each may have at a time; `probes` are to backends."""

    registration: int
    plain_http: int
    clients: int
    probes: int = _PROBES


def tune_malloc() -> bool:
    """Keep buffers up to 32 MiB on the heap; whether the C library took it."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    mallopt.restype = ctypes.c_int
    # mallopt(3): 1 on success.
    return bool(mallopt(_M_MMAP_THRESHOLD, 32 << 20) == 1 and mallopt(_M_TRIM_THRESHOLD, 64 << 20) == 1)


def raise_open_files() -> int:
    """Raise the soft limit of open files to the hard one, or `_ENOUGH_FILES`; returns what holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ValueError, OSError) as error:
        _log.warning("the limit of open files stays at %d: %s", soft, error)
        return soft
    return wanted


def open_files() -> int:
    """The soft limit of open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _ENOUGH_FILES if soft == resource.RLIM_INFINITY else soft


def shares(files: int, *, control: bool, traffic: bool) -> Shares:
    """Share `files` descriptors out in a process that has the control plane, the data plane, or both."""
    own = min(_OWN_FILES, files // 4)
    registration = min(_REGISTRATION, files // 8) if control else 0
    plain_http = min(_PLAIN_HTTP, files // 8) if control else 0
    probes = max(min(_PROBES, files // 16), 1) if control else 0
    left = files - own - registration - plain_http - probes
    return Shares(registration, plain_http, max(left // 2, 1) if traffic else 0, probes)


def set_name(name: str) -> None:
    """Show `name`, 15 bytes at most, in ps and top; where there is no /proc nothing happens."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)


class Threads(ThreadPoolExecutor):
    """The threads of an event loop, which does not wait at its end for one that hangs at a disk or a CA."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work; what is going on is left to itself."""
        super().shutdown(wait=False, cancel_futures=True)


def leave(status: int) -> NoReturn:
    """End the process, whatever threads are still at; what has to be done before has been waited for."""
    if threading.active_count() == 1:
        sys.exit(status)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
