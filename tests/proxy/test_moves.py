"""Backends that hang: who says so, how often, and who goes to another one when control calls them DOWN."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from portero_py.core.health import Evidence
from portero_py.core.model import Halt, LeaseState, Service
from portero_py.core.routing_table import RoutingTable
from portero_py.proxy import moves
from portero_py.proxy.moves import Moves
from tests.proxy.dialogue import GET, OK, ScriptedTransport, World, post, settle, statuses

A, B = "b0", "b1"
SLOW = Evidence("app.example", "127.0.0.1", 9000, hangs=True, error="no answer within 2 s")


class Play:
    """A world of two backends, and what it tells control."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.moves = Moves(world.loop, world.deadlines, world.pools)
        self.evidence: list[Evidence] = []
        world.outcomes.on_evidence = self.evidence.append
        world.register(2)
        self.clients: list[ScriptedTransport] = []

    async def ask(self, request: bytes = GET) -> tuple[ScriptedTransport, ScriptedTransport]:
        """A request, and the connection of its own on which a backend has it."""
        for pool in self.world.all_pools():
            pool.empty()
        client = self.world.client()
        self.clients.append(client)
        client.send(request)
        return client, await self.world.backend()

    async def ask_of(self, name: str, request: bytes = GET) -> tuple[ScriptedTransport, ScriptedTransport]:
        """A request that this backend has."""
        while True:
            client, backend = await self.ask(request)
            if self.world.loop.addresses[-1][1] == 9000 + int(name[1:]):
                return client, backend
            backend.send(OK)

    async def change(self, name: str, **changes: object) -> None:
        """Another table, in which this backend's lease has changed."""
        former = self.world.table
        [service] = former.services.values()
        leases = tuple(
            replace(lease, **cast("Any", changes)) if lease.instance_id == name else lease
            for lease in service.leases
        )
        await self.apply(replace(service, leases=leases))

    async def fall(self, name: str = A) -> None:
        await self.change(name, state=LeaseState.DOWN, since=self.world.clock())

    async def apply(self, service: Service, *, since: int | None = None) -> None:
        former = self.world.table
        table = RoutingTable(
            former.version + 1,
            {service.name: service},
            since=former.version if since is None else since,
            changed=frozenset({service.name}),
        )
        self.world.apply(table)
        self.world.queues.follow(table)
        self.moves.follow(former, table)
        await settle()

    @property
    def moved(self) -> int:
        return self.world.counters.retries["app.example", "moved"]

    def statuses(self) -> list[int]:
        return [status for client in self.clients for status in statuses(client.received)]


@pytest.fixture
async def play(world: World) -> AsyncIterator[Play]:
    play = Play(world)
    yield play
    play.moves.close()
    for client in play.clients:
        if not client.lost:
            client.vanish()


# The early look


async def test_three_that_wait_for_a_probes_time_ask_for_a_probe_and_nobody_is_ejected(play: Play) -> None:
    for _ in range(3):
        await play.ask_of(A)
    await play.world.pass_time(4)
    assert play.evidence == [SLOW]
    assert [mark.is_ejected for mark in play.world.health.by_backend().values()] == [False]
    assert 504 not in play.statuses()


async def test_two_ask_for_nothing_and_get_their_time_out_when_it_is_due(play: Play) -> None:
    begun = play.world.clock.now
    two = [await play.ask_of(A) for _ in range(2)]
    seen: set[int] = set()
    while not seen:
        await play.world.pass_time(1)
        seen = {status for client, _ in two for status in statuses(client.received)}
    assert seen == {504}
    assert 0 <= play.world.clock.now - begun - play.world.timeouts.upstream_head <= 2
    assert play.evidence == []


async def test_control_is_asked_once_an_interval(play: Play) -> None:
    for second in range(12):
        await play.ask_of(A)
        await play.world.pass_time(1)
        assert len(play.evidence) <= 1 + second // 5
    assert len(play.evidence) == 2
    for _ in range(3):
        play.world.outcomes.look(play.world.clock())
    await play.world.pass_time(3)
    assert len(play.evidence) <= 3


