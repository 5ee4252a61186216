"""The end of a connection whose client may still be sending.

A connection that is closed with bytes of the client unread is reset, and a reset can overtake our answer. So
such a client is read and forgotten for a moment (RFC 9112, 9.6). Every HTTP/2 client is one: it opens windows
while it reads. One that is slow to read gets all the time that it uses: only one that takes nothing for a
while is cut off. What it takes is seen by what is left, here and in the kernel, where megabytes may wait.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Final

from portero_py.proxy.progress import Progress

if TYPE_CHECKING:
    from portero_py.proxy.downstream.connection import Connection
    from portero_py.proxy.surroundings import Surroundings

#: How long, and how many bytes, the rest of a request is read and thrown away.
LINGER_SECONDS: Final = 5.0
LINGER_BYTES: Final = 1 << 20
#: Seconds that a client may take nothing of the last bytes.
CLOSE_SECONDS: Final = 10.0


class Leaving(asyncio.Protocol):
    """Takes the transport of `former` over until the client closes; LINGER_SECONDS, `most` bytes at most."""

    __slots__ = ("_left", "_progress", "_surroundings", "_transport", "deadline")

    def __init__(
        self,
        surroundings: Surroundings,
        transport: asyncio.Transport,
        former: Connection,
        most: int = LINGER_BYTES,
    ) -> None:
        self._surroundings = surroundings
        self._transport = transport
        self._left = most
        self._progress = Progress(transport)
        waits = transport.get_write_buffer_size()
        self.deadline = monotonic() + (CLOSE_SECONDS if waits else LINGER_SECONDS)
        transport.set_protocol(self)
        surroundings.connection_succeeded(former, self)
        transport.write_eof()

    def start_drain(self) -> None:
        """It is leaving already."""

    def announce_drain(self) -> None:
        """It is leaving already."""

    @property
    def is_tunnel(self) -> bool:
        """It carries nothing any more."""
        return False

    def end_tunnel(self) -> None:
        """There is none."""

    def idle_seconds(self, now: float) -> float:
        """It is busy leaving."""
        return 0.0

    def held_bytes(self) -> int:
        """How much the client has not taken."""
        return self._transport.get_write_buffer_size()

    def kill(self) -> None:
        """End at once."""
        self._transport.abort()

    # asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._surroundings.connection_closed(self)

    # The deadline wheel

    def on_deadline(self, now: float) -> None:
        """Go on while the client takes bytes, slowly as it may be."""
        if self._progress.is_made():
            self.deadline = now + CLOSE_SECONDS
        else:
            self._transport.abort()
