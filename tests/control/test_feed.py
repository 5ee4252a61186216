"""Tables go out to every worker, counters come back from all."""

from __future__ import annotations

from typing import Any

import pytest

from portero_py.control.feed import Feed
from portero_py.core.counters import Counters
from portero_py.core.routing_table import RoutingTable


class Worker:
    """Writes down what it gets."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.got: list[object] = []

    def apply(self, table: RoutingTable) -> None:
        self.got.append(table)

    def apply_certificates(self, certificates: Any) -> None:
        self.got.append(certificates)

    def apply_challenges(self, challenges: Any) -> None:
        self.got.append(challenges)


async def test_every_subscriber_has_a_table_when_its_publication_returns() -> None:
    feed, workers, table = Feed(), [Worker(), Worker()], RoutingTable(1)
    for worker in workers:
        feed.subscribe(worker)
    await feed.publish(table)
    certificates: Any = "certificates"
    await feed.publish_certificates(certificates)
    challenges: Any = "challenges"
    await feed.publish_challenges(challenges)
    assert [worker.got for worker in workers] == [[table, "certificates", "challenges"]] * 2


async def test_who_comes_late_gets_what_was_published_last() -> None:
    feed, early, late = Feed(), Worker(), Worker()
    feed.subscribe(early)
    assert early.got == []
    certificates: Any = "certificates"
    await feed.publish_certificates(certificates)
    await feed.publish(RoutingTable(1))
    await feed.publish(RoutingTable(2))
    challenges: Any = "challenges"
    await feed.publish_challenges(challenges)
    feed.subscribe(late)
    # Certificates first: a handshake comes before a route.
    assert late.got == ["certificates", "challenges", RoutingTable(2)]


async def test_an_older_table_never_replaces_a_newer_one() -> None:
    feed, worker = Feed(), Worker()
    feed.subscribe(worker)
    for version in (2, 1, 2, 3):
        await feed.publish(RoutingTable(version))
    assert worker.got == [RoutingTable(2), RoutingTable(2), RoutingTable(3)]


async def test_who_left_gets_nothing_more_and_cannot_leave_twice() -> None:
    feed, worker = Feed(), Worker()
    feed.subscribe(worker)
    feed.unsubscribe(worker)
    await feed.publish(RoutingTable(1))
    assert worker.got == []
    with pytest.raises(ValueError, match="not in list"):
        feed.unsubscribe(worker)


def test_counters_are_the_sum_and_never_fall_when_a_worker_leaves() -> None:
    feed, one, two = Feed(), Worker(), Worker()
    for worker in (one, two):
        feed.subscribe(worker)
        worker.counters.exchange_done("app.example", "GET", 200, 0.1)
        worker.counters.connections_open = 3
        worker.counters.exchanges_in_flight = 2
    assert feed.counters().exchanges["app.example", "GET", 200] == 2
    assert feed.counters().connections_open == 6
    feed.unsubscribe(two)
    total = feed.counters()
    assert total.exchanges["app.example", "GET", 200] == 2
    assert (total.connections_open, total.exchanges_in_flight) == (3, 2)
    assert feed.counters().exchanges == total.exchanges  # asking does not count
    assert one.counters.exchanges["app.example", "GET", 200] == 1
