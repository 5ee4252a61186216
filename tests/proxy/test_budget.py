"""The account of buffered bytes: against a model, and in dialogues with peers that are slow."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from portero_py.core.counters import Counters
from portero_py.proxy import budget as budget_module
from portero_py.proxy.budget import GRANT, PATIENCE, RETAINED, Budget
from portero_py.proxy.refusals import BUFFERED_BYTES, Refusals
from tests.proxy.dialogue import GET, OK, World, post, settle, statuses
from tests.waiting import until

BIG = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + bytes(200_000)


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_module, "RETAINED", 0)


class Timer:
    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def cancel(self) -> None:
        self._loop.later.clear()


class Loop:
    """Callbacks that a test runs by itself."""

    def __init__(self) -> None:
        self.later: list[tuple[object, tuple[object, ...]]] = []
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: object, *arguments: object) -> None:
        callback(*arguments)  # type: ignore[operator]

    def call_later(self, _: float, callback: object, *arguments: object) -> Timer:
        self.later.append((callback, arguments))
        return Timer(self)

    def turn(self) -> None:
        calls, self.later = self.later, []
        for callback, arguments in calls:
            callback(*arguments)  # type: ignore[operator]


class Peer:
    """Somebody who holds, or waits."""

    def __init__(self) -> None:
        self.size = 0
        self.ended = False
        self.went_on = 0

    def held_bytes(self) -> int:
        return self.size

    def kill(self) -> None:
        self.ended = True

    def go_on(self) -> None:
        self.went_on += 1


def made(most: int) -> tuple[Budget, Loop, Counters]:
    loop, counters = Loop(), Counters()
    running = cast("asyncio.AbstractEventLoop", loop)
    budget = Budget(running, counters, Refusals(running, counters))
    budget.most = most
    return budget, loop, counters


def holding(budget: Budget, size: int) -> Peer:
    peer = Peer()
    peer.size = size
    budget.holds(peer, size)
    return peer


def test_over_twice_the_budget_whoever_has_not_moved_is_ended_at_once() -> None:
    budget, _, counters = made(500)
    first, moving, third = holding(budget, 300), holding(budget, 300), holding(budget, 300)
    assert not any(peer.ended for peer in (first, moving, third))
    moving.size -= 1
    fourth = holding(budget, 300)
    assert not moving.ended
    assert sum(peer.ended for peer in (first, third, fourth)) == 1
    assert counters.refused == {BUFFERED_BYTES: 1}
    assert budget.total == counters.buffered_bytes == 899


def test_over_the_budget_whoever_takes_something_in_time_stays() -> None:
    budget, loop, counters = made(1000)
    stuck, moving = holding(budget, 600), holding(budget, 600)
    loop.now = PATIENCE - 1
    moving.size -= 1
    new = holding(budget, 1)
    assert not stuck.ended
    loop.now = PATIENCE
    budget.holds(new, 2)
    assert stuck.ended
    loop.now = 2 * PATIENCE - 2
    last = holding(budget, 600)
    assert not moving.ended
    assert not last.ended
    assert counters.refused == {BUFFERED_BYTES: 1}


def test_a_holder_counts_for_what_its_transport_keeps_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_module, "RETAINED", RETAINED)
    budget, _, _ = made(0)
    peer = holding(budget, 1000)
    assert budget.total == 1000 + RETAINED
    budget.holds(peer, 2000)
    assert budget.total == 2000 + RETAINED
    budget.drops(peer)
    assert budget.total == 0


def test_without_a_limit_it_is_counted_all_the_same() -> None:
    budget, loop, counters = made(0)
    holding(budget, 1 << 40)
    assert counters.buffered_bytes == 1 << 40
    assert budget.may_go_on(Peer())
    assert not loop.later


def test_one_that_cannot_go_on_keeps_nobody_else_waiting(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Peer):
        def go_on(self) -> None:
            raise RuntimeError("a fault")

    budget, loop, _ = made(GRANT)
    holder = holding(budget, GRANT)
    broken, other = Broken(), Peer()
    assert not any(budget.may_go_on(peer) for peer in (broken, other))
    budget.drops(holder)
    loop.turn()
    loop.turn()
    assert (other.went_on, budget.waiting) == (1, 0)
    assert "somebody cannot go on" in caplog.text


def test_who_was_behind_waits_for_room_in_order_and_nobody_waits_for_ever() -> None:
    budget, loop, _ = made(8 * GRANT)
    holders = [holding(budget, GRANT) for _ in range(7)]
    waiting = [Peer() for _ in range(5)]
    assert not any(budget.may_go_on(peer) for peer in waiting)
    loop.turn()
    assert [peer.went_on for peer in waiting] == [0, 0, 0, 0, 0]
    for holder in holders[:3]:
        budget.drops(holder)
    assert not budget.may_go_on(Peer()), "there is room, but others were first"
    loop.turn()
    assert [peer.went_on for peer in waiting] == [1, 1, 0, 0, 0]
    budget.gone(waiting[2])
    loop.turn()
    loop.turn()
    assert [peer.went_on for peer in waiting] == [1, 1, 0, 1, 1]
    loop.turn()
    assert budget.waiting == 0
    assert not loop.later


def test_a_limit_that_is_lifted_lets_everybody_go_on() -> None:
    budget, loop, _ = made(1000)
    holding(budget, 900)
    waiting = [Peer() for _ in range(50)]
    for peer in waiting:
        budget.may_go_on(peer)
    budget.most = 0
    loop.turn()
    assert all(peer.went_on for peer in waiting)


def test_what_is_passed_on_is_still_held_once() -> None:
    budget, _, _ = made(1000)
    former, successor = holding(budget, 300), Peer()
    budget.passed_on(former, successor)
    budget.gone(former)
    assert budget.total == 300
    budget.gone(successor)
    budget.gone(successor)
    assert budget.total == 0


MOST = 4 * GRANT
WHO = st.integers(0, 7)


class Accounts(RuleBasedStateMachine):
    """Eight peers that hold, move, drop, wait and leave as they like."""

    def __init__(self) -> None:
        super().__init__()
        self.budget, self.loop, self.counters = made(MOST)
        self.peers = [Peer() for _ in range(8)]
        self.said: dict[Peer, int] = {}
        self.waiting: list[Peer] = []

    def after(self) -> None:
        """Those that were ended are gone."""
        for number, peer in enumerate(self.peers):
            if peer.ended:
                self.said.pop(peer, None)
                self.budget.gone(peer)
                self.peers[number] = Peer()

    @rule(who=WHO, size=st.integers(1, GRANT))
    def holds(self, who: int, size: int) -> None:
        peer = self.peers[who]
        if peer in self.waiting:
            return
        peer.size = size
        self.said[peer] = size
        moved = {peer: peer.size < said for peer, said in self.said.items()}
        self.budget.holds(peer, size)
        for peer, has_moved in moved.items():
            assert not (peer.ended and has_moved), "it takes what is there"
            if has_moved and self.budget._held[peer] == peer.size:
                self.said[peer] = peer.size  # it was looked at
        self.after()
        assert self.budget.total <= 2 * MOST

    @rule(who=WHO, part=st.integers(1, 9))
    def moves(self, who: int, part: int) -> None:
        self.peers[who].size -= self.peers[who].size * part // 10

    @rule(who=WHO)
    def drops_and_waits(self, who: int) -> None:
        peer = self.peers[who]
        if self.said.pop(peer, None) is None:
            return
        peer.size = 0
        self.budget.drops(peer)
        if not self.budget.may_go_on(peer):
            self.waiting.append(peer)

    @rule(who=WHO)
    def leaves(self, who: int) -> None:
        peer = self.peers[who]
        self.said.pop(peer, None)
        if peer in self.waiting:
            self.waiting.remove(peer)
        self.budget.gone(peer)
        self.peers[who] = Peer()

    @rule()
    def turn(self) -> None:
        tight = self.budget.total >= MOST - MOST // 4
        self.loop.turn()
        gone_on = [peer for peer in self.waiting if peer.went_on]
        assert gone_on == self.waiting[: len(gone_on)], "in order"
        assert bool(gone_on) == (bool(self.waiting) and not tight)
        for peer in gone_on:
            peer.went_on = 0
            self.waiting.remove(peer)

    @invariant()
    def it_adds_up(self) -> None:
        assert self.budget.total == sum(self.said.values()) == self.counters.buffered_bytes
        assert self.budget.waiting == len(self.waiting)
        assert bool(self.waiting) <= bool(self.loop.later), "somebody looks for room"


TestAccounts = Accounts.TestCase


async def test_a_client_that_is_behind_waits_for_room_before_its_backend_is_read_again(world: World) -> None:
    world.budget.most = 800_000
    stuck = [world.client() for _ in range(3)]
    for client in stuck:
        client.stop_reading()
        client.send(GET)
        (await world.backend()).send(BIG)
    slow = world.client()
    slow.stop_reading()
    slow.send(GET)
    backend = await world.backend()
    backend.send(BIG[:100_000])
    assert world.budget.total == 3 * len(BIG) + 100_000
    assert world.counters.buffered_bytes == world.budget.total
    slow.read_all()
    assert not backend.reading, "there is no room for more"
    assert world.budget.waiting == 1
    fast = world.client()
    fast.send(GET)
    other = await world.backend()
    other.send(BIG)
    other.send(bytes(800_000))
    assert len(fast.received) == len(BIG) + 800_000, "who is not behind is not concerned"
    stuck[0].vanish()
    await until(lambda: backend.reading)
    assert world.budget.waiting == 0
    for client in (*stuck, slow):
        client.vanish()


async def test_a_backend_that_is_behind_waits_for_room_before_its_client_is_read_again(world: World) -> None:
    stuck = world.client()
    stuck.stop_reading()
    stuck.send(GET)
    (await world.backend()).send(BIG)
    client = world.client()
    client.send(post(bytes(500_000))[:1000])
    backend = await world.backend()
    backend.stop_reading()
    client.send(bytes(90_000))
    assert world.budget.total == len(BIG) + 90_000
    world.budget.most = len(BIG) + 10_000  # a reload
    backend.read_all()
    assert not client.reading
    stuck.vanish()
    await until(lambda: client.reading)
    client.vanish()


async def test_an_upload_that_its_backend_does_not_take_is_ended_when_there_is_no_room(world: World) -> None:
    world.budget.most = 50_000
    client, other = world.client(), world.client()
    client.send(post(bytes(500_000))[:1000])
    backend = await world.backend()
    backend.stop_reading()
    client.send(bytes(90_000))
    other.stop_reading()
    other.send(GET)
    (await world.backend()).send(BIG[:70_000])
    await settle()
    assert statuses(client.received) == [502]
    assert not other.closed
    assert world.counters.refused == {BUFFERED_BYTES: 1}
    client.vanish()
    other.vanish()


async def test_what_is_held_for_a_connection_that_leaves_is_given_back(world: World) -> None:
    client = world.client()
    client.stop_reading()
    client.send(b"GET / HTTP/1.1\r\nHost: app.example\r\nConnection: close\r\n\r\n")
    (await world.backend()).send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + bytes(100_000))
    assert world.budget.total > 100_000
    client.unsent -= 50_000
    assert world.budget.total > 100_000, "nobody has looked"
    client.vanish()
    assert world.budget.total == 0


async def test_pipelined_requests_and_long_heads_are_held_until_they_are_taken(world: World) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    client.send(GET * 2000)
    assert world.budget.total == len(GET) * 2000
    assert not client.reading
    backend.send(OK)
    assert world.budget.total == len(GET) * 2000, "the next one is on its way"
    client.vanish()
    other = world.client()
    head = b"GET / HTTP/1.1\r\nHost: nowhere.example\r\nX: " + b"x" * 20_000
    other.send(head)
    assert world.budget.total == len(head)
    other.send(b"\r\n\r\n")
    assert statuses(other.received) == [404]
    assert world.budget.total == 0


async def test_a_body_that_waits_for_a_connection_is_held_and_refused_when_there_is_no_room(
    world: World,
) -> None:
    world.budget.most = 50_000
    connected = asyncio.Event()
    world.loop.outcomes = [connected, asyncio.Event()]
    first, second = world.client(), world.client()
    first.send(post(bytes(60_000)))
    assert world.budget.total == 60_000
    second.send(post(bytes(30_000)))
    assert world.budget.total == 90_000
    connected.set()
    backend = await world.backend()
    assert backend.received.endswith(bytes(60_000))
    assert world.budget.total == 30_000
    third = world.client()
    world.loop.outcomes = [asyncio.Event()]
    third.send(post(bytes(90_000)))
    await settle()
    assert statuses(second.received) == [503]
    assert world.done[-1].error is not None
    assert world.done[-1].error.reason == "out_of_buffers"
    assert third.received == b""
    assert world.budget.total == 90_000
    backend.send(OK)
    for client in (first, second, third):
        client.vanish()
