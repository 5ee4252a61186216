"""Backends at their limit, paused and stopped services: who waits, who goes on, who is turned away."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import orjson
import pytest

from portero_py.core.model import Backend, Halt, Lease, Service
from portero_py.core.routing_table import RoutingTable
from portero_py.proxy.exchange import CONNECT_PATIENCE, Exchange
from portero_py.proxy.queues import SHARED_LOOK
from portero_py.proxy.upstream.rooms import NONE, Rooms
from tests.proxy.client_ends import CLIENT_ENDS, ClientEnd
from tests.proxy.dialogue import GET, OK, ScriptedTransport, World, get, post, settle, statuses
from tests.proxy.upstream.slot_holder import Holder, lease

if TYPE_CHECKING:
    from portero_py.config.model import Limits
    from portero_py.proxy.endpoints import Downstream
    from portero_py.proxy.peer import Peer
    from portero_py.proxy.surroundings import Surroundings
    from portero_py.wire.message import RequestHead

REFUSED = ConnectionRefusedError(111, "Connection refused")


class Timer:
    def __init__(self, due: float, call: Callable[[], None]) -> None:
        self.due = due
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class Hall:
    """The queues of a world, with timers that the world's clock drives."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.timers: list[Timer] = []
        self.version = 10
        cast("Any", world.queues)._loop = self

    # What the queues ask of the loop

    def call_soon(self, callback: Callable[[], None]) -> asyncio.Handle:
        return asyncio.get_running_loop().call_soon(callback)

    def call_later(self, seconds: float, callback: Callable[..., None], *arguments: object) -> Timer:
        self.timers.append(Timer(self.world.clock.now + seconds, lambda: callback(*arguments)))
        return self.timers[-1]

    # What tests do

    async def pass_time(self, seconds: float) -> None:
        """Time passes, and every timer fires when it is due."""
        until = self.world.clock.now + seconds
        while True:
            self.timers = [timer for timer in self.timers if timer.call is not None]
            timer = min(self.timers, key=lambda timer: timer.due, default=None)
            if timer is None or timer.due > until:
                break
            self.world.clock.now = max(self.world.clock.now, timer.due)
            call, timer.call = timer.call, None
            assert call is not None
            call()
            await settle()
        self.world.clock.now = until
        await settle()

    def limits(self, **changed: float) -> None:
        limits: Limits = replace(self.world.limits, **cast("Any", changed))
        self.world.limits = self.world.queues.limits = limits

    def serve(self, *limits: int, halt: Halt | None = None, name: str = "app.example") -> None:
        """From now on one backend each with these limits (0: none) serves the service."""
        leases = tuple(
            Lease(name, f"b{n}", Backend("127.0.0.1", 9000 + n), float("inf"), None, max_in_flight=limit)
            for n, limit in enumerate(limits)
        )
        self.apply({**self.world.table.services, name: Service(name, leases, halt)})

    def apply(self, services: dict[str, Service], default: str = "") -> None:
        self.version += 1
        table = RoutingTable(self.version, services, default)
        self.world.apply(table)
        self.world.queues.follow(table)

    def halt(self, halt: Halt | None, name: str = "app.example") -> None:
        services = dict(self.world.table.services)
        services[name] = replace(services[name], halt=halt)
        self.apply(services, self.world.table.default_service)

    @property
    def queued(self) -> int:
        return len(self.world.queues)

    @property
    def refused(self) -> dict[str, int]:
        return {reason: count for (_, reason), count in self.world.counters.queue_refused.items()}


@pytest.fixture
async def hall(world: World) -> Hall:
    """Patience of 5 s, and one backend that takes one exchange."""
    found = Hall(world)
    found.limits(queue_seconds=5)
    found.serve(1)
    return found


class _Real(ClientEnd):
    """A client end in front of a real exchange."""

    def _new_exchange(
        self, surroundings: Surroundings, peer: Peer, downstream: Downstream, head: RequestHead, /
    ) -> Any:
        made = Exchange(surroundings, peer, downstream, head)
        self.exchanges.append(cast("Any", made))
        return made


