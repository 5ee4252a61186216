"""Listeners: open while there is room for another client, else clients wait in the kernel's queue.

There is one `Doors` for all listeners of a worker, whose room is what descriptors and `limits.connections`
allow, and one for each listener alone (`limits.connections_per_listener`).

A client needs two descriptors, its own and one to a backend. Whoever accepts until none is left can serve
nobody; and libuv, whose accept then fails, takes what waits in the kernel's queue and hangs up on it. So
there are at most `most` clients at a time, and then the listeners stop to accept: who comes waits, and is not
refused.

While it is full those who have been idle longest are asked to finish, an eighth at each look: an idle
connection closes, another one after its response (`start_drain`). Only when nobody has been idle for `TURN`
seconds, and it has been full for twice as long, so that whoever came last and says nothing has been, others
are asked too, those at work last: a client whose connection closes in the moment in which it sends a request
has lost that. So clients that keep their connections take turns. Each has `TURN` seconds at least: a new one
must have the time to say what it wants, and has twice as long if it has not been served yet. With half a
million descriptors none of this ever happens; a connection then costs a comparison and a look at the clock.
"""

from __future__ import annotations

import asyncio
import logging
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

#: Seconds between two looks while it is full.
LOOK_SECONDS: Final = 0.1
#: Seconds that a connection may live before it is asked to finish.
TURN: Final = 2.0
#: Most connections that are asked to finish at one look, and that are looked at to find them.
MAX_ASKED: Final = 256
MAX_LOOKED_AT: Final = 4096

_log = logging.getLogger(__name__)


class Asked(Protocol):
    """A connection that can be asked to go, and be ended."""

    def start_drain(self) -> None:
        """Finish what was begun, take nothing new."""

    def idle_seconds(self, now: float) -> float:
        """For how long nothing has been going on, about; 0.0 while something is."""

    def kill(self) -> None:
        """End at once."""


class Site(Protocol):
    """A listening socket."""

    def pause(self) -> None:
        """Accept nobody for now: they wait."""

    async def resume(self) -> None:
        """Accept again. Raises OSError."""

    async def stop(self) -> None:
        """Accept nobody any more."""


class Doors:
    """Open, until `filled`; then shut until there is room. `count` says how many clients there are.

    `shutting` is called when they shut. If not all of `live` came through these, `concerns` says who did.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        most: int,
        live: dict[Asked, float],
        count: Callable[[], int],
        *,
        shutting: Callable[[], None] | None = None,
        concerns: Callable[[Asked], bool] | None = None,
    ) -> None:
        # process
        self.sites: list[Site] = []
        self.are_shut = False
        self.most = most
        self._loop = loop
        self._live = live  # and when each was opened; who was looked at, or asked, is last
        self._count = count
        self._shutting = shutting
        self._concerns = concerns
        # while shut
        self._shut_at = 0.0
        self._looking: asyncio.TimerHandle | None = None
        self._opening: asyncio.Task[None] | None = None

    def filled(self) -> None:
        """There are as many clients as there may be."""
        if not self.are_shut and self.sites:
            self.are_shut = True
            self._loop.call_soon(self._shut)  # not inside of uvloop's own accepting

    def left(self) -> None:
        """A client has gone. Only of interest while shut."""
        if self._count() <= self.most - self.most // 8:
            self._open()

    async def close(self) -> None:
        """Stop to accept for good."""
        sites, self.sites = self.sites, []
        self._end_looking()
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.cancel()
            await asyncio.wait([opening])
        for site in sites:
            await site.stop()

    # Private

    def _shut(self) -> None:
        if self._shutting is not None:
            self._shutting()
        for site in self.sites:
            site.pause()
        self._shut_at = monotonic()
        if self.sites:
            self._looking = self._loop.call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        self._looking = self._loop.call_later(LOOK_SECONDS, self._look)
        if self._count() < self.most:
            self._open()
        else:
            for connection in self._longest_idle(min(max(self.most // 8, 1), MAX_ASKED)):
                # As if it were new: a tunnel that goes on for hours is asked again when the others were.
                del self._live[connection]
                self._live[connection] = monotonic()
                connection.start_drain()

    def _longest_idle(self, most: int) -> list[Asked]:
        now = monotonic()
        found = []
        for connection, opened in list(islice(self._live.items(), MAX_LOOKED_AT)):
            if len(self._live) > MAX_LOOKED_AT:
                del self._live[connection]
                self._live[connection] = opened
            if opened < now - TURN and (self._concerns is None or self._concerns(connection)):
                found.append((connection.idle_seconds(now), connection))
        least = TURN if now - self._shut_at < 2 * TURN else 0.0
        found.sort(key=_seconds, reverse=True)
        return [connection for seconds, connection in found[:most] if seconds >= least]

    def _open(self) -> None:
        if self._looking is not None and self._opening is None:
            self._opening = self._loop.create_task(self._open_all(), name="listeners")

    async def _open_all(self) -> None:
        try:
            for site in self.sites:
                await site.resume()
        except OSError as error:
            _log.error("the listeners stay shut for now: %s", error)
        except Exception:  # a bug: they are tried again, as after an error
            _log.exception("a fault of portero's own: the listeners stay shut for now")
        else:
            self.are_shut = False
            self._end_looking()
        self._opening = None

    def _end_looking(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None


def _seconds(found: tuple[float, Asked]) -> float:
    return found[0]
