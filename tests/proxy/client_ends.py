"""Clients of every HTTP version, for the dialogues that every downstream has to hold.

A `ClientEnd` is a client and the connection's protocol before it, with a scripted exchange behind: what the
downstream tells its exchange is in `exchange.said`, and what the test has the exchange tell the downstream is
what `end.seen()` finds that the client was sent.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import hpack
import pytest

from portero_py.proxy.downstream import http1
from portero_py.proxy.downstream.http1 import Http1Downstream
from portero_py.proxy.downstream.http2 import Http2Downstream
from portero_py.proxy.endpoints import Downstream, RequestSide
from portero_py.wire.http2.frames import (
    DATA,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    FRAME_LIMIT,
    HEADERS,
    PREFACE,
    RST_STREAM,
    WINDOW_UPDATE,
    ErrorCode,
    reset_frame,
    settings_frame,
    window_frame,
)
from tests.e2e.messages import Closed, Reader, Response, Truncated, read_response
from tests.proxy.dialogue import ScriptedTransport, World
from tests.wire.http2.dialogue import Frame, frame, split_frames

if TYPE_CHECKING:
    from collections.abc import Callable

    from portero_py.errors import PorteroError
    from portero_py.proxy.peer import Peer
    from portero_py.proxy.surroundings import Surroundings
    from portero_py.wire.message import Fields, RequestHead


class ScriptedExchange(RequestSide):
    """Writes down what its downstream says; `on_start` is what it does at once."""

    on_start: Callable[[ScriptedExchange], None] | None = None

    def __init__(self, surroundings: Surroundings, peer: Peer, downstream: Downstream, head: RequestHead):
        self.peer = peer
        self.downstream = downstream
        self.head = head
        self.request_id = b"id-7"
        self.said: list[object] = []
        self._timeouts = surroundings.timeouts

    @property
    def body_idle(self) -> float:
        """As the configuration says."""
        return self._timeouts.body_idle

    @property
    def body(self) -> bytes:
        """All of the request's body that was delivered."""
        return b"".join(each for each in self.said if isinstance(each, bytes))

    @property
    def calls(self) -> list[object]:
        """What was said, but for the bytes."""
        return [each for each in self.said if not isinstance(each, bytes)]

    def start(self) -> None:
        self.said.append("start")
        if self.on_start is not None:
            self.on_start(self)

    def request_body(self, data: bytes) -> None:
        assert data, "a body without bytes"
        self.said.append(data)

    def request_end(self, trailers: Fields | None) -> None:
        self.said.append(("end", trailers))

    def downstream_paused(self) -> None:
        self.said.append("paused")

    def downstream_resumed(self) -> None:
        self.said.append("resumed")

    def downstream_gone(self, error: PorteroError) -> None:
        self.said.append(("gone", error.reason))

    def broke(self) -> None:
        raise AssertionError("a fault of our own")


@dataclass
class Seen:
    """What a client has of its response; `broken`: it knows that the rest will never come."""

    status: int = 0
    informational: list[int] = field(default_factory=list)
    fields: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    trailers: list[tuple[bytes, bytes]] = field(default_factory=list)
    complete: bool = False
    broken: bool = False


