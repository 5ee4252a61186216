"""Backends that remember every byte they received, and answer what a script says.

A `RecordingBackend` is a thread that accepts; every connection is a `Peer` with a thread of its own, in
which the script runs. A script reads from its peer and writes to it; when it returns, the connection is
closed. It may meet an end of the connection (`Closed`, `Truncated`, OSError): that ends the peer quietly,
because the proxy may close whenever it likes. Anything else (`NotHttp` above all: the proxy wrote something
ambiguous) is kept in `violations`, and `close` raises it.
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Callable

from tests.e2e.messages import Closed, Reader, Request, Truncated, read_request
from tests.e2e.waiting import PATIENCE, eventually

Script = Callable[["Peer"], None]


class Peer:
    """One connection from the proxy, as a script sees it."""

    def __init__(self, raw: socket.socket, number: int) -> None:
        self.number = number
        self.received = bytearray()
        self.requests: list[Request] = []
        self.sent = 0
        self.closed = threading.Event()  # the proxy has closed its side, or reset
        self._socket: socket.socket = raw
        self._reader = Reader(self.receive)

    def receive(self) -> bytes:
        """The next bytes; b"" when the proxy has closed."""
        try:
            data = self._socket.recv(262144)
        except OSError:
            self.closed.set()
            raise
        if not data:
            self.closed.set()
        self.received += data
        return data

    def read_request(self, on_head: Callable[[Request], None] | None = None) -> Request:
        """One whole request, which is also added to `requests`."""
        request = read_request(self._reader, on_head)
        self.requests.append(request)
        return request

    def read_head(self) -> bytes:
        """The bytes up to the end of a head; what has come behind it stays in the buffer."""
        lines = []
        while line := self._reader.line():
            lines.append(line)
        return b"\r\n".join(lines)

    def read_rest(self) -> bytes:
        """Everything until the proxy closes."""
        return self._reader.rest()

    def send(self, data: bytes) -> None:
        """Send all of `data`."""
        self._socket.sendall(data)
        self.sent += len(data)

    def close(self) -> None:
        """Close in good order: FIN behind the last byte."""
        self._socket.close()

    def shut(self) -> None:
        """Close the writing side only."""
        self._socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close with RST."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def wait_closed(self) -> None:
        """Read and record until the proxy closes."""
        while self.receive():
            pass

    def secure(self, context: ssl.SSLContext) -> None:
        """Take the TLS handshake."""
        self._socket = context.wrap_socket(self._socket, server_side=True)

    def interrupt(self) -> None:
        """Wake a script that waits in `receive` or `send`."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            self.closed.set()  # it was gone already


class RecordingBackend:
    """A TCP or TLS server on `port`, or a free one, that records what it gets and plays `script`."""

    def __init__(
        self, script: Script, *, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.script = script
        self.host = host
        self.peers: list[Peer] = []
        self.violations: list[BaseException] = []
        self._tls = tls
        self._listening = socket.create_server((host, port), family=family, backlog=512)
        self.port: int = self._listening.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    @property
    def requests(self) -> list[Request]:
        """All complete requests, connection by connection."""
        return [request for peer in list(self.peers) for request in peer.requests]

    @property
    def received(self) -> bytes:
        """All bytes of all connections."""
        return b"".join(bytes(peer.received) for peer in list(self.peers))

    def wait_for_peers(self, count: int = 1) -> list[Peer]:
        """Wait until `count` connections have come."""
        eventually(lambda: len(self.peers) >= count, f"{count} connections at the backend")
        return self.peers

    def close(self) -> None:
        """Stop, and raise the first violation that a script met."""
        self._listening.shutdown(socket.SHUT_RDWR)
        self._accepting.join(PATIENCE)
        self._listening.close()
        for peer in self.peers:
            peer.interrupt()
        for thread in self._threads:
            thread.join(PATIENCE)
        if self.violations:
            raise self.violations[0]

    # Private

    def _accept(self) -> None:
        while True:
            try:
                raw, _ = self._listening.accept()
            except OSError:
                return
            raw.settimeout(60)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer = Peer(raw, len(self.peers))
            self.peers.append(peer)
            thread = threading.Thread(target=self._play, args=(peer,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _play(self, peer: Peer) -> None:
        try:
            if self._tls is not None:
                peer.secure(self._tls)
            self.script(peer)
        except (Closed, Truncated, OSError):
            peer.closed.set()
        except BaseException as violation:
            self.violations.append(violation)
        finally:
            peer.close()


# Scripts


def echo_each(peer: Peer) -> None:
    """Answer every request with 200; the body tells method, path and the request's body."""
    while True:
        request = peer.read_request()
        peer.send(ok(b"%b %b %b" % (request.method, request.path, request.body), request))


def ok(body: bytes, request: Request | None = None) -> bytes:
    """A 200 with `body`, which is left away when `request` is a HEAD."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    return head if request is not None and request.method == b"HEAD" else head + body


def answer_with(raw: bytes, *, then_close: bool = False) -> Script:
    """Read each request and answer it with `raw`."""

    def script(peer: Peer) -> None:
        while True:
            peer.read_request()
            peer.send(raw)
            if then_close:
                return

    return script


def in_turn(*scripts: Script) -> Script:
    """The first script for the first connection, and so on; the last one for all that follow."""

    def script(peer: Peer) -> None:
        scripts[min(peer.number, len(scripts) - 1)](peer)

    return script
