"""Where the frames of a WebSocket begin and end, and the one frame that a proxy may say itself.

RFC 6455, 5.2: a frame begins with its opcode and its length; a control frame may stand between the fragments
of a message (5.4), but never inside of a frame. So a proxy that wants to close (7.4.1: 1001, going away) has
to know where the frame ends that is passing, and nothing else: frames are skipped by their lengths, and
nothing is looked at or kept but the few bytes of a head that comes in pieces.

`Goodbye` is what the client's side of a tunnel asks: bytes of the backend go through `pass_on`, and after
`say` the client hears that we go away as soon as that can be said, and nothing more. Its answer, a close
frame too, goes to the backend as everything that it sends: so both ends are closed in good order.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final

#: Close, 1001, without a mask: as servers send it.
GOING_AWAY: Final = b"\x88\x02\x03\xe9"


class State(Enum):
    PASSING = 0
    WAITING = 1  # for the end of a frame
    SAID = 2  # by us, or by the backend


#: The steps that may happen.
TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    State.PASSING: frozenset({State.WAITING, State.SAID}),
    State.WAITING: frozenset({State.SAID}),
    State.SAID: frozenset(),
}

_CLOSE: Final = 8
_LONGEST_HEAD: Final = 14


class Goodbye:
    """The frames from the backend to the client, and whether we have taken leave of him."""

    def __init__(self) -> None:
        self._frames = Frames()
        self._state = State.PASSING

    def pass_on(self, data: bytes) -> bytes:
        """What the client gets in the place of these bytes of the backend."""
        if self._state is State.PASSING:
            self._frames.follow(data)
            return data
        if self._state is State.SAID:
            return b""
        end = self._frames.end_of_frame(data)
        rest = data[:end]
        return rest + self._said() if self._frames.is_between else rest

    def say(self) -> bytes:
        """What the client gets now; nothing when a frame has begun, or when it was said already."""
        if self._state is not State.PASSING:
            return b""
        self._state = State.WAITING
        return self._said() if self._frames.is_between else b""

    # Private

    def _said(self) -> bytes:
        self._state = State.SAID
        return b"" if self._frames.is_closed else GOING_AWAY


class Frames:
    """One direction: `follow` what is passed on, and ask for the `end_of_frame` when it has to end."""

    def __init__(self) -> None:
        self._left = 0  # bytes of the current frame that are still to come
        self._head = b""  # of the next one, as far as it has come
        #: A close frame has begun: nothing may follow it.
        self.is_closed = False

    @property
    def is_between(self) -> bool:
        """Whether a frame of our own could be said now."""
        return not self._left and not self._head

    def follow(self, data: bytes) -> None:
        """Take note of bytes that are passed on."""
        at, end = 0, len(data)
        while at < end:
            if self._left:
                step = min(self._left, end - at)
                self._left -= step
                at += step
            else:
                at = self._begin(data, at)

    def end_of_frame(self, data: bytes) -> int:
        """How many of these bytes belong to the frame that has begun; when all do, it may go on behind them.

        `is_between` says whether it does not. What comes after it is not taken note of.
        """
        if self.is_between:
            return 0
        at, end = 0, len(data)
        while at < end and not self._left:
            if not self._head:
                return at  # a frame without content has just ended
            at = self._begin(data, at)
        step = min(self._left, end - at)
        self._left -= step
        return at + step

    # Private

    def _begin(self, data: bytes, at: int) -> int:
        """Read a frame's head, or as much of it as there is; where its content begins."""
        known = len(self._head)
        stop = at + _LONGEST_HEAD - known
        head = self._head + data[at:stop]
        size = _size_of_head(head)
        if len(head) < size:
            self._head = head
            return len(data)
        self._head = b""
        if head[0] & 0x0F == _CLOSE:
            self.is_closed = True
        self._left = _length(head)
        return at + size - known


# Private


def _size_of_head(head: bytes) -> int:
    if len(head) < 2:
        return 2
    short = head[1] & 0x7F
    size = 2 if short < 126 else 4 if short == 126 else 10
    return size + 4 if head[1] & 0x80 else size


def _length(head: bytes) -> int:
    short = head[1] & 0x7F
    if short < 126:
        return short
    stop = 4 if short == 126 else 10
    return int.from_bytes(head[2:stop], "big")
