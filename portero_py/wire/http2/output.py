"""What a connection has to send: frames of this batch, flow control, streams that wait for their turn.

Every frame of one turn of the event loop goes out in one write: over TLS each write is a record and a system
call. So frames are gathered in `pieces` as headers and payloads, body bytes uncopied until they are joined. A
frame of the current batch can still be changed: that is how the last DATA frame of a message gets its
END_STREAM.

Two things stop a body: a window (the stream's or the connection's, RFC 9113, 5.2) or the socket (`blocked`).
Then its bytes wait in the stream, and the stream waits in `waiting`, unless it is its own window that is used
up. While anything waits there and nothing blocks, the connection's window is used up; so nobody overtakes.
`pump` sends one frame for each waiting stream in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from portero_py.wire.http2.frames import (
    DATA,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    FRAME,
    FRAME_LIMIT,
    HEADERS,
    header_frames,
)
from portero_py.wire.http2.hpack import HeaderEncoder

#: No more body bytes than this in one batch: the socket shall say that it is full before it is fed more.
BATCH_LIMIT: Final = 262_144
#: The largest frame that portero sends, even to peers that allow more: streams take turns by frames.
SENT_FRAME_LIMIT: Final = 65_536

_ENDED: Final = tuple(bytes([flags | END_STREAM]) for flags in range(256))
_FRAME: Final = FRAME.pack


class Waiting:
    """What has bytes that wait for their turn: the stream `id`; `window` is what the peer takes of it."""

    __slots__ = ("id", "window")

    id: int
    window: int

    def next_piece(self, room: int) -> tuple[memoryview, bool]:
        """Take up to `room` bytes out of what waits; say whether they end the stream."""
        raise NotImplementedError

    def piece_sent(self, length: int, place: int, *, last: bool) -> None:
        """The bytes that were taken, `length` of them, are in the frame at `place` of this batch."""
        raise NotImplementedError


class Output:
    """The sending half of a connection. `wake` is called when there is something to take, once a batch."""

    __slots__ = (
        "_wake",
        "batch",
        "blocked",
        "encoder",
        "frame_limit",
        "frames",
        "held",
        "initial_window",
        "pieces",
        "size",
        "told",
        "waiting",
        "window",
    )

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        # connection
        self.encoder = HeaderEncoder()
        self.window = DEFAULT_WINDOW
        self.initial_window = DEFAULT_WINDOW
        self.frame_limit = FRAME_LIMIT
        self.blocked = False  # the socket takes no more
        self.waiting: dict[Waiting, None] = {}
        self.held = 0  # bytes that wait in streams, for whatever reason
        # batch
        self.pieces: list[bytes | memoryview] = []
        self.size = 0
        self.batch = 0
        self.told = False
        #: Frames of messages that have left so far.
        self.frames = 0

    def take(self) -> bytes:
        """Return all that is to be written now."""
        pieces = self.pieces
        self.pieces = []
        self.size = 0
        self.batch += 1
        self.told = False
        return b"".join(pieces)

    def tell(self) -> None:
        """Say that there is something to take. Callers look at `told` first: once a batch is enough."""
        self.told = True
        self._wake()

    def control(self, frame: bytes) -> None:
        """Send a whole frame that no window holds back."""
        self.pieces.append(frame)
        self.size += len(frame)
        if not self.told:
            self.tell()

    def headers(self, stream: int, block: bytes, flags: int) -> int:
        """Send a header block; return the place of its first frame in this batch."""
        pieces = self.pieces
        place = len(pieces)
        length = len(block)
        if length <= self.frame_limit:
            pieces.append(_FRAME(length >> 8, length & 0xFF, HEADERS, flags | END_HEADERS, stream))
            pieces.append(block)
        else:
            pieces.extend(header_frames(stream, block, flags, self.frame_limit))
        self.size += length + 9
        self.frames += 1
        if not self.told:
            self.tell()
        return place

    def end_at(self, place: int) -> None:
        """Set END_STREAM in the frame header at `place` of this batch."""
        header = bytes(self.pieces[place])
        self.pieces[place] = header[:4] + _ENDED[header[4]] + header[5:]

    def pump(self) -> None:
        """Send what waits, as far as the windows and the socket allow."""
        waiting = self.waiting
        while waiting and self.window > 0 and self.size < BATCH_LIMIT and not self.blocked:
            stream = next(iter(waiting))
            del waiting[stream]
            room = min(self.frame_limit, self.window, stream.window)
            piece, last = stream.next_piece(room)
            length = len(piece)
            place = len(self.pieces)
            self.pieces.append(_FRAME(length >> 8, length & 0xFF, DATA, END_STREAM if last else 0, stream.id))
            self.pieces.append(piece)
            self.size += length + 9
            self.frames += 1
            self.window -= length
            stream.piece_sent(length, place, last=last)
        if self.pieces and not self.told:
            self.tell()
