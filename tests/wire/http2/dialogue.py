"""A scripted HTTP/2 client in front of the core: bytes in, frames and commands out.

HPACK here is the `hpack` package, not the library under test. Every command that the core gives a stream ends
up in `said` as a tuple: its name, the stream, what came with it.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import hpack

from portero_py.errors import PorteroError
from portero_py.wire.http2.frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PREFACE,
    RST_STREAM,
    ErrorCode,
    settings_frame,
)
from portero_py.wire.http2.heads import HeadLimits
from portero_py.wire.http2.server import ServerConnection
from portero_py.wire.http2.server_stream import ServerStream
from portero_py.wire.message import Fields, RequestHead, ResponseHead

GET = [(":method", "GET"), (":scheme", "https"), (":authority", "app.example"), (":path", "/")]
POST = [(":method", "POST"), (":scheme", "https"), (":authority", "app.example"), (":path", "/up")]

Command = tuple[object, ...]
Pairs = list[tuple[str, str]] | list[tuple[bytes, bytes]]


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Encode a frame, by other means than the code under test."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def split_frames(data: bytes) -> list[Frame]:
    """Decode a sequence of whole frames."""
    frames = []
    while data:
        length = int.from_bytes(data[:3], "big")
        kind, flags, stream = struct.unpack(">BBI", data[3:9])
        assert len(data) >= 9 + length
        frames.append(Frame(kind, flags, stream, data[9 : 9 + length]))
        data = data[9 + length :]
    return frames


class Recorded(ServerStream):
    """A stream that writes down what it is told; `Dialogue.answer` may react to a head."""

    dialogue: Dialogue
    head: RequestHead

    def on_head(self, head: RequestHead) -> None:
        self.head = head
        self.dialogue.say("head", self, head.method, head.target)
        self.dialogue.react(self)

    def on_refused(self, error: PorteroError) -> None:
        self.dialogue.say("refused", self, error.status)
        self.send_response(ResponseHead(error.status, b"", [], 0), b"")

    def on_body(self, data: bytes) -> None:
        self.dialogue.say("body", self, data)

    def on_end(self, trailers: Fields | None) -> None:
        self.dialogue.say("end", self, trailers)

    def on_lost(self, error: PorteroError) -> None:
        self.dialogue.say("lost", self, error.reason)

    def on_held_up(self) -> None:
        self.dialogue.say("held up", self)

    def on_relieved(self) -> None:
        self.dialogue.say("relieved", self)


class Dialogue:
    """One connection, its client's side of HPACK, and all that was said."""

    def __init__(self, *, greet: bool = True, streams: int = 100, limits: HeadLimits | None = None) -> None:
        self.said: list[Command] = []
        self.woken = 0
        self.now = 1000.0
        self.answer: ResponseHead | None = None
        self.encoder = hpack.Encoder()
        self.decoder = hpack.Decoder()
        self.connection = ServerConnection(
            self._wake, self._stream, limits or HeadLimits(8192, 32768, 100), streams
        )
        if greet:
            self.send(PREFACE + settings_frame(()))
            self.frames()

    def send(self, data: bytes) -> None:
        """The client sends bytes, and the event loop turns until they are dealt with."""
        self.connection.receive(data, self.now)
        while self.connection.behind:
            self.connection.receive(b"", self.now)

    def send_frame(self, kind: int, flags: int, stream: int, payload: bytes = b"") -> None:
        self.send(frame(kind, flags, stream, payload))

    def request(self, stream: int, fields: Pairs | None = None, *, ends: bool = True) -> Recorded | None:
        """The client opens a stream; return ours when it is still open."""
        block = self.encoder.encode(GET if fields is None else fields)
        self.send_frame(HEADERS, END_HEADERS | (END_STREAM if ends else 0), stream, block)
        return self.stream(stream)

    def open(self, stream: int, fields: Pairs | None = None, *, ends: bool = True) -> Recorded:
        """As `request`, for a stream that stays open."""
        opened = self.request(stream, fields, ends=ends)
        assert opened is not None
        return opened

    def upload(self, stream: int, length: int | None = None) -> Recorded:
        """The client opens a stream whose body is still to come."""
        fields = POST if length is None else [*POST, ("content-length", str(length))]
        return self.open(stream, fields, ends=False)

    def data(self, stream: int, data: bytes, *, ends: bool = False) -> None:
        self.send_frame(DATA, END_STREAM if ends else 0, stream, data)

    def stream(self, stream: int) -> Recorded | None:
        found = self.connection.streams.get(stream)
        assert found is None or isinstance(found, Recorded)
        return found

    def frames(self) -> list[Frame]:
        """What the client receives."""
        return split_frames(self.connection.output.take())

    def of(self, kind: int) -> list[Frame]:
        """What the client receives of one type."""
        return [one for one in self.frames() if one.kind == kind]

    def response(self, frames: list[Frame]) -> list[tuple[str, str]]:
        """Decode the one header block in `frames`."""
        block = b"".join([one.payload for one in frames if one.kind in (HEADERS, CONTINUATION)])
        return [(str(name), str(value)) for name, value in self.decoder.decode(block)]

    def goaway(self) -> tuple[int, ErrorCode]:
        """The client receives a GOAWAY: its last stream and code."""
        (found,) = self.of(GOAWAY)
        last, code = struct.unpack(">II", found.payload[:8])
        return last, ErrorCode(code)

    def failed(self) -> ErrorCode:
        """The connection has ended with an error: its code."""
        assert self.connection.finished
        assert self.connection.fault is not None
        assert self.goaway()[1] == self.connection.fault.code
        return self.connection.fault.code

    def resets(self) -> list[tuple[int, ErrorCode]]:
        """The client receives RST_STREAM: streams and codes."""
        return [(one.stream, ErrorCode(int.from_bytes(one.payload, "big"))) for one in self.of(RST_STREAM)]

    # What the recorded streams do

    def say(self, what: str, stream: ServerStream, *more: object) -> None:
        self.said.append((what, stream.id, *more))

    def react(self, stream: ServerStream) -> None:
        if self.answer is not None:
            stream.send_response(self.answer, b"hello")

    def _wake(self) -> None:
        self.woken += 1

    def _stream(self, connection: ServerConnection, number: int, window: int) -> ServerStream:
        stream = Recorded(connection, number, window)
        stream.dialogue = self
        return stream
