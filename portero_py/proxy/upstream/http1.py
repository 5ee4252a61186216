"""An HTTP/1.1 connection to a backend: one exchange at a time, then back to the pool.

States
    IDLE         in the pool; any byte from the backend is unasked for and ends the connection
    HEAD         a request was or is being sent; waiting for the head of a final response
    BODY         inside a body that says where it ends
    UNTIL_CLOSE  inside a body that the end of the connection ends
    TUNNEL       after a 101: bytes both ways
    HALF_TUNNEL  a tunnel whose backend has closed its side: bytes go to it, none come
    CLOSED       given up

Tunnels end one way at a time: the end of one side is passed on, the other goes on until it ends too, or is
silent for TUNNEL_IDLE. What TLS cannot say: the loop's TLS has no half-closed connection (in TLS 1.2 there is
none, RFC 5246, 7.2.1), so a backend's close_notify ends the tunnel behind the bytes that came before it; and
it cannot be told that its client has ended, so what it still has to say must come within `upstream_idle`.

A head is held back for the first bytes of its body. Until it is out nothing of the request is sent, and when
the connection breaks meanwhile what comes for it goes back to the exchange, not a byte of it lost.

A request that is complete is looked at twice: after `first_look`, when it is said that the backend is slow,
and after `upstream_head`, when it is over. `deadline` is the earlier of the two, which costs an ordinary
request nothing; `_looked` is the use of the connection in which the first look was.

A connection is used again only if the response was framed, both messages are complete, the backend did not
ask to close, and not one byte came behind the response: a byte too many may be the beginning of an answer to
a request that somebody else is going to send (response-queue poisoning).
"""

from __future__ import annotations

from enum import Enum
from time import monotonic
from typing import TYPE_CHECKING, Final, cast

from portero_py.errors import (
    BadResponse,
    HeadTooLarge,
    TargetTooLong,
    UpstreamClosed,
    UpstreamTimeout,
)
from portero_py.proxy.budget import HEAVY
from portero_py.proxy.progress import SlowPeer
from portero_py.proxy.upstream.connection import UpstreamConnection
from portero_py.wire.framing import ChunkedDecoder, LengthDecoder, body_decoder, chunk, last_chunk
from portero_py.wire.http1 import find_head, request_bytes
from portero_py.wire.message import CHUNKED, UNTIL_CLOSE

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping

    from portero_py.errors import PorteroError
    from portero_py.proxy.endpoints import ResponseSide
    from portero_py.proxy.surroundings import Surroundings
    from portero_py.proxy.upstream.pool import BackendPool
    from portero_py.wire.headers import Forwarded
    from portero_py.wire.message import Fields, RequestHead, ResponseHead

#: Most 1xx responses to one request. They are passed on as long as they are no longer than one head together:
#: a client that does not read holds none of them back.
MAX_INFORMATIONAL: Final = 32
#: Seconds that a connection which is not used again may take to send its last bytes.
CLOSE_SECONDS: Final = 10.0
#: Seconds that a tunnel may be silent. Longer than any keep-alive of WebSockets in use.
TUNNEL_IDLE: Final = 3600.0


class State(Enum):
    IDLE = 0
    HEAD = 1
    BODY = 2
    UNTIL_CLOSE = 3
    TUNNEL = 4
    HALF_TUNNEL = 5
    CLOSED = 6


_IDLE, _HEAD, _BODY, _UNTIL_CLOSE, _TUNNEL, _HALF_TUNNEL, _CLOSED = State

#: The steps that may happen.
TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    _IDLE: frozenset({_HEAD, _CLOSED}),
    _HEAD: frozenset({_IDLE, _BODY, _UNTIL_CLOSE, _TUNNEL, _CLOSED}),
    _BODY: frozenset({_IDLE, _CLOSED}),
    _UNTIL_CLOSE: frozenset({_CLOSED}),
    _TUNNEL: frozenset({_HALF_TUNNEL, _CLOSED}),
    _HALF_TUNNEL: frozenset({_CLOSED}),
    _CLOSED: frozenset({_CLOSED}),
}


