"""A client's connection, whatever it speaks, the set of those that live, and how they take leave.

A drain
- Every answer that begins from then on says that it is the last (`Surroundings.draining`), and HTTP/2 says
  GOAWAY at once.
- Who has nothing in hand is asked to go later, those first who have been idle longest, spread over `spread`
  seconds: a request that is on its way is still served, and not all come back in one moment. A new connection
  gets as long for its first request, and so does one that is still shaking hands.
- Whose answer had begun before could not be told: after it such a client has a moment for another request.
- WebSockets are asked to close one after the other, over half of the time.
- Where a successor will have the same port once this process has ended, the listeners stay open until those
  have gone who were there when it began (`wait_for_former`). Who came in between is served one request and
  has little time for it (`hurry`): from then on clients wait for the successor.
- What remains when the time is up is cut off, and counted in one line of the log.
"""

from __future__ import annotations

import asyncio
import logging
from operator import itemgetter
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol, cast

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
#: Seconds of idleness after which nobody expects another request just now.
LONG_IDLE: Final = 5.0
#: Seconds that a client has for another request after an answer that could not tell it to go.
MOMENT: Final = 1.0
SWEEP_SECONDS: Final = 0.1
#: Seconds between two looks at who is still there.
LOOK_SECONDS: Final = 0.02
#: Seconds that connections which are cut off may take for that.
KILL_SECONDS: Final = 1.0

_log = logging.getLogger(__name__)


class Connection(Watched, Asked, Protocol):
    """A client's connection, as its process sees it: it has a deadline, drains, and can be ended."""

    def announce_drain(self) -> None:
        """Tell the client, if it can be told before an answer, and without harm to what it has just sent."""

    @property
    def is_tunnel(self) -> bool:
        """Whether it carries something that is no HTTP."""

    def end_tunnel(self) -> None:
        """Ask the client to end it, if there are words for that."""


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
        self._loop = loop
        self._most = self._descriptors = most
        self._greeting = greeting
        self._live: dict[Connection, float] = {}  # and when each was opened; the oldest first
        self._refusals: Refusals | None = None
        #: How many descriptors these connections and those to backends take, and what gives some back.
        self.descriptors: Callable[[], int] = self.__len__
        self.make_room: Callable[[], object] = int
        self.arrivals = Arrivals(loop, shared)
        self.doors = Doors(loop, most, self._asked, self._count, shutting=self._shutting)
        # once it drains
        self._spread: float | None = None
        self._former: set[Connection] = set()  # those that were there when it began, and still are
        self._told: set[Connection] = set()  # those that are asked to go as soon as they have nothing in hand
        self._asking: list[asyncio.TimerHandle] = []
        self._sweeping: asyncio.TimerHandle | None = None

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
        return Doors(loop, self._descriptors, self._asked, count, shutting=shutting, concerns=concerns)

    def greets(self) -> None:
        """Another client is about to begin its handshake."""
        if self._count() + 1 >= self._most:
            self.doors.filled()

    def opened(self, connection: Connection) -> None:
        """A connection begins to live."""
        self._live[connection] = monotonic()
        if len(self._live) >= self._most or self.descriptors() >= 2 * self._descriptors:
            self.doors.filled()
        if self._spread is not None:
            self._ask_later(self._spread, connection)

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
        self._former.discard(connection)
        self._told.discard(connection)

    def start_drain(self) -> None:
        """Ask every connection to finish now: GOAWAY, or Connection: close."""
        for connection in list(self._live):
            connection.start_drain()

    def drain(self, seconds: float, spread: float) -> None:
        """Ask every connection to finish: the idle ones within `spread` seconds; all have `seconds`."""
        self._spread = spread
        self._former.update(self._live)
        now = monotonic()
        idle: list[tuple[float, Connection]] = []
        tunnels: list[Connection] = []
        for connection in list(self._live):
            seconds_idle = connection.idle_seconds(now)
            if seconds_idle > 0.0:
                idle.append((seconds_idle, connection))
                continue
            self._told.add(connection)
            connection.announce_drain()
            if connection.is_tunnel:
                tunnels.append(connection)
        idle.sort(key=itemgetter(0), reverse=True)
        for number, (seconds_idle, connection) in enumerate(idle):
            rank = number if seconds_idle >= LONG_IDLE else number + 1
            self._ask_later(spread * rank / len(idle), connection)
        for number, tunnel in enumerate(tunnels):
            at = seconds / 2 * number / len(tunnels)
            self._asking.append(self._loop.call_later(at, self._end_tunnel, tunnel))
        self._asking.append(self._loop.call_later(seconds / 2, self._end_tunnels))
        self._sweep()

    async def wait_for_former(self, seconds: float) -> None:
        """Wait until those have gone who were there when the drain began, `seconds` at most."""
        ends_at = monotonic() + seconds
        while self._former and monotonic() < ends_at:  # noqa: ASYNC110 - looked at for seconds, once
            await asyncio.sleep(LOOK_SECONDS)

    def hurry(self, seconds: float) -> None:
        """Nobody else comes: who has nothing in hand is asked to go in `seconds`."""
        self._spread = min(self._spread or 0.0, seconds)
        for connection in list(self._live):
            self._ask_later(self._spread, connection)

    async def wait(self, seconds: float) -> tuple[int, int]:
        """Wait until the connections are gone, `seconds` at most.

        How many are left then, and how many of them are tunnels.
        """
        begun = monotonic()
        await self._wait_until_empty(begun + seconds, begun + min(self._spread or 0.0, seconds))
        for asking in self._asking:
            asking.cancel()
        self._asking.clear()
        if self._sweeping is not None:
            self._sweeping.cancel()
        return len(self._live), sum(connection.is_tunnel for connection in self._live)

    async def end(self) -> None:
        """End those that are left."""
        for connection in list(self._live):
            connection.kill()
        await self._wait_until_empty(monotonic() + KILL_SECONDS, 0.0)

    # Private

    @property
    def _asked(self) -> dict[Asked, float]:
        """Those that live, as doors see them."""
        return cast("dict[Asked, float]", self._live)

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

    def _ask_later(self, seconds: float, connection: Connection) -> None:
        self._asking.append(self._loop.call_later(seconds, self._ask, connection))

    def _ask(self, connection: Connection) -> None:
        if connection not in self._live:
            return
        if connection.idle_seconds(monotonic()) > 0.0:
            connection.start_drain()
        else:
            self._told.add(connection)
            connection.announce_drain()

    def _sweep(self) -> None:
        """Ask those to go who have had their moment."""
        self._sweeping = self._loop.call_later(SWEEP_SECONDS, self._sweep)
        now, moment = monotonic(), min(self._spread or 0.0, MOMENT)
        for connection in list(self._told):
            seconds = connection.idle_seconds(now)
            if seconds > moment:
                self._told.discard(connection)
                connection.start_drain()

    def _end_tunnels(self) -> None:
        """Those too that became one when the drain had begun."""
        for connection in list(self._live):
            connection.end_tunnel()

    def _end_tunnel(self, connection: Connection) -> None:
        if connection in self._live:
            connection.end_tunnel()

    async def _wait_until_empty(self, ends_at: float, greets_until: float) -> None:
        """Wait for the connections until the first time, and for handshakes until the second."""
        while (now := monotonic()) < ends_at and (  # noqa: ASYNC110 - as above
            self._live or (now < greets_until and self._greeting())
        ):
            await asyncio.sleep(LOOK_SECONDS)