@pytest.fixture(params=CLIENT_ENDS)
async def end(request: pytest.FixtureRequest, hall: Hall, monkeypatch: pytest.MonkeyPatch) -> ClientEnd:
    kind = CLIENT_ENDS[request.param]
    made = type("Real", (_Real, kind), {})(hall.world, monkeypatch)
    assert isinstance(made, ClientEnd)
    return made


def reasons(world: World) -> list[str]:
    return [done.error.reason if done.error is not None else "" for done in world.done]


def paths(backend: ScriptedTransport) -> list[bytes]:
    """The targets of the requests that a backend got."""
    return [line.split()[1] for line in backend.received.split(b"\r\n") if line.endswith(b" HTTP/1.1")]


async def occupied(world: World) -> ScriptedTransport:
    """The one backend, busy with another client's request."""
    world.client().send(get(b"/busy"))
    return await world.backend()


# In order


async def test_who_finds_no_room_goes_when_there_is_some_in_order_of_arrival(hall: Hall) -> None:
    world = hall.world
    clients = [world.client() for _ in range(4)]
    for number, client in enumerate(clients):
        client.send(get(b"/%d" % number))
    backend = await world.backend()
    assert (hall.queued, world.counters.queued) == (3, {"app.example": 3})
    for number in range(4):
        assert paths(backend) == [b"/%d" % each for each in range(number + 1)]
        backend.send(OK)
        await settle()
    assert [statuses(client.received) for client in clients] == [[200]] * 4
    assert len(world.loop.connections) == 1
    assert world.counters.queue_durations() == {"app.example": [3, *[0] * 14]}


async def test_who_comes_while_others_wait_does_not_go_before_them(hall: Hall) -> None:
    world = hall.world
    first, second, third = (world.client() for _ in range(3))
    first.send(get(b"/1"))
    backend = await world.backend()
    second.send(get(b"/2"))
    backend.send(OK)  # there is room, and nobody had a turn yet
    third.send(get(b"/3"))
    await settle()
    assert paths(backend) == [b"/1", b"/2"]
    backend.send(OK)
    await settle()
    assert paths(backend) == [b"/1", b"/2", b"/3"]
    backend.send(OK)


async def test_every_backend_has_its_own_limit(hall: Hall) -> None:
    world = hall.world
    hall.serve(2, 1)
    for _ in range(5):
        world.client().send(GET)
    await settle()
    assert sorted(port for _, port in world.loop.addresses) == [9000, 9000, 9001]
    assert hall.queued == 2
    while hall.queued or any(pool.claims for pool in world.all_pools()):
        for connection in world.loop.connections:
            if connection.received:
                connection.received = b""
                connection.send(OK)
        await settle()
        assert sum(pool.claims for pool in world.all_pools()) <= 3


async def test_a_backend_without_a_limit_takes_what_the_others_cannot(hall: Hall) -> None:
    world = hall.world
    hall.serve(1, 0)
    for _ in range(6):
        world.client().send(GET)
    await settle()
    assert hall.queued == 0
    assert [port for _, port in world.loop.addresses].count(9000) == 1
    for connection in world.loop.connections:
        connection.send(OK)


async def test_a_thousand_who_wait_are_served_without_calling_each_other(hall: Hall) -> None:
    world = hall.world
    clients = [world.client() for _ in range(1000)]
    for client in clients:
        client.send(GET)
    backend = await world.backend()
    while hall.queued:
        backend.send(OK)
        await settle()
    backend.send(OK)
    await settle()
    assert all(statuses(client.received) == [200] for client in clients)


