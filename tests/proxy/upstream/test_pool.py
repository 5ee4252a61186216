"""Idle connections: who may use one, and when it goes."""

from __future__ import annotations

import asyncio
import errno
import ssl
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, cast

import pytest

from portero_py.core.model import Backend, Lease, Service
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import UpstreamTlsFailed
from portero_py.proxy.upstream import pool
from portero_py.proxy.upstream.pool import FRESH_SECONDS, IDLE_SECONDS
from tests.proxy.dialogue import GET, OK, ScriptedTransport, World, leased, post, settle, statuses

if TYPE_CHECKING:
    from portero_py.proxy.endpoints import ResponseSide
    from portero_py.proxy.upstream.tls import UpstreamTls


async def test_the_last_connection_that_was_used_is_the_next(world: World) -> None:
    clients = [world.client() for _ in range(3)]
    backends = []
    for client in clients:
        client.send(GET)
        backends.append(await world.backend())
    for backend in backends:
        backend.send(OK)
    clients[0].send(GET)
    assert [backend.received.count(b"GET") for backend in backends] == [1, 1, 2]
    backends[2].send(OK)


async def test_equal_backends_of_a_service_share_a_pool_and_others_do_not(world: World) -> None:
    plain = Backend("127.0.0.1", 9)
    pool = world.pools.of(leased(plain), b"app.example")
    assert world.pools.of(leased(replace(plain)), b"www.app.example") is pool
    other: dict[str, Any] = {
        "host": "127.0.0.2",
        "port": 10,
        "use_tls": True,
        "protocol": "h2c",
        "tls_fingerprint": "ab",
    }
    assert list(other) == [each.name for each in fields(Backend)]
    differing = [
        world.pools.of(leased(replace(plain, **{name: other[name]})), b"app.example") for name in other
    ]
    of_another_service = world.pools.of(leased(plain, "other.example"), b"other.example")
    assert len({pool, of_another_service, *differing}) == 2 + len(other)


@pytest.mark.parametrize("tls", [False, True])
async def test_the_claims_of_a_backend_are_those_under_all_server_names_of_its_service(
    world: World, tls: bool
) -> None:
    backend = Backend("127.0.0.1", 9, use_tls=tls)
    assert world.pools.claims_of(leased(backend)) == 0
    held = []
    for name in (b"app.example", b"other.example"):
        held.append(world.pools.of(leased(backend), name))
        held[-1].claims += 1
    assert world.pools.claims_of(leased(replace(backend))) == 2
    assert world.pools.claims_of(leased(replace(backend, port=10))) == 0
    assert world.pools.claims_of(leased(backend, "other.example")) == 0
    assert world.pools.claims_by_backend() == {("app.example", "127.0.0.1", 9): 2}
    assert world.pools.claims_by_backend("other.example") == {}
    for each in held:
        each.claims -= 1
    assert world.pools.claims_of(leased(backend)) == 0
    assert world.pools.claims_by_backend() == {}


async def test_an_idle_connection_is_closed_after_its_time(world: World) -> None:
    backend = await world.idle_backend()
    await world.pass_time(IDLE_SECONDS - 1)
    assert not backend.closed
    await world.pass_time(8)
    assert backend.closed
    assert [pool.idle for pool in world.all_pools()] == [0]


async def test_an_idle_connection_that_does_not_close_is_aborted(world: World) -> None:
    backend = await world.idle_backend()
    backend.unsent = 1
    await world.pass_time(IDLE_SECONDS + 7)
    assert backend.closed
    assert not backend.aborted
    await world.pass_time(17)
    assert backend.aborted


async def test_a_request_that_cannot_be_repeated_takes_only_a_fresh_connection(world: World) -> None:
    old = await world.idle_backend()
    world.clock.now += FRESH_SECONDS + 0.1
    client = world.client()
    client.send(post(b"abc"))
    new = await world.backend()
    assert old.received == b""
    new.send(OK)
    client.send(post(b"def"))
    assert new.received.endswith(b"def")
    new.send(OK)
    assert statuses(client.received) == [200, 200]


async def test_a_connection_that_the_backend_closed_is_not_taken(world: World) -> None:
    backend = await world.idle_backend()
    backend.send_end()  # and nobody was told yet
    client = world.client()
    client.send(GET)
    (await world.backend()).send(OK)
    assert backend.received == b""
    assert statuses(client.received) == [200]