async def test_any_answer_begins_the_row_anew(play: Play) -> None:
    first = [await play.ask_of(A) for _ in range(2)]
    for answer in (OK, b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"):
        await play.world.pass_time(4)
        assert play.evidence == []
        first.pop()[1].send(answer)
        await play.ask_of(A)
        await play.ask_of(A)
    await play.world.pass_time(1)
    assert play.evidence == []


async def test_a_body_is_sent_before_the_time_begins(play: Play) -> None:
    waiting = [await play.ask_of(A, post(b"abc")[:-1]) for _ in range(3)]
    await play.world.pass_time(5)
    assert play.evidence == []
    for client, _ in waiting:
        client.send(b"c")
    await play.world.pass_time(4)
    assert play.evidence == [SLOW]


async def test_who_has_said_anything_is_not_slow(play: Play) -> None:
    waiting = [await play.ask_of(A) for _ in range(6)]
    for number, (_, backend) in enumerate(waiting):
        backend.send(b"HTTP/1.1 103 Early Hints\r\n\r\n" if number % 2 else b"HTTP/1.1 200")
    await play.world.pass_time(5)
    assert play.evidence == []


async def test_a_head_that_is_due_before_a_probe_would_be_has_one_look_only(play: Play) -> None:
    world = play.world
    world.patience.general.upstream_head = world.patience.general.first_look = 1.0
    client, _ = await play.ask_of(A)
    await world.pass_time(3)
    assert statuses(client.received)[-1] == 504
    assert play.evidence == []


# Moving on


async def test_who_waits_for_one_that_is_down_now_is_served_by_another_and_a_post_stays(play: Play) -> None:
    gets = [await play.ask_of(A) for _ in range(10)]
    posted, kept = await play.ask_of(A, post(b"abc"))
    await play.fall()
    assert [backend.aborted for _, backend in gets] == [True] * 10
    assert not kept.aborted
    for _ in gets:
        (await play.world.backend()).send(OK)
    assert [statuses(client.received)[-1] for client, _ in gets] == [200] * 10
    assert play.moved == 10
    assert play.world.counters.retries_refused == {}
    kept.send(OK)
    assert statuses(posted.received) == [200], "who is there still may answer"


async def test_the_same_fall_moves_nobody_twice(play: Play) -> None:
    client, _ = await play.ask_of(A)
    await play.fall()
    at_b = await play.world.backend()
    await play.change(A, weight=2)
    await play.fall(B)
    assert not at_b.aborted, "there is nobody better"
    at_b.send(OK)
    assert statuses(client.received)[-1] == 200
    assert play.moved == 1


async def test_one_that_falls_later_moves_them_again(play: Play) -> None:
    play.world.register(3)
    client, _ = await play.ask_of(A)
    await play.fall()
    await play.world.backend()
    await play.fall("b1" if play.world.loop.addresses[-1][1] == 9001 else "b2")
    (await play.world.backend()).send(OK)
    assert statuses(client.received)[-1] == 200
    assert play.moved == 2


async def test_who_has_part_of_an_answer_stays(play: Play) -> None:
    early, one = await play.ask_of(A)
    one.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
    half, other = await play.ask_of(A)
    other.send(b"HTTP/1.1 200 OK\r\n")
    body, third = await play.ask_of(A)
    third.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
    await play.fall()
    one.send(OK)
    other.send(b"Content-Length: 2\r\n\r\nok")
    third.send(b"ok")
    for client in (early, half, body):
        assert statuses(client.received)[-1] == 200
    assert play.moved == 0


@pytest.mark.parametrize("why", ["alone", "down", "paused", "full", "failed", "unknown", "moved", "gone"])
async def test_nobody_is_moved_when_that_does_no_good(play: Play, why: str) -> None:
    world = play.world
    _, backend = await play.ask_of(A)
    [service] = world.table.services.values()
    if why == "alone":
        await play.apply(replace(service, leases=service.leases[:1]))
    elif why == "down":
        await play.fall(B)
    elif why == "full":
        await play.change(B, max_in_flight=1)
        await play.ask_of(B)
    elif why == "failed":
        backend.send(OK)
        world.loop.broken[9001] = ConnectionRefusedError(111, "Connection refused")
        while not world.counters.retries:
            backend.send(OK)
            _, backend = await play.ask()
    elif why == "paused":
        await play.apply(replace(service, halt=Halt(30.0)))
    if why == "unknown":
        fallen = tuple(replace(lease, state=LeaseState.DOWN) for lease in service.leases[:1])
        await play.apply(replace(service, leases=(*fallen, *service.leases[1:])), since=-1)
    elif why == "moved":
        await play.change(
            A, state=LeaseState.DOWN, backend=replace(service.leases[0].backend, host="127.0.0.9")
        )
    elif why == "gone":
        world.table = former = world.table
        changed = frozenset({"app.example"})
        table = RoutingTable(2, {}, since=former.version, changed=changed)
        world.apply(table)
        play.moves.follow(former, table)
        await settle()
    else:
        await play.fall()
    assert not backend.aborted
    assert play.moved == 0
    backend.send(OK)


async def test_an_answer_that_comes_before_its_turn_is_taken(play: Play) -> None:
    client, backend = await play.ask_of(A)
    former = play.world.table
    [service] = former.services.values()
    leases = (replace(service.leases[0], state=LeaseState.DOWN), *service.leases[1:])
    changed = frozenset({"app.example"})
    table = RoutingTable(2, {"app.example": replace(service, leases=leases)}, since=1, changed=changed)
    play.world.apply(table)
    play.moves.follow(former, table)
    backend.send(OK)
    await settle()
    assert statuses(client.received)[-1] == 200
    assert play.moved == 0


async def test_who_waits_for_a_connection_is_moved_with_the_body_that_has_come(play: Play) -> None:
    world = play.world
    made = asyncio.Event()
    world.loop.outcomes = [made]
    client = world.client()
    client.send(post(b"abc"))
    await settle()
    await play.fall()
    backend = await world.backend()
    assert backend.received.endswith(b"abc")
    backend.send(OK)
    assert statuses(client.received) == [200]
    assert play.moved == 1
    made.set()
    await settle()
    assert [pool.idle for pool in world.all_pools() if pool.backend.port == 9000] == [1]


async def test_a_limited_backend_has_its_slot_back_and_who_waits_in_the_queue_is_before_them(
    play: Play,
) -> None:
    world = play.world
    for name in (A, B):
        await play.change(name, max_in_flight=1)
    world.limits = world.queues.limits = replace(world.limits, queue_seconds=10.0)
    (_, at_a), (_, at_b) = await play.ask_of(A), await play.ask()
    queued = world.client()
    queued.send(post(b"first"))
    await settle()
    assert len(world.queues) == 1
    await play.fall()
    assert at_a.aborted
    assert len(world.queues) == 2
    assert sum(pool.claims for pool in world.all_pools()) == 1
    at_b.received = b""
    at_b.send(OK)
    await settle()
    assert at_b.received.endswith(b"first")
    at_b.send(OK)
    await settle()
    assert at_b.received.count(b"GET / ") == 1
    at_b.send(OK)
    assert statuses(queued.received) == [200]
    assert play.statuses()[-2:] == [200, 200]
    assert play.moved == 1


async def test_many_are_told_in_steps_and_what_falls_meanwhile_comes_next(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moves, "STEP", 1)
    play.world.register(4)
    waiting = [await play.ask() for _ in range(8)]
    for name in ("b0", "b1", "b2"):
        await play.fall(name)
    for _ in range(100):
        await settle()
    assert sum(backend.aborted for _, backend in waiting) == 6
    for transport in play.world.loop.connections:
        if not transport.closed:
            transport.send(OK)
    assert play.statuses() == [200] * 8


async def test_a_fault_of_our_own_ends_one_exchange_and_moves_the_others(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = await play.ask_of(A)
    other, _ = await play.ask_of(A)
    route = play.world.router.route
    faults = [RuntimeError("a fault")]

    def breaks_once(authority: bytes, table: RoutingTable) -> Service | None:
        if faults:
            raise faults.pop()
        return route(authority, table)

    monkeypatch.setattr(play.world, "router", SimpleNamespace(route=breaks_once))
    await play.fall()
    (await play.world.backend()).send(OK)
    assert sorted(statuses(one.received)[-1:] + statuses(other.received)[-1:]) == [200, 500]


async def test_whoever_closes_it_stops_it(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    _, backend = await play.ask_of(A)
    monkeypatch.setattr(play.world, "apply", lambda table: None)
    monkeypatch.setattr("tests.proxy.test_moves.settle", _nothing)
    await play.fall()
    play.moves.close()
    monkeypatch.undo()
    await settle()
    assert not backend.aborted
    backend.send(OK)


async def _nothing() -> None:
    """Nobody has a turn."""
