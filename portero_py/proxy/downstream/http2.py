"""A client's HTTP/2 connection: the socket and the clock around `wire/http2/`, and its streams' exchanges.

What the core wants to send leaves in one write for each turn of the event loop: after `data_received`,
or in one callback for all responses that arrived in the same turn.

Backpressure
- The socket is full: `output.blocked`. Bodies then wait in their streams, which hold up their backends; heads
  and control frames go on into the output, and when that grows the client is no longer read. So a client
  that does not read its answers can ask for nothing.
- A window is used up: the core holds up the one backend.
- A backend does not read: the core gives no window back for that stream.
- One read brings more than a turn of the event loop may take (`connection.behind`): the client is not read
  until the rest was dealt with, turn by turn.

Time
One deadline for the connection, none for a stream: a sweep every few seconds compares with what it found the
last time. So all time-outs here fire up to two sweeps (LOOK seconds each) late, and no request sets a timer.
- A client is idle when nothing moves on the whole connection, as in HTTP/1: no byte of a body comes, no frame
  of a response leaves, and while the socket is full the client takes nothing of what waits there. PINGs,
  SETTINGS and windows that are opened move nothing by themselves.
- While the connection moves, a stream on which nothing happens has STALLED seconds: with 128 streams a slow
  client comes back to each of them after minutes, but one that keeps a stream for ever keeps a backend.

The end
Whatever the reason, the last bytes are left to `leaving.py`. An exception that nobody expected, from whatever
the client's bytes have called, ends the connection with GOAWAY: a connection without its state would be mute.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final, Protocol

from portero_py.errors import BodyTimeout, ClientGone
from portero_py.proxy.body_rate import RATE_SECONDS, is_measured
from portero_py.proxy.budget import HEAVY
from portero_py.proxy.downstream.leaving import CLOSE_SECONDS, Leaving
from portero_py.proxy.exchange import Exchange
from portero_py.proxy.progress import Progress
from portero_py.proxy.refusals import BODY_RATE
from portero_py.proxy.replies import reply
from portero_py.wire.http2.connection import Phase
from portero_py.wire.http2.frames import ErrorCode
from portero_py.wire.http2.heads import HeadLimits
from portero_py.wire.http2.server import ServerConnection
from portero_py.wire.http2.server_stream import ServerStream
from portero_py.wire.http2.stream import ENDING, HEAD

if TYPE_CHECKING:
    from portero_py.errors import PorteroError
    from portero_py.proxy.endpoints import Downstream, RequestSide
    from portero_py.proxy.peer import Peer
    from portero_py.proxy.surroundings import Surroundings
    from portero_py.wire.message import Fields, RequestHead

#: Most seconds between two sweeps; less when a time-out is short.
LOOK: Final = 5.0
#: Seconds that a stream may stand still while others move, if the client's time-out is not longer.
STALLED: Final = 600.0
#: Seconds between the two GOAWAY of a drain when the client does not answer the PING.
DRAIN_PAUSE: Final = 1.0
#: An early answer is followed by its reset one or two times so many seconds later.
RESET_PAUSE: Final = 0.5
#: Bytes of output, while the socket is full, at which the client is no longer read.
OUTPUT_LIMIT: Final = 65_536
#: Bytes that are read and thrown away behind our last word: a client in full swing shall find its GOAWAY.
LINGER_BYTES: Final = 64 << 20

_log = logging.getLogger(__name__)


class NewExchange(Protocol):
    """How an exchange is made; `Exchange` itself outside of tests."""

    def __call__(
        self, surroundings: Surroundings, peer: Peer, downstream: Downstream, head: RequestHead, /
    ) -> RequestSide: ...


class Http2Stream(ServerStream):
    """One stream, as the downstream of its exchange."""

    __slots__ = ("_exchange", "_head", "_rated_at", "_rated_from", "_shell")

    def __init__(
        self, shell: Http2Downstream, connection: ServerConnection, number: int, window: int
    ) -> None:
        super().__init__(connection, number, window)
        self._shell = shell
        self._exchange: RequestSide | None = None
        self._head: RequestHead | None = None
        self._rated_at = 0.0  # the last look at the body's rate, or 0.0
        self._rated_from = 0  # the bytes that had come by then

    # What the core calls

    def on_head(self, head: RequestHead) -> None:
        shell = self._shell
        self._head = head
        self._exchange = exchange = shell.new_exchange(shell.surroundings, shell.peer, self, head)
        exchange.start()

    def on_refused(self, error: PorteroError) -> None:
        request_id = self._shell.surroundings.next_request_id()
        self._reply(error, request_id)
        self._shell.refused(error, request_id)

    def on_body(self, data: bytes) -> None:
        assert self._exchange is not None
        self._exchange.request_body(data)

    def on_end(self, trailers: Fields | None) -> None:
        assert self._exchange is not None
        self._exchange.request_end(trailers)

    def on_lost(self, error: PorteroError) -> None:
        self._shell.surroundings.budget.gone(self)
        if self._exchange is not None:
            self._exchange.downstream_gone(error)
        else:
            self._shell.refused(error, self._shell.surroundings.next_request_id())

    def on_waiting(self) -> None:
        self._shell.account()

    def on_held_up(self) -> None:
        assert self._exchange is not None
        self._exchange.downstream_paused()
        self._shell.account()

    def on_relieved(self) -> None:
        if self._shell.surroundings.budget.may_go_on(self):
            self.go_on()

    # What the budget of buffered bytes calls

    def go_on(self) -> None:
        """There is room again for what the backend says."""
        if self._exchange is not None:
            self._exchange.downstream_resumed()

    # What the exchange calls, beside the methods of Stream

    def flush(self) -> None:
        """Nothing is held back longer than this turn of the event loop."""

    def abort(self, error: PorteroError) -> None:
        self._shell.surroundings.budget.gone(self)
        self.reset(ErrorCode.INTERNAL_ERROR if error.status >= 500 else ErrorCode.CANCEL)

    def start_tunnel(self) -> None:
        raise AssertionError("HTTP/2 has no upgrade")

    def half_close(self) -> bool:
        raise AssertionError("HTTP/2 has no upgrade")

    def pause_body(self) -> None:
        self._rated_at = 0.0
        super().pause_body()

    # What the shell calls

    def look(self, now: float, moved: float) -> None:
        """Give up when nothing happened for too long; on the connection something `moved` then."""
        if self._shell.surroundings.limits.body_rate and self._is_slow(now):
            self._shell.surroundings.refusals.count(BODY_RATE, self._shell.peer.address)
            self._time_out(BodyTimeout("the request's body came too slowly"))
            return
        since = self.idle_since
        exchange = self._exchange
        surroundings = self._shell.surroundings
        body_idle = surroundings.timeouts.body_idle if exchange is None else exchange.body_idle
        if since == 0.0:
            self.idle_since = now
        elif now - max(since, moved) < body_idle and now - since < max(STALLED, body_idle):
            return
        elif self.stalled:
            self._time_out(ClientGone("the client did not take the response"))
        elif not self.received and not self.paused and self.sending < ENDING:
            self._time_out(BodyTimeout("the client stopped in the middle of the body"))

    # Private

    def _is_slow(self, now: float) -> bool:
        """Say whether too little of the body has come in the last seconds."""
        exchange, head = self._exchange, self._head
        if exchange is None or head is None or self.received or self.paused or self.sending != HEAD:
            return False
        before, seconds = self._rated_from, now - self._rated_at
        if self._rated_at != 0.0 and seconds < RATE_SECONDS:
            return False
        is_first = self._rated_at == 0.0
        self._rated_at = now
        self._rated_from = exchange.bytes_in
        least = self._shell.surroundings.limits.body_rate * seconds
        return not is_first and exchange.bytes_in - before < least and is_measured(head)

    def _time_out(self, error: PorteroError) -> None:
        """Tell the exchange, then answer if that is still possible."""
        self._shell.surroundings.budget.gone(self)
        if self.sending < ENDING:
            exchange = self._exchange
            assert exchange is not None
            exchange.downstream_gone(error)
            if self.sending == HEAD:
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
        "_early",
        "_holds",
        "_idle_since",
        "_last_stream",
        "_look",
        "_moved",
        "_progress",
        "_reading",
        "_seen",
        "_transport",
        "_turn",
        "_unfinished",
        "_unfinished_since",
        "deadline",
        "new_exchange",
        "peer",
        "surroundings",
    )

    def __init__(
        self,
        surroundings: Surroundings,
        peer: Peer,
        transport: asyncio.Transport,
        new_exchange: NewExchange = Exchange,
    ) -> None:
        self.surroundings = surroundings
        self.peer = peer
        self.new_exchange = new_exchange
        self._transport = transport
        limits = surroundings.limits
        self._connection = ServerConnection(
            self._wake,
            lambda connection, number, window: Http2Stream(self, connection, number, window),
            HeadLimits(limits.request_line, limits.header_bytes, limits.header_fields),
            limits.h2_streams,
        )
        self._reading = True
        self._closing = False
        self._holds = False  # more than is worth a word to the budget
        self._turn: asyncio.Handle | None = None  # more has come than one turn may take
        self._early: asyncio.TimerHandle | None = None  # until the next look at early answers
        self._progress: Progress | None = None  # while the socket is full, or closes
        # what the last sweep found
        now = surroundings.loop.time()
        self._idle_since = now
        self._last_stream = 0
        self._unfinished = self._connection.unfinished_head
        self._unfinished_since = now
        self._seen = 0
        self._moved = now
        timeouts = surroundings.timeouts
        shortest = min(timeouts.head, timeouts.body_idle, timeouts.keep_alive)
        self._look = min(LOOK, max(1.0, shortest / 4))
        self.deadline = now + self._look

    def start_drain(self) -> None:
        """Take no new streams, finish the others, then close."""
        self._connection.start_drain()
        self._look_by(self.surroundings.loop.time() + DRAIN_PAUSE)

    def announce_drain(self) -> None:
        """GOAWAY twice: what the client has sent before it read the first is served."""
        self.start_drain()

    @property
    def is_tunnel(self) -> bool:
        """It carries HTTP."""
        return False

    def end_tunnel(self) -> None:
        """There is none."""

    def idle_seconds(self, now: float) -> float:
        """For how long there has been no stream, by what the last sweep found."""
        connection = self._connection
        if connection.streams or connection.last_stream != self._last_stream:
            return 0.0
        return now - self._idle_since

    def kill(self) -> None:
        """End at once, whatever is going on."""
        self._transport.abort()

    # asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        try:
            self._connection.receive(data, self.surroundings.loop.time())
        except Exception:  # a bug: it ends this connection alone
            self._break_off()
        self._write()

    def eof_received(self) -> bool:
        """There is no half-closed HTTP/2. Who took nothing to the end must not stay for ever."""
        if not self._closing:
            self._closing = True
            self._stop_timers()
            self._progress = Progress(self._transport)
            self._transport.close()
            self._look_by(self.surroundings.loop.time() + CLOSE_SECONDS)
            self._connection.lose(ClientGone("the client closed the connection"))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._stop_timers()
        self.surroundings.connection_closed(self)
        self._connection.lose(ClientGone("the client closed the connection"))

    def pause_writing(self) -> None:
        self._connection.output.blocked = True
        self.account()
        self._progress = Progress(self._transport)
        self._moved = self.surroundings.loop.time()

    def resume_writing(self) -> None:
        self._connection.output.blocked = False
        self._progress = None
        self._moved = self.surroundings.loop.time()
        self._pump()
        self._write()

    # The deadline wheel

    def on_deadline(self, now: float) -> None:
        """Sweep: over the socket, the header block, the streams, the idleness."""
        if self._closing:
            self.deadline = now + CLOSE_SECONDS
            if self._progress is None or not self._progress.is_made():
                self._transport.abort()
            return
        self.deadline = now + self._look
        try:
            self._sweep(now)
        except Exception:  # a bug: it ends this connection alone
            self._break_off()
        self._write()

    def _sweep(self, now: float) -> None:
        connection = self._connection
        timeouts = self.surroundings.timeouts
        seen, self._seen = self._seen, connection.progress
        if self._progress is not None:
            # What is put behind a full socket has not moved.
            if self._progress.is_made():
                self._moved = now
            elif now - self._moved >= timeouts.body_idle:
                self._transport.abort()
                return
        elif seen != self._seen:
            self._moved = now
        if connection.phase is Phase.DRAINING:
            connection.finish_drain()
        if connection.unfinished_head != self._unfinished:
            self._unfinished = connection.unfinished_head
            self._unfinished_since = now
        elif self._unfinished and now - self._unfinished_since >= timeouts.head:
            connection.fail(ErrorCode.ENHANCE_YOUR_CALM, "the header block or preface took too long")
        for stream in list(connection.streams.values()):
            assert isinstance(stream, Http2Stream)
            stream.look(now, self._moved)
        if connection.streams or connection.last_stream != self._last_stream:
            self._last_stream = connection.last_stream
            self._idle_since = now
        elif now - self._idle_since >= timeouts.keep_alive:
            connection.finish_drain()

    # The budget of buffered bytes

    def held_bytes(self) -> int:
        """How much waits for the client: in its streams, in the output, in the socket's transport."""
        output = self._connection.output
        return output.held + output.size + self._transport.get_write_buffer_size()

    def account(self) -> None:
        """Say how much that is, if it is worth a word."""
        size = self.held_bytes()
        if size > HEAVY:
            self._holds = True
            self.surroundings.budget.holds(self, size)
        elif self._holds:
            self._holds = False
            self.surroundings.budget.drops(self)

    # What its streams call

    def refused(self, error: PorteroError, request_id: bytes) -> None:
        """Log what did not become an exchange."""
        self.surroundings.request_refused(self.peer, error, request_id, b"2")

    # Private

    def _wake(self) -> None:
        self.surroundings.loop.call_soon(self._write)

    def _write(self) -> None:
        """Write what there is, as far as the socket takes it; close when nothing more will come."""
        if self._closing or self._transport.is_closing():
            return
        connection = self._connection
        output = connection.output
        if connection.ended.early and self._early is None:
            self._early = self.surroundings.loop.call_later(RESET_PAUSE, self._reset_early)
        while output.pieces and not output.blocked:
            self._transport.write(output.take())
            if output.waiting:
                self._pump()
        if connection.finished:
            self._close()
            return
        if self._holds:
            self.account()
        full = output.size > OUTPUT_LIMIT
        if connection.behind and not full and self._turn is None:
            self._turn = self.surroundings.loop.call_soon(self._next_turn)
        if self._reading == (full or connection.behind):
            self._reading = not self._reading
            if self._reading:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    def _pump(self) -> None:
        try:
            self._connection.output.pump()
        except Exception:  # a bug: it ends this connection alone
            self._break_off()

    def _next_turn(self) -> None:
        """The other connections had their turn."""
        self._turn = None
        self.data_received(b"")

    def _reset_early(self) -> None:
        self._early = None
        if not self._connection.output.blocked:  # else the reset would leave together with the answer
            self._connection.reset_early()
        self._write()

    def _break_off(self) -> None:
        """Nobody expected this exception, which is being handled: log it, and end the connection."""
        _log.exception("a fault ended an HTTP/2 connection")
        try:
            self._connection.break_off()
        except Exception:  # of a stream that was told; so were the others
            _log.exception("a fault at the end of an HTTP/2 connection")

    def _close(self) -> None:
        fault = self._connection.fault
        if fault is not None:
            self.refused(fault, self.surroundings.next_request_id())
        output = self._connection.output
        if output.pieces:
            self._transport.write(output.take())
        self._closing = True
        self._stop_timers()
        if not self._reading:
            self._transport.resume_reading()
        Leaving(self.surroundings, self._transport, self, LINGER_BYTES)

    def _stop_timers(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        if self._early is not None:
            self._early.cancel()
            self._early = None

    def _look_by(self, deadline: float) -> None:
        if deadline < self.deadline or self.deadline == 0.0:
            self.deadline = deadline
            self.surroundings.deadlines.sooner(self)
