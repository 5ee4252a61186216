"""Whether a peer that is slow to read takes anything at all.

What is left of what was written tells: the transport's buffer and the kernel's together. The transport's
alone does not: the kernel takes megabytes, and says that it has room again only when a third of them is
free, so a peer that reads all the time may leave that buffer as it is for minutes.
"""

from __future__ import annotations

import fcntl
import sys
import termios
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio


class Progress:
    """Says whether the client takes what was written. Nothing may be written between two looks."""

    __slots__ = ("_transport", "_unsent")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._unsent = _unsent(transport)

    def is_made(self) -> bool:
        """Say whether the client has taken anything since the last look."""
        unsent = _unsent(self._transport)
        if unsent < self._unsent:
            self._unsent = unsent
            return True
        return False


class SlowPeer:
    """Says how much longer to wait for a peer since when it was slow first, which is now.

    A large body pauses many times: the kernel is asked only when it comes to a decision.
    """

    __slots__ = ("_progress", "_transport", "_unsent")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._unsent = transport.get_write_buffer_size()
        self._progress: Progress | None = None

    def more_time(self, seconds: float) -> float:
        """Return the seconds to wait for it, or 0.0 when it has taken nothing in the last `seconds`."""
        unsent = self._transport.get_write_buffer_size()
        if unsent < self._unsent:
            self._unsent = unsent
            return seconds
        if self._progress is None:
            self._progress = Progress(self._transport)
            return seconds / 4
        return seconds if self._progress.is_made() else 0.0


# Private


def _unsent(transport: asyncio.Transport) -> int:
    """Return how many bytes the client has not acknowledged; of the kernel's share only Linux tells."""
    unsent = transport.get_write_buffer_size()
    sock = transport.get_extra_info("socket")
    if sock is not None and sys.platform == "linux":
        try:
            left = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
        except (OSError, ValueError):
            return unsent  # the socket is closed
        unsent += int.from_bytes(left, sys.byteorder)
    return unsent