async def test_a_tunnel_holds_its_backend_as_long_as_it_lives(hall: Hall) -> None:
    world = hall.world
    tunnel, other = world.client(), world.client()
    tunnel.send(get(b"/", b"Connection: upgrade\r\nUpgrade: websocket\r\n"))
    backend = await world.backend()
    backend.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
    other.send(GET)
    await hall.pass_time(4)
    assert hall.queued == 1
    backend.vanish()
    (await world.backend()).send(OK)
    assert statuses(other.received) == [200]


# Bounds


async def test_without_a_queue_nobody_waits(hall: Hall, end: ClientEnd) -> None:
    hall.limits(queue_seconds=0)
    backend = await occupied(hall.world)
    end.begin()
    await settle()
    assert end.seen().status == 503
    assert (
        end.seen().fields[next(name for name in end.seen().fields if name.lower() == b"retry-after")] == b"2"
    )
    assert reasons(hall.world) == ["queue_full"]
    assert hall.refused == {"queue_full": 1}
    backend.send(OK)


async def test_each_waits_for_its_own_time_to_a_fraction_of_a_second(hall: Hall) -> None:
    world = hall.world
    backend = await occupied(world)
    first, second = world.client(), world.client()
    hall.limits(queue_seconds=1.5)
    first.send(GET)
    await hall.pass_time(0.7)
    second.send(GET)
    await hall.pass_time(0.79)
    assert (statuses(first.received), hall.queued) == ([], 2)
    await hall.pass_time(0.02)
    assert (statuses(first.received), hall.queued) == ([503], 1)
    await hall.pass_time(0.66)
    assert (statuses(second.received), hall.queued) == ([], 1)
    await hall.pass_time(0.04)
    assert statuses(second.received) == [503]
    assert reasons(world) == ["queue_timeout"] * 2
    assert b"\r\nRetry-After: 2\r\n" in second.received
    assert hall.refused == {"queue_timeout": 2}
    backend.send(OK)
    assert not first.closed
    first.send(GET)
    await settle()
    backend.send(OK)
    assert statuses(first.received) == [503, 200]


async def test_a_queue_is_full_by_number_and_each_service_has_its_own(hall: Hall) -> None:
    world = hall.world
    hall.limits(queue_length=2)
    hall.serve(1, name="other.example")
    backend = await occupied(world)
    clients = [world.client() for _ in range(3)]
    for client in clients:
        client.send(GET)
    assert [statuses(client.received) for client in clients] == [[], [], [503]]
    for _ in range(2):
        world.client().send(get(b"/", host=b"other.example"))
    other = await world.backend()
    assert world.counters.queued == {"app.example": 2, "other.example": 1}
    assert hall.refused == {"queue_full": 1}
    for _ in range(3):
        backend.send(OK)
        await settle()
    for _ in range(2):
        other.send(OK)
        await settle()


async def test_a_queue_is_full_by_bytes(hall: Hall) -> None:
    world = hall.world
    hall.limits(queue_bytes=1000)
    backend = await occupied(world)
    clients = [world.client() for _ in range(3)]
    for client in clients:
        client.send(get(b"/", b"X-Large: %b\r\n" % (b"x" * 450)))
    assert [statuses(client.received) for client in clients] == [[], [], [503]]
    for _ in range(3):
        backend.send(OK)
        await settle()


async def test_bodies_that_were_on_their_way_count_too(hall: Hall, end: ClientEnd) -> None:
    hall.limits(queue_bytes=1000)
    backend = await occupied(hall.world)
    end.begin(b"POST", body=True)
    end.exchanges[-1].request_body(b"x" * 500)
    assert end.seen().status == 0
    end.exchanges[-1].request_body(b"x" * 500)
    await settle()
    assert end.seen().status == 503
    assert hall.refused == {"queue_full": 1}
    assert hall.queued == 0
    backend.send(OK)


# Bodies