class ClientEnd:
    """A client on one connection, with one request at a time. Field names are given in lower case."""

    #: Whether the end of one side of a tunnel can be told apart from the end of both; None: no tunnels.
    half_closes: bool | None = None
    #: What belongs to "TE: trailers".
    te_fields: tuple[tuple[bytes, bytes], ...] = ()

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = world
        self.exchanges: list[ScriptedExchange] = []
        self.on_start: Callable[[ScriptedExchange], None] | None = None
        self.transport = self._connect(monkeypatch)
        world.connected.append(self.transport)

    def begin(
        self, method: bytes = b"GET", fields: tuple[tuple[bytes, bytes], ...] = (), *, body: bool = False
    ) -> ScriptedExchange:
        """Send a head; with `body` it is not yet the whole request."""
        raise NotImplementedError

    def send_body(self, data: bytes) -> None:
        """Send some of the body."""
        raise NotImplementedError

    def send_end(self, trailers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        """Send the end of the request."""
        raise NotImplementedError

    def send_nonsense(self) -> None:
        """Break the protocol in the middle of a body."""
        raise NotImplementedError

    def may_send(self) -> bool:
        """Whether another 1,000 bytes of the body would be taken from the client."""
        raise NotImplementedError

    def read_all(self) -> None:
        """Read, after `transport.stop_reading()`."""
        self.transport.read_all()

    def seen(self) -> Seen:
        """What has come of the response to the latest request."""
        raise NotImplementedError

    # Private

    def _connect(self, monkeypatch: pytest.MonkeyPatch) -> ScriptedTransport:
        raise NotImplementedError

    def _new_exchange(
        self, surroundings: Surroundings, peer: Peer, downstream: Downstream, head: RequestHead, /
    ) -> ScriptedExchange:
        made = ScriptedExchange(surroundings, peer, downstream, head)
        made.on_start = self.on_start
        self.exchanges.append(made)
        return made


class Http1Client(ClientEnd):
    half_closes = True
    te_fields = ((b"connection", b"te"),)
    _tls = False

    def begin(
        self, method: bytes = b"GET", fields: tuple[tuple[bytes, bytes], ...] = (), *, body: bool = False
    ) -> ScriptedExchange:
        self._begun = len(self.transport.received)
        self._method = method
        framing = ((b"transfer-encoding", b"chunked"),) if body else ()
        lines = b"".join(b"%b: %b\r\n" % pair for pair in (*framing, *fields))
        self.transport.send(b"%b / HTTP/1.1\r\nhost: app.example\r\n%b\r\n" % (method, lines))
        return self.exchanges[-1]

    def send_body(self, data: bytes) -> None:
        self.transport.send(b"%x\r\n%b\r\n" % (len(data), data))

    def send_end(self, trailers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        lines = b"".join(b"%b: %b\r\n" % pair for pair in trailers)
        self.transport.send(b"0\r\n%b\r\n" % lines)

    def send_nonsense(self) -> None:
        self.transport.send(b"no chunk\r\n")

    def may_send(self) -> bool:
        return self.transport.reading

    def seen(self) -> Seen:
        came = [self.transport.received[self._begun :]]
        reader = Reader(lambda: came.pop() if came else b"")
        complete = True
        found: Response | None
        try:
            found = read_response(reader, self._method)
        except Closed:
            complete, found = False, None
        except Truncated as error:
            complete, found = False, error.response
        broken = not complete and (self.transport.closed or self.transport.ended)
        if found is None:
            return Seen(broken=broken)
        return Seen(
            found.status,
            found.informational,
            dict(found.fields),
            found.body,
            found.trailers,
            complete,
            broken,
        )

    # Private

    def _connect(self, monkeypatch: pytest.MonkeyPatch) -> ScriptedTransport:
        monkeypatch.setattr(http1, "Exchange", self._new_exchange)
        transport = ScriptedTransport(tls=self._tls)
        transport.protocol = Http1Downstream(self.world)
        transport.protocol.connection_made(transport)
        if self._tls:
            transport.protocol._peer.tls_version = "TLSv1.3"
        return transport


class Http1TlsClient(Http1Client):
    half_closes = False
    _tls = True


class Http2Client(ClientEnd):
    def begin(
        self, method: bytes = b"GET", fields: tuple[tuple[bytes, bytes], ...] = (), *, body: bool = False
    ) -> ScriptedExchange:
        self._stream += 2
        self._window = DEFAULT_WINDOW
        pseudo = (
            (b":method", method),
            (b":scheme", b"https"),
            (b":authority", b"app.example"),
            (b":path", b"/"),
        )
        block = self._encoder.encode((*pseudo, *fields))
        self.transport.send(frame(HEADERS, END_HEADERS | (0 if body else END_STREAM), self._stream, block))
        return self.exchanges[-1]

    def send_body(self, data: bytes) -> None:
        self._window -= len(data)
        while data:
            piece, data = data[:FRAME_LIMIT], data[FRAME_LIMIT:]
            self.transport.send(frame(DATA, 0, self._stream, piece))

    def send_end(self, trailers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        if trailers:
            block = self._encoder.encode(trailers)
            self.transport.send(frame(HEADERS, END_HEADERS | END_STREAM, self._stream, block))
        else:
            self.transport.send(frame(DATA, END_STREAM, self._stream))

    def send_nonsense(self) -> None:
        self.transport.send(reset_frame(self._stream, ErrorCode.PROTOCOL_ERROR))

    def may_send(self) -> bool:
        opened = sum(
            int.from_bytes(each.payload, "big") for each in self._frames() if each.kind == WINDOW_UPDATE
        )
        return self.transport.reading and self._window + opened >= 1000

    def read_all(self) -> None:
        super().read_all()
        for number in (0, self._stream):
            self.transport.send(window_frame(number, 1 << 24))

    def seen(self) -> Seen:
        seen = Seen(broken=self.transport.closed)
        for each in self._frames():
            if each.kind == HEADERS:
                fields = self._decoded(each)
                status = int(fields.pop(0)[1]) if fields[0][0] == b":status" else 0
                if 100 <= status < 200:
                    seen.informational.append(status)
                elif status:
                    seen.status, seen.fields = status, dict(fields)
                else:
                    seen.trailers = fields
            elif each.kind == DATA:
                seen.body += each.payload
            elif each.kind == RST_STREAM:
                seen.broken = not seen.complete
            if each.kind in (HEADERS, DATA) and each.flags & END_STREAM:
                seen.complete, seen.broken = True, False
        return seen

    # Private

    def _frames(self) -> list[Frame]:
        """All frames of the latest stream."""
        return [each for each in split_frames(self.transport.received) if each.stream == self._stream]

    def _decoded(self, headers: Frame) -> list[tuple[bytes, bytes]]:
        """The fields of a HEADERS frame: each is decoded once, in order, as the compression demands."""
        every = [each for each in split_frames(self.transport.received) if each.kind == HEADERS]
        for each in every[len(self._blocks) :]:
            fields = self._decoder.decode(each.payload, raw=True)
            self._blocks.append([(bytes(name), bytes(value)) for name, value in fields])
        at = next(number for number, each in enumerate(every) if each == headers)
        return list(self._blocks[at])

    def _connect(self, monkeypatch: pytest.MonkeyPatch) -> ScriptedTransport:
        self._encoder = hpack.Encoder()
        self._decoder = hpack.Decoder()
        self._blocks: list[list[tuple[bytes, bytes]]] = []
        self._stream = -1
        transport = ScriptedTransport(tls=True)
        made = Http2Downstream(
            self.world,
            self.world.peers.of(transport),
            cast("asyncio.Transport", transport),
            self._new_exchange,
        )
        transport.protocol = made
        self.world.connection_opened(made)
        transport.send(PREFACE + settings_frame(()))
        return transport


#: Whoever implements `Downstream` joins by one line.
CLIENT_ENDS: dict[str, type[ClientEnd]] = {
    "http1": Http1Client,
    "http1-tls": Http1TlsClient,
    "http2": Http2Client,
}
