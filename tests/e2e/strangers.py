"""Clients that want nothing good, and those that go on asking meanwhile; each from a loopback address of its
own."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterable
from types import TracebackType

from tests.e2e.http1_client import get
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.waiting import PATIENCE, eventually

#: Where abuse comes from, and where honest clients do.
BAD, GOOD = "127.0.0.66", "127.0.0.7"

_NO_PORT_YET = 24  # IP_BIND_ADDRESS_NO_PORT, which Python 3.11 does not know


class Strangers:
    """Raw connections to one port, all from one address."""

    def __init__(self, port: int, source: str = BAD, *, receive_buffer: int = 0) -> None:
        self.sockets: list[socket.socket] = []
        self._port = port
        self._source = source
        self._receive_buffer = receive_buffer

    def __enter__(self) -> Strangers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def come(self, count: int, say: bytes = b"") -> Strangers:
        """Open `count` connections more, and say something on each."""
        for _ in range(count):
            raw = socket.socket()
            if self._receive_buffer:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
            raw.settimeout(PATIENCE)
            raw.setsockopt(
                socket.IPPROTO_IP, _NO_PORT_YET, 1
            )  # of thousands the kernel looks long for a free one
            raw.bind((self._source, 0))
            raw.connect(("127.0.0.1", self._port))
            self.sockets.append(raw)
            if say:
                _send(raw, say)
        return self

    def say(self, data: bytes) -> None:
        """Say something more on each connection that is there."""
        for raw in self.sockets:
            _send(raw, data)

    def there(self) -> int:
        """How many the proxy has not ended."""
        return sum(not _has_ended(raw) for raw in self.sockets)

    def ends(self, left: int) -> None:
        """Wait until only so many are left."""
        eventually(lambda: self.there() <= left, f"only {left} connections are left")
        assert self.there() == left

    def leave(self) -> None:
        """Close all of them."""
        for raw in self.sockets:
            raw.close()
        self.sockets.clear()


def honest(proxy: ProxyProcess, service: str, count: int, *, tls: ssl.SSLContext | None = None) -> None:
    """So many clients ask once each, from another address; each of them is served."""
    for number in range(count):
        raw: socket.socket = socket.create_connection(("127.0.0.1", proxy.port), PATIENCE, (GOOD, 0))
        try:
            if tls is not None:
                raw = tls.wrap_socket(raw, server_hostname=service)
            raw.sendall(get(service, f"/{number}"))
            answer = b""
            while not re.search(rb"\r\n\r\n.", answer):
                data = raw.recv(65536)
                assert data, answer
                answer += data
            assert answer.startswith(b"HTTP/1.1 200 "), answer
        finally:
            raw.close()


def lines(proxy: ProxyProcess, word: str) -> list[str]:
    """The lines of the operator's log that hold a word."""
    return [line for line in proxy.operator_log().splitlines() if word in line]


def refused(proxy: ProxyProcess, reason: str) -> float:
    """How much was refused for a reason."""
    return proxy.metric("portero_refused_total", reason=reason)


# Private


def _send(raw: socket.socket, data: bytes) -> None:
    try:
        raw.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        return  # it was turned away


def _has_ended(raw: socket.socket) -> bool:
    """Whether the end of the connection is there, behind whatever was said."""
    raw.setblocking(False)
    try:
        while data := raw.recv(65536):
            assert data
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        raw.settimeout(PATIENCE)
    return True


def all_of(groups: Iterable[Strangers]) -> int:
    """How many of all groups are left."""
    return sum(group.there() for group in groups)
