"""A client's HTTP/1 connection: requests in order, one exchange at a time.

States
    HEAD      waiting for a request's head, or for the rest of one; idle when nothing of it has come
    BODY      inside a request body
    RESPONSE  the request is complete, the response is not; what comes now belongs to the next request
              and waits in `_buffer` (pipelining: answered in order because nothing is looked at before)
    TUNNEL    after a 101: bytes both ways
    CLOSED    the last byte is written, the transport closes; or another protocol has it (`leaving.py`)

The traps
- An exchange can end inside `start()` (a 404): `_process` loops over pipelined requests and never recurses.
- A response that is complete before its request was read to its end ends the connection: what follows could
  be taken for a request.
- The response's head is held back until its first body bytes, so that a small response is one write.
- A client that sends requests and reads no answers would fill our memory: no request is begun while written
  bytes wait, and reading stops soon after.
- A client that has closed its side is still owed an answer to every request that came before, unless that
  one still waits in a queue: most clients that close do not want it any more.
- A connection that is closed with bytes of the client unread is reset, and a reset can overtake the answer.
  So after the last answer the rest is read and forgotten (`leaving.py`), unless the client has said itself
  that nothing more would come.
- The deadline of a body runs only while the body is read. If its rate is limited, it is no later than the
  time at which that is looked at (`_rated_at`).
- A tunnel whose backend has ended is half-closed towards the client, who may go on. Not under TLS: our
  close_notify would be the last that we read (`tls.py`), so there the end of one side ends both.
- The client of a WebSocket hears of a drain by a close frame (`wire/websocket.py`); other tunnels have no
  word for it.
- One that is slow to read the last bytes gets all the time that it uses, and no more.
- The first thing that is said on a plain connection may be HTTP/2's preface.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import socket
import struct
from enum import Enum
from time import monotonic
from typing import TYPE_CHECKING, Final, cast

from portero_py.errors import BadRequest, BodyTimeout, ClientGone, HeadTimeout, Http2Preface, WireError
from portero_py.proxy.body_rate import RATE_SECONDS, is_measured
from portero_py.proxy.budget import HEAVY
from portero_py.proxy.downstream.leaving import CLOSE_SECONDS, Leaving
from portero_py.proxy.exchange import Exchange
from portero_py.proxy.progress import SlowPeer
from portero_py.proxy.refusals import BODY_RATE
from portero_py.proxy.replies import reply
from portero_py.wire.framing import ChunkedDecoder, LengthDecoder, body_decoder, chunk, last_chunk
from portero_py.wire.http1 import PREFACE_HEAD, find_head, response_bytes
from portero_py.wire.websocket import Goodbye

if TYPE_CHECKING:
    from collections.abc import Mapping

    from portero_py.errors import PorteroError
    from portero_py.proxy.downstream.connection import Entrance
    from portero_py.proxy.endpoints import RequestSide
    from portero_py.proxy.peer import Peer
    from portero_py.proxy.surroundings import Surroundings
    from portero_py.wire.message import Fields, RequestHead, ResponseHead

NEVER: Final = math.inf
#: Bytes of pipelined requests that are kept before reading stops.
PIPELINE_LIMIT: Final = 65536
#: Pipelined requests taken in one go: 9,000 fit into one read, and the other clients want their turn.
BURST: Final = 64
#: Up to here head and body are joined before they are written: under TLS every write is a record.
JOIN_LIMIT: Final = 65536

_RESET: Final = struct.pack("ii", 1, 0)  # linger for 0 seconds
_EMPTY_LINES = re.compile(rb"(?:\r\n)*")
_log = logging.getLogger(__name__)


class State(Enum):
    HEAD = 0
    BODY = 1
    RESPONSE = 2
    TUNNEL = 3
    CLOSED = 4


_HEAD, _BODY, _RESPONSE, _TUNNEL, _CLOSED = State

#: The steps that may happen.
TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    _HEAD: frozenset({_BODY, _RESPONSE, _CLOSED}),
    _BODY: frozenset({_RESPONSE, _CLOSED}),  # an upgrade has no body
    _RESPONSE: frozenset({_HEAD, _TUNNEL, _CLOSED}),
    _TUNNEL: frozenset({_CLOSED}),
    _CLOSED: frozenset({_CLOSED}),
}


class Http1Downstream(asyncio.Protocol):
    """Implements `Downstream` for one exchange after the other."""

    __slots__ = (
        "_began_empty",
        "_body_paused",
        "_buffer",
        "_decoder",
        "_ended",
        "_entrance",
        "_exchange",
        "_head",
        "_head_begun",
        "_held",
        "_keep_alive",
        "_last",
        "_peer",
        "_processing",
        "_rated_at",
        "_rated_from",
        "_reading_paused",
        "_response_chunked",
        "_response_started",
        "_slow",
        "_state",
        "_surroundings",
        "_transport",
        "_turn",
        "_websocket",
        "_writing_paused",
        "deadline",
    )

    def __init__(self, surroundings: Surroundings, entrance: Entrance | None = None) -> None:
        # connection
        self._surroundings = surroundings
        self._entrance = entrance  # who has to be asked first
        self._peer: Peer = None  # type: ignore[assignment]  # set by connection_made
        self._transport: asyncio.Transport = None  # type: ignore[assignment]  # set by connection_made
        self._state = _HEAD
        self._buffer = b""
        self._began_empty = False  # an empty line came first: not HTTP/2, whatever follows
        self._processing = False
        self._turn: asyncio.Handle | None = None  # more requests are at hand than one turn may take
        self._reading_paused = False
        self._writing_paused = False
        self._slow: SlowPeer | None = None  # while the client is slow to read, or has to read the last bytes
        self._last = False  # no request may follow the one that has begun
        self._ended = False  # the client has closed its side
        self.deadline = monotonic() + surroundings.timeouts.head
        # exchange
        self._exchange: RequestSide | None = None
        self._head: RequestHead | None = None
        self._head_begun = False  # some bytes of it have come, and its deadline is set
        self._decoder: LengthDecoder | ChunkedDecoder | None = None
        self._body_paused = False
        self._rated_at = NEVER  # the next look at the body's rate
        self._rated_from = 0  # the bytes that had come by the last one
        self._keep_alive = True
        self._response_started = False
        self._response_chunked = False
        self._held: bytes | None = None
        self._websocket: Goodbye | None = None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        if self._entrance is not None and not self._entrance.arrived(self, self._transport):
            return
        surroundings = self._surroundings
        self._peer = surroundings.peers.of(transport)
        surroundings.connection_opened(self)

    def data_received(self, data: bytes) -> None:
        state = self._state
        if state is _HEAD:
            if (
                not self._buffer
                and data.find(b"\r\n\r\n") == len(data) - 4
                and 4 < len(data) <= self._surroundings.limits.header_bytes
                and data[0] != 0x0D
                and not self._writing_paused
            ):
                # One request and nothing else, as nearly always: `_process` would do the same for 0.3 µs
                # more.
                try:
                    self._take_head(data)
                except WireError as error:
                    self._refuse_head(error)
                return
            self._buffer = self._buffer + data if self._buffer else data
            self._process()
            if len(self._buffer) > PIPELINE_LIMIT:
                self._update_reading()
        elif state is _RESPONSE:
            self._buffer += data
            if len(self._buffer) > PIPELINE_LIMIT:
                self._update_reading()
        elif state is not _CLOSED:
            self._take_body(data)

    def eof_received(self) -> bool | None:
        state = self._state
        waits = self._writing_paused or self._turn is not None
        if not self._peer.tls_version:  # under TLS it is gone: see tls.py
            if self._exchange is not None and self._exchange.is_queued:
                pass  # nothing was begun for it, and there may be others who still want an answer
            elif state is _RESPONSE or (state is _HEAD and waits and self._buffer):
                # The client has said all it had to say and waits for the answers (RFC 9112, 9.6).
                self._ended = True
                return True
            elif state is _TUNNEL and self._exchange is not None:
                self._ended = True
                self._exchange.request_end(None)
                return True
        self._close()  # connection_lost does the rest
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._surroundings.connection_closed(self)
        self._state = _CLOSED
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.downstream_gone(ClientGone("the client closed the connection"))

    def pause_writing(self) -> None:
        self._writing_paused = True
        self._surroundings.budget.holds(self, self.held_bytes())
        self._slow = SlowPeer(self._transport)
        self.deadline = monotonic() + self._body_idle()
        if self._exchange is not None:
            self._exchange.downstream_paused()

    def resume_writing(self) -> None:
        self._writing_paused = False
        budget = self._surroundings.budget
        budget.drops(self)
        if self._state is _RESPONSE or self._state is _TUNNEL:
            self.deadline = 0.0
        elif self._state is _BODY:
            self._expect_body()
        if self._exchange is not None:
            if budget.may_go_on(self):
                self._exchange.downstream_resumed()
        elif self._state is _HEAD and self._buffer:
            self.deadline = monotonic() + self._surroundings.timeouts.head
            self._process()
            if self._reading_paused:
                self._update_reading()

    # The budget of buffered bytes

    def held_bytes(self) -> int:
        """How much waits here: responses for the client, requests for their turn."""
        return self._transport.get_write_buffer_size() + len(self._buffer)

    def go_on(self) -> None:
        """There is room again for what the backend says."""
        if self._exchange is not None and not self._writing_paused:
            self._exchange.downstream_resumed()

    # The deadline wheel

    def on_deadline(self, now: float) -> None:
        """The client has done nothing for too long."""
        state = self._state
        if state is _CLOSED or self._writing_paused:
            patience = CLOSE_SECONDS if state is _CLOSED else self._body_idle()
            more = self._slow.more_time(patience) if self._slow is not None else 0.0
            if more:
                self.deadline = now + more
            elif state is _CLOSED:
                self.kill()
            else:
                self._fail(ClientGone("the client stopped reading"))
        elif state is _HEAD:
            if self._buffer:
                self._fail(HeadTimeout("the request's head was not received in time"))
            else:
                self._close()
        elif state is _BODY:
            if now < self._rated_at:
                self._fail(BodyTimeout("the request's body was not received in time"))
            elif self._is_slow():
                self._surroundings.refusals.count(BODY_RATE, self._peer.address)
                self._fail(BodyTimeout("the request's body came too slowly"))
            else:
                self._expect_body()

    # The life cycle

    def start_drain(self) -> None:
        """Take no new request: close now when idle, after the current response otherwise."""
        self._keep_alive = False
        self._last = True
        if self._exchange is None and self._state is _HEAD and not self._buffer:
            self._close()

    def announce_drain(self) -> None:
        """The head of the next answer will say it."""

    @property
    def is_tunnel(self) -> bool:
        """Whether it carries something that is no HTTP."""
        return self._state is _TUNNEL

    def end_tunnel(self) -> None:
        """Ask the client of a WebSocket to close it."""
        if self._websocket is not None and self._state is _TUNNEL and not self._transport.is_closing():
            goodbye = self._websocket.say()
            if goodbye:
                self._transport.write(goodbye)

    def idle_seconds(self, now: float) -> float:
        """For how long no request has come; told by the deadline, so that no request has to note the time.

        Half as long for a client that has not been served yet: those that have been make room for it.
        """
        if self._state is not _HEAD or self._buffer:
            return 0.0
        timeouts = self._surroundings.timeouts
        if self._head is None:
            return max(now - (self.deadline - timeouts.head), 0.0) / 2
        return max(now - (self.deadline - timeouts.keep_alive), 0.0)

    def kill(self) -> None:
        """End at once, whatever is going on."""
        self._transport.abort()

    # What the exchange calls

    def send_informational(self, head: ResponseHead) -> None:
        """Pass a 1xx response on; HTTP/1.0 clients do not know them (RFC 9110, 15.2)."""
        request = self._head
        if request is not None and request.version == b"1.1" and not self._transport.is_closing():
            self._transport.write(response_bytes(head, b""))

    def send_response(self, head: ResponseHead, body: bytes) -> None:
        """A whole response in one write."""
        if self._state is _RESPONSE:
            request = self._head
            assert request is not None
            keep_alive = self._keep_alive and not self._surroundings.draining
            if not keep_alive:
                extra = b"Connection: close\r\n"
            else:
                extra = b"" if request.version == b"1.1" else b"Connection: keep-alive\r\n"
            if not self._transport.is_closing():
                self._transport.write(response_bytes(head, extra, body))
            self._exchange = None
            if keep_alive:
                self._next()
            else:
                self._say_goodbye()
            return
        self.send_head(head)
        if body:
            self.send_body(body)
        self.send_end(None)

    def send_head(self, head: ResponseHead) -> None:
        """Hold the response's head back for the first body bytes."""
        request = self._head
        assert request is not None
        self._response_started = True
        length = head.body_length
        self._response_chunked = False
        extra = b""
        if head.upgrade:
            if head.upgrade.lower() == b"websocket":
                self._websocket = Goodbye()
            self._held = response_bytes(head, b"Connection: Upgrade\r\nUpgrade: %b\r\n" % head.upgrade)
            return
        if length < 0:
            if request.version == b"1.1":
                self._response_chunked = True
                extra = b"Transfer-Encoding: chunked\r\n"
            else:
                self._keep_alive = False
        if self._state is not _RESPONSE or self._surroundings.draining:
            self._keep_alive = False
        if not self._keep_alive:
            extra += b"Connection: close\r\n"
        elif request.version == b"1.0":
            extra += b"Connection: keep-alive\r\n"
        self._held = response_bytes(head, extra)

    def send_body(self, data: bytes) -> None:
        """Send body bytes, or bytes of a tunnel."""
        transport = self._transport
        if transport.is_closing():
            return  # connection_lost follows and tells the exchange
        if self._response_chunked:
            if self._websocket is None:
                data = chunk(data)
            elif not (data := self._websocket.pass_on(data)):
                return
        held = self._held
        if held is not None:
            self._held = None
            if len(data) <= JOIN_LIMIT:
                data = held + data
            else:
                transport.write(held)
        transport.write(data)

    def send_end(self, trailers: Fields | None) -> None:
        """The response is complete: on to the next request, or close."""
        self._exchange = None
        if self._state is _TUNNEL:
            self._linger()  # closed at once if the client has ended too
            return
        request = self._head
        if self._response_chunked:
            wanted = request is not None and request.wants_trailers
            self._held = (self._held or b"") + last_chunk(trailers if wanted else None)
        self.flush()
        if self._state is not _RESPONSE:
            self._linger()
        elif not self._keep_alive:
            self._say_goodbye()
        else:
            self._next()

    def flush(self) -> None:
        """Let out a head whose body has not come yet."""
        held = self._held
        if held is not None:
            self._held = None
            if not self._transport.is_closing():
                self._transport.write(held)

    def abort(self, error: PorteroError) -> None:
        """Cut the response off so that the client notices."""
        exchange, self._exchange = self._exchange, None
        if self._held is not None and exchange is not None:  # not a byte of the response is out
            exchange.status = error.status
            self._answer(error, self._head, exchange.request_id)
        else:
            self._cut_off()

    def pause_body(self) -> None:
        """Stop reading the request's body."""
        self._body_paused = True
        self._update_reading()

    def resume_body(self) -> None:
        """Read the request's body again."""
        self._body_paused = False
        if self._turn is None and self._is_behind():
            self._turn = self._surroundings.loop.call_soon(self._next_turn)
        self._update_reading()

    def start_tunnel(self) -> None:
        """A 101 was sent: what the client sent behind its request is the tunnel's."""
        self._state = _TUNNEL
        self._response_chunked = self._websocket is not None  # its bytes are not simply passed on either
        if not self._writing_paused:
            self.deadline = 0.0
        self.flush()
        buffer, self._buffer = self._buffer, b""
        self._body_paused = False
        self._update_reading()
        if buffer and self._exchange is not None:
            self._exchange.request_body(buffer)
        if self._ended and self._exchange is not None:
            self._exchange.request_end(None)

    def half_close(self) -> bool:
        """Tell the client that its backend has ended its side; see the file's head for TLS."""
        if self._peer.tls_version or self._transport.is_closing():
            return False
        self._transport.write_eof()
        self._websocket = None  # nothing can be said any more
        self._response_chunked = False
        return True

    # Private

    def _next(self) -> None:
        """This exchange is over, and the connection may carry another."""
        self._state = _HEAD
        self._response_started = False
        self._response_chunked = False
        self._body_paused = False
        self.deadline = monotonic() + self._surroundings.timeouts.keep_alive
        if self._reading_paused:
            self._update_reading()
        if self._buffer:
            self._process()
        elif self._ended:
            self._close()

    def _process(self) -> None:
        """Take requests from the buffer until one of them has to wait."""
        if self._processing:
            return
        self._processing = True
        left = BURST
        try:
            while (
                self._state is _HEAD
                and self._buffer
                and not self._writing_paused
                and not self._transport.is_closing()
            ):
                if not left:
                    if self._turn is None:
                        self._turn = self._surroundings.loop.call_soon(self._next_turn)
                    break
                left -= 1
                if not self._next_request():
                    if self._ended:
                        self._close()
                    break
        except WireError as error:
            self._refuse_head(error)
        except Exception:
            # Whoever called may stand for another exchange: this one is not his to end.
            _log.exception("a fault of portero's own; the connection of %s ends", self._peer.address)
            self._transport.abort()
        finally:
            self._processing = False

    def _refuse_head(self, error: WireError) -> None:
        """Answer what is no request, unless it is HTTP/2 that the client speaks."""
        first = self._head is None and not self._began_empty
        if isinstance(error, Http2Preface) and first and not self._peer.tls_version:
            start = PREFACE_HEAD + self._buffer
            self._state = _CLOSED
            self._buffer = b""
            self._surroundings.found_http2(self, self._peer, self._transport, start)
        else:
            self._fail(error)

    def _next_turn(self) -> None:
        """The other clients had their turn."""
        self._turn = None
        if self._state is not _BODY:
            self._process()
        elif not self._body_paused and self._is_behind():
            self._go_on_with_body()
        if self._reading_paused:
            self._update_reading()

    def _go_on_with_body(self) -> None:
        try:
            self._take_body(b"")
        except Exception:
            _log.exception("a fault of portero's own; the connection of %s ends", self._peer.address)
            self._transport.abort()

    def _is_behind(self) -> bool:
        """Say whether there are more chunks of the body at hand than one turn may take."""
        return self._state is _BODY and self._decoder is not None and self._decoder.behind

    def _next_request(self) -> bool:
        surroundings = self._surroundings
        limits = surroundings.limits
        data = self._buffer
        end = data.find(b"\r\n\r\n")
        if 0 < end <= limits.header_bytes and data[0] != 0x0D:
            end += 4  # as `find_head` would say, without the call
        elif not (end := self._unusual_head(data)):
            return False
        else:
            data = self._buffer
        if self._head_begun:
            self._head_begun = False
            self._surroundings.budget.drops(self)
        self._buffer = data[end:]
        self._take_head(data[:end])
        return True

    def _take_head(self, raw: bytes) -> None:
        surroundings = self._surroundings
        self._head = head = surroundings.request_parser.parse(raw)
        self._keep_alive = head.keep_alive and not self._last
        self._exchange = exchange = Exchange(surroundings, self._peer, self, head)
        if head.body_length == 0:
            self._state = _RESPONSE
            self.deadline = 0.0
            exchange.start()
        else:
            self._begin_body(exchange, head.body_length)

    def _unusual_head(self, data: bytes) -> int:
        """Return the length of the head in the buffer; 0 when it must wait for more of it.

        Drops the empty lines before it. Raises a WireError for what can never become a head.
        """
        surroundings = self._surroundings
        limits = surroundings.limits
        if data[0] == 0x0D:  # RFC 9112, 2.2: empty lines before a request are ignored
            match = _EMPTY_LINES.match(data)
            assert match is not None
            data = data[match.end() :]
            self._began_empty = True
        if data and data != b"\r":
            end = find_head(data, limits.request_line, limits.header_bytes, BadRequest)
        else:
            end = 0
        if not end and data and not self._head_begun:
            self._head_begun = True
            self.deadline = monotonic() + surroundings.timeouts.head
            surroundings.deadlines.sooner(self)
        self._buffer = data
        if not end and len(data) > HEAVY:
            surroundings.budget.holds(self, self.held_bytes())
        return end

    def _begin_body(self, exchange: RequestSide, length: int) -> None:
        now = monotonic()
        surroundings = self._surroundings
        patience = surroundings.timeouts.body_idle  # until it is known what the service says
        self.deadline = now + patience
        self._rated_at = now + RATE_SECONDS if surroundings.limits.body_rate else NEVER
        self._rated_from = 0
        self._state = _BODY
        self._decoder = body_decoder(length, BadRequest)
        exchange.start()
        if self._buffer and self._state is _BODY:
            body, self._buffer = self._buffer, b""
            self._take_body(body)
        if self._reading_paused:
            self._update_reading()
            if self._reading_paused and self._state is _BODY:
                self._expect_body()
        elif self._state is _BODY and not self._writing_paused and exchange.body_idle != patience:
            self.deadline = min(self._rated_at, now + exchange.body_idle)
            surroundings.deadlines.sooner(self)

    def _take_body(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        state = self._state
        if state is _TUNNEL:
            exchange.request_body(data)
            return
        if not self._reading_paused:
            deadline = monotonic() + exchange.body_idle
            self.deadline = min(self._rated_at, deadline)
        decoder = self._decoder
        assert decoder is not None
        try:
            body, rest = decoder.decode(data)
        except WireError as error:
            self._fail(error)
            return
        if rest is None:
            if body:
                exchange.request_body(body)
            if decoder.behind:
                self._update_reading()
                if self._turn is None:
                    self._turn = self._surroundings.loop.call_soon(self._next_turn)
            return
        self._buffer = rest
        self._decoder = None
        self._body_complete(exchange, body, decoder.trailers or None)

    def _body_complete(self, exchange: RequestSide, data: bytes, trailers: Fields | None) -> None:
        if data:
            exchange.request_body(data)
        if self._exchange is exchange and self._state is _BODY:
            self._state = _RESPONSE
            if not self._writing_paused:
                self.deadline = 0.0
            exchange.request_end(trailers)

    def _fail(self, error: PorteroError) -> None:
        """Answer `error` if that is still possible, then end the connection."""
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            head, request_id = None, self._surroundings.next_request_id()
            self._surroundings.request_refused(self._peer, error, request_id)
        else:
            head, request_id = self._head, exchange.request_id
            exchange.downstream_gone(error)
        if isinstance(error, ClientGone):
            self._transport.abort()
            return
        if exchange is not None and self._response_started:
            self._cut_off()
            return
        self._answer(error, head, request_id)

    def _answer(self, error: PorteroError, head: RequestHead | None, request_id: bytes) -> None:
        response, body = reply(error, head, request_id)
        self._held = None
        if not self._transport.is_closing():
            self._transport.write(response_bytes(response, b"Connection: close\r\n", body))
        self._linger()

    def _cut_off(self) -> None:
        request = self._head
        self._held = None
        if request is None or request.version == b"1.1":
            self._close()  # the length, or the missing last chunk, tells
        else:
            # Only a reset tells, and a socket that is closed with nothing unread sends none by itself.
            sock = self._transport.get_extra_info("socket")
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._transport.abort()

    def _say_goodbye(self) -> None:
        """The last response is written, and says that it is the last."""
        request = self._head
        if self._buffer or (request is not None and request.keep_alive):
            self._linger()
        else:
            self._close()

    def _linger(self) -> None:
        """The last byte is out: give the client a moment to read it."""
        if self._transport.is_closing():
            return
        if self._ended:
            self._close()
            return
        self._state = _CLOSED
        self._buffer = b""
        self._body_paused = False
        self._update_reading()
        Leaving(self._surroundings, self._transport, self)

    def _close(self) -> None:
        """Close once everything is written."""
        if self._state is not _CLOSED and not self._transport.is_closing():
            self._state = _CLOSED
            self._buffer = b""
            self._slow = SlowPeer(self._transport)
            self.deadline = monotonic() + CLOSE_SECONDS
            self._transport.close()

    def _update_reading(self) -> None:
        """Read from the socket unless somebody is behind."""
        if self._transport.is_closing() or self._ended:  # resumed after its end, a transport reports it again
            return
        pause = self._body_paused or len(self._buffer) > PIPELINE_LIMIT or self._is_behind()
        if pause and not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()
            if self._buffer and self._state is not _BODY:  # that is on its way to the exchange
                self._surroundings.budget.holds(self, self.held_bytes())
        elif not pause and self._reading_paused:
            self._reading_paused = False
            self._transport.resume_reading()
            if not self._writing_paused:
                self._surroundings.budget.drops(self)
        else:
            return
        if self._state is _BODY:
            self._expect_body()

    def _body_idle(self) -> float:
        """For how many seconds the client may stand still."""
        exchange = self._exchange
        return self._surroundings.timeouts.body_idle if exchange is None else exchange.body_idle

    def _expect_body(self) -> None:
        """Set the deadline of the body: there is none while the backend is behind, not the client."""
        if self._writing_paused:  # then it is the response's
            return
        if self._reading_paused:
            self.deadline = 0.0
            return
        now = monotonic()
        self.deadline = now + self._body_idle()
        if self._surroundings.limits.body_rate and self._exchange is not None:
            self._rated_at = now + RATE_SECONDS
            self._rated_from = self._exchange.bytes_in
            self.deadline = min(self.deadline, self._rated_at)
        else:
            self._rated_at = NEVER

    def _is_slow(self) -> bool:
        """Say whether too little of the body has come since the last look."""
        head, exchange = self._head, self._exchange
        assert head is not None
        assert exchange is not None
        least = self._surroundings.limits.body_rate * RATE_SECONDS
        return (
            exchange.bytes_in - self._rated_from < least and not self._response_started and is_measured(head)
        )
