"""A client that sends exactly the bytes it is told to, over TCP or TLS."""

from __future__ import annotations

import socket
import ssl
import struct
from types import TracebackType

from tests.e2e.messages import Reader, Response, read_response
from tests.e2e.waiting import PATIENCE


class Http1Client:
    """One connection to the proxy."""

    def __init__(
        self,
        address: tuple[str, int],
        *,
        tls: ssl.SSLContext | None = None,
        sni: str | None = None,
        source: str = "",
    ) -> None:
        raw = socket.create_connection(address, PATIENCE, (source, 0) if source else None)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket: socket.socket = raw
        if tls is not None:
            try:
                self.socket = tls.wrap_socket(raw, server_hostname=sni)
            except OSError:
                raw.close()
                raise
        self._reader = Reader(self._receive)

    def __enter__(self) -> Http1Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        """Send all of `data`; a proxy that has closed already is no error here: read what it said."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return

    def send_slowly(self, data: bytes) -> None:
        """Send every byte in a segment of its own."""
        for i in range(len(data)):
            self.send(data[i : i + 1])

    def read_response(self, method: bytes = b"GET") -> Response:
        """The next final response. Raises `Closed`, `Truncated`, `NotHttp`."""
        return read_response(self._reader, method)

    def ask(self, data: bytes, method: bytes = b"GET") -> Response:
        """Send and read the response."""
        self.send(data)
        return self.read_response(method)

    def read_some(self) -> bytes:
        """Whatever comes next, raw; b"" at the end."""
        if self._reader.buffer:
            data, self._reader.buffer = self._reader.buffer, b""
            return data
        return self._receive()

    def read_all(self) -> bytes:
        """Every byte until the proxy closes."""
        return self._reader.rest()

    def shut(self) -> None:
        """Close the writing side only."""
        self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close in good order."""
        self.socket.close()

    def reset(self) -> None:
        """Vanish: RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    # Private

    def _receive(self) -> bytes:
        try:
            return self.socket.recv(262144)
        except (ConnectionResetError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return b""


def get(host: str, path: str = "/", *lines: str, version: str = "1.1", method: str = "GET") -> bytes:
    """A plain request without a body."""
    fields = "".join(f"{line}\r\n" for line in (f"Host: {host}", *lines))
    return f"{method} {path} HTTP/{version}\r\n{fields}\r\n".encode("latin-1")


def post(host: str, body: bytes, path: str = "/", *lines: str) -> bytes:
    """A POST with Content-Length."""
    return get(host, path, f"Content-Length: {len(body)}", *lines, method="POST") + body
