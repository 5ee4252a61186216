"""Leases come and go by any source: each change is in force, published and told when the call returns."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from portero_py.control import leases as module
from portero_py.control.leases import Change, Leases, What
from portero_py.core.model import API, Backend, LeaseRequest, LeaseState
from portero_py.core.probing import Verdict
from portero_py.core.registry import LINGER, Registry
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import NoSuchLease, RegistryFull
from portero_py.feed.feed import Feed
from tests.control.workers import Worker
from tests.waiting import until


def ask(port: int, ttl: int | None = 30, *, service: str = "app.example") -> LeaseRequest:
    return LeaseRequest(service, Backend("::1", port), ttl)


class Desk:
    """Leases, one worker, and a clock that the test turns."""

    def __init__(self, registry: Registry | None = None) -> None:
        self.now = 1000.0
        self.worker = Worker()
        self.feed = Feed()
        self.feed.subscribe(self.worker)
        self.counted: Counter[str] = Counter()
        self.told: list[tuple[str, int]] = []
        self.leases = Leases(
            registry or Registry(),
            self.feed,
            clock=lambda: self.now,
            count_fault=lambda where: self.counted.update([where]),
        )
        self.leases.subscribe(self.hear)

    def hear(self, change: Change) -> None:
        self.told.append((change.what.value, change.lease.backend.port))


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    one = Desk()
    await one.leases.start()
    yield one
    await one.leases.close()


async def test_the_first_table_is_published_at_the_start_and_closing_twice_is_harmless() -> None:
    one = Desk(Registry("fallback.example"))
    await one.leases.start()
    assert one.worker.table.default_service == "fallback.example"
    await one.leases.close()
    await one.leases.close()


async def test_what_is_granted_and_released_is_in_the_workers_table_when_the_call_returns(desk: Desk) -> None:
    assert not desk.leases.has_backend("app.example")
    granted = await desk.leases.grant(ask(1))
    assert (granted.what, granted.lease.source, granted.former) == (What.REGISTERED, "api", None)
    assert desk.worker.ports() == [1]
    assert desk.leases.has_backend("app.example")
    released = await desk.leases.release("app.example", host="::1", port=1)
    assert released == granted.lease
    assert desk.worker.ports() == []
    assert not desk.leases.has_backend("app.example")
    with pytest.raises(NoSuchLease):
        await desk.leases.release("app.example", host="::1", port=1)


async def test_who_subscribed_hears_of_every_change_once_it_is_in_force(desk: Desk) -> None:
    seen = []
    desk.leases.subscribe(lambda change: seen.append((change.is_end, desk.worker.ports())))
    await desk.leases.grant(ask(1))
    await desk.leases.grant(ask(1))
    moved = LeaseRequest("app.example", Backend("::1", 2), 30, "[::1]:1")
    assert (await desk.leases.grant(moved)).former is not None
    await desk.leases.grant(ask(3, ttl=10))
    await desk.leases.release("app.example", "[::1]:1")
    desk.now += 10
    await desk.leases.sweep()
    assert desk.told == [
        ("registered", 1),
        ("renewed", 1),
        ("moved", 2),
        ("registered", 3),
        ("deregistered", 2),
        ("expired", 3),
    ]
    assert seen == [(False, [1]), (False, [1]), (False, [2]), (False, [2, 3]), (True, [3]), (True, [])]


async def test_a_subscriber_that_fails_harms_nobody(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    def broken(change: Change) -> None:
        raise RuntimeError("no luck today")

    heard: list[Change] = []
    desk.leases.subscribe(broken)
    desk.leases.subscribe(heard.append)
    await desk.leases.grant(ask(1))
    assert desk.worker.ports() == [1]
    assert len(heard) == 1
    assert "no luck today" in caplog.text
    assert desk.counted == {"leases": 1}


# One source's leases


async def test_a_source_is_replaced_as_a_whole_in_one_table_and_no_others_leases_change(desk: Desk) -> None:
    await desk.leases.grant(ask(9))
    await desk.leases.replace("docker", [ask(1), ask(2)])
    tables = desk.worker.tables
    await desk.leases.replace("docker", [ask(2), ask(3), ask(3, service="b.example")])
    assert desk.worker.tables == tables + 1
    assert desk.worker.ports() == [9, 2, 3]
    assert desk.worker.ports("b.example") == [3]
    assert desk.told[-4:] == [("deregistered", 1), ("renewed", 2), ("registered", 3), ("registered", 3)]
    await desk.leases.replace("docker", [])
    assert desk.worker.ports() == [9]
    tables = desk.worker.tables
    await desk.leases.replace("docker", [])
    assert desk.worker.tables == tables


async def test_what_does_not_fit_is_said_when_the_rest_is_in_force() -> None:
    desk = Desk(Registry(max_leases_per_service=1))
    with pytest.raises(RegistryFull, match=r"app\.example"):
        await desk.leases.replace("docker", [ask(1), ask(2), ask(3), ask(4, service="b.example")])
    assert desk.worker.ports() == [1]
    assert desk.worker.ports("b.example") == [4]


async def test_what_one_source_releases_stays_by_the_other(desk: Desk) -> None:
    await desk.leases.grant(ask(1))
    await desk.leases.grant(ask(1, None), "static")
    assert desk.worker.ports() == [1]
    await desk.leases.release("app.example", host="::1", port=1)
    assert desk.worker.ports() == [1]
    desk.now += 1e9
    await desk.leases.sweep()
    assert desk.worker.ports() == [1]
    await desk.leases.release("app.example", host="::1", port=1, source="static")
    assert desk.worker.ports() == []


async def test_what_was_granted_elsewhere_is_taken_over_with_its_sources() -> None:
    former, desk = Desk(), Desk()
    await former.leases.grant(ask(1))
    await former.leases.grant(ask(1, None), "static")
    await former.leases.grant(ask(2, None), "forgotten")
    table = former.leases.table
    assert desk.leases.restore(table.services.values(), table.version, {"api", "static"}) == 2
    await desk.leases.start()
    assert desk.worker.ports() == [1]
    await desk.leases.release("app.example", host="::1", port=1, source="static")
    assert desk.worker.ports() == [1]
    assert desk.leases.table.services["app.example"].leases[0].serves_until == 1030.0
    await desk.leases.close()


# The sweep


async def test_what_expired_is_swept_out_of_the_workers_table(desk: Desk) -> None:
    await desk.leases.grant(ask(1))
    tables = desk.worker.tables
    await desk.leases.sweep()
    assert desk.worker.tables == tables
    desk.now += 30
    await desk.leases.sweep()
    assert desk.worker.ports() == []
    desk.now += LINGER
    await desk.leases.sweep()
    assert not desk.worker.table.services


async def test_the_sweep_comes_by_itself_also_for_a_lease_that_ends_before_the_others(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SWEEP_DELAY", 0.0)
    loop = asyncio.get_running_loop()
    start = loop.time()
    desk.leases._clock = lambda: 1000.0 + loop.time() - start
    await desk.leases.grant(ask(1, 86_400))
    await until(lambda: desk.leases._sweep_at < math.inf)  # the sweep now waits for that one
    await desk.leases.grant(ask(2, 1))
    await until(lambda: desk.worker.ports() == [1])


async def test_a_sweep_that_fails_is_logged_and_shown_and_goes_on(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "SWEEP_DELAY", 0.0)
    publish = desk.feed.publish

    async def failing(table: RoutingTable) -> None:
        raise OSError("a worker is gone")

    await desk.leases.grant(ask(1, 1))
    await desk.leases.grant(ask(2, 2))
    desk.feed.publish = failing  # type: ignore[method-assign]
    desk.now += 1.5
    desk.leases._sooner.set()  # look at the turned clock
    await until(lambda: desk.leases.faults == ["sweep"])
    assert desk.counted == {"sweep": 1}
    assert "sweep failed; it begins again" in caplog.text
    desk.feed.publish = publish  # type: ignore[method-assign]
    desk.now += 1
    desk.leases._sooner.set()
    await until(lambda: desk.worker.ports() == [])


async def test_leases_without_an_end_are_waited_for_by_no_sweep(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SWEEP_DELAY", 0.0)
    await desk.leases.grant(ask(1, None), "static")
    await asyncio.sleep(0.01)
    assert desk.leases._sweep_at == math.inf
    desk.now += 1e9
    await desk.leases.grant(ask(2, 1))
    await until(lambda: desk.leases._sweep_at < math.inf)
    desk.now += 1
    desk.leases._sooner.set()  # look at the turned clock
    await until(lambda: desk.worker.ports() == [1])


async def test_what_never_ends_is_logged_so(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "portero_py")
    await desk.leases.replace("static", [ask(1, None)])
    await desk.leases.replace("static", [])
    assert [record.getMessage() for record in caplog.records if record.name.startswith("portero_py")] == [
        "registered: app.example at http://[::1]:1 ([::1]:1 (static)) for ever",
        "deregistered: app.example at http://[::1]:1 ([::1]:1 (static))",
    ]


async def test_who_reports_late_brings_back_what_is_missing_and_nothing_that_was_released(desk: Desk) -> None:
    former = Registry()
    for port in (1, 2, 3, 4):
        former.register(ask(port), desk.now)
    former.register(ask(5, 1), desk.now - 10)
    former.register(ask(6), desk.now, "docker")
    await desk.leases.grant(ask(1, 60))
    await desk.leases.grant(ask(2))
    await desk.leases.release("app.example", host="::1", port=2)
    assert await desk.leases.adopt(former.table, {API}) == 2
    assert desk.worker.ports() == [1, 3, 4]
    assert await desk.leases.adopt(former.table, {API}) == 0


async def test_when_too_much_was_released_nobody_who_reports_late_is_heard(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_ENDED", 0)
    former = Registry()
    former.register(ask(3), desk.now)
    await desk.leases.grant(ask(1))
    await desk.leases.release("app.example", host="::1", port=1)
    assert await desk.leases.adopt(former.table, {API}) == 0


async def test_verdicts_are_one_table_and_what_became_another_lease_meanwhile_stays(desk: Desk) -> None:
    for port in (1, 2, 3):
        await desk.leases.grant(replace(ask(port), health_path="/up"))
    probed = {port: desk.leases.at("app.example", "::1", port) for port in (1, 2, 3)}
    desk.now += 1
    await desk.leases.grant(replace(ask(1), health_path="/up"))  # a renewal is no other lease
    await desk.leases.set_state("app.example", "::1", 2, LeaseState.DRAINING)
    await desk.leases.release("app.example", host="::1", port=3)
    assert desk.leases.at("app.example", "::1", 3) is None
    desk.told.clear()
    tables = desk.worker.tables
    found = [Verdict(lease, LeaseState.READY, "a probe succeeded") for lease in probed.values() if lease]
    await desk.leases.judge(found)
    assert desk.worker.tables == tables + 1
    assert desk.told == [("state", 1)]
    states = [lease.state for lease in desk.worker.table.services["app.example"].leases]
    assert states == [LeaseState.READY, LeaseState.DRAINING]
    await desk.leases.judge(found)
    assert desk.worker.tables == tables + 1
