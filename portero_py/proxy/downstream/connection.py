"""A client's connection, whatever it speaks, and the set of those that live."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from portero_py.proxy.deadlines import Watched
from portero_py.proxy.downstream.doors import Asked, Doors

if TYPE_CHECKING:
    from collections.abc import Callable


class Connection(Watched, Asked, Protocol):
    """A client's connection, as its process sees it: it has a deadline, drains, and can be ended."""


class Connections:
    """The connections that live; `most` of them, or the doors are shut.

    `greeting` says how many clients are in the middle of a handshake: they have a descriptor too.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, most: int, greeting: Callable[[], int]) -> None:
        self._most = most
        self._greeting = greeting
        self._live: dict[Asked, float] = {}  # and when each was opened; the oldest first
        self._emptied = asyncio.Event()
        self.doors = Doors(loop, most, self._live, self._count)

    def greets(self) -> None:
        """Another client is about to begin its handshake."""
        if self._count() + 1 >= self._most:
            self.doors.filled()

    def opened(self, connection: Connection) -> None:
        """A connection begins to live."""
        self._live[connection] = monotonic()
        if len(self._live) >= self._most:
            self.doors.filled()

    def closed(self, connection: Connection) -> None:
        """A connection is gone, or somebody else stands for it now."""
        self._live.pop(connection, None)
        if self.doors.are_shut:
            self.doors.left()
        if not self._live:
            self._emptied.set()

    def start_drain(self) -> None:
        """Ask every connection to finish: GOAWAY, or Connection: close."""
        for connection in list(self._live):
            connection.start_drain()

    async def end(self, seconds: float) -> None:
        """Wait until the connections are gone, `seconds` at most, then end the rest."""
        await self._wait_until_empty(seconds)
        for connection in list(self._live):
            connection.kill()
        await self._wait_until_empty(1.0)

    # Private

    def _count(self) -> int:
        """Return how many clients there are, those included that are in the middle of a handshake."""
        return len(self._live) + self._greeting()

    async def _wait_until_empty(self, seconds: float) -> None:
        if self._live:
            self._emptied.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._emptied.wait()
            except TimeoutError:
                pass
