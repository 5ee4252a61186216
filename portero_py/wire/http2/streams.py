"""The streams of one HTTP/2 connection: who is open, what is remembered of the others, what a peer may send.

Memory
What a peer may send of a body that nobody reads is its stream's window: FIRST_WINDOW, and STREAM_WINDOW for
up to GROWN_STREAMS streams whose readers have read. So a connection holds `streams` x 64 KiB + 3 MiB at most
(11 MiB with 128 streams).

The traps
- A GOAWAY never names a later stream than the one before it (RFC 9113, 6.8), though newer streams, which are
  ignored, still move `last_stream`.
- What a peer sent before it learnt of our RST_STREAM is no offence (`ended.py`), and its DATA counts in the
  connection's window.
- A peer that sends malformed streams makes us reset them; that costs it `Floods.faults`, else it would have
  found a way around the limit on its own resets.
"""

from __future__ import annotations

from typing import Final

from portero_py.errors import PorteroError
from portero_py.wire.http2.ended import EndedStreams
from portero_py.wire.http2.floods import Floods
from portero_py.wire.http2.frames import LARGEST_STREAM, ConnectionFault, ErrorCode, reset_frame, window_frame
from portero_py.wire.http2.output import Output
from portero_py.wire.http2.stream import Carrier, Stream

#: What a peer may send of a body before it must wait: at first, and once its reader has read some of it.
#: Enough for 100 Mbit/s at 20 ms a stream.
FIRST_WINDOW: Final = 65_536
STREAM_WINDOW: Final = 262_144
#: How many streams of a connection may have the larger one at the same time.
GROWN_STREAMS: Final = 16


class Streams(Carrier):
    """The open streams are `streams`, what is remembered of others `ended`.

    quiet_from   the state of a stream's `sending` from which on our side hears nothing more of it
    last_stream  the latest that was opened, by whichever side is the client
    """

    def __init__(self, output: Output, quiet_from: int) -> None:
        self.output = output
        self.quiet_from = quiet_from
        self.streams: dict[int, Stream] = {}
        self.ended = EndedStreams()
        self.last_stream = 0
        self._accepted = LARGEST_STREAM  # what is opened beyond this one is ignored
        self._grown = 0
        self._floods = Floods()
        self._now = 0.0

    def reset_early(self) -> None:
        """Reset the streams that we left early and that were there at the last call already."""
        for number in self.ended.overdue():
            self._refuse(number, ErrorCode.NO_ERROR)

    # What streams call

    def forget(self, stream: Stream, *, reset: bool) -> bool:
        """The stream is closed, `reset` if by us. Say whether our side still had to hear of it."""
        if reset:
            self.ended.reset(stream.id)
        else:
            self.ended.closed(stream.id)
        return self._drop(stream)

    def leave_early(self, stream: Stream) -> None:
        """Our side is through with a stream that the peer has not ended: what still comes is thrown away."""
        self._drop(stream)
        oldest = self.ended.left_early(stream.id, stream.receive_window)
        if oldest:
            self._refuse(oldest, ErrorCode.NO_ERROR)

    def give_back(self, stream: Stream) -> None:
        """The peer may send as much more on the stream as was delivered, and more than that at first."""
        if stream.returnable * 2 >= stream.room and not stream.received and stream.sending < self.quiet_from:
            increment = stream.returnable
            stream.returnable = 0
            if stream.room == FIRST_WINDOW and self._grown < GROWN_STREAMS:
                self._grown += 1
                stream.room = STREAM_WINDOW
                increment += STREAM_WINDOW - FIRST_WINDOW
            stream.receive_window += increment
            self.output.control(window_frame(stream.id, increment))

    # What a role says

    def _peer_fault(self, message: str) -> PorteroError:
        """What a stream hears on which the peer broke the rules."""
        raise NotImplementedError

    # What the connection and its role do with streams

    def _refuse_idle(self, number: int) -> None:
        if not number or number > self.last_stream:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a frame on an idle stream")

    def _refuse(self, number: int, code: ErrorCode) -> None:
        """Reset a stream that has no object."""
        self.ended.reset(number)
        self.output.control(reset_frame(number, code))

    def _drop(self, stream: Stream) -> bool:
        heard = stream.sending < self.quiet_from
        stream.close()
        del self.streams[stream.id]
        if stream.room > FIRST_WINDOW:
            self._grown -= 1
        return heard

    def _stream_fault(self, stream: Stream, code: ErrorCode, message: str) -> None:
        self._floods.faults.draw(self._now)
        self.output.control(reset_frame(stream.id, code))
        if self.forget(stream, reset=True):
            stream.on_lost(self._peer_fault(message))

    def _on_late(self, number: int, size: int, *, ends: bool, data: bool) -> None:
        """HEADERS or DATA on a stream that has ended, or was never open."""
        if number > self._accepted or self.ended.late(number, size, ends=ends, data=data):
            self._floods.chores.draw(self._now)