async def test_a_body_is_not_read_while_its_request_waits_and_goes_on_afterwards(
    hall: Hall, end: ClientEnd
) -> None:
    world = hall.world
    backend = await occupied(world)
    end.begin(b"POST", body=True)
    assert hall.queued == 1
    sent = 0
    while end.may_send():
        end.send_body(b"~" * 1000)
        sent += 1000
        assert sent < 1 << 20
    backend.send(OK)
    await settle()
    assert backend.received.count(b"~") == sent
    assert end.may_send()
    end.send_body(b"one")
    end.send_end()
    await settle()
    assert b"POST / HTTP/1.1" in backend.received
    assert b"3\r\none\r\n0\r\n\r\n" in backend.received
    backend.send(OK)
    await settle()
    assert end.seen().status == 200


async def test_what_has_come_of_a_body_reaches_the_backend(hall: Hall) -> None:
    world = hall.world
    backend = await occupied(world)
    client = world.client()
    client.send(post(b"hello"))
    assert hall.queued == 1
    backend.send(OK)
    await settle()
    assert backend.received.endswith(b"\r\n\r\nhello")
    backend.send(OK)
    assert statuses(client.received) == [200]


# Clients that leave


async def test_a_client_that_leaves_leaves_the_queue_at_once(hall: Hall, end: ClientEnd) -> None:
    world = hall.world
    backend = await occupied(world)
    end.begin()
    behind = world.client()
    behind.send(get(b"/behind"))
    assert hall.queued == 2
    if end.half_closes is None:
        end.send_nonsense()  # a reset
    else:
        end.transport.send_end()
    await settle()
    assert hall.queued == 1
    assert [(done.status, done.error.reason) for done in world.done if done.error] == [(499, "client_gone")]
    backend.send(OK)
    await settle()
    backend.send(OK)
    assert paths(backend) == [b"/busy", b"/behind"]
    assert statuses(behind.received) == [200]


async def test_a_client_whose_whole_body_has_come_is_heard_when_it_leaves(hall: Hall) -> None:
    backend = await occupied(hall.world)
    client = hall.world.client()
    client.send(post(b"hello"))
    assert client.reading
    client.send_end()
    await settle()
    assert (hall.queued, reasons(hall.world)) == (0, ["client_gone"])
    backend.send(OK)


async def test_a_client_that_asks_for_more_than_one_thing_waits_for_each(hall: Hall) -> None:
    backend = await occupied(hall.world)
    client = hall.world.client()
    client.send(get(b"/1") + get(b"/2"))
    for _ in range(3):
        backend.send(OK)
        await settle()
    assert paths(backend) == [b"/busy", b"/1", b"/2"]
    assert statuses(client.received) == [200, 200]


# Other tables


@pytest.mark.parametrize("limits", [(2,), (0,), (1, 1)])
async def test_a_table_that_brings_room_lets_them_go_on(hall: Hall, limits: tuple[int, ...]) -> None:
    world = hall.world
    backend = await occupied(world)
    client = world.client()
    client.send(GET)
    hall.serve(*limits)
    other = await world.backend()
    other.send(OK)
    assert statuses(client.received) == [200]
    backend.send(OK)


async def test_a_lowered_limit_is_kept_from_then_on(hall: Hall) -> None:
    world = hall.world
    hall.serve(3)
    for _ in range(4):
        world.client().send(GET)
    backends = [await world.backend() for _ in range(3)]
    hall.serve(1)
    for left, backend in zip((3, 2, 1), backends, strict=True):
        assert (hall.queued, sum(pool.claims for pool in world.all_pools())) == (1, left)
        backend.send(OK)
        await settle()
    assert hall.queued == 0
    next(each for each in backends if each.received.count(b"GET") == 2).send(OK)


async def test_who_waits_for_a_service_that_goes_gets_what_a_new_request_would(hall: Hall) -> None:
    world = hall.world
    backend = await occupied(world)
    clients = [world.client() for _ in range(3)]
    clients[0].send(GET)
    hall.serve()
    await settle()
    assert (statuses(clients[0].received), reasons(world)) == ([503], ["no_backend"])
    hall.serve(1)
    clients[1].send(GET)
    clients[2].send(GET)
    hall.apply({})
    await settle()
    assert [statuses(client.received) for client in clients] == [[503], [404], [404]]
    backend.send(OK)


