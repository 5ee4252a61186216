"""One HTTP/2 stream of either role: a message that is sent, one that is received, and their windows.

Nothing here knows which of the two is the request. A role (`server_stream.py`) adds how a head is sent and
what becomes of a stream whose message has left (`on_sent`); its user what is done with what comes (`on_body`,
`on_end`, `on_lost`, `on_waiting`, `on_held_up`, `on_relieved`).

    received   True once END_STREAM has come
    sending    HEAD -> BODY -> ENDING -> ENDED -> DONE. ENDING: the message is complete, but bytes of it
               still wait for a window or for the socket. ENDED: END_STREAM has left. DONE: the stream is
               closed, for whatever reason.

The rules
- A side that hears nothing more of a stream (`Streams.quiet_from`) gets nothing of what still comes: it is
  thrown away.
- The stream's window is given back to the peer when body bytes were delivered and the body is not paused.
  What is delivered during a pause is given back at the resumption. The connection's window knows no pause.
- `idle_since` is 0.0 after every sign of life. Whoever sweeps over the streams from time to time sets it to
  his clock when it is 0.0, and so learns how long nothing happened: no clock is read for a sign of life.
  While bytes wait for the peer it is no sign of life that there are more of them.
- Waiting bytes come in pieces as they were sent to us, of one byte if somebody likes: small ones are put
  together (a piece costs 200 bytes, and a frame).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NoReturn

from portero_py.wire.http2.frames import DATA, END_STREAM, FRAME, ErrorCode, frame_header, reset_frame
from portero_py.wire.http2.hpack import field_list
from portero_py.wire.http2.output import BATCH_LIMIT, Output, Waiting

if TYPE_CHECKING:
    from portero_py.errors import PorteroError
    from portero_py.wire.message import Fields

# States of `sending`: plain ints, as they are compared several times a request.
HEAD: Final = 0
BODY: Final = 1
ENDING: Final = 2
ENDED: Final = 3
DONE: Final = 4

#: What `sending` may become.
TRANSITIONS: Final[Mapping[int, frozenset[int]]] = {
    HEAD: frozenset({BODY, ENDED, DONE}),
    BODY: frozenset({ENDING, ENDED, DONE}),
    ENDING: frozenset({ENDED, DONE}),
    ENDED: frozenset({DONE}),
    DONE: frozenset(),
}

#: A message with more waiting bytes is held up at its source, until less than the second figure waits.
HIGH_WATER: Final = 65_536
LOW_WATER: Final = 16_384
#: Waiting pieces are put together up to this size.
SMALL: Final = 4096

_FRAME: Final = FRAME.pack


class Carrier:
    """What a stream needs of its connection."""

    output: Output

    def forget(self, stream: Stream, *, reset: bool) -> bool:
        """The stream is closed, `reset` if by us. Say whether our side still had to hear of it."""
        raise NotImplementedError

    def leave_early(self, stream: Stream) -> None:
        """Our side is through with a stream that the peer has not ended: what still comes is thrown away."""
        raise NotImplementedError

    def give_back(self, stream: Stream) -> None:
        """The peer may send as much more on the stream as was delivered."""
        raise NotImplementedError


class Stream(Waiting):
    """A stream with an identifier; `window` is what the peer takes of our message."""

    __slots__ = (
        "_batch",
        "_connection",
        "_held_up",
        "_output",
        "_place",
        "_queue",
        "_queued",
        "_trailers",
        "body_left",
        "idle_since",
        "paused",
        "receive_window",
        "received",
        "returnable",
        "room",
        "sending",
    )

    def __init__(self, connection: Carrier, number: int, receive_window: int) -> None:
        self.id = number
        self._connection = connection
        self._output = output = connection.output
        self.idle_since = 0.0
        # what is received
        self.received = False
        self.body_left = -1  # bytes of the body that Content-Length still promises, or -1
        self.paused = False
        self.room = receive_window  # the window when everything was given back
        self.receive_window = receive_window
        self.returnable = 0  # delivered, to be given back with the next WINDOW_UPDATE
        # what is sent
        self.sending = HEAD
        self.window = output.initial_window
        self._batch = -1  # of the last frame, and its place there
        self._place = 0
        self._queue: deque[memoryview] | None = None
        self._queued = 0
        self._held_up = False
        self._trailers: Fields | None = None

    # What is called here; a role or its user does the work

    def on_body(self, data: bytes) -> None:
        """Bytes of the body that is received, never empty."""
        raise NotImplementedError

    def on_end(self, trailers: Fields | None) -> None:
        """What is received is complete."""
        raise NotImplementedError

    def on_lost(self, error: PorteroError) -> None:
        """The stream was closed, not by us, while our side still had to hear of it."""
        raise NotImplementedError

    def on_waiting(self) -> None:
        """Something of what is sent waits from now on. Only for the record."""

    def on_held_up(self) -> None:
        """Too much of what is sent waits."""
        raise NotImplementedError

    def on_relieved(self) -> None:
        """What is sent may go on."""
        raise NotImplementedError

    def on_sent(self) -> None:
        """All of our message has left, END_STREAM included."""
        raise NotImplementedError

    # The message that is sent

    def send_body(self, data: bytes) -> None:
        """Send bytes of the body, or keep them until there is room."""
        if self.sending != BODY:
            self._illegal("send_body")
        length = len(data)
        output = self._output
        if (
            self._queue is None
            and length <= self.window
            and length <= output.window
            and length <= output.frame_limit
            and output.size < BATCH_LIMIT
            and not output.blocked
        ):
            self.idle_since = 0.0
            self.window -= length
            output.window -= length
            pieces = output.pieces
            self._place = len(pieces)
            self._batch = output.batch
            pieces.append(_FRAME(length >> 8, length & 0xFF, DATA, 0, self.id))
            pieces.append(data)
            output.size += length + 9
            output.frames += 1
            if not output.told:
                output.tell()
            return
        queue = self._queue
        begins = queue is None
        if queue is None:
            self.idle_since = 0.0
            self._queue = queue = deque()
        if queue and length + len(queue[-1]) <= SMALL:
            queue[-1] = memoryview(bytes(queue[-1]) + data)
        else:
            queue.append(memoryview(data))
        self._queued += length
        output.held += length
        if self.window > 0:
            output.waiting[self] = None
            output.pump()
        if begins and self._queue is not None:
            self.on_waiting()
        if self._queued > HIGH_WATER and not self._held_up:
            self._held_up = True
            self.on_held_up()

    def send_end(self, trailers: Fields | None) -> None:
        """The message is complete."""
        if self.sending != BODY:
            self._illegal("send_end")
        if self._queue is not None:
            self.sending = ENDING
            self._trailers = trailers
        else:
            self._end(trailers)

    def reset(self, code: ErrorCode) -> None:
        """Close the stream with RST_STREAM."""
        if self.sending != DONE:
            self._output.control(reset_frame(self.id, code))
            self._connection.forget(self, reset=True)

    # The body that is received

    def pause_body(self) -> None:
        """Give no window back until `resume_body`."""
        self.paused = True

    def resume_body(self) -> None:
        """Give back what was withheld, and whatever comes."""
        self.paused = False
        self.idle_since = 0.0
        self._connection.give_back(self)

    # What the connection and the output need

    @property
    def stalled(self) -> bool:
        """Bytes of our message wait for the peer."""
        return self._queue is not None

    def open_window(self, increment: int) -> None:
        """The peer takes so many bytes more, or fewer when it is negative."""
        self.window += increment
        if self._queue is not None:
            if self.window > 0:
                self._output.waiting[self] = None
            else:
                self._output.waiting.pop(self, None)

    def next_piece(self, room: int) -> tuple[memoryview, bool]:
        queue = self._queue
        assert queue is not None
        piece = queue[0]
        if len(piece) > room:
            queue[0] = piece[room:]
            return piece[:room], False
        queue.popleft()
        if not queue:
            self._queue = None
            return piece, self.sending == ENDING and not self._trailers
        return piece, False

    def piece_sent(self, length: int, place: int, *, last: bool) -> None:
        self._place = place
        self._batch = self._output.batch
        self.window -= length
        self._queued -= length
        self._output.held -= length
        self.idle_since = 0.0
        if self._queue is not None:
            if self.window > 0:
                self._output.waiting[self] = None
        elif last:
            self.sending = ENDED
            self.on_sent()
        elif self.sending == ENDING:
            self._end(self._trailers)
        if self._held_up and self._queued <= LOW_WATER and self.sending == BODY:
            self._held_up = False
            self.on_relieved()

    def close(self) -> None:
        """The stream is closed: what waits will not be sent."""
        self.sending = DONE
        if self._queue is not None:
            self._queue = None
            self._output.held -= self._queued
            self._queued = 0
            self._output.waiting.pop(self, None)

    # What a role sends with

    def _send_first(self, block: bytes) -> None:
        """Send the head of our message, as a header block."""
        self.sending = BODY
        self.idle_since = 0.0
        output = self._output
        self._place = output.headers(self.id, block, 0)
        self._batch = output.batch

    def _send_all(self, block: bytes, body: bytes) -> None:
        """Send our whole message, its head as a header block."""
        length = len(body)
        output = self._output
        if (
            length > self.window
            or length > output.window
            or length > output.frame_limit
            or output.size >= BATCH_LIMIT
            or output.blocked
        ):
            self._send_first(block)
            if body:
                self.send_body(body)
            self.send_end(None)
            return
        if body:
            self.window -= length
            output.window -= length
            output.headers(self.id, block, 0)
            output.pieces += (_FRAME(length >> 8, length & 0xFF, DATA, END_STREAM, self.id), body)
            output.size += length + 9
            output.frames += 1
        else:
            output.headers(self.id, block, END_STREAM)
        self.sending = ENDED
        self.on_sent()

    def _illegal(self, step: str) -> NoReturn:
        raise RuntimeError(f"{step} in state {self.sending} of stream {self.id}")

    # Private

    def _end(self, trailers: Fields | None) -> None:
        output = self._output
        if trailers and (fields := field_list(trailers)):
            output.headers(self.id, output.encoder.encode(fields), END_STREAM)
        elif self._batch == output.batch:
            output.end_at(self._place)
        else:
            output.control(frame_header(0, DATA, END_STREAM, self.id))
        self.sending = ENDED
        self.on_sent()
