"""A client's HTTP/2 connection: the socket and the clock around `wire/http2.py`, and its streams' exchanges.

What the core wants to send leaves in one write for each turn of the event loop: after `data_received`,
or in one callback for all responses that arrived in the same turn.

Backpressure
- The socket is full: `output.blocked`. Bodies then wait in their streams, which hold up their backends; heads
  and control frames go on into the output, and when that grows the client is no longer read. So a client
  that does not read its answers can ask for nothing.
- A window is used up: the core holds up the one backend.
- A backend does not read: the core gives no window back for that stream.

Time
One deadline for the connection, none for a stream: a sweep every few seconds compares with what it found the
last time. So all time-outs here fire up to two sweeps (LOOK seconds each) late, and no request sets a timer.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Protocol

from portero_py.errors import BodyTimeout, ClientGone
from portero_py.proxy.exchange import Exchange
from portero_py.proxy.replies import reply
from portero_py.wire.http2 import Phase, ServerConnection
from portero_py.wire.http2_frames import ErrorCode
from portero_py.wire.http2_heads import HeadLimits
from portero_py.wire.http2_stream import ENDING, HEAD, Stream

if TYPE_CHECKING:
    from portero_py.errors import PorteroError
    from portero_py.proxy.client import Client
    from portero_py.proxy.endpoints import Downstream
    from portero_py.proxy.worker import Worker
    from portero_py.wire.message import Fields, RequestHead

#: Most seconds between two sweeps; less when a time-out is short.
LOOK: Final = 5.0
#: Seconds between the two GOAWAY of a drain when the client does not answer the PING, and for the last bytes.
DRAIN_PAUSE: Final = 1.0
CLOSE_SECONDS: Final = 5.0
#: Bytes of output, while the socket is full, at which the client is no longer read.
OUTPUT_LIMIT: Final = 65_536


class StreamExchange(Protocol):
    """What a stream needs of an exchange."""

    request_id: bytes

    def start(self) -> None: ...
    def request_body(self, data: bytes) -> None: ...
    def request_end(self, trailers: Fields | None) -> None: ...
    def downstream_paused(self) -> None: ...
    def downstream_resumed(self) -> None: ...
    def downstream_gone(self, error: PorteroError) -> None: ...


class NewExchange(Protocol):
    """How an exchange is made; `Exchange` itself outside of tests."""

    def __call__(
        self, worker: Worker, client: Client, downstream: Downstream, head: RequestHead, /
    ) -> StreamExchange: ...


class Http2Stream(Stream):
    """One stream, as the downstream of its exchange."""

    __slots__ = ("_exchange", "_head", "_shell")

    def __init__(
        self, shell: Http2Downstream, connection: ServerConnection, number: int, window: int
    ) -> None:
        super().__init__(connection, number, window)
        self._shell = shell
        self._exchange: StreamExchange | None = None
        self._head: RequestHead | None = None

    # What the core calls

    def on_head(self, head: RequestHead) -> None:
        shell = self._shell
        self._head = head
        self._exchange = exchange = shell.new_exchange(shell.worker, shell.client, self, head)
        exchange.start()

    def on_refused(self, error: PorteroError) -> None:
        worker = self._shell.worker
        request_id = worker.next_request_id()
        self._reply(error, request_id)
        worker.request_refused(self._shell.client, error, request_id)

    def on_body(self, data: bytes) -> None:
        assert self._exchange is not None
        self._exchange.request_body(data)

    def on_end(self, trailers: Fields | None) -> None:
        assert self._exchange is not None
        self._exchange.request_end(trailers)

    def on_lost(self, error: PorteroError) -> None:
        if self._exchange is not None:
            self._exchange.downstream_gone(error)
        else:
            worker = self._shell.worker
            worker.request_refused(self._shell.client, error, worker.next_request_id())

    def on_held_up(self) -> None:
        assert self._exchange is not None
        self._exchange.downstream_paused()

    def on_relieved(self) -> None:
        assert self._exchange is not None
        self._exchange.downstream_resumed()

    # What the exchange calls, beside the methods of Stream

    def flush(self) -> None:
        """Nothing is held back longer than this turn of the event loop."""

    def abort(self, error: PorteroError) -> None:
        self.reset(ErrorCode.INTERNAL_ERROR if error.status >= 500 else ErrorCode.CANCEL)

    def start_tunnel(self) -> None:
        raise AssertionError("HTTP/2 has no upgrade")

    def half_close(self) -> bool:
        raise AssertionError("HTTP/2 has no upgrade")

    # What the shell calls

    def look(self, now: float, body_idle: float) -> None:
        """Give up when nothing happened for too long."""
        if self.idle_since == 0.0:
            self.idle_since = now
        elif self.stalled:
            if now - self.idle_since >= body_idle:
                self._time_out(ClientGone("the client did not take the response"))
        elif self.request_ended or self.paused or self.response >= ENDING:
            return  # nothing is awaited from the client
        elif now - self.idle_since >= body_idle:
            self._time_out(BodyTimeout("the client stopped in the middle of the body"))

    # Private

    def _time_out(self, error: PorteroError) -> None:
        """Tell the exchange, then answer if that is still possible."""
        if self.response < ENDING:
            exchange = self._exchange
            assert exchange is not None
            exchange.downstream_gone(error)
            if self.response == HEAD:
                self._reply(error, exchange.request_id)
                return
        self.reset(ErrorCode.CANCEL)

    def _reply(self, error: PorteroError, request_id: bytes) -> None:
        self.send_response(*reply(error, self._head, request_id))


class Http2Downstream(asyncio.Protocol):
    """One connection; made when it is known to speak HTTP/2, with the bytes read so far still to come."""

    __slots__ = (
        "_closing",
        "_connection",
        "_full_since",
        "_idle_since",
        "_last_stream",
        "_look",
        "_reading",
        "_transport",
        "_unfinished",
        "_unfinished_since",
        "client",
        "deadline",
        "new_exchange",
        "worker",
    )

    def __init__(
        self,
        worker: Worker,
        client: Client,
        transport: asyncio.Transport,
        new_exchange: NewExchange = Exchange,
    ) -> None:
        self.worker = worker
        self.client = client
        self.new_exchange = new_exchange
        self._transport = transport
        limits = worker.limits
        self._connection = ServerConnection(
            self._wake,
            lambda connection, number, window: Http2Stream(self, connection, number, window),
            HeadLimits(limits.request_line, limits.header_bytes, limits.header_fields),
            limits.h2_streams,
        )
        self._reading = True
        self._closing = False
        # what the last sweep found
        now = worker.loop.time()
        self._idle_since = now
        self._last_stream = 0
        self._unfinished = self._connection.unfinished_head
        self._unfinished_since = now
        self._full_since = 0.0
        timeouts = worker.timeouts
        shortest = min(timeouts.head, timeouts.body_idle, timeouts.keep_alive)
        self._look = min(LOOK, max(1.0, shortest / 4))
        self.deadline = now + self._look

    def start_drain(self) -> None:
        """Take no new streams, finish the others, then close."""
        self._connection.start_drain()
        self._look_by(self.worker.loop.time() + DRAIN_PAUSE)

    def kill(self) -> None:
        """End at once, whatever is going on."""
        self._transport.abort()

    # asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        self._connection.receive(data, self.worker.loop.time())
        self._write()

    def eof_received(self) -> bool:
        """There is no half-closed HTTP/2. Who took nothing to the end must not stay for ever."""
        if not self._closing:
            self._closing = True
            self._transport.close()
            self._look_by(self.worker.loop.time() + CLOSE_SECONDS)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self.worker.connection_closed(self)
        self._connection.lose(ClientGone("the client closed the connection"))

    def pause_writing(self) -> None:
        self._connection.output.blocked = True
        self._full_since = self.worker.loop.time()

    def resume_writing(self) -> None:
        output = self._connection.output
        output.blocked = False
        self._full_since = 0.0
        if not self._reading and not self._closing:
            self._reading = True
            self._transport.resume_reading()
        output.pump()
        self._write()

    # The deadline wheel

    def on_deadline(self, now: float) -> None:
        """Sweep: over the socket, the header block, the streams, the idleness."""
        connection = self._connection
        if self._closing or (self._full_since and now - self._full_since >= self.worker.timeouts.body_idle):
            self._transport.abort()
            self.deadline = now + CLOSE_SECONDS
            return
        timeouts = self.worker.timeouts
        if connection.phase is Phase.DRAINING:
            connection.finish_drain()
        if connection.unfinished_head != self._unfinished:
            self._unfinished = connection.unfinished_head
            self._unfinished_since = now
        elif self._unfinished and now - self._unfinished_since >= timeouts.head:
            connection.fail(ErrorCode.ENHANCE_YOUR_CALM, "the header block or preface took too long")
        for stream in list(connection.streams.values()):
            assert isinstance(stream, Http2Stream)
            stream.look(now, timeouts.body_idle)
        if connection.streams or connection.last_stream != self._last_stream:
            self._last_stream = connection.last_stream
            self._idle_since = now
        elif now - self._idle_since >= timeouts.keep_alive:
            connection.finish_drain()
        self.deadline = now + self._look
        self._write()

    # Private

    def _wake(self) -> None:
        self.worker.loop.call_soon(self._write)

    def _write(self) -> None:
        """Write what there is, as far as the socket takes it; close when nothing more will come."""
        if self._closing or self._transport.is_closing():
            return
        connection = self._connection
        output = connection.output
        while output.pieces and not output.blocked:
            self._transport.write(output.take())
            if output.waiting:
                output.pump()
        if connection.finished:
            self._close()
        elif output.size > OUTPUT_LIMIT and self._reading:
            self._reading = False
            self._transport.pause_reading()

    def _close(self) -> None:
        fault = self._connection.fault
        if fault is not None:
            self.worker.request_refused(self.client, fault, self.worker.next_request_id())
        output = self._connection.output
        if output.pieces:
            self._transport.write(output.take())
        self._closing = True
        if fault is None:
            self._transport.close()
        else:
            # What the client still sends is read and forgotten: a reset for it would overtake GOAWAY.
            self._transport.write_eof()
            if not self._reading:
                self._transport.resume_reading()
        self._look_by(self.worker.loop.time() + CLOSE_SECONDS)

    def _look_by(self, deadline: float) -> None:
        if deadline < self.deadline or self.deadline == 0.0:
            self.deadline = deadline
            self.worker.deadlines.sooner(self)
