"""Who waits until nothing is in flight at a backend any more, and the one task that looks for all of them.

The rules
- What is in flight is what every worker says: tunnels and long downloads count until they end. A worker that
  does not answer may hold anything: it counts as one exchange at each backend, so nothing is over before it
  has answered, or is gone.
- A wait is over when nothing is in flight; when its time is up; when new exchanges may go to the address
  again (somebody registered it anew, another source serves it, or it was made ready), because then there may
  always be some; and when portero closes. It has the count of that moment.
- There is one look for all who wait. Who comes is looked at in the next one, which begins at once: a wait of
  no seconds is one look. After that looks are FIRST_PAUSE apart, then more and more, up to LAST_PAUSE.
- A look costs the workers something with many backends: it takes a part of the time (SHARE) at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from portero_py.control.leases import Leases
from portero_py.core.model import Lease, LeaseState
from portero_py.feed.feed import Standings

#: Seconds between two looks: at first, at last, and by how much they grow.
FIRST_PAUSE: Final = 0.02
LAST_PAUSE: Final = 0.25
GROWTH: Final = 1.5

#: How many times as long as a look takes there is none; FIRST_PAUSE at most.
SHARE: Final = 4.0


class Drains:
    """Waits by service and address. `run` has to run; `close` ends all of them."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._waits: dict[asyncio.Future[int], _Wait] = {}
        self._came = asyncio.Event()
        self._is_closing = False

    def __len__(self) -> int:
        return len(self._waits)

    def until_empty(self, lease: Lease, seconds: float) -> asyncio.Future[int]:
        """Wait until nothing is in flight at the backend of `lease`, which takes nothing new: what is.

        Whoever has enough cancels the future.
        """
        return self._wait(_Wait(lease, seconds))

    def until_ready(self, lease: Lease, seconds: float) -> asyncio.Future[int]:
        """Wait until the backend of `lease` is ready, or gone, or drains: what is in flight there."""
        return self._wait(_WaitForReady(lease, seconds))

    async def run(self) -> None:
        """Look for those who wait; it never ends."""
        loop = asyncio.get_running_loop()
        pause = FIRST_PAUSE
        while True:
            if self._came.is_set() or not self._waits:
                pause = FIRST_PAUSE
                await self._came.wait()
            self._came.clear()
            waits = [wait for wait in self._waits.values() if not wait.over.done()]
            services = {wait.service for wait in waits}
            began = loop.time()
            if waits:
                standings = await self._leases.standings(services.pop() if len(services) == 1 else "")
                self._decide(waits, standings)
            await asyncio.sleep(min(SHARE * (loop.time() - began), FIRST_PAUSE))
            await self._rest(pause)
            pause = min(pause * GROWTH, LAST_PAUSE)

    def close(self) -> None:
        """Whoever waits hears what the next look finds, and whoever comes later, too."""
        self._is_closing = True
        self._came.set()

    # Private

    def _wait(self, wait: _Wait) -> asyncio.Future[int]:
        self._waits[wait.over] = wait
        wait.over.add_done_callback(self._waits.pop)
        self._came.set()
        return wait.over

    def _decide(self, waits: list[_Wait], standings: Standings) -> None:
        now = asyncio.get_running_loop().time()
        states: dict[str, Mapping[tuple[str, int], LeaseState]] = {}
        for wait in waits:
            if wait.over.done():
                continue
            if wait.service not in states:
                states[wait.service] = self._states(wait.service)
            state = states[wait.service].get((wait.host, wait.port))
            in_flight = standings.in_flight_at(wait.service, wait.host, wait.port)
            in_flight += not standings.is_complete
            if self._is_closing or now >= wait.ends_at or wait.is_over(in_flight, state):
                wait.over.set_result(in_flight)

    def _states(self, service: str) -> dict[tuple[str, int], LeaseState]:
        known = self._leases.table.services.get(service)
        leases = () if known is None else known.leases
        return {(lease.backend.host, lease.backend.port): lease.state for lease in leases}

    async def _rest(self, seconds: float) -> None:
        """Until the next look is due: somebody has come, `seconds` are over, or somebody's time is up."""
        now = asyncio.get_running_loop().time()
        soonest = min((wait.ends_at - now for wait in self._waits.values()), default=seconds)
        try:
            async with asyncio.timeout(max(min(seconds, soonest), 0.0)):
                await self._came.wait()
        except TimeoutError:
            return


# Private


class _Wait:
    """One who waits for the end of what is in flight."""

    def __init__(self, lease: Lease, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self.service = lease.service
        self.host, self.port = lease.backend.host, lease.backend.port
        self.ends_at = loop.time() + seconds
        self.over: asyncio.Future[int] = loop.create_future()

    def is_over(self, in_flight: int, state: LeaseState | None) -> bool:
        """Whether there is nothing more to wait for; `state` is None where nobody has a lease."""
        return in_flight == 0 or state not in (None, LeaseState.DRAINING)


class _WaitForReady(_Wait):
    """One who waits for a backend to be ready."""

    def is_over(self, in_flight: int, state: LeaseState | None) -> bool:
        """Whether it is, or will not be."""
        return state in (None, LeaseState.READY, LeaseState.DRAINING)
