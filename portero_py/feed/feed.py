"""The channel from the control plane to the workers, and back again for what they count.

The rules
- Publishing is awaited: when it returns, every subscriber routes by that table. Only then is a POST answered.
  A subscriber that does not say so in time (`ACK_SECONDS`: it hangs, and will be replaced) is not waited for.
- A table never goes back: one that is older than the last is dropped, so two publications may overlap.
- A subscriber that joins late gets what was published last, at once.
- A publication never fails for one subscriber: what one cannot take is logged and
  counted, the others have it.
- When a subscriber leaves, what it had counted stays in the sum (a counter must never fall), except what
  was open in it: that is gone. So are the counts of services that no table has any more: see `core.counters`.

A subscriber is the worker itself when there is only one process; then all of this is function calls. With
several, `feed.server` has a `RemoteWorker` for each of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from portero_py.core.counters import Counters
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import FeedError

if TYPE_CHECKING:
    from portero_py.core.certificates import CertificateTable
    from portero_py.core.challenges import Challenges
    from portero_py.core.health import Evidence
    from portero_py.core.model import Standing

#: Seconds that a publication waits for workers that do not answer.
ACK_SECONDS: Final = 1.0

#: What to wait for until it is in force; None when it is already.
InForce = asyncio.Future[None] | None

Published = TypeVar("Published")

_log = logging.getLogger(__name__)


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

    def standings(self, service: str) -> list[Standing] | asyncio.Future[list[Standing]]:
        """What it says of the backends of a service, or of all ("")."""


@dataclass(frozen=True, slots=True)
class Standings:
    """What all workers say of backends, by service, host and port."""

    in_flight: dict[tuple[str, str, int], int]
    ejected: dict[tuple[str, str, int], int]  # by how many workers
    errors: dict[tuple[str, str, int], str]
    is_complete: bool  # every worker has answered

    def in_flight_at(self, service: str, host: str, port: int) -> int:
        """How many exchanges hold that backend."""
        return self.in_flight.get((service, host, port), 0)


class Feed:
    """Hands the newest tables to every subscriber, and adds up their counters.

    `count_fault` is called for each publication that a subscriber could not take, each of `on_table` for each
    new table.
    """

    def __init__(self, *, ack_seconds: float = ACK_SECONDS) -> None:
        self.count_fault: Callable[[str], None] = _count_nothing
        self.on_table: list[Callable[[], None]] = []
        #: A worker has seen a backend fail too often.
        self.on_evidence: Callable[[Evidence], None] | None = None
        self._ack_seconds = ack_seconds
        self._subscribers: list[Subscriber] = []
        self._table: RoutingTable | None = None
        self._certificates: CertificateTable | None = None
        self._challenges: Challenges | None = None
        self._departed = Counters()

    @property
    def certificates(self) -> CertificateTable | None:
        """What was published last."""
        return self._certificates

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
            self._told(subscriber.apply_certificates, self._certificates)
        if self._challenges is not None:
            self._told(subscriber.apply_challenges, self._challenges)
        if self._table is not None:
            self._told(subscriber.apply, self._table)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """`subscriber` is gone, its counters stay. Raises ValueError when it was never there."""
        self._subscribers.remove(subscriber)
        self.add_departed(subscriber.counters)

    def add_departed(self, counters: Counters) -> None:
        """Count what workers had counted that are gone."""
        self._departed.merge(counters)
        self._departed.connections_open = 0
        self._departed.exchanges_in_flight = 0
        self._departed.queued.clear()
        self._departed.tasks = 0
        self._forget(self._departed)

    async def publish(self, table: RoutingTable) -> None:
        """Give every subscriber this table, and return when all have it."""
        if self._table is not None and table.version < self._table.version:
            return
        self._table = table
        for told in self.on_table:
            told()
        await self._in_force([self._told(each.apply, table) for each in self._subscribers])

    async def publish_certificates(self, certificates: CertificateTable) -> None:
        """Give every subscriber these certificates, and return when all have them."""
        self._certificates = certificates
        await self._in_force(
            [self._told(each.apply_certificates, certificates) for each in self._subscribers]
        )

    async def publish_challenges(self, challenges: Challenges) -> None:
        """Give every subscriber these challenges, and return when all have them."""
        self._challenges = challenges
        await self._in_force([self._told(each.apply_challenges, challenges) for each in self._subscribers])

    async def standings(self, service: str = "") -> Standings:
        """What all workers say of the backends of a service, or of all. Who is late is not waited for."""
        answers = [self._asked(each, service) for each in self._subscribers]
        awaited = [answer for answer in answers if isinstance(answer, asyncio.Future)]
        if awaited:
            await asyncio.wait(awaited, timeout=self._ack_seconds)
        in_time = all(answer.done() and not answer.cancelled() for answer in awaited)
        found = Standings({}, {}, {}, in_time and None not in answers)
        for answer in answers:
            if isinstance(answer, asyncio.Future):
                said = answer.result() if answer.done() and not answer.cancelled() else []
            else:
                said = answer or []
            for each in said:
                place = (each.service, each.host, each.port)
                found.in_flight[place] = found.in_flight.get(place, 0) + each.in_flight
                found.ejected[place] = found.ejected.get(place, 0) + each.is_ejected
                if each.error:
                    found.errors[place] = each.error
        return found

    def found(self, evidence: Evidence) -> None:
        """A worker says that a backend fails."""
        if self.on_evidence is not None:
            self.on_evidence(evidence)

    def counters(self) -> Counters:
        """The sum over all subscribers, a copy; without services that the last table does not know."""
        self._forget(self._departed)
        total = Counters()
        total.merge(self._departed)
        for subscriber in self._subscribers:
            total.merge(subscriber.counters)
        self._forget(total)  # what a worker had counted when it reported last
        return total

    # Private

    def _forget(self, counters: Counters) -> None:
        if self._table is not None:
            counters.keep_only(self._table.services)

    def _told(self, apply: Callable[[Published], InForce], what: Published) -> InForce:
        """What `apply` answers, whatever may be wrong with who it belongs to."""
        try:
            return apply(what)
        except Exception:  # one that is broken must not keep the others from it
            _log.exception("a worker could not be given %s", type(what).__name__)
            self.count_fault(FeedError.reason)
            return None

    def _asked(
        self, subscriber: Subscriber, service: str
    ) -> list[Standing] | asyncio.Future[list[Standing]] | None:
        """What it answers, None when it cannot."""
        try:
            return subscriber.standings(service)
        except Exception:  # as above: then its exchanges are not known to have ended
            _log.exception("a worker could not be asked for its standings")
            self.count_fault(FeedError.reason)
            return None

    async def _in_force(self, answers: list[InForce]) -> None:
        awaited = [answer for answer in answers if answer is not None]
        if awaited:
            # Who is late says so himself (`feed.remote_worker`); here nobody waits for him any longer.
            await asyncio.wait(awaited, timeout=self._ack_seconds)


def _count_nothing(_: str) -> None:
    """Stand in for `count_fault`."""