class UpstreamHttp1(UpstreamConnection):
    """Is itself the `Upstream` of one exchange after the other."""

    __slots__ = (
        "_body_chunked",
        "_buffer",
        "_decoder",
        "_exchange",
        "_informational",
        "_informational_bytes",
        "_looked",
        "_method",
        "_outgoing",
        "_pool",
        "_reading_paused",
        "_request_ended",
        "_reusable",
        "_slow",
        "_state",
        "_surroundings",
        "_transport",
        "_turn",
        "_uses",
        "_writing_paused",
    )

    def __init__(self, surroundings: Surroundings, pool: BackendPool) -> None:
        # connection
        self._surroundings = surroundings
        self._pool = pool
        self._transport: asyncio.Transport = None  # type: ignore[assignment]  # set by connection_made
        self._state = _IDLE
        self._uses = 0
        self._looked = 0
        self._reading_paused = False
        self._writing_paused = False
        self._slow: SlowPeer | None = None  # while the backend is slow to read
        self.deadline = 0.0
        self.idle_since = 0.0
        # exchange
        self._exchange: ResponseSide | None = None
        self._method = b""
        self._outgoing: bytes | None = None  # the head, held back for the first body bytes
        self._body_chunked = False
        self._request_ended = False
        self._buffer = b""
        self._decoder: LengthDecoder | ChunkedDecoder | None = None
        self._reusable = False
        self._informational = 0
        self._informational_bytes = 0
        self._turn: asyncio.Handle | None = None  # more chunks are at hand than one turn may take

    # What the pool calls

    def is_usable(self) -> bool:
        """Say whether a request may be sent on this idle connection."""
        return self._state is _IDLE and not self._transport.is_closing()

    def upstream(self) -> UpstreamHttp1 | None:
        """Return itself, when it is usable."""
        return self if self._state is _IDLE and not self._transport.is_closing() else None

    def carried(self) -> ResponseSide | None:
        """Return the exchange that is here."""
        return self._exchange

    def close(self) -> None:
        """End the connection."""
        self._state = _CLOSED
        self._transport.close()

    # What the exchange calls

    def send_head(
        self, exchange: ResponseSide, head: RequestHead, forwarded: Forwarded, request_id: bytes
    ) -> None:
        """Begin an exchange. Before a body the head waits for the first bytes of it, or for `send_end`."""
        self._exchange = exchange
        self._state = _HEAD
        self._method = head.method
        self._uses += 1
        self._informational = 0
        length = head.body_length
        self._request_ended = length == 0
        if length == 0:
            self.deadline = exchange.upstream_started + self._pool.patience.first_look
            self._transport.write(request_bytes(head, forwarded, request_id))
            return
        self._body_chunked = length == CHUNKED
        self.deadline = 0.0
        self._outgoing = request_bytes(head, forwarded, request_id)
        if head.expects_continue:
            self._let_out()
            self.deadline = exchange.upstream_started + self._pool.patience.upstream_head

    def send_body(self, data: bytes) -> None:
        """Send body bytes, or bytes of a tunnel."""
        if self._transport.is_closing():
            # connection_lost follows and tells the exchange. With the head sent the request is lost.
            if self._outgoing is not None and self._exchange is not None:
                self._exchange.body_refused(data)
            return
        state = self._state
        if self._body_chunked:
            data = chunk(data)
        if self._outgoing is not None:
            data = self._outgoing + data
            self._outgoing = None
        if state is _HEAD:
            if not self._writing_paused:
                self.deadline = 0.0  # the backend need not answer before it has all; the downstream watches
        elif not self._reading_paused:
            self._expect_bytes()  # both ways at once: neither is idle
        self._transport.write(data)

    def send_end(self, trailers: Fields | None) -> None:
        """The request is complete: from now on the backend has to answer in time."""
        self._request_ended = True
        if self._transport.is_closing():
            return  # as in `send_body`; the exchange has kept the trailers
        if self._state is _TUNNEL:
            if self._transport.can_write_eof():
                self._transport.write_eof()
            elif not self._reading_paused:
                self._expect_bytes()
            return
        if self._state is _HALF_TUNNEL:
            self._complete(None, b"")
            return
        if self._body_chunked:
            self._body_chunked = False
            self._outgoing = (self._outgoing or b"") + last_chunk(trailers)
        self._let_out()
        if self._state is _HEAD:
            self._expect_bytes()

    def is_silent(self) -> bool:
        """No byte of a response has come, not even of an informational one."""
        return self._state is _HEAD and not self._buffer and self._informational == 0

    def abort(self) -> None:
        """The exchange was given up: what this connection carries is of no use any more."""
        self._exchange = None
        self._state = _CLOSED
        self._transport.abort()

    def pause_body(self) -> None:
        """Stop reading from the backend."""
        if not self._reading_paused and self._state is not _HALF_TUNNEL and not self._transport.is_closing():
            self._reading_paused = True
            self._transport.pause_reading()
            self.deadline = 0.0  # it is the client who is slow; the downstream watches it

    def resume_body(self) -> None:
        """Read from the backend again."""
        if self._reading_paused and not self._transport.is_closing():
            self._reading_paused = False
            if self._is_behind():
                self._wait_for_turn()
            else:
                self._transport.resume_reading()
            self._expect_bytes()

    def start_tunnel(self) -> None:
        """Nothing to do: reading the 101 has switched this side already."""

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        self._transport.set_write_buffer_limits(HEAVY)
        self._surroundings.deadlines.watch(self)

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None:
            if self._state is _IDLE:
                self._pool.discard(self)
            self.close()
            return
        try:
            if self._state is _HEAD and not self._buffer:
                self._read_head(data, exchange)
            else:
                self._read(data, exchange)
        except (BadResponse, HeadTooLarge, TargetTooLong) as error:
            self._fail(error if isinstance(error, BadResponse) else BadResponse(str(error)), silent=False)
            return
        except Exception:  # a bug: the exchange logs it, counts it, and is over
            self._break(exchange)
            return
        if self._exchange is exchange:
            exchange.flush()

    def eof_received(self) -> bool | None:
        exchange = self._exchange
        if exchange is None:
            return False
        if self._state is _TUNNEL and self._half_close(exchange):
            return True
        if self._state is _UNTIL_CLOSE or self._state is _TUNNEL:
            self._complete(None, b"")
        else:
            self._fail(UpstreamClosed(self._closed_text()), silent=self.is_silent())
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._surroundings.deadlines.forget(self)
        self._surroundings.budget.gone(self)
        if self._state is _IDLE:
            self._pool.discard(self)
        elif self._exchange is not None:
            if exc is None and self._state in (_UNTIL_CLOSE, _TUNNEL, _HALF_TUNNEL):
                self._complete(None, b"")
            else:
                self._fail(UpstreamClosed(self._closed_text()), silent=self.is_silent())
        self._state = _CLOSED

    def pause_writing(self) -> None:
        self._writing_paused = True
        self._surroundings.budget.holds(self, self.held_bytes())
        if self._exchange is not None:
            self._slow = SlowPeer(self._transport)
            self.deadline = monotonic() + self._pool.patience.upstream_idle
            self._exchange.upstream_paused()

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._surroundings.budget.drops(self)
        if self._exchange is not None:
            self.deadline = 0.0
            if not self._reading_paused:
                self._expect_bytes()
            if self._surroundings.budget.may_go_on(self):
                self._exchange.upstream_resumed()

    # The budget of buffered bytes

    def held_bytes(self) -> int:
        """How much the backend has not taken."""
        return self._transport.get_write_buffer_size()

    def go_on(self) -> None:
        """There is room again for what the client says."""
        if self._exchange is not None and not self._writing_paused:
            self._exchange.upstream_resumed()

    # The deadline wheel

    def on_deadline(self, now: float) -> None:
        """The backend, or nobody, has done something for too long."""
        exchange = self._exchange
        if exchange is None:
            if self._state is _IDLE:
                self._pool.discard(self)
                self.close()
                self.deadline = now + CLOSE_SECONDS
            else:
                self._transport.abort()
            return
        if self._writing_paused:
            more = 0.0
            if self._slow is not None:
                more = self._slow.more_time(self._pool.patience.upstream_idle)
            if more:
                self.deadline = now + more
                return
        elif self._is_first_look(now):
            return
        self._exchange = None
        self._state = _CLOSED
        self._transport.abort()
        error = UpstreamTimeout(f"backend {self._pool.backend.address} took too long")
        try:
            exchange.upstream_timed_out(error)
        except Exception:  # a bug: the exchange logs it, counts it, and is over
            exchange.broke()

    def kill(self) -> None:
        """End at once, whatever is going on; connection_lost tells the exchange."""
        self._transport.abort()

    # Private

    def _is_first_look(self, now: float) -> bool:
        """Whether the backend has time left for its answer; it is said that it is slow."""
        if self._state is not _HEAD or not self._request_ended or self._looked == self._uses:
            return False
        self._looked = self._uses
        patience, exchange = self._pool.patience, self._exchange
        rest = patience.upstream_head - patience.first_look
        if rest <= 0.0 or self._informational or exchange is None:
            return False
        self.deadline += rest
        if self.is_silent():
            self._surroundings.outcomes.slow(exchange, self._surroundings.table, now)
        return now < self.deadline

    def _let_out(self) -> None:
        if self._outgoing is not None and not self._transport.is_closing():
            outgoing, self._outgoing = self._outgoing, None
            self._transport.write(outgoing)

    def _read(self, data: bytes, exchange: ResponseSide) -> None:
        state = self._state
        if state is _HEAD:
            self._read_head(self._buffer + data if self._buffer else data, exchange)
        elif state is _BODY:
            self.deadline = monotonic() + self._pool.patience.upstream_idle
            self._read_body(data, exchange)
        elif state is _UNTIL_CLOSE:
            self.deadline = monotonic() + self._pool.patience.upstream_idle
            exchange.response_body(data)
        elif state is _TUNNEL:
            self._expect_bytes()
            exchange.response_body(data)

    def _read_head(self, data: bytes, exchange: ResponseSide) -> None:
        surroundings = self._surroundings
        if self._outgoing is not None:
            # The request is still here: this was meant for somebody else (RFC 9112, 9.2).
            raise BadResponse("a response before the request")
        while True:
            limit = surroundings.limits.header_bytes
            end = data.find(b"\r\n\r\n") + 4  # as `find_head` would say, without the call
            if not 4 < end <= limit:
                end = find_head(data, limit, limit, BadResponse)
            if not end:
                self._buffer = data
                return
            self._buffer = b""
            raw = data if end == len(data) else data[:end]
            head, self._reusable = surroundings.response_parser.parse(raw, self._method)
            rest = data[end:]
            if head.status >= 200 or head.status == 101:
                break
            if self._informational == 0:
                self._informational_bytes = 0
            self._informational += 1
            self._informational_bytes += end
            if self._informational > MAX_INFORMATIONAL:
                raise BadResponse("too many informational responses")
            if self._request_ended:
                self.deadline = monotonic() + self._pool.patience.upstream_head  # it is at work
            if self._informational_bytes <= limit:
                exchange.response_informational(head)
            if not rest or self._exchange is not exchange:
                return
            data = rest
        if head.status == 101:
            self._switch(exchange, head, rest)
            return
        length = head.body_length
        if 0 <= length <= len(rest):
            # Head and body are at hand, which is how most responses come.
            now = monotonic()
            extra = len(rest) > length
            self._release(now, extra=extra)
            exchange.response(head, rest[:length] if extra else rest, now)
            return
        self.deadline = monotonic() + self._pool.patience.upstream_idle
        if length == UNTIL_CLOSE:
            self._state = _UNTIL_CLOSE
        else:
            self._state = _BODY
            self._decoder = body_decoder(length, BadResponse)
        exchange.response_head(head)
        if rest and self._exchange is exchange:
            self._read(rest, exchange)

    def _switch(self, exchange: ResponseSide, head: ResponseHead, rest: bytes) -> None:
        if not head.upgrade or head.upgrade.lower() != exchange.head.upgrade.lower():
            raise BadResponse("a switch to a protocol that was not asked for")  # RFC 9110, 7.8
        self._state = _TUNNEL
        self._request_ended = False  # as long as the client's side is open
        self._reusable = False
        self.deadline = monotonic() + TUNNEL_IDLE
        exchange.response_head(head)
        if rest and self._exchange is exchange:
            exchange.response_body(rest)

    def _half_close(self, exchange: ResponseSide) -> bool:
        """The backend has closed its side of the tunnel: say whether the other side goes on."""
        if self._request_ended or not self._transport.can_write_eof() or not exchange.tunnel_half_closed():
            return False
        self._state = _HALF_TUNNEL
        return True

    def _read_body(self, data: bytes, exchange: ResponseSide) -> None:
        decoder = self._decoder
        assert decoder is not None
        body, rest = decoder.decode(data)
        if body:
            exchange.response_body(body)
        if rest is not None and self._exchange is exchange:
            self._decoder = None
            self._complete(decoder.trailers or None, rest)
        elif decoder.behind and self._exchange is exchange:
            if not self._reading_paused:
                self._transport.pause_reading()
            self._wait_for_turn()

    def _is_behind(self) -> bool:
        """Say whether there are more chunks of the body at hand than one turn may take."""
        return self._state is _BODY and self._decoder is not None and self._decoder.behind

    def _wait_for_turn(self) -> None:
        if self._turn is None:
            self._turn = self._surroundings.loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        """The other connections had their turn."""
        self._turn = None
        if (
            self._exchange is not None
            and not self._reading_paused
            and self._is_behind()
            and not self._transport.is_closing()
        ):
            self._transport.resume_reading()
            self.data_received(b"")

    def _complete(self, trailers: Fields | None, rest: bytes) -> None:
        """The response has ended: reuse the connection or close it, then tell the exchange."""
        exchange = self._exchange
        if exchange is None:
            return
        if self._state is _TUNNEL:
            self._request_ended = True  # what the client said is still delivered
        self._release(monotonic(), extra=bool(rest))
        try:
            exchange.response_end(trailers)
        except Exception:  # a bug: the exchange logs it, counts it, and is over
            exchange.broke()

    def _release(self, now: float, *, extra: bool) -> None:
        """This end's part of the exchange is over: back to the pool, or close."""
        self._exchange = None
        if (
            self._reusable
            and self._request_ended
            and not extra
            and not self._writing_paused  # an answer to what was not read: the next request would wait
            and not self._transport.is_closing()
        ):
            self._state = _IDLE
            if self._reading_paused:
                self._reading_paused = False
                self._transport.resume_reading()
            self._pool.put(self, now)
        else:
            self._state = _CLOSED
            self.deadline = now + CLOSE_SECONDS
            if self._request_ended:
                self._transport.close()
            else:
                self._transport.abort()  # what is still to be sent is of no use any more

    def _fail(self, error: PorteroError, *, silent: bool) -> None:
        exchange, self._exchange = self._exchange, None
        unsent = self._outgoing is not None
        self._state = _CLOSED
        self._transport.abort()
        if exchange is not None:
            try:
                exchange.upstream_failed(error, reused=self._uses > 1, silent=silent or unsent, unsent=unsent)
            except Exception:  # a bug: the exchange logs it, counts it, and is over
                exchange.broke()

    def _break(self, exchange: ResponseSide) -> None:
        """Something of our own raised: end both sides, whichever of them was done with it already."""
        if self._state is _IDLE:
            self._pool.discard(self)
        current, self._exchange = self._exchange, None
        self._state = _CLOSED
        self._transport.abort()
        exchange.broke()
        if current is not None and current is not exchange:  # the next one has the connection already
            current.broke()

    def _closed_text(self) -> str:
        where = "before it answered" if self._state is _HEAD else "in the middle of its response"
        return f"backend {self._pool.backend.address} closed the connection {where}"

    def _expect_bytes(self) -> None:
        """Set the deadline that fits the state, after a pause."""
        patience = self._pool.patience
        if self._state is _HEAD:
            seconds = patience.first_look
            if not self._request_ended:
                seconds = 0.0
            elif self._writing_paused or self._looked == self._uses or self._informational:
                seconds = patience.upstream_head
        elif self._state is _HALF_TUNNEL or (
            self._state is _TUNNEL and (not self._request_ended or self._transport.can_write_eof())
        ):
            seconds = TUNNEL_IDLE
        else:
            seconds = patience.upstream_idle
        self.deadline = monotonic() + seconds if seconds else 0.0
