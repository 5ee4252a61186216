"""How the connections of a process take leave: who is asked when, and who is cut off."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic

import pytest

from portero_py.proxy.downstream import connection as module
from portero_py.proxy.downstream.connection import LONG_IDLE, Connections
from tests.waiting import until

#: Longer than any test: nobody is asked in its course.
NEVER = 1000.0


class Client:
    """A client's connection: for how long it has been idle, and what it was told."""

    deadline = 0.0

    def __init__(self, name: str, told: list[str], *, idle: float = 0.0, tunnel: bool = False) -> None:
        self.name = name
        self.idle = idle
        self.is_tunnel = tunnel
        self.ended = 0
        self.killed: Callable[[], None] | None = None
        self._told = told
        self._since = monotonic()

    def start_drain(self) -> None:
        self._told.append(f"{self.name} go")

    def announce_drain(self) -> None:
        self._told.append(f"{self.name} announced")

    def end_tunnel(self) -> None:
        if self.is_tunnel:
            self.ended += 1

    def idle_seconds(self, now: float) -> float:
        return self.idle

    def kill(self) -> None:
        self._told.append(f"{self.name} killed")
        if self.killed is not None:
            self.killed()

    def on_deadline(self, now: float) -> None: ...


class Room:
    """Connections of clients who note what they are told."""

    def __init__(self, greeting: Callable[[], int] = lambda: 0) -> None:
        self.told: list[str] = []
        self.connections = Connections(asyncio.get_running_loop(), 1000, greeting)

    def enter(self, name: str, *, idle: float = 0.0, tunnel: bool = False) -> Client:
        client = Client(name, self.told, idle=idle, tunnel=tunnel)
        client.killed = lambda: self.connections.closed(client)
        self.connections.opened(client)
        return client

    async def until_told(self, *words: str) -> None:
        await until(lambda: set(words) <= set(self.told))

    async def leave(self) -> None:
        """No timer stays."""
        await self.connections.wait(0.0)
        await self.connections.end()


async def test_idle_clients_are_asked_one_after_the_other_those_first_who_were_idle_longest() -> None:
    room = Room()
    for name, idle in (("short", 1.0), ("longest", 50.0), ("long", 20.0)):
        room.enter(name, idle=idle)
    room.connections.drain(NEVER, 0.2)
    await room.until_told("short go")
    assert room.told == ["longest go", "long go", "short go"]
    await room.leave()


async def test_who_has_been_idle_for_a_moment_only_is_not_asked_at_once() -> None:
    room = Room()
    room.enter("young", idle=LONG_IDLE / 2)
    room.connections.drain(NEVER, NEVER)
    for _ in range(10):
        await asyncio.sleep(0)
    assert room.told == []
    await room.leave()


async def test_who_is_at_work_is_told_at_once_and_asked_to_go_when_it_was_idle_for_a_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SWEEP_SECONDS", 0.001)
    room = Room()
    busy = room.enter("busy")
    room.connections.drain(NEVER, NEVER)
    assert room.told == ["busy announced"]
    busy.idle = module.MOMENT / 2  # its answer is out, and may not have said that it was the last
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert room.told == ["busy announced"]
    busy.idle = module.MOMENT * 2
    await room.until_told("busy go")
    await room.leave()


async def test_those_are_waited_for_who_were_there_and_who_came_later_has_to_hurry() -> None:
    room = Room()
    former = room.enter("former")
    room.connections.drain(NEVER, NEVER)
    room.enter("later", idle=0.1)
    waiting = asyncio.create_task(room.connections.wait_for_former(NEVER))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not waiting.done()
    room.connections.closed(former)
    async with asyncio.timeout(20):
        await waiting
    assert "later go" not in room.told
    room.connections.hurry(0.01)
    await room.until_told("later go")
    await room.leave()


async def test_those_who_were_there_are_not_waited_for_for_ever() -> None:
    room = Room()
    room.enter("former")
    room.connections.drain(NEVER, NEVER)
    async with asyncio.timeout(20):
        await room.connections.wait_for_former(0.01)
    await room.leave()


async def test_who_comes_while_it_drains_has_time_for_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SWEEP_SECONDS", 0.001)
    room = Room()
    room.connections.drain(NEVER, 0.01)
    speaking, silent = room.enter("speaking"), room.enter("silent", idle=0.001)
    await room.until_told("speaking announced", "silent go")
    assert "speaking go" not in room.told
    speaking.idle = 1.0
    await room.until_told("speaking go")
    assert silent.name
    await room.leave()


async def test_tunnels_are_asked_to_end_and_so_is_what_became_one_meanwhile() -> None:
    room = Room()
    tunnel, later = room.enter("tunnel", tunnel=True), room.enter("later")
    room.connections.drain(0.1, NEVER)
    later.is_tunnel = True
    await until(lambda: tunnel.ended and later.ended)
    await room.leave()


async def test_what_remains_at_the_end_is_counted_and_cut_off() -> None:
    room = Room()
    room.enter("one")
    room.enter("two", tunnel=True)
    room.connections.drain(NEVER, NEVER)
    assert await room.connections.wait(0.0) == (2, 1)
    await room.connections.end()
    assert {"one killed", "two killed"} <= set(room.told)
    assert await room.connections.wait(0.0) == (0, 0)


async def test_a_client_in_the_middle_of_its_handshake_is_waited_for() -> None:
    greeting = [1]
    room = Room(lambda: greeting[0])
    room.connections.drain(NEVER, NEVER)
    waiting = asyncio.create_task(room.connections.wait(NEVER))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not waiting.done()
    greeting[0] = 0
    async with asyncio.timeout(20):
        assert await waiting == (0, 0)


async def test_a_handshake_that_never_ends_is_not_waited_for_longer_than_an_idle_client() -> None:
    room = Room(lambda: 1)
    room.connections.drain(NEVER, 0.01)
    async with asyncio.timeout(20):
        assert await room.connections.wait(NEVER) == (0, 0)
