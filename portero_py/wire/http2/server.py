"""The server's side of an HTTP/2 connection: what is the server's in it, on top of `connection.py`.

The client opens streams, each with a request: its head is read here. A request over a limit is answered by
its stream (`on_refused`), a malformed one is reset, one beyond `max_streams` refused, and one behind the last
stream of a drain ignored. A stream hears of its client until its response is complete.
"""

from __future__ import annotations

from collections.abc import Callable

from portero_py.errors import BadRequest, ClientGone, PorteroError
from portero_py.wire.http2.blocks import HeaderBlocks
from portero_py.wire.http2.connection import Connection
from portero_py.wire.http2.frames import (
    INITIAL_WINDOW_SIZE,
    MAX_CONCURRENT_STREAMS,
    MAX_HEADER_LIST_SIZE,
    NO_RFC7540_PRIORITIES,
    PREFACE,
    ErrorCode,
    settings_frame,
)
from portero_py.wire.http2.heads import HeadLimits, RequestReader
from portero_py.wire.http2.server_stream import ServerStream
from portero_py.wire.http2.stream import ENDING
from portero_py.wire.http2.streams import FIRST_WINDOW
from portero_py.wire.message import RequestHead


class ServerConnection(Connection):
    """One connection; `make_stream(connection, number, window)` makes each of its streams."""

    def __init__(
        self,
        wake: Callable[[], None],
        make_stream: Callable[[ServerConnection, int, int], ServerStream],
        limits: HeadLimits,
        max_streams: int,
    ) -> None:
        self._make_stream = make_stream
        self._max_streams = max_streams
        self._requests: HeaderBlocks[RequestHead] = HeaderBlocks(RequestReader(limits), limits.list_bytes)
        greeting = settings_frame(
            (
                (MAX_CONCURRENT_STREAMS, max_streams),
                (INITIAL_WINDOW_SIZE, FIRST_WINDOW),
                (MAX_HEADER_LIST_SIZE, limits.list_bytes),
                (NO_RFC7540_PRIORITIES, 1),
            )
        )
        super().__init__(wake, self._requests, limits, greeting, PREFACE, ENDING)

    # What `Connection` asks

    def _on_block(self, number: int, ends: int, block: bytes) -> None:
        if number > self.last_stream:
            self.last_stream = number
            self._on_request(number, ends, block)
        else:
            self._on_more(number, ends, block)

    def _last_taken(self) -> int:
        return min(self.last_stream, self._accepted)

    def _peer_reset(self, code: int) -> PorteroError:
        return ClientGone("the client reset the stream")

    def _peer_fault(self, message: str) -> PorteroError:
        return BadRequest(message)

    # Private

    def _on_request(self, number: int, ends: int, block: bytes) -> None:
        head = self._requests.head(block, ends=ends != 0)
        if number > self._accepted:
            return
        if len(self.streams) >= self._max_streams:
            self._floods.resets.draw(self._now)
            self._refuse(number, ErrorCode.REFUSED_STREAM)
            return
        stream = self.streams[number] = self._make_stream(self, number, FIRST_WINDOW)
        if ends:
            stream.received = True
        if isinstance(head, RequestHead):
            if not ends:
                stream.body_left = head.body_length  # CHUNKED is -1: unknown
            stream.on_head(head)
        elif isinstance(head, BadRequest):
            self._stream_fault(stream, ErrorCode.PROTOCOL_ERROR, str(head))
        else:
            stream.on_refused(head)
