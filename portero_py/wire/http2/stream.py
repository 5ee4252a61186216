"""One HTTP/2 stream of the server's side: the state of its request and of its response, and their windows.

A subclass says what to do with a request (the methods that raise NotImplementedError); everything else is
here. Its methods `send_*`, `pause_body` and `resume_body` are those of the `Downstream` protocol.

    request    open until END_STREAM (`request_ended`)
    response   HEAD -> BODY -> ENDING -> DONE. ENDING: the response is complete, but bytes of it still wait
               for a window or for the socket. DONE: the stream is closed, for whatever reason.

The rules
- Once the response is ENDING or DONE the request is of no interest: its body is thrown away.
- A response that is complete before the request is: END_STREAM, and the connection sees to the rest
  (`http2_ended.py`).
- The stream's window is given back to the client when body bytes were delivered and the body is not paused.
  What is delivered during a pause is given back at the resumption. The connection's window knows no pause.
- `idle_since` is 0.0 after every sign of life. Whoever sweeps over the streams from time to time sets it to
  his clock when it is 0.0, and so learns how long nothing happened: no clock is read for a sign of life.
  While bytes wait for the client it is no sign of life that there are more of them.
- Waiting bytes come in pieces as the backend sent them, of one byte if it likes: small ones are put together
  (a piece costs 200 bytes, and a frame).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, NoReturn

from portero_py.wire.http2.frames import DATA, END_STREAM, FRAME, ErrorCode, frame_header, reset_frame
from portero_py.wire.http2.hpack import field_list
from portero_py.wire.http2.output import BATCH_LIMIT

if TYPE_CHECKING:
    from portero_py.errors import PorteroError
    from portero_py.wire.http2.connection import ServerConnection
    from portero_py.wire.message import Fields, RequestHead, ResponseHead

# States of a response.
HEAD: Final = 0
BODY: Final = 1
ENDING: Final = 2
DONE: Final = 3

#: A response with more waiting bytes is held up at its source, until less than the second figure waits.
HIGH_WATER: Final = 65_536
LOW_WATER: Final = 16_384
#: Waiting pieces are put together up to this size.
SMALL: Final = 4096

_FRAME = FRAME.pack


class Stream:
    """A stream with an identifier; `window` is what the client takes of the response."""

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
        "id",
        "idle_since",
        "paused",
        "receive_window",
        "request_ended",
        "response",
        "returnable",
        "room",
        "window",
    )

    def __init__(self, connection: ServerConnection, number: int, receive_window: int) -> None:
        self.id = number
        self._connection = connection
        self._output = output = connection.output
        self.idle_since = 0.0
        # request
        self.request_ended = False
        self.body_left = -1  # bytes of the body that Content-Length still promises, or -1
        self.paused = False
        self.room = receive_window  # the window when everything was given back
        self.receive_window = receive_window
        self.returnable = 0  # delivered, to be given back with the next WINDOW_UPDATE
        # response
        self.response = HEAD
        self.window = output.initial_window
        self._batch = -1  # of the last frame, and its place there
        self._place = 0
        self._queue: deque[memoryview] | None = None
        self._queued = 0
        self._held_up = False
        self._trailers: Fields | None = None

    # What the connection calls; a subclass does the work

    def on_head(self, head: RequestHead) -> None:
        """A request begins. When it has no body (`request_ended`), `on_end` is not called."""
        raise NotImplementedError

    def on_refused(self, error: PorteroError) -> None:
        """The request's head is over a limit: answer with `error.status`; nothing else will be called."""
        raise NotImplementedError

    def on_body(self, data: bytes) -> None:
        """Bytes of the request's body, never empty."""
        raise NotImplementedError

    def on_end(self, trailers: Fields | None) -> None:
        """The request is complete."""
        raise NotImplementedError

    def on_lost(self, error: PorteroError) -> None:
        """The stream was closed before its response was complete, and not by us."""
        raise NotImplementedError

    def on_held_up(self) -> None:
        """Too much of the response waits."""
        raise NotImplementedError

    def on_relieved(self) -> None:
        """The response may go on."""
        raise NotImplementedError

    # The response

    def send_informational(self, head: ResponseHead) -> None:
        """Send a 1xx response."""
        if self.response != HEAD:
            self._illegal("send_informational")
        output = self._output
        output.headers(self.id, output.encoder.encode_response(head.status, head.fields), 0)

    def send_response(self, head: ResponseHead, body: bytes) -> None:
        """Send a whole final response."""
        length = len(body)
        output = self._output
        if (
            self.response != HEAD
            or length > self.window
            or length > output.window
            or length > output.frame_limit
            or output.size >= BATCH_LIMIT
            or output.blocked
        ):
            self.send_head(head)
            if body:
                self.send_body(body)
            self.send_end(None)
            return
        block = output.encoder.encode_response(head.status, head.fields)
        if body:
            self.window -= length
            output.window -= length
            output.headers(self.id, block, 0)
            output.pieces += (_FRAME(length >> 8, length & 0xFF, DATA, END_STREAM, self.id), body)
            output.size += length + 9
            output.frames += 1
        else:
            output.headers(self.id, block, END_STREAM)
        self._close()

    def send_head(self, head: ResponseHead) -> None:
        """Send the head of the final response."""
        if self.response != HEAD:
            self._illegal("send_head")
        self.response = BODY
        self.idle_since = 0.0
        output = self._output
        self._place = output.headers(self.id, output.encoder.encode_response(head.status, head.fields), 0)
        self._batch = output.batch

    def send_body(self, data: bytes) -> None:
        """Send bytes of the body, or keep them until there is room."""
        if self.response != BODY:
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
        if queue is None:
            self.idle_since = 0.0
            self._queue = queue = deque()
        if queue and length + len(queue[-1]) <= SMALL:
            queue[-1] = memoryview(bytes(queue[-1]) + data)
        else:
            queue.append(memoryview(data))
        self._queued += length
        if self.window > 0:
            output.waiting[self] = None
            output.pump()
        if self._queued > HIGH_WATER and not self._held_up:
            self._held_up = True
            self.on_held_up()

    def send_end(self, trailers: Fields | None) -> None:
        """The response is complete."""
        if self.response != BODY:
            self._illegal("send_end")
        if self._queue is not None:
            self.response = ENDING
            self._trailers = trailers
        else:
            self._end(trailers)

    def reset(self, code: ErrorCode) -> None:
        """Close the stream with RST_STREAM."""
        if self.response != DONE:
            self._output.control(reset_frame(self.id, code))
            self._connection.forget(self, reset=True)

    # The request's body

    def pause_body(self) -> None:
        """Give no window back until `resume_body`."""
        self.paused = True

    def resume_body(self) -> None:
        """Give back what was withheld, and whatever comes."""
        self.paused = False
        self.idle_since = 0.0
        if self.response < ENDING:
            self._connection.give_back(self)

    # What the connection and the output need

    @property
    def stalled(self) -> bool:
        """Bytes of the response wait for the client."""
        return self._queue is not None

    def open_window(self, increment: int) -> None:
        """The client takes so many bytes more, or fewer when it is negative."""
        self.window += increment
        if self._queue is not None:
            if self.window > 0:
                self._output.waiting[self] = None
            else:
                self._output.waiting.pop(self, None)

    def next_piece(self, room: int) -> tuple[memoryview, bool]:
        """Take up to `room` bytes from the queue; say whether they end the stream."""
        queue = self._queue
        assert queue is not None
        piece = queue[0]
        if len(piece) > room:
            queue[0] = piece[room:]
            return piece[:room], False
        queue.popleft()
        if not queue:
            self._queue = None
            return piece, self.response == ENDING and not self._trailers
        return piece, False

    def piece_sent(self, length: int, place: int, *, last: bool) -> None:
        """Account for a piece of the queue, whose frame is at `place` of this batch."""
        self._place = place
        self._batch = self._output.batch
        self.window -= length
        self._queued -= length
        self.idle_since = 0.0
        if self._queue is not None:
            if self.window > 0:
                self._output.waiting[self] = None
        elif last:
            self._close()
        elif self.response == ENDING:
            self._end(self._trailers)
        if self._held_up and self._queued <= LOW_WATER and self.response == BODY:
            self._held_up = False
            self.on_relieved()

    def drop_queue(self) -> None:
        """The stream is closed: what waits will not be sent."""
        self._queue = None
        self._queued = 0
        self._output.waiting.pop(self, None)

    # Private

    def _end(self, trailers: Fields | None) -> None:
        output = self._output
        if trailers and (fields := field_list(trailers)):
            output.headers(self.id, output.encoder.encode(fields), END_STREAM)
        elif self._batch == output.batch:
            output.end_at(self._place)
        else:
            output.control(frame_header(0, DATA, END_STREAM, self.id))
        self._close()

    def _close(self) -> None:
        if self.request_ended:
            self._connection.forget(self, reset=False)
        else:
            self._connection.answered_early(self)

    def _illegal(self, step: str) -> NoReturn:
        raise RuntimeError(f"{step} in state {self.response} of stream {self.id}")
