"""A strict, independent reader of HTTP/1.1, for what the proxy writes to backends and to clients.

It shares no line with the proxy, on purpose: it is the second opinion of the smuggling suite. It accepts what
RFC 9112 allows a sender to generate and nothing else, so that everything the proxy lets through in a shape
that somebody might read in another way raises `NotHttp`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

Field = tuple[bytes, bytes]

_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([\x21-\x7e]+) HTTP/1\.1")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9]) ([\t\x20-\x7e\x80-\xff]*)")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ?([\t\x20-\x7e\x80-\xff]*)")
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,8}")


class NotHttp(AssertionError):
    """Bytes that a strict recipient refuses."""


class Truncated(Exception):
    """The peer closed or reset in the middle of a message; `response` is what had come, if its head had."""

    def __init__(self, response: Response | None = None) -> None:
        super().__init__("closed in the middle of a message")
        self.response = response


class Closed(Exception):
    """The peer closed where a new message could have begun."""


@dataclass
class Request:
    """A request as a backend reads it; field names are lower-cased."""

    method: bytes
    path: bytes
    fields: list[Field]
    body: bytes = b""
    trailers: list[Field] = field(default_factory=list)
    raw: bytes = b""

    def values(self, name: bytes) -> list[bytes]:
        """All values of a field, in order."""
        return [value for given, value in self.fields if given == name]


@dataclass
class Response:
    """A response as a client reads it; field names are lower-cased."""

    status: int
    version: bytes
    fields: list[Field]
    body: bytes = b""
    trailers: list[Field] = field(default_factory=list)
    informational: list[int] = field(default_factory=list)
    phrase: bytes = b""

    def values(self, name: bytes) -> list[bytes]:
        """All values of a field, in order."""
        return [value for given, value in self.fields if given == name]

    def value(self, name: bytes) -> bytes:
        """The only value of a field."""
        (value,) = self.values(name)
        return value


class Reader:
    """A buffer over `receive`, which returns b"" at the end of the stream."""

    def __init__(self, receive: Callable[[], bytes]) -> None:
        self._receive = receive
        self.buffer = b""
        self.taken = bytearray()

    def line(self) -> bytes:
        """One line without its CRLF."""
        while b"\r\n" not in self.buffer:
            self._more()
        line, _, _ = self.buffer.partition(b"\r\n")
        self._take(len(line) + 2)
        if b"\r" in line or b"\n" in line:
            raise NotHttp(f"a bare CR or LF: {line!r}")
        return line

    def exactly(self, size: int) -> bytes:
        """The next `size` bytes."""
        parts = []
        while size:
            if not self.buffer:
                self._more()
            part = self.buffer[:size]
            self._take(len(part))
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def rest(self) -> bytes:
        """All bytes up to the end of the stream."""
        parts = [self.buffer]
        self._take(len(self.buffer))
        while data := self._receive():
            parts.append(data)
        return b"".join(parts)

    def at_end(self) -> bool:
        """Wait for the next byte; True when there is none."""
        if self.buffer:
            return False
        self.buffer = self._receive()
        return not self.buffer

    # Private

    def _more(self) -> None:
        data = self._receive()
        if not data:
            raise Truncated
        self.buffer += data

    def _take(self, size: int) -> None:
        self.taken += self.buffer[:size]
        self.buffer = self.buffer[size:]


def read_request(reader: Reader, on_head: Callable[[Request], None] | None = None) -> Request:
    """Read one request with its body. Raises `Closed` when none comes, `NotHttp`, `Truncated`."""
    if reader.at_end():
        raise Closed
    reader.taken.clear()
    line = reader.line()
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise NotHttp(f"request line {line!r}")
    request = Request(match[1], match[2], _fields(reader))
    lengths, codings = request.values(b"content-length"), request.values(b"transfer-encoding")
    if len(lengths) + len(codings) > 1 or len(request.values(b"host")) != 1:
        raise NotHttp(f"ambiguous head {request.fields}")
    if on_head is not None:
        on_head(request)
    if codings:
        if codings != [b"chunked"]:
            raise NotHttp(f"transfer coding {codings}")
        request.body, request.trailers = _chunked(reader, bytearray())
    elif lengths:
        request.body = reader.exactly(_length(lengths[0]))
    request.raw = bytes(reader.taken)
    return request


def read_response(reader: Reader, method: bytes = b"GET") -> Response:
    """Read one final response with its body, noting the 1xx before it.

    Raises `Closed` when none comes, `NotHttp`, and `Truncated` with what had come of it.
    """
    informational: list[int] = []
    while True:
        if reader.at_end():
            raise Closed
        response = _response_head(reader)
        if response.status >= 200 or response.status == 101:
            break
        informational.append(response.status)
    response.informational = informational
    if method == b"HEAD" or response.status in (101, 204, 304):
        return response
    lengths, codings = response.values(b"content-length"), response.values(b"transfer-encoding")
    if len(lengths) + len(codings) > 1:
        raise NotHttp(f"ambiguous head {response.fields}")
    body = bytearray()
    try:
        if codings:
            if codings != [b"chunked"]:
                raise NotHttp(f"transfer coding {codings}")
            response.body, response.trailers = _chunked(reader, body)
        elif lengths:
            size = _length(lengths[0])
            while len(body) < size:
                body += reader.exactly(1)
                body += reader.exactly(min(len(reader.buffer), size - len(body)))
            response.body = bytes(body)
        else:
            response.body = reader.rest()
    except Truncated:
        response.body = bytes(body)
        raise Truncated(response) from None
    return response


# Private


def _response_head(reader: Reader) -> Response:
    line = reader.line()
    match = _STATUS_LINE.fullmatch(line)
    if match is None:
        raise NotHttp(f"status line {line!r}")
    return Response(int(match[2]), b"1." + match[1], _fields(reader), phrase=match[3])


def _fields(reader: Reader) -> list[Field]:
    fields = []
    while line := reader.line():
        match = _FIELD.fullmatch(line)
        if match is None:
            raise NotHttp(f"field line {line!r}")
        fields.append((match[1].lower(), match[2]))
    return fields


def _length(value: bytes) -> int:
    if not re.fullmatch(rb"[0-9]{1,18}", value):
        raise NotHttp(f"Content-Length {value!r}")
    return int(value)


def _chunked(reader: Reader, body: bytearray) -> tuple[bytes, list[Field]]:
    while True:
        line = reader.line()
        if not _CHUNK_SIZE.fullmatch(line):
            raise NotHttp(f"chunk size line {line!r}")
        size = int(line, 16)
        if size == 0:
            return bytes(body), _fields(reader)
        body += reader.exactly(size)
        if reader.exactly(2) != b"\r\n":
            raise NotHttp("a chunk does not end with CRLF")
