"""What systemd and portero tell each other: readiness and the watchdog out, sockets in.

Everything here does nothing outside systemd. The protocols are those of sd_notify(3) and
sd_listen_fds(3): datagrams to `$NOTIFY_SOCKET`; file descriptors from 3 on, counted by `$LISTEN_FDS`, named
by `$LISTEN_FDNAMES` and meant for the process `$LISTEN_PID`.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Final

from portero_py.errors import ConfigError

#: Where the sockets begin that systemd opened.
FIRST_DESCRIPTOR: Final = 3


class Notifier:
    """Tells the service's state to systemd by `tell`, which gets lines as `notify` sends them.

    `pid` is the process that systemd watches.
    """

    def __init__(self, environ: Mapping[str, str], pid: int, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self.watchdog_seconds = _watchdog_seconds(environ, pid)

    def ready(self, status: str) -> None:
        self._tell(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """A `ready` must follow, also when the reload failed (sd_notify(3), Type=notify-reload)."""
        self._tell("\n".join(reloading()))

    def stopping(self) -> None:
        self._tell("STOPPING=1\nSTATUS=finishing the exchanges in flight")

    def alive(self) -> None:
        """To be sent at least every `watchdog_seconds`."""
        self._tell("WATCHDOG=1")


def reloading() -> tuple[str, str]:
    """What says that a change begins; READY=1 says that it is over."""
    return "RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"


def notify(environ: Mapping[str, str], *lines: str) -> None:
    """Send lines to systemd, which listens to the main process. Without a `NOTIFY_SOCKET` nothing happens."""
    path = environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    # "@" is how an abstract socket is written.
    address = f"\0{path[1:]}" if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(lines).encode(), address)
    except OSError:
        # sd_notify(3): a service goes on when nobody listens; nor is a lack of descriptors its end.
        return


def inherited_sockets(environ: Mapping[str, str], pid: int) -> dict[str, list[socket.socket]]:
    """The sockets that systemd opened, by their names; a nameless one counts as "https".

    They are portero's from now on: callers close them. Raises `ConfigError` for a number that is none, and
    for a descriptor that is no listening socket.
    """
    if environ.get("LISTEN_PID") != str(pid):
        return {}
    try:
        count = int(environ.get("LISTEN_FDS", "0"))
    except ValueError:
        raise ConfigError("LISTEN_FDS is no number") from None
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    found: dict[str, list[socket.socket]] = {}
    for index in range(count):
        name = names[index] if index < len(names) else ""
        found.setdefault(_known_name(name), []).append(_adopt(FIRST_DESCRIPTOR + index))
    return found


# Private


def _watchdog_seconds(environ: Mapping[str, str], pid: int) -> float:
    """How long systemd waits for a sign of life; 0.0 when it does not watch that process."""
    if environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return 0.0
    microseconds = environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 1e6 if microseconds.isdecimal() and len(microseconds) < 20 else 0.0


def _known_name(name: str) -> str:
    # Without FileDescriptorName= systemd names a socket after its unit, or "unknown".
    if name in {"https", "http", "register"}:
        return name
    if name in {"", "unknown"} or name.endswith(".socket"):
        return "https"
    raise ConfigError(f'LISTEN_FDNAMES holds "{name}": the names are https, http and register')


def _adopt(descriptor: int) -> socket.socket:
    try:
        os.set_inheritable(descriptor, False)
        sock = socket.socket(fileno=descriptor)
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ConfigError(f"LISTEN_FDS: descriptor {descriptor}: {os.strerror(error.errno or 0)}") from None
    if not listening or sock.family not in {socket.AF_INET, socket.AF_INET6}:
        sock.close()
        raise ConfigError(f"LISTEN_FDS: descriptor {descriptor} is no listening TCP socket")
    sock.setblocking(False)
    return sock
