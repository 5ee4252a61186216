"""One task looks for all who wait until a backend is empty; each hears it when it is so, or why it is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from portero_py.control import drains as module
from portero_py.control.drains import Drains
from portero_py.control.leases import Leases
from portero_py.core.model import Backend, Lease, LeaseRequest, LeaseState
from portero_py.core.registry import Registry
from portero_py.feed.feed import Feed
from tests.control.workers import Worker
from tests.waiting import until

SERVICE = "app.example"


class Desk:
    """Leases, two workers, and the waits."""

    def __init__(self) -> None:
        self.workers = Worker(), Worker()
        feed = Feed(ack_seconds=0.02)
        for worker in self.workers:
            feed.subscribe(worker)
        self.leases = Leases(Registry(), feed, clock=lambda: 1000.0, count_fault=lambda _: None)
        self.drains = Drains(self.leases)

    async def granted(self, port: int = 1, service: str = SERVICE, health_path: str = "") -> Lease:
        asked = LeaseRequest(service, Backend("::1", port), 30, health_path=health_path)
        return (await self.leases.grant(asked)).lease

    def holds(self, worker: int, count: int, port: int = 1, service: str = SERVICE) -> None:
        self.workers[worker].held[service, "::1", port] = count

    async def looked(self, times: int = 2) -> None:
        """Wait until there were that many looks more."""
        seen = len(self.workers[0].asked)
        await until(lambda: len(self.workers[0].asked) >= seen + times)


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    one = Desk()
    await one.leases.start()
    running = asyncio.create_task(one.drains.run())
    yield one
    assert not running.done()
    running.cancel()
    await asyncio.wait({running})
    await one.leases.close()
    assert not len(one.drains)


async def test_a_wait_is_over_when_nothing_is_in_flight_in_any_worker(desk: Desk) -> None:
    lease = await desk.granted()
    await desk.leases.release(SERVICE, host="::1", port=1)
    desk.holds(0, 2)
    desk.holds(1, 1)
    over = desk.drains.until_empty(lease, 60)
    await desk.looked()
    desk.holds(0, 0)
    await desk.looked()
    assert not over.done()
    desk.holds(1, 0)
    assert await over == 0


async def test_what_is_in_flight_elsewhere_is_not_waited_for(desk: Desk) -> None:
    lease = await desk.granted()
    await desk.leases.release(SERVICE, host="::1", port=1)
    desk.holds(0, 5, port=2)
    desk.holds(0, 5, service="other.example")
    assert await desk.drains.until_empty(lease, 60) == 0


async def test_a_wait_of_no_seconds_is_one_look(desk: Desk) -> None:
    lease = await desk.granted()
    await desk.leases.release(SERVICE, host="::1", port=1)
    desk.holds(0, 2)
    desk.holds(1, 3)
    assert await desk.drains.until_empty(lease, 0) == 5
    assert desk.workers[0].asked == [SERVICE]


async def test_when_the_time_is_up_the_answer_is_what_is_in_flight(desk: Desk) -> None:
    lease = await desk.granted()
    await desk.leases.release(SERVICE, host="::1", port=1)
    desk.holds(1, 3)
    assert await desk.drains.until_empty(lease, 0.05) == 3
    assert len(desk.workers[0].asked) > 1


async def test_a_worker_that_hangs_is_not_known_to_be_empty(desk: Desk) -> None:
    lease = await desk.granted()
    await desk.leases.release(SERVICE, host="::1", port=1)
    desk.workers[1].hangs = True
    over = desk.drains.until_empty(lease, 60)
    assert await desk.drains.until_empty(lease, 0.01) == 1
    desk.holds(0, 2)
    assert await desk.drains.until_empty(lease, 0.01) == 3
    desk.holds(0, 0)
    await desk.looked()
    assert not over.done()
    desk.workers[1].hangs = False
    assert await over == 0


async def test_an_address_that_is_registered_again_is_not_waited_for_any_longer(desk: Desk) -> None:
    lease = await desk.granted()
    await desk.leases.release(SERVICE, host="::1", port=1)
    desk.holds(0, 2)
    over = desk.drains.until_empty(lease, 60)
    await desk.looked()
    assert not over.done()
    await desk.granted()
    assert await over == 2


async def test_nor_is_one_that_another_source_serves(desk: Desk) -> None:
    await desk.leases.grant(LeaseRequest(SERVICE, Backend("::1", 1), None), "static")
    lease = await desk.granted()
    await desk.leases.release(SERVICE, host="::1", port=1)
    desk.holds(0, 2)
    assert await desk.drains.until_empty(lease, 60) == 2


async def test_one_that_drains_is_waited_for_until_it_is_made_ready(desk: Desk) -> None:
    lease = await desk.granted()
    await desk.leases.set_state(SERVICE, "::1", 1, LeaseState.DRAINING)
    desk.holds(0, 2)
    over = desk.drains.until_empty(lease, 60)
    await desk.looked()
    assert not over.done()
    await desk.leases.set_state(SERVICE, "::1", 1, LeaseState.READY)
    assert await over == 2


async def test_a_drain_goes_on_when_the_lease_ends_meanwhile(desk: Desk) -> None:
    lease = await desk.granted()
    await desk.leases.set_state(SERVICE, "::1", 1, LeaseState.DRAINING)
    desk.holds(0, 2)
    over = desk.drains.until_empty(lease, 60)
    await desk.leases.release(SERVICE, host="::1", port=1)
    await desk.looked()
    assert not over.done()
    desk.holds(0, 0)
    assert await over == 0


async def test_a_wait_for_ready_is_over_when_the_probes_say_so(desk: Desk) -> None:
    lease = await desk.granted(health_path="/up")
    assert lease.state is LeaseState.STARTING
    over = desk.drains.until_ready(lease, 60)
    await desk.looked()
    assert not over.done()
    desk.holds(1, 4)
    await desk.leases.set_state(SERVICE, "::1", 1, LeaseState.READY)
    assert await over == 4


async def test_a_wait_for_ready_is_over_when_the_lease_is_gone(desk: Desk) -> None:
    lease = await desk.granted(health_path="/up")
    over = desk.drains.until_ready(lease, 60)
    await desk.leases.release(SERVICE, host="::1", port=1)
    assert await over == 0


async def test_hundreds_of_waits_are_one_look(desk: Desk) -> None:
    leases = []
    for port in range(1, 301):
        leases.append(await desk.granted(port, f"s{port % 3}.example"))
        await desk.leases.release(f"s{port % 3}.example", host="::1", port=port)
        desk.holds(0, 1, port, f"s{port % 3}.example")
    overs = [desk.drains.until_empty(lease, 60) for lease in leases]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert desk.workers[0].asked == [""]
    await desk.looked(3)
    assert not any(over.done() for over in overs)
    desk.workers[0].held.clear()
    assert await asyncio.gather(*overs) == [0] * 300
    assert len(desk.workers[0].asked) < 100


async def test_who_has_enough_leaves_nothing_behind(desk: Desk) -> None:
    lease = await desk.granted()
    await desk.leases.release(SERVICE, host="::1", port=1)
    desk.holds(0, 1)
    over = desk.drains.until_empty(lease, 60)
    await desk.looked()
    over.cancel()
    await asyncio.sleep(0)
    assert not len(desk.drains)
    await asyncio.sleep(0.1)
    asked = len(desk.workers[0].asked)
    await asyncio.sleep(2 * module.LAST_PAUSE)
    assert len(desk.workers[0].asked) == asked, "somebody still looks"


async def test_looks_become_rarer_and_begin_at_once_for_who_comes(desk: Desk) -> None:
    lease = await desk.granted()
    await desk.leases.release(SERVICE, host="::1", port=1)
    desk.holds(0, 1)
    first = desk.drains.until_empty(lease, 60)
    await desk.looked(8)
    assert await desk.drains.until_empty(lease, 0) == 1
    assert not first.done()
    first.cancel()


async def test_who_waits_when_it_closes_hears_what_is_in_flight(desk: Desk) -> None:
    lease = await desk.granted()
    await desk.leases.release(SERVICE, host="::1", port=1)
    desk.holds(0, 7)
    over = desk.drains.until_empty(lease, 60)
    await desk.looked()
    desk.drains.close()
    assert await over == 7
    assert await desk.drains.until_empty(lease, 60) == 7
