"""Listeners that stop to accept when there is no room, and begin again."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from time import monotonic
from typing import TYPE_CHECKING, cast

import pytest

from portero_py.proxy.downstream import doors
from portero_py.proxy.downstream.doors import TURN, Doors
from tests.waiting import until

if TYPE_CHECKING:
    from portero_py.proxy.downstream.doors import Asked
    from portero_py.proxy.downstream.doors import Site as ListeningSite


class Site:
    """A listener that counts."""

    def __init__(self) -> None:
        self.accepts = True
        self.stopped = False
        self.resumed = 0
        self.refuses: list[Exception] = []

    def pause(self) -> None:
        self.accepts = False

    async def resume(self) -> None:
        self.resumed += 1
        await asyncio.sleep(0)
        if self.refuses:
            raise self.refuses.pop()
        self.accepts = True

    async def stop(self) -> None:
        self.accepts, self.stopped = False, True


class Client:
    """A connection that closes when it is asked to, unless it is busy."""

    def __init__(self, hall: Hall, since: float, *, busy: bool = False) -> None:
        self._hall = hall
        self.since = since
        self._busy = busy
        self.asked = 0

    def idle_seconds(self, now: float) -> float:
        return 0.0 if self._busy else now - self.since

    def start_drain(self) -> None:
        self.asked += 1
        if not self._busy:
            self._hall.leave(self)

    def kill(self) -> None: ...


class Hall:
    """Room for 16 behind two listeners."""

    def __init__(self) -> None:
        self.live: dict[Asked, float] = {}
        self.doors = Doors(asyncio.get_running_loop(), 16, self.live, lambda: len(self.live))
        self.sites = [Site(), Site()]
        self.doors.sites += cast("list[ListeningSite]", self.sites)

    def enter(
        self, count: int, *, age: float = 0.0, idle: float = math.inf, busy: bool = False
    ) -> list[Client]:
        now = monotonic()
        came = [Client(self, now - min(idle, age), busy=busy) for _ in range(count)]
        for client in came:
            self.live[client] = now - age
            if len(self.live) >= 16:
                self.doors.filled()
        return came

    def leave(self, client: Client) -> None:
        self.live.pop(client, None)
        if self.doors.are_shut:
            self.doors.left()

    @property
    def accepts(self) -> bool:
        assert self.sites[0].accepts == self.sites[1].accepts
        return self.sites[0].accepts


@pytest.fixture
async def hall(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hall]:
    monkeypatch.setattr(doors, "LOOK_SECONDS", 0.005)
    made = Hall()
    yield made
    await made.doors.close()
    assert all(site.stopped for site in made.sites)


async def test_they_shut_when_it_is_full_and_open_when_an_eighth_has_gone(hall: Hall) -> None:
    clients = hall.enter(15)
    await asyncio.sleep(0)
    assert hall.accepts
    clients += hall.enter(1)
    await asyncio.sleep(0)
    assert not hall.accepts
    for client in clients[:2]:
        hall.leave(client)
    await until(lambda: not hall.doors.are_shut)
    assert hall.accepts
    hall.enter(2)
    await asyncio.sleep(0)
    assert not hall.accepts


async def test_who_is_idle_longest_makes_room_and_who_came_just_now_does_not(hall: Hall) -> None:
    active = hall.enter(4, age=TURN + 60, idle=0.001)
    idle = [hall.enter(1, age=TURN + 9, idle=TURN + age)[0] for age in (1, 3, 2)]
    at_work = hall.enter(4, age=TURN + 60, busy=True)
    new = hall.enter(5)
    await until(lambda: not hall.doors.are_shut)
    assert [client.asked for client in idle] == [0, 1, 1]
    assert not any(client.asked for client in (*active, *at_work, *new))


async def test_who_is_at_work_is_asked_last_once_and_when_it_has_been_full_for_long(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doors, "TURN", 0.02)
    tunnels = hall.enter(12, age=100, busy=True)
    clients = hall.enter(4, age=100, idle=0.001)
    await until(lambda: not hall.doors.are_shut)
    assert sum(client.asked for client in clients) == 2
    assert not any(client.asked for client in tunnels)
    clients += hall.enter(2, busy=True, age=100)
    for client in clients:
        client._busy = True
    await until(lambda: all(client.asked for client in tunnels))
    assert [client.asked for client in tunnels] == [1] * 12
    hall.leave(tunnels[0])
    hall.leave(tunnels[1])


async def test_of_very_many_some_are_looked_at_each_time(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "MAX_LOOKED_AT", 5)
    new = hall.enter(12, age=TURN - 60)
    old = hall.enter(4, age=TURN + 1)
    await until(lambda: not hall.doors.are_shut)
    assert sum(client.asked for client in old) == 2
    assert not any(client.asked for client in new)


async def test_nobody_is_asked_before_its_turn_is_over(hall: Hall) -> None:
    clients = hall.enter(16, age=TURN - 60)
    looks = hall.doors._looking
    await until(lambda: hall.doors._looking is not looks)
    await asyncio.sleep(0.02)
    assert not any(client.asked for client in clients)
    assert hall.doors.are_shut


async def test_a_listener_that_cannot_open_is_tried_again(
    hall: Hall, caplog: pytest.LogCaptureFixture
) -> None:
    hall.sites[0].refuses = [OSError("no descriptor"), OSError("no descriptor")]
    hall.enter(16, age=TURN + 1)
    await until(lambda: not hall.doors.are_shut)
    assert hall.accepts
    assert caplog.text.count("stay shut for now: no descriptor") == 2


async def test_listeners_are_tried_again_after_a_fault_too(
    hall: Hall, caplog: pytest.LogCaptureFixture
) -> None:
    hall.sites[0].refuses = [RuntimeError("a fault")]
    hall.enter(16, age=TURN + 1)
    await until(lambda: not hall.doors.are_shut)
    assert hall.accepts
    assert "stay shut for now" in caplog.text


async def test_a_worker_that_drains_while_it_is_full_does_not_open_again(hall: Hall) -> None:
    clients = hall.enter(16, busy=True)
    await asyncio.sleep(0)
    hall.leave(clients[0])
    hall.leave(clients[1])  # they are about to open
    await hall.doors.close()
    for client in clients[2:]:
        hall.leave(client)
    hall.doors.filled()
    await asyncio.sleep(0.02)
    assert not any(site.accepts for site in hall.sites)
