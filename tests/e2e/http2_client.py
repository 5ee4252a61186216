"""An HTTP/2 client that sends exactly the frames it is told to (RFC 9113), over TLS or with prior knowledge.

Nothing is validated on the way out. HPACK is that of the `hpack` package, so that it is not the proxy's own.
Answers are gathered by stream; `outcome` waits until a stream, or the whole connection, has come to an end.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import hpack

from tests.e2e.waiting import PATIENCE

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    range(10)
)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITIZED = 0x1, 0x1, 0x4, 0x8, 0x20

NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = 0, 1, 2, 3
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, COMPRESSION_ERROR = 5, 6, 7, 9
ENHANCE_YOUR_CALM = 11

Fields = Sequence[tuple[bytes, bytes]]


@dataclass
class Answer:
    """What has come on one stream."""

    heads: list[dict[bytes, bytes]] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    ended: bool = False
    reset: int | None = None

    @property
    def status(self) -> int:
        """The final status, or 0 while there is none."""
        for head in self.heads:
            status = int(head.get(b":status", b"0"))
            if status >= 200:
                return status
        return 0


@dataclass(frozen=True)
class Outcome:
    """How a stream ended: with a status, with RST_STREAM, or with the connection (`goaway`, `closed`)."""

    status: int = 0
    body: bytes = b""
    reset: int | None = None
    goaway: int | None = None
    closed: bool = False


class Http2Client:
    """One connection; `settings` are those of its first SETTINGS frame, sent unless `begins` is False."""

    def __init__(
        self,
        address: tuple[str, int],
        tls: ssl.SSLContext | None,
        sni: str,
        *,
        settings: Sequence[tuple[int, int]] = (),
        opens_windows: bool = True,
        begins: bool = True,
    ) -> None:
        raw = socket.create_connection(address, timeout=PATIENCE)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket: socket.socket = raw
        if tls is not None:
            try:
                self.socket = secure = tls.wrap_socket(raw, server_hostname=sni)
            except OSError:
                raw.close()
                raise
            assert secure.selected_alpn_protocol() == "h2"
        self.encoder = hpack.Encoder()
        self.answers: dict[int, Answer] = {}
        self.goaway: int | None = None
        self.last_stream = -1
        self.closed = False
        self.pongs: list[bytes] = []
        self.settings_seen: list[bytes] = []
        self.windows_seen: Counter[int] = Counter()  # bytes of WINDOW_UPDATEs, by stream
        self._decoder = hpack.Decoder()
        self._decoder.max_allowed_table_size = 1 << 16
        self._opens_windows = opens_windows
        self._buffer = b""
        self._block = b""
        self._next_stream = 1
        if begins:
            payload = b"".join(struct.pack(">HI", *pair) for pair in settings)
            self.send(PREFACE + frame(SETTINGS, 0, 0, payload))

    def __enter__(self) -> Http2Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Out

    def send(self, data: bytes) -> None:
        """Send raw bytes; when the proxy has closed already, what it said is still to be read."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
            return

    def flood(self, pieces: Iterable[bytes], *, reads: bool = True) -> None:
        """Send all pieces as fast as the proxy takes them, reading meanwhile, until GOAWAY or the end."""
        self.socket.setblocking(False)
        try:
            for piece in pieces:
                left = memoryview(piece)
                while left and not self.closed and not self.goaway:
                    select.select([self.socket] if reads else [], [self.socket], [], PATIENCE)
                    try:
                        left = left[self.socket.send(left) :]
                    except ssl.SSLWantWriteError:
                        pass  # its buffer is full: read, then try again
                    except (OSError, ssl.SSLError):
                        break
                    if reads:
                        self._read_what_is_there()
        finally:
            self.socket.settimeout(PATIENCE)
        while reads and not self.closed and not self.goaway:
            self.read()

    def block(self, fields: Fields) -> bytes:
        """An HPACK block."""
        return bytes(self.encoder.encode(list(fields), huffman=False))

    def new_stream(self) -> int:
        """The next stream id."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        return stream

    def request(self, fields: Fields, body: bytes | None = None) -> int:
        """Send HEADERS, and DATA when there is a body; the stream's id."""
        stream = self.new_stream()
        flags = END_HEADERS | (END_STREAM if body is None else 0)
        data = frame(HEADERS, flags, stream, self.block(fields))
        if body is not None:
            data += frame(DATA, END_STREAM, stream, body)
        self.send(data)
        return stream

    # In

    def outcome(self, stream: int) -> Outcome:
        """Wait until the stream or the connection has ended."""
        answer = self.answers.setdefault(stream, Answer())
        while not (answer.ended or answer.reset is not None or self.goaway is not None or self.closed):
            self.read()
        if answer.ended or answer.reset is not None:
            return Outcome(answer.status, bytes(answer.body), answer.reset)
        return Outcome(answer.status, bytes(answer.body), None, self.goaway, self.closed)

    def ask(self, fields: Fields, body: bytes | None = None) -> Outcome:
        """Send a request and wait for its end."""
        return self.outcome(self.request(fields, body))

    def read_until_goaway(self) -> int | None:
        """Read until a GOAWAY with an error, or the end; the last GOAWAY's code."""
        while not self.closed and not self.goaway:
            self.read()
        return self.goaway

    def read_until_closed(self) -> None:
        """Read until the proxy closes."""
        while not self.closed:
            self.read()

    def read(self) -> None:
        """Take in what comes next."""
        try:
            data = self.socket.recv(262144)
        except (ConnectionResetError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
            data = b""
        if not data:
            self.closed = True
            return
        self._buffer += data
        while len(self._buffer) >= 9:
            size = int.from_bytes(self._buffer[:3], "big")
            if len(self._buffer) < 9 + size:
                return
            kind, flags = self._buffer[3], self._buffer[4]
            stream = int.from_bytes(self._buffer[5:9], "big")
            payload, self._buffer = self._buffer[9 : 9 + size], self._buffer[9 + size :]
            self._take(kind, flags, stream, payload)

    def close(self) -> None:
        """Close without a word."""
        self.socket.close()

    # Private

    def _read_what_is_there(self) -> None:
        try:
            self.read()
        except ssl.SSLWantReadError:
            return

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        answer = self.answers.setdefault(stream, Answer())
        if kind == DATA:
            assert not flags & PADDED
            answer.body += payload
            answer.ended = bool(flags & END_STREAM)
            if payload and self._opens_windows:
                self.send(window_update(0, len(payload)) + window_update(stream, len(payload)))
        elif kind in (HEADERS, CONTINUATION):
            assert not flags & PADDED
            assert not flags & PRIORITIZED
            self._block += payload
            if kind == HEADERS and flags & END_STREAM:
                answer.ended = True
            if flags & END_HEADERS:
                block, self._block = self._block, b""
                pairs = self._decoder.decode(block, raw=True)
                answer.heads.append({bytes(name): bytes(value) for name, value in pairs})
        elif kind == RST_STREAM:
            answer.reset = int.from_bytes(payload, "big")
        elif kind == SETTINGS and not flags & ACK:
            self.settings_seen.append(payload)
            self.send(frame(SETTINGS, ACK, 0, b""))
        elif kind == WINDOW_UPDATE:
            self.windows_seen[stream] += int.from_bytes(payload, "big")
        elif kind == PING and flags & ACK:
            self.pongs.append(payload)
        elif kind == PING:
            self.send(frame(PING, ACK, 0, payload))
        elif kind == GOAWAY:
            self.last_stream, self.goaway = struct.unpack(">II", payload[:8])


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def window_update(stream: int, size: int) -> bytes:
    """A WINDOW_UPDATE frame."""
    return frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", size))


def rst_stream(stream: int, code: int = 8) -> bytes:
    """A RST_STREAM frame; 8 is CANCEL."""
    return frame(RST_STREAM, 0, stream, struct.pack(">I", code))


def fields_of(
    service: str, path: bytes = b"/", *extra: tuple[bytes, bytes], method: bytes = b"GET"
) -> list[tuple[bytes, bytes]]:
    """The fields of an ordinary request."""
    return [
        (b":method", method),
        (b":scheme", b"https"),
        (b":authority", service.encode()),
        (b":path", path),
        *extra,
    ]
