"""One HTTP/2 connection of either role (RFC 9113): bytes in, method calls and bytes out.

What differs by role is what a subclass says (`server.py`): how the connection begins (`greeting`, `preface`),
what a complete header block means (`_on_block`), which stream a GOAWAY names (`_last_taken`), what a stream
hears when the peer ends or breaks it (`_peer_reset`, `_peer_fault`), and how long our side wants to hear of a
stream (`quiet_from`). The streams and their windows are in `streams.py`; all the rest is here: SETTINGS,
PING, GOAWAY, the connection's windows, floods, header blocks, drains, the end.

How a shell uses it
    connection = ServerConnection(...)  the first output is there at once
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

The traps
- Only a client opens streams, and there is no push: all of them are odd, in both directions.
- The connection's window is opened again as soon as DATA has come, wanted or not: it bounds what is on its
  way, and a stream that stands still never stops another one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Final

from portero_py.errors import PorteroError, WireError
from portero_py.wire.http2.blocks import HeaderBlocks
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
    PRIORITY,
    PRIORITY_FLAG,
    PUSH_PROMISE,
    RST_STREAM,
    SETTING_SIZE,
    SETTINGS,
    SETTINGS_ACK,
    WINDOW_UPDATE,
    ConnectionFault,
    ErrorCode,
    InternalFault,
    goaway_frame,
    ping_frame,
    read_long,
    read_settings,
    window_frame,
    without_padding,
)
from portero_py.wire.http2.heads import HeadLimits, read_trailers
from portero_py.wire.http2.output import SENT_FRAME_LIMIT, Output
from portero_py.wire.http2.streams import Streams

#: What may be on its way to us of all bodies together.
CONNECTION_WINDOW: Final = 1_048_576

#: Frames of messages that we send earn a peer so many chores each.
CREDIT: Final = 4

#: What one call of `receive` does before the other connections have their turn, and what a frame of each type
#: counts there: 64 requests, or 1024 of the frames that cost little. One read may hold 20,000 requests.
TURN: Final = 1024
_WORK: Final = bytes(
    [16 if kind in (HEADERS, CONTINUATION, RST_STREAM, SETTINGS) else 1 for kind in range(256)]
)

#: Settings that one frame may hold: six are defined, and a few in extensions. nghttp2 has the same limit.
MAX_SETTINGS: Final = 32

_DRAIN_PING: Final = b"portero\0"


class Phase(Enum):
    OPEN = 0
    DRAINING = 1
    LAST = 2
    OVER = 3


#: What `phase` may become.
TRANSITIONS: Final[Mapping[Phase, frozenset[Phase]]] = {
    Phase.OPEN: frozenset({Phase.DRAINING, Phase.LAST, Phase.OVER}),
    Phase.DRAINING: frozenset({Phase.LAST, Phase.OVER}),
    Phase.LAST: frozenset({Phase.OVER}),
    Phase.OVER: frozenset({Phase.OVER}),
}


class Connection(Streams):
    """One connection. It begins with our `greeting`; the peer's frames begin behind its `preface`."""

    def __init__(
        self,
        wake: Callable[[], None],
        blocks: HeaderBlocks[Any],
        limits: HeadLimits,
        greeting: bytes,
        preface: bytes,
        quiet_from: int,
    ) -> None:
        super().__init__(Output(wake), quiet_from)
        self._limits = limits
        self._blocks = blocks
        self.phase = Phase.OPEN
        #: The connection error that ended it.
        self.fault: ConnectionFault | None = None
        self._peer_leaves = False
        # reading
        self._preface = preface
        self._settled = False  # the peer's first SETTINGS came
        self._rest = b""
        self.behind = False
        self._returnable = 0
        self._body_bytes = 0
        self._credited = 0
        # the connection's window cannot be changed by SETTINGS
        self.output.control(greeting + window_frame(0, CONNECTION_WINDOW - DEFAULT_WINDOW))

    @property
    def finished(self) -> bool:
        """Nothing more will be sent or received."""
        if self.phase is Phase.OVER:
            return True
        leaves = self.phase is Phase.LAST or self._peer_leaves
        return leaves and not self.streams and not self.ended.early

    @property
    def progress(self) -> int:
        """Grows while bodies move: with every byte that comes and every frame of a message that leaves."""
        return self._body_bytes + self.output.frames

    @property
    def unfinished_head(self) -> int:
        """What the peer must finish soon: a header block (its stream), the preface (-1), nothing (0)."""
        return self._blocks.stream if self._settled else -1

    def receive(self, data: bytes, now: float) -> None:
        """Take bytes from the peer at `now` (seconds). The shell writes the output afterwards."""
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
                    raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "the frame is too large")  # noqa: TRY301 - below
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
        """Tell the peer to open no more streams; those on their way are still served (RFC 9113, 6.8)."""
        if self.phase is Phase.OPEN:
            self.phase = Phase.DRAINING
            self.output.control(goaway_frame(LARGEST_STREAM, ErrorCode.NO_ERROR))
            self.output.control(ping_frame(_DRAIN_PING, ack=False))

    def finish_drain(self) -> None:
        """Name the last stream: the connection is idle, or the peer did not answer the PING in time."""
        if self.phase in (Phase.OPEN, Phase.DRAINING):
            self.phase = Phase.LAST
            self._accepted = self.last_stream
            self.output.control(goaway_frame(self._last_taken(), ErrorCode.NO_ERROR))

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

    # What a role says

    def _on_block(self, number: int, ends: int, block: bytes) -> None:
        """A complete header block came, with END_STREAM if `ends`: a head, or what `_on_more` is for."""
        raise NotImplementedError

    def _last_taken(self) -> int:
        """The last stream of the peer's that was or will be dealt with."""
        raise NotImplementedError

    def _peer_reset(self, code: int) -> PorteroError:
        """What a stream hears that the peer has reset."""
        raise NotImplementedError

    # Private: HEADERS and DATA

    def _on_headers(self, number: int, flags: int, payload: bytes) -> None:
        if not number & 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "HEADERS on a stream that no client opens")
        if flags & (PADDED | PRIORITY_FLAG):
            payload = without_padding(flags, payload)
        if flags & END_HEADERS:
            self._on_block(number, flags & END_STREAM, payload)
        else:
            self._blocks.begin(number, flags, payload)

    def _on_more(self, number: int, ends: int, block: bytes) -> None:
        """A header block behind a head: trailers, or something late."""
        received = self._blocks.decode(block)
        stream = self.streams.get(number)
        if stream is None:
            self._on_late(number, 0, ends=ends != 0, data=False)
        elif stream.received:
            self._stream_fault(stream, ErrorCode.STREAM_CLOSED, "HEADERS behind the end of the message")
        elif not ends:
            self._stream_fault(stream, ErrorCode.PROTOCOL_ERROR, "HEADERS inside of a message")
        elif stream.sending >= self.quiet_from:
            stream.received = True
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
            stream.received = True
            stream.on_end(trailers)

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
        if stream.received:
            self._stream_fault(stream, ErrorCode.STREAM_CLOSED, "DATA behind the end of the message")
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
            stream.received = True
        quiet_from = self.quiet_from
        if payload and stream.sending < quiet_from:
            stream.idle_since = 0.0
            stream.on_body(payload)
        if stream.sending >= quiet_from:
            return
        if flags & END_STREAM:
            stream.on_end(None)
            return
        stream.returnable += size
        if not stream.paused:
            self.give_back(stream)

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
                begun, block = gathered
                self._on_block(number, begun & END_STREAM, block)
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
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE, which nobody was allowed")
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
        if len(payload) > MAX_SETTINGS * SETTING_SIZE:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too many settings in one frame")
        output = self.output
        windows = []
        for identifier, value in read_settings(payload):
            if identifier == INITIAL_WINDOW_SIZE:
                windows.append(value)
            elif identifier == HEADER_TABLE_SIZE:
                output.encoder.set_table_size(value)
            elif identifier == MAX_FRAME_SIZE:
                output.frame_limit = min(value, SENT_FRAME_LIMIT)
        if windows:
            self._change_windows(max(windows), windows[-1])
        self._settled = True
        output.control(SETTINGS_ACK)

    def _change_windows(self, largest: int, last: int) -> None:
        """Every stream's window begins with `last` from now on, after others up to `largest` in one frame.

        Once a frame, however often it names the setting: 2,700 times it was 95 ms with 128 streams.
        """
        former = self.output.initial_window
        self.output.initial_window = last
        for stream in self.streams.values():
            if stream.window + largest - former > LARGEST_WINDOW:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "a window over 2^31 - 1")
            if last != former:
                stream.open_window(last - former)

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
        self._peer_leaves = True

    def _on_rst_stream(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "RST_STREAM has not 4 bytes")
        self._refuse_idle(number)
        self._floods.resets.draw(self._now)
        stream = self.streams.get(number)
        if stream is None:
            self.ended.peer_reset(number)
        elif self.forget(stream, reset=False):
            stream.on_lost(self._peer_reset(read_long(payload)))

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

    def _take_preface(self, data: bytes) -> int:
        """Compare what came of the preface; return its length, or of what came of it."""
        preface = self._preface
        length = min(len(data), len(preface))
        if data[:length] != preface[:length]:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "not an HTTP/2 connection preface")
        self._preface = preface[length:]
        return length

    def _fail(self, fault: ConnectionFault) -> None:
        self.fault = fault
        self.output.control(goaway_frame(self._last_taken(), fault.code, str(fault).encode()))
        self.lose(fault)
