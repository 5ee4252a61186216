"""The server's side of one HTTP/2 connection (RFC 9113): bytes in, method calls and bytes out.

How a shell uses it
    connection = ServerConnection(wake, make_stream, settings)   the first output is there at once
    connection.receive(data, now)       calls methods of streams; then the shell writes
    `connection.output.take()`
    connection.behind                   after `receive`: bytes are left for the next turn of the event loop;
    read no more, and call `receive(b"", now)` then
    wake()                              is called once a batch when there is output outside of `receive`
    connection.output.blocked = True    while the socket takes no more; False and `output.pump()` afterwards
    connection.ended.early              not empty: call `reset_early()` every half second
    connection.finished                 after a write: nothing more will come, close the socket
    connection.lose(error)              the socket is gone

Phases: OPEN -> DRAINING (GOAWAY that refuses nothing was sent, with a PING) -> LAST (the last stream was
named, newer ones are ignored) -> OVER (a connection error, or the socket is gone). A connection error
(ConnectionFault) ends in a GOAWAY, every stream's `on_lost`, and OVER. `receive` raises only what a stream's
method raises, which none should: then the shell calls `break_off()`.

Memory
What a client may send of a body that nobody reads is its stream's window: FIRST_WINDOW, and STREAM_WINDOW for
up to GROWN_STREAMS streams whose backends have read. So a connection holds `streams` x 64 KiB + 3 MiB at most
(11 MiB with 128 streams). The connection's window is opened again as soon as DATA has come: it bounds what is
on its way, and a stream that stands still never stops another one.

The traps
- A GOAWAY never names a later stream than the one before it (RFC 9113, 6.8), though newer streams, which are
  ignored, still move `last_stream`.
- What a client sent before it learnt of our RST_STREAM is no offence (`http2_ended.py`), and its DATA counts
  in the connection's window.
- A client that sends malformed streams makes us reset them; that costs it `Floods.faults`, else it would have
  found a way around the limit on its own resets.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Final

from portero_py.errors import BadRequest, ClientGone, PorteroError, WireError
from portero_py.wire.http2.blocks import HeaderBlocks
from portero_py.wire.http2.ended import EndedStreams
from portero_py.wire.http2.floods import Floods
from portero_py.wire.http2.frames import (
    ACK,
    CONTINUATION,
    DATA,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    FRAME,
    FRAME_HEADER,
    FRAME_LIMIT,
    GOAWAY,
    HEADER_TABLE_SIZE,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    LARGEST_STREAM,
    LARGEST_WINDOW,
    MAX_FRAME_SIZE,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PRIORITY_FLAG,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    SETTINGS_ACK,
    WINDOW_UPDATE,
    ConnectionFault,
    ErrorCode,
    InternalFault,
    goaway_frame,
    our_settings,
    ping_frame,
    read_long,
    read_settings,
    reset_frame,
    window_frame,
    without_padding,
)
from portero_py.wire.http2.heads import HeadLimits, read_trailers
from portero_py.wire.http2.output import SENT_FRAME_LIMIT, Output
from portero_py.wire.http2.stream import DONE, ENDING, Stream
from portero_py.wire.message import RequestHead

#: What a client may send of a body before it must wait: at first, and once its backend has read some of it.
#: Enough for 100 Mbit/s at 20 ms a stream.
FIRST_WINDOW: Final = 65_536
STREAM_WINDOW: Final = 262_144
#: How many streams of a connection may have the larger one at the same time.
GROWN_STREAMS: Final = 16
#: What may be on its way to us of all bodies together.
CONNECTION_WINDOW: Final = 1_048_576

#: Response frames that we send earn a client so many chores each.
CREDIT: Final = 4

#: What one call of `receive` does before the other connections have their turn, and what a frame of each type
#: counts there: 64 requests, or 1024 of the frames that cost little. One read may hold 20,000 requests.
TURN: Final = 1024
_WORK: Final = bytes(
    [16 if kind in (HEADERS, CONTINUATION, RST_STREAM, SETTINGS) else 1 for kind in range(256)]
)

_DRAIN_PING: Final = b"portero\0"


class Phase(Enum):
    OPEN = 0
    DRAINING = 1
    LAST = 2
    OVER = 3


class ServerConnection:
    """One connection; `make_stream(connection, number, window)` makes each of its streams."""

    def __init__(
        self,
        wake: Callable[[], None],
        make_stream: Callable[[ServerConnection, int, int], Stream],
        limits: HeadLimits,
        max_streams: int,
    ) -> None:
        self._make_stream = make_stream
        self._limits = limits
        self._max_streams = max_streams
        self._floods = Floods()
        self._blocks = HeaderBlocks(limits)
        self._now = 0.0
        self.output = Output(wake)
        self.phase = Phase.OPEN
        #: The connection error that ended it.
        self.fault: ConnectionFault | None = None
        # streams
        self.streams: dict[int, Stream] = {}
        self.last_stream = 0
        self._accepted = LARGEST_STREAM
        self.ended = EndedStreams()
        self._grown = 0
        self._client_leaves = False
        # reading
        self._preface = PREFACE
        self._settled = False  # the client's first SETTINGS came
        self._rest = b""
        self.behind = False
        self._returnable = 0
        self._body_bytes = 0
        self._credited = 0
        self._greet()

    @property
    def finished(self) -> bool:
        """Nothing more will be sent or received."""
        if self.phase is Phase.OVER:
            return True
        leaves = self.phase is Phase.LAST or self._client_leaves
        return leaves and not self.streams and not self.ended.early

    @property
    def progress(self) -> int:
        """Grows while bodies move: with every byte of a request and every frame of a response that leaves."""
        return self._body_bytes + self.output.frames

    @property
    def unfinished_head(self) -> int:
        """What the client must finish soon: a header block (its stream), the preface (-1), nothing (0)."""
        return self._blocks.stream if self._settled else -1

    def receive(self, data: bytes, now: float) -> None:
        """Take bytes from the client at `now` (seconds). The shell writes the output afterwards."""
        if self.phase is Phase.OVER:
            return
        output = self.output
        output.told = True
        self._now = now
        if output.frames != self._credited:
            self._floods.chores.give((output.frames - self._credited) * CREDIT)
            self._credited = output.frames
        if self._rest:
            data = self._rest + data
            self._rest = b""
        position = 0
        end = len(data)
        unpack = FRAME.unpack_from
        left = TURN
        try:
            if self._preface:
                position = self._take_preface(data)
            while left > 0 and end - position >= FRAME_HEADER:
                high, low, kind, flags, number = unpack(data, position)
                length = high << 8 | low
                if length > FRAME_LIMIT:
                    raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "the frame is too large")  # noqa: TRY301
                start = position + FRAME_HEADER
                position = start + length
                if position > end:
                    position = start - FRAME_HEADER
                    break
                left -= _WORK[kind]
                if kind == HEADERS and self._settled and not self._blocks.stream:
                    self._on_headers(number & LARGEST_STREAM, flags, data[start:position])
                elif kind == DATA and self._settled and not self._blocks.stream:
                    self._on_data(number & LARGEST_STREAM, flags, data[start:position])
                else:
                    self._on_other(kind, number & LARGEST_STREAM, flags, data[start:position])
            if output.waiting:
                output.pump()
            self._rest = data[position:]
            self.behind = left <= 0 and len(self._rest) >= FRAME_HEADER
        except ConnectionFault as fault:
            self._fail(fault)
        if not output.pieces:
            output.told = False  # nothing to take: the next output has to be told

    def start_drain(self) -> None:
        """Tell the client to open no more streams; those on their way are still served (RFC 9113, 6.8)."""
        if self.phase is Phase.OPEN:
            self.phase = Phase.DRAINING
            self.output.control(goaway_frame(self._accepted, ErrorCode.NO_ERROR))
            self.output.control(ping_frame(_DRAIN_PING, ack=False))

    def finish_drain(self) -> None:
        """Name the last stream: the connection is idle, or the client did not answer the PING in time."""
        if self.phase in (Phase.OPEN, Phase.DRAINING):
            self.phase = Phase.LAST
            self._accepted = self.last_stream
            self.output.control(goaway_frame(self.last_stream, ErrorCode.NO_ERROR))

    def lose(self, error: PorteroError) -> None:
        """End everything: every stream is told, nothing more is sent but what waits in the output.

        Raises what a stream raises, when all have been told.
        """
        self.phase = Phase.OVER
        self._rest = b""
        self.behind = False
        self.ended.early.clear()
        raised: Exception | None = None
        for stream in list(self.streams.values()):
            if stream.id in self.streams and self.forget(stream, reset=True):
                try:
                    stream.on_lost(error)
                except Exception as caught:  # the others must hear of it all the same
                    raised = raised or caught
        if raised is not None:
            raise raised

    def fail(self, code: ErrorCode, message: str) -> None:
        """End the connection with GOAWAY: the shell's own reasons, such as a time-out."""
        if self.phase is not Phase.OVER:
            self._fail(ConnectionFault(code, message))

    def break_off(self) -> None:
        """End the connection with GOAWAY because `receive`, or a stream, has raised what it should not."""
        if self.phase is not Phase.OVER:
            self._fail(InternalFault(ErrorCode.INTERNAL_ERROR, "a fault in the proxy itself"))

    def reset_early(self) -> None:
        """Reset the streams that were answered early and were there at the last call already."""
        for number in self.ended.overdue():
            self._refuse(number, ErrorCode.NO_ERROR)

    # What streams call

    def forget(self, stream: Stream, *, reset: bool) -> bool:
        """The stream is closed, `reset` if by us. Say whether its response was incomplete."""
        if reset:
            self.ended.reset(stream.id)
        else:
            self.ended.closed(stream.id)
        return self._drop(stream)

    def answered_early(self, stream: Stream) -> None:
        """The stream's response is complete and its request is not: the stream itself is done with."""
        self._drop(stream)
        oldest = self.ended.answered(stream.id, stream.receive_window)
        if oldest:
            self._refuse(oldest, ErrorCode.NO_ERROR)

    def give_back(self, stream: Stream) -> None:
        """The client may send as much more on the stream as was delivered, and more than that at first."""
        if stream.returnable * 2 >= stream.room and not stream.request_ended:
            increment = stream.returnable
            stream.returnable = 0
            if stream.room == FIRST_WINDOW and self._grown < GROWN_STREAMS:
                self._grown += 1
                stream.room = STREAM_WINDOW
                increment += STREAM_WINDOW - FIRST_WINDOW
            stream.receive_window += increment
            self.output.control(window_frame(stream.id, increment))

    # Private: HEADERS and DATA

    def _on_headers(self, number: int, flags: int, payload: bytes) -> None:
        if not number & 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "HEADERS on a stream that no client opens")
        if flags & (PADDED | PRIORITY_FLAG):
            payload = without_padding(flags, payload)
        if flags & END_HEADERS:
            self._on_block(number, flags, payload)
        else:
            self._blocks.begin(number, flags, payload)

    def _on_block(self, number: int, flags: int, block: bytes) -> None:
        """A complete header block: a request, trailers, or something late."""
        ends = flags & END_STREAM
        if number > self.last_stream:
            self.last_stream = number
            self._on_request(number, ends, block)
            return
        received = self._blocks.decode(block)
        stream = self.streams.get(number)
        if stream is None:
            self._on_late(number, 0, ends=ends != 0, data=False)
        elif stream.request_ended:
            self._stream_fault(stream, ErrorCode.STREAM_CLOSED, "HEADERS behind the end of the request")
        elif not ends:
            self._stream_fault(stream, ErrorCode.PROTOCOL_ERROR, "HEADERS inside of the request")
        elif stream.response >= ENDING:
            stream.request_ended = True
        else:
            try:
                trailers = read_trailers(received, self._limits)
            except WireError as error:
                self._stream_fault(stream, ErrorCode.PROTOCOL_ERROR, str(error))
                return
            if stream.body_left > 0:
                self._stream_fault(
                    stream, ErrorCode.PROTOCOL_ERROR, "the body is shorter than Content-Length"
                )
                return
            stream.request_ended = True
            stream.on_end(trailers)

    def _on_request(self, number: int, ends: int, block: bytes) -> None:
        head = self._blocks.request(block, ends=ends != 0)
        if number > self._accepted:
            return
        if len(self.streams) >= self._max_streams:
            self._floods.resets.draw(self._now)
            self._refuse(number, ErrorCode.REFUSED_STREAM)
            return
        stream = self.streams[number] = self._make_stream(self, number, FIRST_WINDOW)
        if ends:
            stream.request_ended = True
        if isinstance(head, RequestHead):
            if not ends:
                stream.body_left = head.body_length  # CHUNKED is -1: unknown
            stream.on_head(head)
        elif isinstance(head, BadRequest):
            self._stream_fault(stream, ErrorCode.PROTOCOL_ERROR, str(head))
        else:
            stream.on_refused(head)

    def _on_data(self, number: int, flags: int, payload: bytes) -> None:
        size = len(payload)
        if flags & PADDED:
            payload = without_padding(flags & PADDED, payload)
        self._returnable += size
        if self._returnable >= CONNECTION_WINDOW // 2:
            self.output.control(window_frame(0, self._returnable))
            self._returnable = 0
        self._body_bytes += len(payload)
        if not payload and not flags & END_STREAM:
            self._floods.chores.draw(self._now)
        stream = self.streams.get(number)
        if stream is None:
            if not number:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "DATA on stream 0")
            self._on_late(number, size, ends=flags & END_STREAM != 0, data=True)
            return
        if stream.request_ended:
            self._stream_fault(stream, ErrorCode.STREAM_CLOSED, "DATA behind the end of the request")
            return
        if size > stream.receive_window:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "more DATA than the stream's window")
        stream.receive_window -= size
        left = stream.body_left
        if left >= 0:
            left -= len(payload)
            stream.body_left = left
            if left < 0 or (left and flags & END_STREAM):
                self._stream_fault(
                    stream, ErrorCode.PROTOCOL_ERROR, "the body does not have its Content-Length"
                )
                return
        if flags & END_STREAM:
            stream.request_ended = True
        if payload and stream.response < ENDING:
            stream.idle_since = 0.0
            stream.on_body(payload)
        if flags & END_STREAM and stream.response < ENDING:
            stream.on_end(None)
        if stream.response < ENDING:
            stream.returnable += size
            if not stream.paused:
                self.give_back(stream)

    def _on_late(self, number: int, size: int, *, ends: bool, data: bool) -> None:
        """HEADERS or DATA on a stream that has ended, or was never open."""
        if number > self._accepted or self.ended.late(number, size, ends=ends, data=data):
            self._floods.chores.draw(self._now)

    # Private: the other frames

    def _on_other(self, kind: int, number: int, flags: int, payload: bytes) -> None:
        if self._blocks.stream and kind != CONTINUATION:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a frame inside of a header block")
        if not self._settled and (kind != SETTINGS or flags & ACK):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        if kind == WINDOW_UPDATE:
            self._on_window_update(number, payload)
        elif kind == RST_STREAM:
            self._on_rst_stream(number, payload)
        elif kind == CONTINUATION:
            gathered = self._blocks.go_on(number, flags, payload)
            if gathered is not None:
                self._on_block(number, *gathered)
        elif kind in (SETTINGS, PING, GOAWAY):
            if number:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a frame of the connection on a stream")
            if kind == SETTINGS:
                self._on_settings(flags, payload)
            elif kind == PING:
                self._on_ping(flags, payload)
            else:
                self._on_goaway(payload)
        elif kind == PUSH_PROMISE:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE from a client")
        else:
            self._floods.chores.draw(self._now)  # PRIORITY and unknown types: ignored
            if kind == PRIORITY:
                if len(payload) != 5:
                    raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "PRIORITY has not 5 bytes")
                if not number:
                    raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PRIORITY on stream 0")

    def _on_settings(self, flags: int, payload: bytes) -> None:
        if flags & ACK:
            if payload:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS with ACK and a payload")
            self._floods.chores.draw(self._now)
            return
        self._floods.settings.draw(self._now)
        output = self.output
        for identifier, value in read_settings(payload):
            if identifier == INITIAL_WINDOW_SIZE:
                change = value - output.initial_window
                output.initial_window = value
                for stream in self.streams.values():
                    if stream.window + change > LARGEST_WINDOW:
                        raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "a window over 2^31 - 1")
                    stream.open_window(change)
            elif identifier == HEADER_TABLE_SIZE:
                output.encoder.set_table_size(value)
            elif identifier == MAX_FRAME_SIZE:
                output.frame_limit = min(value, SENT_FRAME_LIMIT)
        self._settled = True
        output.control(SETTINGS_ACK)

    def _on_ping(self, flags: int, payload: bytes) -> None:
        if len(payload) != 8:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "PING has not 8 bytes")
        self._floods.chores.draw(self._now)
        if not flags & ACK:
            self.output.control(ping_frame(payload, ack=True))
        elif self.phase is Phase.DRAINING and payload == _DRAIN_PING:
            self.finish_drain()

    def _on_goaway(self, payload: bytes) -> None:
        if len(payload) < 8:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "GOAWAY has less than 8 bytes")
        self._floods.chores.draw(self._now)
        self._client_leaves = True

    def _on_rst_stream(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "RST_STREAM has not 4 bytes")
        self._refuse_idle(number)
        self._floods.resets.draw(self._now)
        stream = self.streams.get(number)
        if stream is None:
            self.ended.client_reset(number)
        elif self.forget(stream, reset=False):
            stream.on_lost(ClientGone("the client reset the stream"))

    def _on_window_update(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "WINDOW_UPDATE has not 4 bytes")
        self._floods.chores.draw(self._now)
        increment = read_long(payload)
        if not number:
            if not increment:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
            if self.output.window + increment > LARGEST_WINDOW:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "a window over 2^31 - 1")
            self.output.window += increment
            return
        self._refuse_idle(number)
        stream = self.streams.get(number)
        if stream is None:
            return
        if not increment:
            self._stream_fault(stream, ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
        elif stream.window + increment > LARGEST_WINDOW:
            self._stream_fault(stream, ErrorCode.FLOW_CONTROL_ERROR, "a window over 2^31 - 1")
        else:
            stream.open_window(increment)

    # Private: the connection

    def _greet(self) -> None:
        """Our SETTINGS, and the connection's window, which SETTINGS cannot change."""
        settings = our_settings(self._max_streams, FIRST_WINDOW, self._limits.list_bytes)
        self.output.control(settings + window_frame(0, CONNECTION_WINDOW - DEFAULT_WINDOW))

    def _take_preface(self, data: bytes) -> int:
        """Compare what came of the preface; return its length, or of what came of it."""
        preface = self._preface
        length = min(len(data), len(preface))
        if data[:length] != preface[:length]:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "not an HTTP/2 connection preface")
        self._preface = preface[length:]
        return length

    def _refuse_idle(self, number: int) -> None:
        if not number or number > self.last_stream:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a frame on an idle stream")

    def _refuse(self, number: int, code: ErrorCode) -> None:
        """Reset a stream that has no object."""
        self.ended.reset(number)
        self.output.control(reset_frame(number, code))

    def _drop(self, stream: Stream) -> bool:
        incomplete = stream.response < ENDING
        stream.response = DONE
        del self.streams[stream.id]
        if stream.stalled:
            stream.drop_queue()
        if stream.room > FIRST_WINDOW:
            self._grown -= 1
        return incomplete

    def _stream_fault(self, stream: Stream, code: ErrorCode, message: str) -> None:
        self._floods.faults.draw(self._now)
        self.output.control(reset_frame(stream.id, code))
        if self.forget(stream, reset=True):
            stream.on_lost(BadRequest(message))

    def _fail(self, fault: ConnectionFault) -> None:
        self.fault = fault
        last = min(self.last_stream, self._accepted)
        self.output.control(goaway_frame(last, fault.code, str(fault).encode()))
        self.lose(fault)