async def test_no_more_connections_are_kept_than_allowed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "MAX_IDLE", 1)
    clients = [world.client() for _ in range(2)]
    backends = []
    for client in clients:
        client.send(GET)
        backends.append(await world.backend())
    for backend in backends:
        backend.send(OK)
    assert [backend.closed for backend in backends] == [False, True]


async def test_a_backend_that_left_loses_its_idle_connections_and_keeps_the_busy_ones(world: World) -> None:
    idle = await world.idle_backend()
    client, other = world.client(), world.client()
    client.send(GET)
    other.send(GET)
    busy = await world.backend()
    idle.send(OK)
    world.apply(world.table)
    world.apply(RoutingTable(2, {"app.example": Service("app.example", ())}))
    assert idle.closed
    assert not busy.closed
    busy.send(OK)
    assert statuses(other.received) == [200]
    assert busy.closed
    world.apply(world.table)
    assert world.all_pools() == []


async def test_a_backend_that_comes_back_keeps_its_connections_again(world: World) -> None:
    client = world.client()
    client.send(GET)
    busy = await world.backend()
    table = world.table
    world.apply(table)
    world.apply(RoutingTable(2, {}))
    world.apply(table)
    busy.send(OK)
    assert not busy.closed
    assert [pool.idle for pool in world.all_pools()] == [1]


async def test_a_backend_that_left_one_of_its_services_keeps_its_connections_for_the_other(
    world: World,
) -> None:
    leases = world.table.services["app.example"].leases
    others = tuple(replace(lease, service="other.example") for lease in leases)
    both = RoutingTable(
        1, {"app.example": Service("app.example", leases), "other.example": Service("other.example", others)}
    )
    world.apply(both)
    idle = await world.idle_backend()
    world.apply(RoutingTable(2, {**both.services, "other.example": Service("other.example", ())}))
    assert not idle.closed
    world.apply(RoutingTable(3, {"app.example": Service("app.example", ())}))
    assert idle.closed
    assert world.all_pools() == []


async def test_a_backend_that_came_and_left_between_two_comparisons_loses_its_connections(
    world: World,
) -> None:
    table = world.table
    empty = RoutingTable(8, {"app.example": Service("app.example", ())}, "", 7, frozenset({"app.example"}))
    world.apply(RoutingTable(6, {}))
    for _ in range(2):  # the second time it is a pool that was closed
        world.table = replace(table, version=7)
        world.pools.follow(world.table)
        idle = await world.idle_backend()
        [pool] = world.all_pools()
        pool.claims = 1  # somebody is at work: it is not dropped
        world.apply(empty)
        assert idle.closed
        assert world.all_pools() == [pool]
    pool.claims = 0


async def test_a_backend_that_comes_while_tables_are_compared_is_looked_after_in_the_next_comparison(
    world: World,
) -> None:
    table = world.table
    name = "app.example"
    many = many_services(2, 600)
    world.pools.follow(RoutingTable(6, many))
    assert not world.pools.prune()
    world.table = RoutingTable(7, {**many, **table.services}, "", 6, frozenset({name}))
    world.pools.follow(world.table)
    idle = await world.idle_backend()
    while not world.pools.prune():
        pass
    assert not idle.closed
    world.apply(RoutingTable(8, many, "", 7, frozenset({name})))
    assert idle.closed


async def test_a_change_is_found_by_the_hint_and_without_it(world: World) -> None:
    table = world.table
    world.apply(table)
    empty = {"app.example": Service("app.example", ())}
    for since, changed in ((table.version, frozenset({"app.example"})), (-1, frozenset[str]())):
        idle = await world.idle_backend()
        world.apply(RoutingTable(table.version + 1, empty, "", since, changed))
        assert idle.closed
        world.apply(table)


class CountingServices(dict[str, Service]):
    """Counts how many services are looked at."""

    looks = 0

    def get(self, name: str, default: Any = None) -> Any:
        CountingServices.looks += 1
        return super().get(name, default)


def many_services(services: int, leases: int) -> CountingServices:
    """So many services of so many leases each."""
    return CountingServices(
        {
            f"n{number}.example": Service(
                f"n{number}.example",
                tuple(
                    Lease(f"n{number}.example", f"b{each}", Backend(f"10.0.{number}.1", 1 + each), 1e9, 60)
                    for each in range(leases)
                ),
            )
            for number in range(services)
        }
    )


