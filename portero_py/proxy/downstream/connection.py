"""A client's connection, whatever it speaks, and the set of those that live."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol

from portero_py.proxy.deadlines import Watched
from portero_py.proxy.downstream.arrivals import Arrivals
from portero_py.proxy.downstream.doors import Asked, Doors
from portero_py.proxy.refusals import CONNECTIONS, DESCRIPTORS

if TYPE_CHECKING:
    from collections.abc import Callable

    from portero_py.config.model import Limits
    from portero_py.core.limits import SharedCounts
    from portero_py.proxy.refusals import Refusals

#: What a transport has for a protocol whose client was turned away.
NOBODY: Final = asyncio.Protocol()


class Connection(Watched, Asked, Protocol):
    """A client's connection, as its process sees it: it has a deadline, drains, and can be ended."""


class Entrance(Protocol):
    """Where a connection comes from, as the one sees it who has its transport first."""

    def arrived(self, who: object, transport: asyncio.Transport) -> bool:
        """A connection is there, before anything is done for it. False: it was turned away, `who` is out."""


class Connections:
    """The connections that live; `most` of them, or the doors are shut.

    `greeting` says how many clients are in the middle of a handshake: they have a descriptor too. `shared`
    tells what the other workers have of each client.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        most: int,
        greeting: Callable[[], int],
        shared: SharedCounts | None = None,
    ) -> None:
        self._most = self._descriptors = most
        self._greeting = greeting
        self._live: dict[Asked, float] = {}  # and when each was opened; the oldest first
        self._emptied = asyncio.Event()
        self._refusals: Refusals | None = None
        #: How many descriptors these connections and those to backends take, and what gives some back.
        self.descriptors: Callable[[], int] = self.__len__
        self.make_room: Callable[[], object] = int
        self.arrivals = Arrivals(loop, shared)
        self.doors = Doors(loop, most, self._live, self._count, shutting=self._shutting)

    def __len__(self) -> int:
        """How many clients there are, those included that are in the middle of a handshake."""
        return len(self._live) + self._greeting()

    def configure(self, limits: Limits, workers: int, refusals: Refusals) -> None:
        """Take over the limits; this is one of so many workers."""
        self._refusals = refusals
        share = -(-limits.connections // workers)
        self._most = self.doors.most = min(self._descriptors, share or self._descriptors)
        self.arrivals.configure(limits, workers)

    def doors_of_one(
        self,
        loop: asyncio.AbstractEventLoop,
        count: Callable[[], int],
        shutting: Callable[[], None],
        concerns: Callable[[Asked], bool],
    ) -> Doors:
        """Return the doors of one listener, which have no limit yet."""
        return Doors(loop, self._descriptors, self._live, count, shutting=shutting, concerns=concerns)

    def greets(self) -> None:
        """Another client is about to begin its handshake."""
        if self._count() + 1 >= self._most:
            self.doors.filled()

    def opened(self, connection: Connection) -> None:
        """A connection begins to live."""
        self._live[connection] = monotonic()
        if len(self._live) >= self._most or self.descriptors() >= 2 * self._descriptors:
            self.doors.filled()

    def succeeded(self, former: Connection, successor: Connection) -> None:
        """Somebody else stands for a connection now."""
        self.arrivals.passed_on(former, successor)
        self.opened(successor)
        self.closed(former)

    def closed(self, connection: Connection) -> None:
        """A connection is gone."""
        self._live.pop(connection, None)
        self.arrivals.leave(connection)
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
        """Return how many clients there are; more when descriptors are shorter than that says.

        A client counts for two. One of HTTP/2 may have a hundred connections to backends.
        """
        return max(len(self), self._most + self.descriptors() - 2 * self._descriptors)

    def _shutting(self) -> None:
        if self.descriptors() >= 2 * self._descriptors:
            self.make_room()
        if self._refusals is not None:
            own = len(self) >= self._most < self._descriptors
            self._refusals.count(CONNECTIONS if own else DESCRIPTORS, f"{len(self)} in this process")

    async def _wait_until_empty(self, seconds: float) -> None:
        if self._live:
            self._emptied.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._emptied.wait()
            except TimeoutError:
                pass
