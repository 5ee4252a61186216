"""What a connection remembers of streams that have ended, to judge what still comes on them.

    closed   by both ends, or by the peer's RST_STREAM: a frame behind that is an offence
    reset    by us: the peer may not have known it yet, its frames are thrown away
    early    our side is through with it (the response is complete) while the peer's message is on its way

RST_STREAM with NO_ERROR tells the client of an early answer to stop (RFC 9113, 8.1). One that finds it in the
same read as the response may forget the response (curl 7.88 does), so the reset waits for a moment, or is
not needed because the client ends the stream by itself. Nothing of the exchange stays meanwhile, only a
number: what still comes is thrown away and counts in both windows, but the stream's is not opened again. So
the peer sends what that window had left, and stops.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from portero_py.wire.http2.frames import ConnectionFault, ErrorCode

#: How many streams that ended, and how many that we reset, are remembered.
KEPT_STREAMS: Final = 256
#: How many that we left early may wait for their reset; of more, the oldest gets it at once.
EARLY_STREAMS: Final = 32


class EndedStreams:
    """The ended streams of one connection; `early` says what may still come on each that we left early."""

    __slots__ = ("_closed", "_reset", "_seen", "early")

    def __init__(self) -> None:
        self.early: dict[int, int] = {}
        self._seen: list[int] = []
        self._closed: deque[int] = deque(maxlen=KEPT_STREAMS)
        self._reset: deque[int] = deque(maxlen=KEPT_STREAMS)

    def closed(self, number: int) -> None:
        """Both ends know that it is closed."""
        self._closed.append(number)

    def reset(self, number: int) -> None:
        """We have reset it."""
        self._reset.append(number)

    def left_early(self, number: int, window: int) -> int:
        """Our side is through with it; return one to be reset now because there are too many, or 0."""
        early = self.early
        early[number] = window
        if len(early) <= EARLY_STREAMS:
            return 0
        oldest = next(iter(early))
        del early[oldest]
        return oldest

    def overdue(self) -> list[int]:
        """Take out the early ones that were there at the last call already: they are to be reset."""
        due = [number for number in self._seen if self.early.pop(number, None) is not None]
        self._seen = list(self.early)
        return due

    def peer_reset(self, number: int) -> None:
        """RST_STREAM came: no news unless we left it early."""
        if self.early.pop(number, None) is not None:
            self._closed.append(number)

    def late(self, number: int, size: int, *, ends: bool, data: bool) -> bool:
        """DATA with `size` bytes, or HEADERS, came: say whether the peer may not know yet that we reset it.

        Raises ConnectionFault when that is no excuse.
        """
        window = self.early.get(number)
        if window is None:
            if number in self._reset:
                return True
            if number in self._closed:
                raise ConnectionFault(ErrorCode.STREAM_CLOSED, "a frame on a closed stream")
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a frame on a stream that is not open")
        if size > window:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "more DATA than the stream's window")
        if ends:
            del self.early[number]
            self._closed.append(number)
        elif data:
            self.early[number] = window - size
        else:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "HEADERS inside of a message")
        return False