async def test_who_waits_goes_to_a_service_that_takes_its_host_over(hall: Hall) -> None:
    world = hall.world
    hall.apply({})
    hall.serve(1, name="*.example")
    backend = await occupied(world)
    client, other = world.client(), world.client()
    client.send(GET)
    other.send(get(b"/", host=b"other.example"))
    hall.serve(0)
    (await world.backend()).send(OK)
    assert statuses(client.received) == [200]
    assert world.done[-1].service == "app.example"
    assert hall.queued == 1
    for _ in range(2):
        backend.send(OK)
        await settle()
    assert statuses(other.received) == [200]


async def test_who_waits_moves_to_the_queue_of_a_service_that_takes_its_host_over(hall: Hall) -> None:
    world = hall.world
    hall.apply({})
    hall.serve(1, name="*.example")
    backend = await occupied(world)
    client = world.client()
    client.send(GET)
    hall.serve(1, halt=Halt(30.0))
    await settle()
    assert world.counters.queued == {"app.example": 1}
    hall.halt(None)
    (await world.backend()).send(OK)
    assert statuses(client.received) == [200]
    backend.send(OK)


# Retries


async def test_a_retry_that_finds_no_room_waits_and_the_others_go_before_it_where_it_failed(
    hall: Hall,
) -> None:
    world = hall.world
    hall.serve(1, 1)
    world.loop.outcomes = [cast("Any", None), REFUSED]
    busy, failing, other = (world.client() for _ in range(3))
    busy.send(get(b"/busy"))
    first = await world.backend()
    failing.send(get(b"/failing"))
    await settle()
    assert (hall.queued, reasons(world)) == (1, [])
    other.send(get(b"/other"))
    second = await world.backend()
    assert [port for _, port in world.loop.addresses] == [9000, 9001, 9001]
    assert (paths(second), hall.queued) == ([b"/other"], 1)
    first.send(OK)
    await settle()
    assert paths(first) == [b"/busy", b"/failing"]
    first.send(OK)
    second.send(OK)
    assert [statuses(each.received) for each in (busy, failing, other)] == [[200]] * 3


async def test_time_in_the_queue_is_no_time_of_failing_connects(hall: Hall) -> None:
    world = hall.world
    hall.limits(queue_seconds=1000)
    hall.serve(1, 1, 1)
    world.loop.outcomes = [cast("Any", None), REFUSED, REFUSED]
    world.client().send(get(b"/busy"))
    busy = await world.backend()
    hall.serve(1, 1)
    client = world.client()
    client.send(GET)
    await settle()
    assert hall.queued == 1
    await hall.pass_time(CONNECT_PATIENCE * world.timeouts.connect + 1)
    world.loop.outcomes = [REFUSED]
    hall.serve(1, 0, 0)  # b1 has failed it; b2 refuses too, in no time
    await settle()
    assert statuses(client.received) == []
    busy.send(OK)
    await settle()
    busy.send(OK)
    assert statuses(client.received) == [200]


async def test_who_is_passed_over_keeps_its_place(hall: Hall) -> None:
    world = hall.world
    hall.serve(1, 1)
    world.loop.outcomes = [cast("Any", None), REFUSED]
    busy, failing, other, late = (world.client() for _ in range(4))
    busy.send(get(b"/busy"))
    first = await world.backend()
    failing.send(get(b"/failing"))
    await settle()
    other.send(get(b"/other"))
    second = await world.backend()
    late.send(get(b"/late"))
    await hall.pass_time(3)  # somebody looks for room, again and again
    first.send(OK)
    await settle()
    assert paths(first) == [b"/busy", b"/failing"]
    first.send(OK)
    await settle()
    first.send(OK)
    second.send(OK)
    assert [statuses(each.received) for each in (busy, failing, other, late)] == [[200]] * 4


