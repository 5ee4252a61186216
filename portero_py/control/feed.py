"""The channel from the control plane to the workers, and back again for what they count.

The rules
- Publishing is awaited: when it returns, every subscriber routes by that table. Only then is a POST answered.
  A subscriber that does not say so in time (`ACK_SECONDS`: it hangs, and will be replaced) is not waited for.
- A table never goes back: one that is older than the last is dropped, so two publications may overlap.
- A subscriber that joins late gets what was published last, at once.
- When a subscriber leaves, what it had counted stays in the sum (a counter must never fall), except what
  was open in it: that is gone.

A subscriber is the worker itself when there is only one process; then all of this is function calls. With
several, `feed_server` has one for every worker process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, Protocol

from portero_py.core.counters import Counters
from portero_py.core.routing_table import RoutingTable

if TYPE_CHECKING:
    from portero_py.core.certificates import CertificateTable
    from portero_py.core.challenges import Challenges

#: Seconds that a publication waits for workers that do not answer.
ACK_SECONDS: Final = 1.0

#: What to wait for until it is in force; None when it is already.
InForce = asyncio.Future[None] | None


class Subscriber(Protocol):
    """A worker, or what stands for one in another process."""

    @property
    def counters(self) -> Counters:
        """What it has counted up to now."""

    def apply(self, table: RoutingTable) -> InForce:
        """Route by `table` from now on."""

    def apply_certificates(self, certificates: CertificateTable) -> InForce:
        """Present these certificates in new handshakes."""

    def apply_challenges(self, challenges: Challenges) -> InForce:
        """Answer these ACME challenges in new handshakes."""


class Feed:
    """Hands the newest tables to every subscriber, and adds up their counters."""

    def __init__(self, *, ack_seconds: float = ACK_SECONDS) -> None:
        self._ack_seconds = ack_seconds
        self._subscribers: list[Subscriber] = []
        self._table: RoutingTable | None = None
        self._certificates: CertificateTable | None = None
        self._challenges: Challenges | None = None
        self._departed = Counters()

    @property
    def departed(self) -> Counters:
        """What those had counted that have left."""
        return self._departed

    @property
    def subscribers(self) -> int:
        """How many there are: as many as workers, when all is well."""
        return len(self._subscribers)

    def subscribe(self, subscriber: Subscriber) -> None:
        """From now on `subscriber` gets everything, beginning with what was published last."""
        self._subscribers.append(subscriber)
        if self._certificates is not None:
            subscriber.apply_certificates(self._certificates)
        if self._challenges is not None:
            subscriber.apply_challenges(self._challenges)
        if self._table is not None:
            subscriber.apply(self._table)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """`subscriber` is gone, its counters stay. Raises ValueError when it was never there."""
        self._subscribers.remove(subscriber)
        self.add_departed(subscriber.counters)

    def add_departed(self, counters: Counters) -> None:
        """Count what workers had counted that are gone."""
        self._departed.merge(counters)
        self._departed.connections_open = 0
        self._departed.exchanges_in_flight = 0
        self._departed.tasks = 0

    async def publish(self, table: RoutingTable) -> None:
        """Give every subscriber this table, and return when all have it."""
        if self._table is not None and table.version < self._table.version:
            return
        self._table = table
        await self._in_force([subscriber.apply(table) for subscriber in self._subscribers])

    async def publish_certificates(self, certificates: CertificateTable) -> None:
        """Give every subscriber these certificates, and return when all have them."""
        self._certificates = certificates
        await self._in_force([each.apply_certificates(certificates) for each in self._subscribers])

    async def publish_challenges(self, challenges: Challenges) -> None:
        """Give every subscriber these challenges, and return when all have them."""
        self._challenges = challenges
        await self._in_force([each.apply_challenges(challenges) for each in self._subscribers])

    def counters(self) -> Counters:
        """The sum over all subscribers, a copy."""
        total = Counters()
        total.merge(self._departed)
        for subscriber in self._subscribers:
            total.merge(subscriber.counters)
        return total

    # Private

    async def _in_force(self, answers: Iterable[InForce]) -> None:
        awaited = [answer for answer in answers if answer is not None]
        if awaited:
            # Who is late says so himself (`feed_server`); here nobody waits for him any longer.
            await asyncio.wait(awaited, timeout=self._ack_seconds)