async def test_a_renewal_in_a_large_table_costs_a_look_at_one_service(world: World) -> None:
    services = many_services(1000, 3)
    world.apply(RoutingTable(7, services))
    CountingServices.looks = 0
    renewed = CountingServices(services)
    renewed["n5.example"] = replace(services["n5.example"])
    world.pools.follow(RoutingTable(8, renewed, "", 7, frozenset({"n5.example"})))
    assert world.pools.prune()
    assert CountingServices.looks == 2
    assert not world.pools.are_behind


async def test_no_step_of_a_comparison_is_large_however_large_the_table_is(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = 0

    def is_same(held: Lease, holds: Lease) -> bool:
        nonlocal compared
        compared += 1
        return held.backend == holds.backend

    monkeypatch.setattr(pool, "_is_same", is_same)
    world.apply(RoutingTable(1, many_services(20, 1000)))
    steps, total = [], 0
    world.pools.follow(RoutingTable(2, many_services(20, 1000)))
    while True:
        done = world.pools.prune()
        steps.append(compared - total)
        total = compared
        if done:
            break
        if len(steps) == 5:
            world.pools.follow(RoutingTable(3, {}))  # a new table in between is for the next time
    assert total == 20_000
    assert max(steps) <= 1000
    assert world.pools.are_behind
    while not world.pools.prune():
        pass
    assert not world.pools.are_behind


async def test_a_lost_connection_is_not_kept(world: World) -> None:
    connected = asyncio.Event()
    world.loop.outcomes = [connected]
    world.loop.greet = lambda transport: transport.vanish()
    client = world.client()
    client.send(GET)
    await settle()
    client.vanish()
    connected.set()
    await settle()
    assert [pool.idle for pool in world.all_pools()] == [0]


@pytest.mark.parametrize(
    "failure",
    [
        UnicodeError("label too long"),
        ValueError("server_hostname cannot be an empty string"),
        FileNotFoundError(2, "No such file or directory"),
        RuntimeError("whatever"),
    ],
)
async def test_whatever_goes_wrong_while_connecting_the_next_backend_is_tried_and_the_client_answered(
    world: World, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    world.register(2)
    world.loop.outcomes = [cast("OSError", failure)]
    client = world.client()
    client.send(GET)
    (await world.backend()).send(OK)
    assert statuses(client.received) == [200]
    assert [port for _, port in world.loop.addresses] == [9000, 9001]
    told = [record for record in caplog.records if record.name == "portero_py.proxy.upstream.pool"]
    assert len(told) == (0 if isinstance(failure, OSError) else 1)


async def test_a_connect_that_always_raises_is_logged_once_and_a_502_each_time(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.loop.outcomes = [cast("OSError", UnicodeError("label too long"))] * 3
    client = world.client()
    for _ in range(3):
        client.send(GET)
        await settle()
    assert statuses(client.received) == [502] * 3
    assert [done.error and done.error.reason for done in world.done] == ["connect_failed"] * 3
    assert len([record for record in caplog.records if record.exc_info]) == 1


async def test_a_client_that_waits_for_a_connection_is_answered_when_portero_ends(world: World) -> None:
    world.register(2)
    world.loop.outcomes = [asyncio.Event()]
    client = world.client()
    client.send(post(b"abc"))
    await settle()
    await world.pools.close()
    assert statuses(client.received) == [502]
    assert len(world.loop.addresses) == 1
    world.check_released()


async def test_closing_ends_connections_that_are_being_made(world: World) -> None:
    world.loop.outcomes = [asyncio.Event()]
    client = world.client()
    client.send(GET)
    await settle()
    client.vanish()
    await world.pools.close()
    assert world.loop.connections == []
    assert world.all_pools() == []


async def test_a_backend_that_does_not_answer_in_time_is_a_502(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.loop.outcomes = [cast("OSError", TimeoutError())]
    client = world.client()
    client.send(GET)
    await settle()
    assert statuses(client.received) == [502]
    assert str(world.done[0].error) == "backend 127.0.0.1:9000 did not answer within 3 s"


class TestTls:
    """A backend that speaks TLS: one pool for each name that it has seen as SNI."""

    backend = Backend("127.0.0.1", 9443, use_tls=True)

    class Policy:
        """Stands in for `UpstreamTls`."""

        def __init__(self, failure: UpstreamTlsFailed | None = None) -> None:
            self.failure = failure

        def context(self, backend: Backend) -> ssl.SSLContext:
            return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

        def check_pin(self, backend: Backend, transport: ScriptedTransport) -> None:
            if self.failure is not None:
                raise self.failure

    @pytest.fixture
    def tls_world(self, world: World) -> World:
        world.register(1)
        lease = world.table.services["app.example"].leases[0]
        leases = (type(lease)("app.example", "tls", self.backend, lease.expires_at, 60),)
        world.table = RoutingTable(
            2,
            {
                "app.example": Service("app.example", leases),
                "*.app.example": Service("*.app.example", leases),
            },
        )
        world.upstream_tls(cast("UpstreamTls", self.Policy()))
        return world

    async def test_names_do_not_share_connections_and_spellings_of_one_name_do(
        self, tls_world: World
    ) -> None:
        client = tls_world.client()
        hosts = (b"app.example", b"App.Example.", b"app.example:443", b"a.app.example")
        for host in hosts:
            client.send(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
            await settle()
            tls_world.loop.connections[-1].send(OK)
        assert len(tls_world.loop.connections) == 2

    async def test_names_that_clients_made_up_do_not_stay_for_ever(self, tls_world: World) -> None:
        client = tls_world.client()
        for number in range(20):
            client.send(b"GET / HTTP/1.1\r\nHost: n%d.app.example\r\n\r\n" % number)
            (await tls_world.backend()).send(OK)
        assert len(tls_world.all_pools()) == 20
        tls_world.apply(tls_world.table)
        assert len(tls_world.all_pools()) == 20
        await tls_world.pass_time(IDLE_SECONDS + 8)
        tls_world.apply(tls_world.table)
        assert tls_world.all_pools() == []

    async def test_names_that_clients_make_up_do_not_pile_up_although_no_table_ever_comes(
        self, tls_world: World
    ) -> None:
        for number in range(100):
            tls_world.pools.of(leased(self.backend), b"n%d.app.example" % number)
            assert len(tls_world.all_pools()) <= 2
        held = tls_world.pools.of(leased(self.backend), b"held.app.example")
        held.claims += 1
        for number in range(100):
            tls_world.pools.of(leased(self.backend), b"n%d.app.example" % number)
        assert tls_world.pools.of(leased(self.backend), b"held.app.example") is held
        held.claims -= 1

    async def test_a_wrong_certificate_is_a_502_and_nothing_was_sent(self, tls_world: World) -> None:
        tls_world.upstream_tls(
            cast("UpstreamTls", self.Policy(UpstreamTlsFailed("not the certificate of this backend")))
        )
        client = tls_world.client()
        client.send(GET)
        backend = await tls_world.backend()
        assert statuses(client.received) == [502]
        assert backend.aborted
        assert backend.received == b""
        assert [done.error and done.error.reason for done in tls_world.done] == ["upstream_tls_failed"]

    async def test_a_handshake_that_fails_is_a_502(self, tls_world: World) -> None:
        tls_world.loop.outcomes = [ssl.SSLError(1, "bad record")]
        client = tls_world.client()
        client.send(GET)
        await settle()
        assert statuses(client.received) == [502]
        assert [done.error and done.error.reason for done in tls_world.done] == ["upstream_tls_failed"]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
async def test_idle_connections_make_room_when_there_is_no_descriptor_left(world: World, number: int) -> None:
    idle = await world.idle_backend()
    world.clock.now += FRESH_SECONDS + 0.1
    world.loop.outcomes = [OSError(number, "no descriptor")]
    client = world.client()
    client.send(post(b"abc"))
    (await world.backend()).send(OK)
    assert idle.closed
    assert statuses(client.received) == [200]


async def test_no_descriptor_left_is_no_fault_of_the_backend(world: World) -> None:
    world.loop.outcomes = [OSError(errno.EMFILE, "no descriptor") for _ in range(10)]
    client = world.client()
    client.send(GET)
    await settle()
    assert statuses(client.received) == [503]
    assert [done.error and done.error.reason for done in world.done] == ["out_of_descriptors"]


async def test_any_other_error_after_that_is_the_backend_s_own(world: World) -> None:
    world.loop.outcomes = [OSError(errno.EMFILE, "no descriptor"), OSError(errno.ECONNREFUSED, "refused")]
    client = world.client()
    client.send(GET)
    await settle()
    assert statuses(client.received) == [502]
    assert [done.error and done.error.reason for done in world.done] == ["connect_failed"]


def test_a_connection_that_is_given_up_has_no_exchange() -> None:
    connecting = pool.Connecting(cast("ResponseSide", object()))
    connecting.give_up()
    assert connecting.exchange is None
