"""The end of a connection whose client may still be sending.

A connection that is closed with bytes of the client unread is reset, and a reset can overtake our answer. So
such a client is read and forgotten for a moment (RFC 9112, 9.6). One that is slow to read gets all the time
that it uses: only one that takes nothing for a while is cut off.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from portero_py.proxy.downstream_http1 import Http1Downstream
    from portero_py.proxy.worker import Worker

#: How long, and how many bytes, the rest of a request is read and thrown away.
LINGER_SECONDS: Final = 5.0
LINGER_BYTES: Final = 1 << 20
#: Seconds that a client may take nothing of the last bytes.
CLOSE_SECONDS: Final = 10.0


class Leaving(asyncio.Protocol):
    """Takes the transport of `former` over until the client closes; LINGER_SECONDS, LINGER_BYTES at most."""

    __slots__ = ("_left", "_transport", "_unsent", "_worker", "deadline")

    def __init__(self, worker: Worker, transport: asyncio.Transport, former: Http1Downstream) -> None:
        self._worker = worker
        self._transport = transport
        self._left = LINGER_BYTES
        self._unsent = transport.get_write_buffer_size()  # when it was last looked at
        self.deadline = monotonic() + (CLOSE_SECONDS if self._unsent else LINGER_SECONDS)
        transport.set_protocol(self)
        worker.connection_succeeded(former, self)
        transport.write_eof()

    def start_drain(self) -> None:
        """It is leaving already."""

    def kill(self) -> None:
        """End at once."""
        self._transport.abort()

    # asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._worker.connection_closed(self)

    # The deadline wheel

    def on_deadline(self, now: float) -> None:
        """Go on while the client takes bytes, slowly as it may be."""
        unsent = self._transport.get_write_buffer_size()
        if unsent < self._unsent:
            self._unsent = unsent
            self.deadline = now + CLOSE_SECONDS
        else:
            self._transport.abort()
