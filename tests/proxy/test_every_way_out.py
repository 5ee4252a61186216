"""Random orders of events, seeded: whatever comes in whatever order, everything is given back, once.

A few clients of every kind and backends that are told what to do by chance: they answer, hang, refuse, reset,
talk nonsense; clients leave, half-close, read nothing; the table, limits, halts and health change meanwhile,
time passes, and at last the worker drains. Then nobody is in flight, nothing is claimed, held, queued, tried
or waited for, and every request has exactly one answer or one end.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from typing import Any, cast

import pytest

from portero_py.core.health import Condition
from portero_py.core.model import Backend, Halt, Lease, LeaseState, Service
from portero_py.proxy.downstream.http2 import Http2Downstream
from portero_py.proxy.exchange import Phase
from portero_py.proxy.upstream.rooms import NONE, Rooms
from portero_py.wire.http2.frames import GOAWAY
from tests.e2e.messages import Closed, Reader, Truncated, read_response
from tests.proxy.client_ends import CLIENT_ENDS, ClientEnd, Http1Client
from tests.proxy.dialogue import OK, ScriptedTransport, World, settle
from tests.proxy.test_queue import REFUSED, Hall, _Real
from tests.wire.http2.dialogue import split_frames

BACKENDS = 3
STEPS = 150
#: More of them are a matter of minutes.
FIRST_SEED = int(os.environ.get("PORTERO_FIRST_SEED", "0"))
SEEDS = int(os.environ.get("PORTERO_SEEDS", "6"))
MOST_CLIENTS = 16
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n\x81\x02hi"
SAYINGS = (
    OK,
    OK,
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-",
    b"HTTP/1.1 200 OK\r\nContent-Length: 70000\r\n\r\n" + bytes(70000),
    b"HTTP/1.1 200 OK\r\n\r\nuntil the end",
    b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
    CHUNKED,
    CHUNKED + b"0\r\n\r\n",
    SWITCH,
    b"nonsense\r\n\r\n",
)


class Client:
    """One request at a time over one connection."""

    def __init__(self, end: ClientEnd) -> None:
        self.end = end
        self.asked = 0
        self.has_body = False
        self.gone = False  # it left

    @property
    def waits(self) -> bool:
        """Whether it still waits for an answer."""
        if not self.asked:
            return False
        seen = self.end.seen()
        return not (seen.complete or seen.broken or self.gone or self.was_told_to_go)

    @property
    def was_told_to_go(self) -> bool:
        """Whether it sent its latest request behind the GOAWAY that named the last one."""
        if isinstance(self.end, Http1Client):
            return False
        lasts = [
            int.from_bytes(each.payload[:4], "big")
            for each in split_frames(self.end.transport.received)
            if each.kind == GOAWAY
        ]
        return bool(lasts) and lasts[-1] < cast("Any", self.end)._stream

    @property
    def can_ask(self) -> bool:
        return not (self.gone or self.waits or self.end.transport.closed or not self.end.transport.reading)


def answers(received: bytes) -> int:
    """How many whole final responses these bytes are."""
    came = [received]
    reader = Reader(lambda: came.pop() if came else b"")
    found = 0
    while True:
        try:
            read_response(reader, b"GET")
        except (Closed, Truncated):
            return found
        found += 1


class Chaos:
    def __init__(self, hall: Hall, seed: int, rooms: Rooms | None, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hall = hall
        self.world = hall.world
        self.chance = Random(seed)
        self.rooms = rooms
        self.clients: list[Client] = []
        self.ever: list[Client] = []
        self.held: list[asyncio.Event] = []  # connects that hang
        self._monkeypatch = monkeypatch
        self.asked = 0

    async def step(self) -> None:
        happens: list[tuple[int, Callable[[], Any]]] = [
            (40, self.ask),
            (4, self.more_body),
            (4, self.end_body),
            (3, self.client_leaves),
            (8, self.client_of_a_trial_leaves),
            (2, self.client_half_closes),
            (2, self.client_reads_nothing),
            (3, self.client_reads),
            (1, self.client_nonsense),
            (40, self.backend_says),
            (6, self.backend_breaks),
            (2, self.backend_ends),
            (6, self.connects),
            (5, self.connect_comes),
            (3, self.table),
            (2, self.halt),
            (2, self.config),
        ]
        call = self.chance.choices([each for _, each in happens], [weight for weight, _ in happens])[0]
        call()
        if self.chance.random() < 0.6:
            await settle()
        if self.chance.random() < 0.15:
            await self.time(self.chance.choice([0.01, 0.6, 1, 1, 3, 3, 30]))

    # Clients

    def ask(self) -> None:
        self.clients = [each for each in self.clients if each.waits or each.can_ask]
        able = [each for each in self.clients if each.can_ask]
        if len(self.clients) < MOST_CLIENTS and (not able or self.chance.random() < 0.5):
            client = self.new_client()
        elif able:
            client = self.chance.choice(able)
        else:
            return
        self.asked += 1
        client.asked += 1
        method = self.chance.choice([b"GET", b"GET", b"PUT", b"POST"])
        client.has_body = method in (b"PUT", b"POST")
        upgrade = ((b"connection", b"upgrade"), (b"upgrade", b"websocket"))
        fields = upgrade if isinstance(client.end, Http1Client) and self.chance.random() < 0.1 else ()
        client.end.begin(method, () if client.has_body else fields, body=client.has_body)

    def new_client(self) -> Client:
        kind = CLIENT_ENDS[self.chance.choice(list(CLIENT_ENDS))]
        made = type("Real", (_Real, kind), {})(self.world, self._monkeypatch)
        if not issubclass(kind, Http1Client):
            assert isinstance(made.transport.protocol, Http2Downstream)
        client = Client(made)
        self.clients.append(client)
        self.ever.append(client)
        return client

    def some(self, wanted: Callable[[Client], bool]) -> Client | None:
        found = [
            each
            for each in self.clients
            if not each.gone and not each.end.transport.closed and each.end.transport.reading and wanted(each)
        ]
        return self.chance.choice(found) if found else None

    def more_body(self) -> None:
        client = self.some(lambda each: each.waits and each.has_body)
        if client is not None:
            client.end.send_body(bytes(self.chance.choice([1, 1000, 9000])))

    def end_body(self) -> None:
        client = self.some(lambda each: each.waits and each.has_body)
        if client is not None:
            client.has_body = False
            client.end.send_end()

    def client_nonsense(self) -> None:
        client = self.some(lambda each: each.waits and each.has_body)
        if client is not None:
            client.has_body = False
            client.end.send_nonsense()
            client.gone = True

    def client_leaves(self) -> None:
        present = [each for each in self.clients if not each.gone and not each.end.transport.lost]
        if present:
            client = self.chance.choice(present)
            client.gone = True
            client.end.transport.vanish(None if self.chance.random() < 0.5 else ConnectionResetError())

    def client_of_a_trial_leaves(self) -> None:
        for client in self.clients:
            if not client.gone and any(cast("Any", each)._trial for each in client.end.exchanges):
                client.gone = True
                client.end.transport.vanish()
                return

    def client_half_closes(self) -> None:
        client = self.some(lambda each: not each.has_body)
        if client is not None:
            client.gone = True
            client.end.transport.send_end()

    def client_reads_nothing(self) -> None:
        if client := self.some(lambda _: True):
            client.end.transport.stop_reading()

    def client_reads(self) -> None:
        for each in self.clients:
            if not each.gone and not each.end.transport.lost and not each.end.transport.peer_reads:
                if each.end.transport.closed or not each.end.transport.reading:
                    each.end.transport.read_all()
                else:
                    each.end.read_all()
                return

    # Backends

    @property
    def backends(self) -> list[ScriptedTransport]:
        return [each for each in self.world.loop.connections if not each.lost and not each.closed]

    def backend_says(self) -> None:
        found = [each for each in self.backends if each.reading and each.received]
        if found:
            backend = self.chance.choice(found)
            if self.chance.random() < 0.5:
                backend.received = b""
            backend.send(OK if self.chance.random() < 0.5 else self.chance.choice(SAYINGS))

    def backend_breaks(self) -> None:
        if self.backends:
            backend = self.chance.choice(self.backends)
            if self.chance.random() < 0.3:
                backend.break_off()
                asyncio.get_running_loop().call_soon(backend.vanish, ConnectionResetError())
            else:
                backend.vanish(ConnectionResetError() if self.chance.random() < 0.5 else None)

    def backend_ends(self) -> None:
        found = [each for each in self.backends if each.reading]
        if found:
            self.chance.choice(found).send_end()

    def connects(self) -> None:
        loop = self.world.loop
        chance = self.chance.random()
        if chance < 0.3:
            loop.outcomes.append(REFUSED)
        elif chance < 0.5:
            loop.outcomes.append(asyncio.Event())
            self.held.append(loop.outcomes[-1])
        elif chance < 0.7:
            loop.outcomes.append(TimeoutError())
        elif chance < 0.9:
            loop.broken[9000 + self.chance.randrange(BACKENDS)] = REFUSED
        else:
            loop.broken.clear()

    def connect_comes(self) -> None:
        if self.held:
            self.held.pop(self.chance.randrange(len(self.held))).set()

    # What control says

    def table(self) -> None:
        states = [LeaseState.READY] * 6 + [LeaseState.STARTING, LeaseState.DOWN, LeaseState.DRAINING]
        now = self.world.clock.now
        leases = tuple(
            Lease(
                "",
                f"b{number}",
                Backend("127.0.0.1", 9000 + number),
                float("inf") if self.chance.random() < 0.9 else now + 5,
                None,
                state=self.chance.choice(states),
                since=self.chance.choice([0.0, 0.0, 0.0, now]),
                max_in_flight=self.chance.choice([0, 0, 1, 1, 2, 5]),
                weight=self.chance.choice([1, 1, 3]),
            )
            for number in self.chance.sample(range(BACKENDS), self.chance.randrange(BACKENDS + 1))
        )
        halt = self.chance.choice([None, None, None, Halt(2.0), Halt(None, "closed")])
        services = {}
        for name in ("app.example", "*.example", "other.test"):
            if self.chance.random() < (0.9 if name == "app.example" else 0.5):
                services[name] = Service(name, tuple(replace(each, service=name) for each in leases), halt)
        self.hall.apply(services, "other.test" if "other.test" in services else "")
        self.world.balancers.retain(self.world.table)
        if self.chance.random() < 0.5:
            self.world.counters.keep_only(self.world.table.services)
            self.world.outcomes.retain(self.world.table, now)

    def halt(self) -> None:
        if "app.example" in self.world.table.services:
            self.hall.halt(self.chance.choice([None, None, Halt(2.0), Halt(None, "closed")]))

    def config(self) -> None:
        limits = replace(
            self.world.limits,
            queue_seconds=self.chance.choice([0, 1, 5]),
            queue_length=self.chance.choice([1, 3, 1000]),
            queue_bytes=self.chance.choice([2000, 1 << 20]),
            buffered_bytes=self.chance.choice([0, 0, 40_000]),
        )
        self.world.limits = self.world.queues.limits = limits
        self.world.budget.most = limits.buffered_bytes
        self.world.health.configure(self.chance.choice([1, 1, 3]), 1.0, self.chance.choice([(), (503,)]))

    # Time, and the end

    async def time(self, seconds: float) -> None:
        for _ in range(max(int(seconds), 1)):
            await self.hall.pass_time(min(seconds, 1))
            self.world.deadlines.advance(self.world.clock.now)
            await settle()

    async def end(self) -> None:
        """The worker drains; who hangs, hangs until its time is up, or vanishes."""
        self.world.draining = True
        for connection in list(self.world.connections._live):
            connection.start_drain()
            connection.end_tunnel()
        await settle()
        if self.chance.random() < 0.5:
            await self.time(3)
        self.world.queues.end()
        await settle()
        for event in self.held:
            event.set()
        await settle()
        if self.chance.random() < 0.5:
            for backend in self.backends:
                backend.vanish()
        for _ in range(3):
            await self.time(70)
        for client in self.clients:
            if client.end.transport.closed and not client.end.transport.lost:
                client.end.transport.vanish()
        tunnels = [each for each in self.backends if each.received]
        for backend in tunnels:
            backend.vanish()
        await settle()

    def look(self) -> None:
        """What is held is held by an exchange that lives."""
        world = self.world
        alive = [cast("Any", each) for client in self.ever for each in client.end.exchanges]
        alive = [each for each in alive if each._phase is not Phase.DONE]
        assert world.counters.exchanges_in_flight == len(alive)
        assert len(world.queues) == sum([each.is_queued for each in alive])
        assert sum([pool.claims for pool in world.all_pools()]) == sum(
            [each._claim is not None for each in alive]
        )
        tried = [each._trial for each in alive]
        for marks in world.health.marks.values():
            for mark in marks.values():
                assert mark.condition is not Condition.TRIED or mark in tried
        if self.rooms is not None:
            held = sum([len(room.held) for room in self.rooms._rooms.values()])
            assert held == sum([each._slot != NONE for each in alive])
            assert set(self.rooms._waiting) == set(cast("Any", world.queues)._lines)

    def check(self) -> None:
        world = self.world
        world.check_released()
        assert cast("Any", world.queues)._lines == {}
        assert [
            mark
            for each in world.health.marks.values()
            for mark in each.values()
            if mark.condition is Condition.TRIED
        ] == []
        if self.rooms is not None:
            assert [room.held for room in self.rooms._rooms.values() if room.held] == []
            assert self.rooms._waiting == {}
        assert world.counters.exchanges_in_flight == 0
        assert len(world.done) == sum([len(each.end.exchanges) for each in self.ever]) <= self.asked
        for client in self.ever:
            assert not client.waits, (client.end, client.end.seen())
            if isinstance(client.end, Http1Client):
                assert answers(client.end.transport.received) <= client.asked
        for exchange in world.done:
            assert cast("Any", exchange)._claim is None
            assert cast("Any", exchange)._trial is None
            assert cast("Any", exchange)._upstream is None or exchange.error is not None
            assert cast("Any", exchange)._connecting is None
            assert cast("Any", exchange)._slot == NONE


@pytest.fixture(params=[False, True], ids=["alone", "shared"])
def rooms(request: pytest.FixtureRequest) -> Iterator[Rooms | None]:
    if not request.param:
        yield None
        return
    file = os.memfd_create("limits")
    yield Rooms(file, 0, 2)
    os.close(file)


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + SEEDS))
async def test_whatever_happens_everything_is_given_back_once(
    world: World,
    seed: int,
    rooms: Rooms | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hall = Hall(world)
    if rooms is not None:
        world.pools._rooms = cast("Any", world.queues)._rooms = rooms
    faults: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    chaos = Chaos(hall, seed, rooms, monkeypatch)
    hall.limits(queue_seconds=5)
    hall.serve(1, 1)
    world.health.configure(1, 1.0, ())
    for _ in range(STEPS):
        await chaos.step()
        chaos.look()
    await chaos.end()
    chaos.check()
    assert faults == []
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []
