"""The channel from the control plane to the workers, and back again for what they count.

The rules
- Publishing is awaited: when it returns, every subscriber routes by that table. Only then is a POST answered.
- A table never goes back: one that is older than the last is dropped, so two publications may overlap.
- A subscriber that joins late gets what was published last, at once.
- When a subscriber leaves, what it had counted stays in the sum (a counter must never fall), except what
  was open in it: that is gone.

A subscriber is the worker itself when there is only one process; then all of this is function calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from portero_py.core.counters import Counters
from portero_py.core.routing_table import RoutingTable

if TYPE_CHECKING:
    from portero_py.core.certificates import CertificateTable
    from portero_py.core.challenges import Challenges


class Subscriber(Protocol):
    """A worker, or what stands for one in another process."""

    @property
    def counters(self) -> Counters:
        """What it has counted up to now."""

    def apply(self, table: RoutingTable) -> None:
        """Route by `table` from now on."""

    def apply_certificates(self, certificates: CertificateTable) -> None:
        """Present these certificates in new handshakes."""

    def apply_challenges(self, challenges: Challenges) -> None:
        """Answer these ACME challenges in new handshakes."""


class Feed:
    """Hands the newest tables to every subscriber, and adds up their counters."""

    def __init__(self) -> None:
        self._subscribers: list[Subscriber] = []
        self._table: RoutingTable | None = None
        self._certificates: CertificateTable | None = None
        self._challenges: Challenges | None = None
        self._departed = Counters()

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
        self._departed.merge(subscriber.counters)
        self._departed.connections_open = 0
        self._departed.exchanges_in_flight = 0

    async def publish(self, table: RoutingTable) -> None:
        """Give every subscriber this table, and return when all have it."""
        if self._table is not None and table.version < self._table.version:
            return
        self._table = table
        for subscriber in self._subscribers:
            subscriber.apply(table)

    async def publish_certificates(self, certificates: CertificateTable) -> None:
        """Give every subscriber these certificates, and return when all have them."""
        self._certificates = certificates
        for subscriber in self._subscribers:
            subscriber.apply_certificates(certificates)

    async def publish_challenges(self, challenges: Challenges) -> None:
        """Give every subscriber these challenges, and return when all have them."""
        self._challenges = challenges
        for subscriber in self._subscribers:
            subscriber.apply_challenges(challenges)

    def counters(self) -> Counters:
        """The sum over all subscribers, a copy."""
        total = Counters()
        total.merge(self._departed)
        for subscriber in self._subscribers:
            total.merge(subscriber.counters)
        return total
