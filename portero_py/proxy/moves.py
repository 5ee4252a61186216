"""Who waits for a backend that has become DOWN hears of it, so that he need not wait in vain.

The rules
- Only a backend that the former table did not call DOWN, of a service that the new one says has changed, is
  news. Any other table costs a look at the names that it brings.
- Nothing is kept for this while requests come and go: the connections to backends are those that the
  deadline wheel watches, those being made are known to the pools. They are looked at STEP at a time, so that
  20,000 connections stop nobody; what falls meanwhile is the next round.
- Here nothing is decided: each exchange knows whether it waits for one of them, and whether it may go
  elsewhere (`backends_fell`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from portero_py.core.model import Lease, LeaseState
from portero_py.proxy.endpoints import ResponseSide
from portero_py.proxy.upstream.connection import UpstreamConnection

if TYPE_CHECKING:
    import asyncio

    from portero_py.core.routing_table import RoutingTable
    from portero_py.proxy.deadlines import DeadlineWheel, Watched
    from portero_py.proxy.upstream.pool import Pools

#: Connections that are looked at in one go: 1 ms at most, while few of them wait for one that fell.
STEP: Final = 500

_DOWN: Final = LeaseState.DOWN


class Moves:
    """Tells the exchanges of a worker. `follow` each table, once it is in force."""

    def __init__(self, loop: asyncio.AbstractEventLoop, deadlines: DeadlineWheel, pools: Pools) -> None:
        self._loop = loop
        self._deadlines = deadlines
        self._pools = pools
        self._fallen: dict[tuple[str, str], Lease] = {}  # of the next round
        # round
        self._told: dict[tuple[str, str], Lease] = {}
        self._left: list[Watched | ResponseSide] = []
        self._turn: asyncio.Handle | None = None

    def follow(self, former: RoutingTable, table: RoutingTable) -> None:
        """`table` is in force now, and `former` was."""
        if table.since != former.version:
            return  # nobody knows what changed: who waits goes on waiting, until his time is up
        for name in table.changed:
            before, after = former.services.get(name), table.services.get(name)
            if before is None or after is None or before is after or after.is_even:
                continue
            were = {lease.instance_id for lease in before.leases if lease.state is _DOWN}
            for lease in after.leases:
                if lease.state is _DOWN and lease.instance_id not in were:
                    self._fallen[name, lease.instance_id] = lease
        if self._fallen and self._turn is None:
            self._turn = self._loop.call_soon(self._begin)

    def close(self) -> None:
        """Nobody is told any more."""
        self._fallen.clear()
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None

    # Private

    def _begin(self) -> None:
        self._told, self._fallen = self._fallen, {}
        self._left = [*self._deadlines.watched()]
        for lease in self._told.values():
            self._left += self._pools.waiting_for(lease)
        self._go_on()

    def _go_on(self) -> None:
        self._turn = None
        step, self._left = self._left[-STEP:], self._left[:-STEP]
        for each in step:
            exchange = each.carried() if isinstance(each, UpstreamConnection) else each
            if isinstance(exchange, ResponseSide):
                try:
                    exchange.backends_fell(self._told)
                except Exception:  # a bug: the exchange logs it, counts it, and is over
                    exchange.broke()
        if self._left:
            self._turn = self._loop.call_soon(self._go_on)
        elif self._fallen:
            self._turn = self._loop.call_soon(self._begin)