async def test_without_a_queue_a_retry_that_finds_no_room_is_the_failure_that_it_was(hall: Hall) -> None:
    world = hall.world
    hall.limits(queue_seconds=0)
    hall.serve(1, 1)
    world.loop.outcomes = [cast("Any", None), REFUSED]
    world.client().send(GET)
    busy = await world.backend()
    client = world.client()
    client.send(GET)
    await settle()
    assert statuses(client.received) == [502]
    busy.send(OK)


# Paused


async def test_a_paused_service_holds_every_request_and_lets_them_go_on_when_it_is_resumed(
    hall: Hall, end: ClientEnd
) -> None:
    world = hall.world
    hall.limits(queue_seconds=0)
    hall.serve(0)
    backend = await occupied(world)
    hall.halt(Halt(30.0))
    end.begin()
    await hall.pass_time(29)
    assert end.seen().status == 0
    backend.send(OK)  # what was in flight is untouched
    await settle()
    assert (hall.queued, [done.status for done in world.done]) == (1, [200])
    hall.halt(None)
    await settle()
    assert hall.queued == 0
    backend.send(OK)
    await settle()
    assert end.seen().status == 200


async def test_a_pause_that_lasts_too_long_is_a_503_with_its_message(hall: Hall) -> None:
    hall.halt(Halt(2.5, "back at noon"))
    client = hall.world.client()
    client.send(GET)
    await hall.pass_time(2.4)
    assert statuses(client.received) == []
    await hall.pass_time(0.2)
    assert statuses(client.received) == [503]
    assert client.received.endswith(b"503 Service Unavailable: back at noon\n")
    assert b"\r\nRetry-After: 2\r\n" in client.received
    assert reasons(hall.world) == ["paused"]


async def test_a_pause_holds_those_too_who_waited_for_room(hall: Hall) -> None:
    world = hall.world
    backend = await occupied(world)
    client = world.client()
    client.send(GET)
    await hall.pass_time(4)
    hall.halt(Halt(30.0))
    backend.send(OK)
    await hall.pass_time(29)
    assert (statuses(client.received), paths(backend)) == ([], [b"/busy"])
    hall.halt(None)
    await settle()
    backend.send(OK)
    assert statuses(client.received) == [200]


async def test_who_was_held_keeps_the_pauses_patience_when_there_is_no_room_after_it(hall: Hall) -> None:
    world = hall.world
    hall.limits(queue_seconds=0)
    hall.halt(Halt(30.0))
    clients = [world.client() for _ in range(3)]
    for client in clients:
        client.send(GET)
    hall.halt(None)
    backend = await world.backend()
    assert hall.queued == 2
    late = world.client()
    late.send(GET)
    assert statuses(late.received) == [503]
    for _ in range(3):
        backend.send(OK)
        await settle()
    assert [statuses(client.received) for client in clients] == [[200]] * 3


async def test_a_thousand_who_are_held_go_on_in_order_a_burst_at_a_time(hall: Hall) -> None:
    world = hall.world
    hall.serve(0, halt=Halt(30.0))
    clients = [world.client() for _ in range(300)]
    for number, client in enumerate(clients):
        client.send(get(b"/%d" % number))
    hall.halt(None)
    await asyncio.sleep(0)
    assert hall.queued == 300 - 64
    while hall.queued:
        await settle()
    await settle()
    assert [paths(backend) for backend in world.loop.connections] == [[b"/%d" % n] for n in range(300)]
    for backend in world.loop.connections:
        backend.send(OK)


async def test_a_retry_does_not_reach_a_paused_service(hall: Hall) -> None:
    world = hall.world
    hall.serve(0, 0)
    gate = asyncio.Event()
    world.loop.outcomes = [gate]
    client = world.client()
    client.send(GET)
    await settle()
    hall.halt(Halt(30.0))
    world.loop.connections.clear()
    gate.set()
    backend = await world.backend()  # it was in flight already
    backend.vanish()
    await settle()
    assert (hall.queued, len(world.loop.addresses)) == (1, 1)
    hall.halt(None)
    await settle()
    world.loop.connections[-1].send(OK)
    assert statuses(client.received) == [200]


