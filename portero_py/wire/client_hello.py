"""The first bytes of a TLS connection: which name a client asks for, and which protocols it offers.

Enough of RFC 8446 (4.1.2, 5.1) and RFC 5246 to look at a ClientHello before OpenSSL does, and no more: the
caller of this hands the same bytes to OpenSSL afterwards, which judges them. So the reader accepts whatever
it can read, says `NOT_TLS` for everything else, and never raises.

- A handshake message may be spread over several records, at any byte: it is put together again first. Work
  is done once a record, however small the pieces are in which it comes.
- What is not whole after `MAX_HELLO` bytes, record headers included, is `NOT_TLS`. Real hellos have 200 to
  2,000 bytes; so what a caller holds back is bounded.
- A name or a protocol list that breaks off is as if it were not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: The most bytes that are looked at before the hello has to be whole.
MAX_HELLO: Final = 16 * 1024

_HANDSHAKE: Final = 22
_CLIENT_HELLO: Final = 1
_RECORD_HEADER: Final = 5
_MESSAGE_HEADER: Final = 4
_MAJOR_VERSION: Final = 3
_MAX_RECORD: Final = 1 << 14
_SERVER_NAME: Final = 0
_ALPN: Final = 16
_HOST_NAME: Final = 0


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What a client says about itself: the name it asks for ("" when none), as sent, and its ALPN list."""

    server_name: str = ""
    protocols: tuple[bytes, ...] = ()


#: What is no ClientHello, or too long for one. It offers nothing.
NOT_TLS: Final = ClientHello()


class HelloReader:
    """Reads one connection's hello. `data` is all that was fed, for whoever reads next."""

    __slots__ = ("_message", "_position", "data")

    def __init__(self) -> None:
        self.data = bytearray()
        self._message = bytearray()  # the payload of the records that are whole
        self._position = 0  # where the next record begins

    def feed(self, data: bytes) -> ClientHello | None:
        """Take the next bytes; returns the hello, `NOT_TLS` when there will be none, or None: feed more."""
        self.data += data
        while (left := len(self.data) - self._position) > 0:
            header = self.data[self._position : self._position + _RECORD_HEADER]
            # The version is 3.x in every TLS there is; nothing else depends on it.
            if header[0] != _HANDSHAKE or (left > 1 and header[1] != _MAJOR_VERSION):
                return NOT_TLS
            length = int.from_bytes(header[3:])
            if left >= _RECORD_HEADER and not 0 < length <= _MAX_RECORD:
                return NOT_TLS
            if left < _RECORD_HEADER + length or left < _RECORD_HEADER:
                break
            start = self._position + _RECORD_HEADER
            self._position = start + length
            self._message += self.data[start : self._position]
            found = self._found()
            if found is not None:
                return found
        return None if len(self.data) <= MAX_HELLO else NOT_TLS

    # Private

    def _found(self) -> ClientHello | None:
        message = self._message
        if message[0] != _CLIENT_HELLO:
            return NOT_TLS
        if len(message) < _MESSAGE_HEADER:
            return None
        end = _MESSAGE_HEADER + int.from_bytes(message[1:_MESSAGE_HEADER])
        if end > MAX_HELLO:
            return NOT_TLS
        return _parse(bytes(message[_MESSAGE_HEADER:end])) if len(message) >= end else None


# Private


def _parse(body: bytes) -> ClientHello:
    """A whole message: version, random, session id, cipher suites, compression methods, extensions."""
    reader = _Reader(body)
    reader.skip(2 + 32)
    reader.vector(1)
    reader.vector(2)
    reader.vector(1)
    extensions = _Reader(reader.vector(2))
    name = ""
    protocols: tuple[bytes, ...] = ()
    while extensions.left:
        kind = extensions.number(2)
        content = extensions.vector(2)
        if kind == _SERVER_NAME:
            name = _server_name(content)
        elif kind == _ALPN:
            protocols = _protocols(content)
    if extensions.broke_off or reader.broke_off:
        return NOT_TLS
    return ClientHello(name, protocols)


def _server_name(content: bytes) -> str:
    names = _Reader(_Reader(content).vector(2))
    kind, name = names.number(1), names.vector(2)
    return "" if kind != _HOST_NAME or names.broke_off else name.decode("ascii", "replace")


def _protocols(content: bytes) -> tuple[bytes, ...]:
    listed = _Reader(_Reader(content).vector(2))
    found = []
    while listed.left:
        found.append(listed.vector(1))
    return () if listed.broke_off else tuple(found)


class _Reader:
    """Reads numbers and length-prefixed vectors; past the end everything is empty and `broke_off` is set."""

    __slots__ = ("_data", "_position", "broke_off")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
        self.broke_off = False

    @property
    def left(self) -> bool:
        return self._position < len(self._data)

    def skip(self, length: int) -> bytes:
        start = self._position
        self._position = start + length
        if self._position > len(self._data):
            self.broke_off = True
            return b""
        return self._data[start : self._position]

    def number(self, width: int) -> int:
        return int.from_bytes(self.skip(width))

    def vector(self, width: int) -> bytes:
        return self.skip(self.number(width))
