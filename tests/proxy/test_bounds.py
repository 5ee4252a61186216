"""What the policy of a service bounds: times, bodies, retries, the queue."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest

from portero_py.config.model import Config, Limits, Log, Timeouts
from portero_py.core.model import Backend, Lease, LeaseState, Service
from portero_py.core.policies import ServiceHealth, ServicePolicy, ServiceTimeouts
from portero_py.core.routing_table import RoutingTable
from portero_py.proxy.exchange import CONNECT_PATIENCE, Exchange
from tests.proxy.client_ends import CLIENT_ENDS, ClientEnd, Http1Client
from tests.proxy.dialogue import GET, OK, World, post, settle, statuses

if TYPE_CHECKING:
    from portero_py.proxy.endpoints import Downstream
    from portero_py.proxy.peer import Peer
    from portero_py.proxy.surroundings import Surroundings
    from portero_py.wire.message import RequestHead

QUICK = ServicePolicy(timeouts=ServiceTimeouts(connect=1, upstream_head=5, upstream_idle=5, body_idle=5))
REFUSED = ConnectionRefusedError(111, "Connection refused")


def serve(world: World, policy: ServicePolicy | None, *, backends: int = 1, limit: int = 0) -> None:
    """From now on app.example is served by this policy."""
    leases = tuple(
        Lease(
            "app.example",
            f"b{n}",
            Backend("127.0.0.1", 9000 + n),
            world.clock() + 1e6,
            60,
            max_in_flight=limit,
            state=LeaseState.READY,
        )
        for n in range(backends)
    )
    service = Service("app.example", leases, policy=policy)
    world.apply(RoutingTable(world.table.version + 1, {"app.example": service}, since=-1))


class _Real(ClientEnd):
    """A client end in front of a real exchange."""

    def _new_exchange(
        self, surroundings: Surroundings, peer: Peer, downstream: Downstream, head: RequestHead, /
    ) -> Any:
        made = Exchange(surroundings, peer, downstream, head)
        self.exchanges.append(cast("Any", made))
        return made


@pytest.fixture(params=CLIENT_ENDS)
async def end(request: pytest.FixtureRequest, world: World, monkeypatch: pytest.MonkeyPatch) -> ClientEnd:
    made = type("Real", (_Real, CLIENT_ENDS[request.param]), {})(world, monkeypatch)
    assert isinstance(made, ClientEnd)
    return made


# Time-outs


async def test_a_backend_has_as_long_for_its_answer_as_its_service_says(world: World) -> None:
    serve(world, QUICK)
    client = world.client()
    client.send(GET)
    await world.backend()
    await world.pass_time(4)
    assert statuses(client.received) == []
    await world.pass_time(3)
    assert statuses(client.received) == [504]


async def test_a_service_of_which_nothing_was_said_has_the_general_times(world: World) -> None:
    serve(world, ServicePolicy(retries=1))
    client = world.client()
    client.send(GET)
    await world.backend()
    await world.pass_time(world.timeouts.upstream_head - 2)
    assert statuses(client.received) == []
    await world.pass_time(10)
    assert statuses(client.received) == [504]


async def test_times_that_change_hold_for_connections_that_live(world: World) -> None:
    backend = await world.idle_backend()
    for policy, seconds in ((QUICK, 7), (replace(QUICK, timeouts=ServiceTimeouts(upstream_head=12)), 14)):
        serve(world, policy)
        client = world.client()
        client.send(GET)
        await settle()
        assert backend.received
        await world.pass_time(seconds - 3)
        assert statuses(client.received) == []
        await world.pass_time(10)
        assert statuses(client.received) == [504]
        backend = await world.idle_backend()
    serve(world, None)
    client = world.client()
    client.send(GET)
    await settle()
    await world.pass_time(world.timeouts.upstream_head - 3)
    assert statuses(client.received) == []
    client.vanish()


async def test_the_configuration_that_changes_reaches_what_a_policy_leaves_open(world: World) -> None:
    serve(world, ServicePolicy(timeouts=ServiceTimeouts(upstream_idle=2)))
    backend = await world.idle_backend()
    world.configure(Config(timeouts=Timeouts(upstream_head=4), log=Log(access="off")))
    client = world.client()
    client.send(GET)
    await settle()
    assert backend.received
    await world.pass_time(12)
    assert statuses(client.received) == [504]


async def test_a_body_that_stands_still_has_the_time_that_its_service_says(world: World) -> None:
    serve(world, QUICK)
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
    await world.pass_time(12)
    assert client.closed
    assert world.done[0].error is not None
    assert world.done[0].error.reason == "upstream_timeout"


async def test_a_first_look_comes_when_a_probe_of_that_service_would_have_ended(world: World) -> None:
    serve(world, ServicePolicy(health=ServiceHealth(timeout=8)))
    client = world.client()
    client.send(GET)
    await world.backend()
    await world.pass_time(7)
    assert not world.marks
    await world.pass_time(8)
    assert world.marks
    client.vanish()


async def test_a_connect_has_the_time_that_its_service_says(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(world, QUICK, backends=CONNECT_PATIENCE + 2)
    limits: list[float | None] = []

    def timeout(seconds: float | None) -> asyncio.Timeout:
        limits.append(seconds)
        world.clock.now += 1.0
        return asyncio.timeouts.timeout(None)

    monkeypatch.setattr("portero_py.proxy.upstream.connector.asyncio.timeout", timeout)
    world.loop.outcomes = [REFUSED] * 20
    client = world.client()
    client.send(GET)
    await settle()
    assert limits == [1] * CONNECT_PATIENCE
    assert statuses(client.received) == [502]


async def test_a_client_that_stops_in_its_body_has_the_time_that_the_service_says(end: ClientEnd) -> None:
    world = end.world
    serve(world, QUICK)
    exchange = cast("Exchange", end.begin(b"POST", body=True))
    await world.backend()
    end.send_body(b"half")
    await settle()
    await world.pass_time(25)
    assert (exchange.status, world.done) == (408, [exchange])


# Bodies


async def test_a_body_over_the_limit_of_its_service_is_refused_before_any_backend_hears_of_it(
    end: ClientEnd,
) -> None:
    world = end.world
    serve(world, ServicePolicy(body_bytes=10))
    if isinstance(end, Http1Client):
        end.transport.send(post(b"x" * 11))
    else:
        end.begin(b"POST", ((b"content-length", b"11"),), body=True)
    await settle()
    assert [each.error.reason for each in world.done if each.error is not None] == ["body_too_large"]
    assert [each.status for each in world.done] == [413]
    assert world.loop.addresses == []


async def test_a_body_without_a_length_is_counted(end: ClientEnd) -> None:
    world = end.world
    serve(world, ServicePolicy(body_bytes=10))
    end.begin(b"POST", body=True)
    backend = await world.backend()
    end.send_body(b"x" * 10)
    await settle()
    assert end.seen().status == 0
    end.send_body(b"x")
    await settle()
    assert end.seen().status == 413
    assert backend.aborted


async def test_who_waits_for_a_100_hears_that_his_body_is_too_large(world: World) -> None:
    serve(world, ServicePolicy(body_bytes=10))
    client = world.client()
    client.send(post(b"", b"Expect: 100-continue\r\n").replace(b"Length: 0", b"Length: 11"))
    await settle()
    assert statuses(client.received) == [413]
    assert world.loop.addresses == []


async def test_a_service_may_allow_more_than_the_others(world: World) -> None:
    world.configure(Config(limits=Limits(body_bytes=5), log=Log(access="off")))
    serve(world, ServicePolicy(body_bytes=10))
    client = world.client()
    client.send(post(b"x" * 10))
    backend = await world.backend()
    backend.send(OK)
    assert statuses(client.received) == [200]
    serve(world, ServicePolicy(body_bytes=0))
    client.send(post(b"x" * 100))
    await settle()
    backend.send(OK)
    assert statuses(client.received) == [200, 200]
    serve(world, None)
    client.send(post(b"x" * 6))
    assert statuses(client.received) == [200, 200, 413]


# Retries


async def test_a_request_is_sent_again_as_often_as_its_service_says(world: World) -> None:
    for retries in (0, 1, 2):
        serve(world, ServicePolicy(retries=retries), backends=5)
        client = world.client()
        client.send(GET)
        for _ in range(retries + 1):
            backend = await world.backend()
            assert statuses(client.received) == []
            backend.vanish()
        await settle()
        assert statuses(client.received) == [502]
        assert world.done[-1].retries == retries


async def test_without_retries_another_backend_is_tried_where_nothing_was_sent(world: World) -> None:
    serve(world, ServicePolicy(retries=0), backends=3)
    world.loop.outcomes = [REFUSED, REFUSED]
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    backend.send(OK)
    assert statuses(client.received) == [200]


async def test_without_retries_no_connection_is_used_that_may_be_stale(world: World) -> None:
    serve(world, ServicePolicy(retries=0))
    idle = await world.idle_backend()
    world.clock.now += 1.5
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    assert idle.received == b""
    backend.send(OK)
    assert statuses(client.received) == [200]


# The queue


async def test_who_finds_no_room_waits_as_long_as_the_service_says(world: World) -> None:
    busy, policy = world.client(), ServicePolicy(queue_seconds=60, queue_length=1)
    serve(world, policy, limit=1)
    busy.send(GET)
    backend = await world.backend()
    first, second = world.client(), world.client()
    for client in (first, second):
        client.send(GET)
        await settle()
    assert statuses(second.received) == [503]
    assert world.done[-1].error is not None
    assert world.done[-1].error.reason == "queue_full"
    serve(world, replace(policy, queue_length=2), limit=1)
    third = world.client()
    third.send(GET)
    await settle()
    assert statuses(third.received) == []
    serve(world, replace(policy, queue_seconds=0), limit=1)
    fourth = world.client()
    fourth.send(GET)
    await settle()
    assert statuses(fourth.received) == [503]
    for _ in range(3):
        backend.send(OK)
        await settle()
    assert [statuses(each.received) for each in (busy, first, third)] == [[200], [200], [200]]


async def test_a_general_queue_is_not_that_of_a_service_that_wants_none(world: World) -> None:
    world.configure(Config(limits=Limits(queue_seconds=5), log=Log(access="off")))
    serve(world, ServicePolicy(queue_seconds=0), limit=1)
    busy, client = world.client(), world.client()
    busy.send(GET)
    backend = await world.backend()
    client.send(GET)
    await settle()
    assert statuses(client.received) == [503]
    backend.send(OK)


async def test_a_limit_that_is_raised_lets_who_waits_go_on(world: World) -> None:
    policy = ServicePolicy(queue_seconds=60)
    serve(world, policy, limit=1)
    busy, client = world.client(), world.client()
    busy.send(GET)
    first = await world.backend()
    client.send(GET)
    await settle()
    assert len(world.queues) == 1
    serve(world, policy, limit=2)
    world.queues.follow(world.table)
    second = await world.backend()
    for backend in (first, second):
        backend.send(OK)
    assert [statuses(each.received) for each in (busy, client)] == [[200], [200]]


@pytest.mark.parametrize(("retries", "moved"), [(0, False), (1, True)])
async def test_without_retries_nobody_is_moved_whose_request_was_sent(
    world: World, retries: int, *, moved: bool
) -> None:
    serve(world, ServicePolicy(retries=retries), backends=2)
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    exchange = cast("Any", backend.protocol)._exchange
    lease = exchange.lease
    down = replace(lease, state=LeaseState.DOWN)
    exchange.backends_fell({(lease.service, lease.instance_id): down})
    await settle()
    assert len(world.loop.connections) == (2 if moved else 1)
    world.loop.connections[-1].send(OK)
    assert statuses(client.received) == [200]


async def test_rules_of_services_that_are_gone_are_forgotten_by_what_has_changed(world: World) -> None:
    def services(*names: str, policy: ServicePolicy | None = QUICK) -> dict[str, Service]:
        return {name: Service(name, (), policy=policy) for name in names}

    def known() -> tuple[set[str], set[str]]:
        return set(world.rules._rules), set(world.patience._own)

    def follow(table: RoutingTable) -> None:
        world.rules.retain(table)
        world.patience.retain(table)

    for service in services(*"abcd").values():
        world.rules.of(service)
    assert known() == (set("abcd"), set("abcd"))
    follow(RoutingTable(7, services(*"abc")))  # nobody knows since when
    assert known() == (set("abc"), set("abc"))
    follow(RoutingTable(8, services(*"bc"), since=7, changed=frozenset("ax")))
    assert known() == (set("bc"), set("bc"))
    # One table was left out: all of them are looked at.
    follow(RoutingTable(10, services("c"), since=9, changed=frozenset("x")))
    assert known() == ({"c"}, {"c"})
    follow(RoutingTable(11, services("c", policy=None), since=10, changed=frozenset("c")))
    assert known() == (set(), set())