@pytest.mark.parametrize("name", ["*.example", "the.default"])
async def test_the_halt_of_a_wildcard_or_default_service_holds_what_is_routed_to_it(
    hall: Hall, name: str
) -> None:
    world = hall.world
    lease = Lease(name, "b", Backend("127.0.0.1", 9000), float("inf"), None)
    hall.apply({name: Service(name, (lease,), Halt(30.0))}, "the.default")
    client = world.client()
    client.send(GET)
    assert world.counters.queued == {name: 1}
    hall.halt(None, name)
    (await world.backend()).send(OK)
    assert statuses(client.received) == [200]


# Stopped


@pytest.mark.parametrize(
    ("accept", "kind", "text"),
    [
        (b"", b"text/plain; charset=utf-8", b"503 Service Unavailable: <back> & forth\n"),
        (b"Accept: text/html,*/*;q=0.8\r\n", b"text/html; charset=utf-8", b"<p>&lt;back&gt; &amp; forth</p>"),
        (b"Accept: application/json\r\n", b"application/problem+json", b'"detail":"<back> & forth"'),
        (
            b"Accept: text/html;q=0.5, application/json\r\n",
            b"application/problem+json",
            b'"reason":"stopped"',
        ),
    ],
)
async def test_a_stopped_service_answers_with_its_message_in_the_kind_that_the_client_likes(
    hall: Hall, accept: bytes, kind: bytes, text: bytes
) -> None:
    hall.halt(Halt(None, "<back> & forth"))
    client = hall.world.client()
    client.send(get(b"/", accept))
    assert statuses(client.received) == [503]
    head, _, body = client.received.partition(b"\r\n\r\n")
    assert b"\r\nContent-Type: %b\r\n" % kind in head
    assert head.endswith(b"\r\nRetry-After: 2")
    assert text in body
    assert reasons(hall.world) == ["stopped"]
    assert (hall.queued, hall.refused) == (0, {})
    if kind == b"application/problem+json":
        assert orjson.loads(body)["status"] == 503


async def test_a_stop_without_a_message_says_what_there_is_to_say(hall: Hall) -> None:
    hall.halt(Halt(None))
    client = hall.world.client()
    client.send(GET)
    assert client.received.endswith(b"503 Service Unavailable: the service is stopped\n")


async def test_a_stop_answers_those_who_wait_and_leaves_what_is_in_flight_alone(hall: Hall) -> None:
    world = hall.world
    busy = world.client()
    busy.send(GET)
    backend = await world.backend()
    client = world.client()
    client.send(GET)
    hall.halt(Halt(None, "gone fishing"))
    await settle()
    assert statuses(client.received) == [503]
    backend.send(OK)
    assert statuses(busy.received) == [200]


# The end


async def test_at_the_end_of_a_drain_who_still_waits_gets_an_answer(hall: Hall) -> None:
    world = hall.world
    backend = await occupied(world)
    client = world.client()
    client.send(GET)
    world.queues.end()
    assert (statuses(client.received), reasons(world)) == ([503], ["going_down"])
    late = world.client()
    late.send(GET)
    assert statuses(late.received) == [503]
    assert hall.refused == {"going_down": 2}
    backend.send(OK)


# What nobody tells


async def test_who_waits_is_tried_now_and_then_though_nobody_told(hall: Hall) -> None:
    world = hall.world
    backend = await occupied(world)
    client = world.client()
    client.send(GET)
    services = dict(world.table.services)
    services["app.example"] = replace(
        services["app.example"], leases=(replace(services["app.example"].leases[0], max_in_flight=2),)
    )
    world.table = RoutingTable(99, services)  # as if room had come by itself
    await hall.pass_time(0.4)
    assert hall.queued == 1
    await hall.pass_time(0.2)
    assert hall.queued == 0
    (await world.backend()).send(OK)
    assert statuses(client.received) == [200]
    backend.send(OK)
    await settle()
    await hall.pass_time(1)
    assert [timer for timer in hall.timers if timer.call is not None] == []


async def test_an_exchange_that_breaks_at_its_turn_ends_and_the_next_one_goes(
    hall: Hall, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = hall.world
    backend = await occupied(world)
    first, second = world.client(), world.client()
    first.send(get(b"/1"))
    second.send(get(b"/2"))
    pick = world.balancers.pick

    def broken(*arguments: Any) -> Lease | None:
        monkeypatch.setattr(type(world.balancers), "pick", lambda _, *rest: pick(*rest))
        raise ZeroDivisionError

    monkeypatch.setattr(type(world.balancers), "pick", lambda _, *rest: broken(*rest))
    backend.send(OK)
    await settle()
    assert statuses(first.received) == [500]
    assert "a fault of portero's own" in caplog.text
    backend.send(OK)
    assert statuses(second.received) == [200]


# Limits that are shared with other workers


@pytest.fixture
async def shared(hall: Hall) -> AsyncIterator[tuple[Hall, Holder]]:
    """A worker and another one, a process of its own, that share the limits."""
    file = os.memfd_create("limits")
    rooms = Rooms(file, 0, 2)
    hall.world.pools._rooms = cast("Any", hall.world.queues)._rooms = rooms
    other = Holder(file, 1, 2)
    yield hall, other
    await settle()
    other.kill()
    left = rooms.take(lease(1))
    os.close(file)
    assert left != NONE, "a slot was not given back"


async def test_a_slot_that_another_worker_gives_back_is_found_soon(shared: tuple[Hall, Holder]) -> None:
    hall, other = shared
    world = hall.world
    assert other.take(1)
    client = world.client()
    client.send(GET)
    await hall.pass_time(0.1)
    assert hall.queued == 1
    other.give_back(1)
    await hall.pass_time(SHARED_LOOK[1])
    assert not other.take(1)
    (await world.backend()).send(OK)
    await settle()
    assert statuses(client.received) == [200]
    assert other.take(1)
    other.give_back(1)


async def test_others_know_while_somebody_waits(shared: tuple[Hall, Holder]) -> None:
    hall, other = shared
    rooms = cast("Any", hall.world.queues)._rooms
    assert other.take(1)
    client = hall.world.client()
    client.send(GET)
    assert list(rooms._waiting) == ["app.example"]
    client.vanish()
    assert list(rooms._waiting) == []
    other.give_back(1)


async def test_who_finds_that_another_worker_was_faster_tries_the_next_backend(
    shared: tuple[Hall, Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    hall, other = shared
    world = hall.world
    hall.serve(1, 1)
    has_room = Rooms.has_room

    def slow(rooms: Rooms, asked: Lease) -> bool:
        found = has_room(rooms, asked)
        if found and asked.backend.port == 9000 and not other.slots:
            assert other.take(1)
        return found

    monkeypatch.setattr(Rooms, "has_room", slow)
    client = world.client()
    client.send(GET)
    (await world.backend()).send(OK)
    await settle()
    assert statuses(client.received) == [200]
    assert [port for _, port in world.loop.addresses] == [9001]
    other.give_back(1)


async def test_a_slot_is_given_back_though_the_exchange_breaks_before_it_has_its_claim(
    shared: tuple[Hall, Holder], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hall, other = shared

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(type(hall.world.pools), "of", broken)
    assert other.take(1)
    client = hall.world.client()
    client.send(GET)
    other.give_back(1)
    await hall.pass_time(1)
    assert statuses(client.received) == [500]
    assert "a fault of portero's own" in caplog.text
    monkeypatch.undo()
