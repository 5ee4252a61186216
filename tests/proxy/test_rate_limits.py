"""Who may come in, and how often: addresses and rate limits of services, on the way of a request."""

from __future__ import annotations

import logging
import re
from ipaddress import ip_network
from typing import TYPE_CHECKING

import pytest

from portero_py.core.model import Backend, Lease, Service
from portero_py.core.policies import RateLimit, ServicePolicy
from portero_py.core.rate_limit import Buckets
from portero_py.core.routing_table import RoutingTable
from portero_py.proxy import exchange
from portero_py.proxy.peer import Peers
from tests.proxy.client_ends import CLIENT_ENDS
from tests.proxy.dialogue import OK, ScriptedTransport, World, get, settle, statuses
from tests.proxy.test_bounds import end, serve

if TYPE_CHECKING:
    from tests.proxy.client_ends import ClientEnd

__all__ = ["CLIENT_ENDS", "end"]

FORWARDED = b"X-Forwarded-For: %b\r\n"


def trust(world: World, *networks: str) -> None:
    """Believe what these say about their clients."""
    world.peers = Peers(tuple(ip_network(each) for each in networks))


async def ask(world: World, client: ScriptedTransport, fields: bytes = b"") -> int:
    """One request of a client, answered by a backend if it gets there: its status."""
    before = len(statuses(client.received))
    client.send(get(b"/", fields))
    await settle()
    if len(statuses(client.received)) == before:
        busy = next(each for each in world.loop.connections if each.received and not each.closed)
        busy.send(OK)
        busy.received = b""
        await settle()
    found = statuses(client.received)
    assert len(found) == before + 1
    return found[-1]


def retry_after(client: ScriptedTransport) -> list[int]:
    return [int(found) for found in re.findall(rb"Retry-After: ([0-9]+)\r\n", client.received)]


# Rate limits


async def test_who_is_over_the_limit_is_told_when_there_is_room_again(world: World) -> None:
    serve(world, ServicePolicy(rate_limits=(RateLimit(2, 10.0),)))
    client = world.client()
    assert [await ask(world, client) for _ in range(4)] == [200, 200, 429, 429]
    assert retry_after(client) == [5, 5]
    world.clock.now += 1.5
    assert await ask(world, client) == 429
    assert retry_after(client)[-1] == 4
    world.clock.now += 3.5
    assert [await ask(world, client) for _ in range(2)] == [200, 429]
    assert world.counters.rate_limited == {"app.example": 4}
    assert world.counters.errors == {"rate_limited": 4}


async def test_a_refusal_reaches_clients_of_every_version(end: ClientEnd) -> None:
    world = end.world
    serve(world, ServicePolicy(rate_limits=(RateLimit(1, 60.0),)))
    end.begin()
    backend = await world.backend()
    backend.send(OK)
    await settle()
    assert end.seen().status == 200
    end.begin(b"POST", body=True)
    await settle()
    seen = end.seen()
    assert seen.status == 429
    assert {name.lower(): value for name, value in seen.fields.items()}[b"retry-after"] == b"60"


async def test_clients_are_counted_apart_and_those_behind_a_trusted_proxy_too(world: World) -> None:
    trust(world, "192.0.2.0/24")
    serve(world, ServicePolicy(rate_limits=(RateLimit(1, 60.0),)))
    client = world.client()
    named = (b"198.51.100.1", b"198.51.100.2", b"203.0.113.9, 198.51.100.1", b"198.51.100.1, 192.0.2.66")
    found = [await ask(world, client, FORWARDED % each) for each in named]
    assert found == [200, 200, 429, 429]
    assert await ask(world, client) == 200  # the proxy itself


async def test_what_a_stranger_says_of_himself_changes_nothing(world: World) -> None:
    serve(world, ServicePolicy(rate_limits=(RateLimit(1, 60.0),)))
    client = world.client()
    assert [await ask(world, client, FORWARDED % b"10.0.0.%d" % n) for n in range(3)] == [200, 429, 429]


async def test_a_network_of_64_bits_is_one_client(world: World) -> None:
    trust(world, "192.0.2.0/24")
    serve(world, ServicePolicy(rate_limits=(RateLimit(1, 60.0),)))
    client = world.client()
    named = (b"2001:db8::1", b"2001:db8::2", b"2001:db8:0:1::1", b"::ffff:198.51.100.1", b"198.51.100.1")
    assert [await ask(world, client, FORWARDED % each) for each in named] == [200, 429, 200, 200, 429]


async def test_a_header_is_a_key_and_who_leaves_it_out_is_one_more(world: World) -> None:
    serve(world, ServicePolicy(rate_limits=(RateLimit(1, 60.0, "header:X-Key"),)))
    client = world.client()
    sent = (b"x-key: a\r\n", b"X-KEY: a\r\n", b"X-Key: b\r\n", b"", b"", b"X-Key: a\r\nX-Key: c\r\n")
    assert [await ask(world, client, fields) for fields in sent] == [200, 429, 200, 200, 429, 200]


async def test_the_host_is_a_key_where_a_service_has_many(world: World) -> None:
    lease = Lease("*.example", "b", Backend("127.0.0.1", 9000), float("inf"), None)
    policy = ServicePolicy(rate_limits=(RateLimit(1, 60.0, "header:Host"),))
    world.apply(RoutingTable(2, {"*.example": Service("*.example", (lease,), policy=policy)}))
    client = world.client()
    client.send(get(b"/", host=b"a.example"))
    backend = await world.backend()
    for host, expected in ((b"A.example", [200, 429]), (b"b.example", [200, 429, 200])):
        backend.send(OK) if backend.received else None
        backend.received = b""
        client.send(get(b"/", host=host))
        await settle()
        if backend.received:
            backend.send(OK)
            backend.received = b""
        assert statuses(client.received) == expected


async def test_all_clients_together_may_have_a_limit(world: World) -> None:
    trust(world, "192.0.2.0/24")
    limits = (RateLimit(3, 60.0, "service"), RateLimit(2, 60.0, "client"))
    serve(world, ServicePolicy(rate_limits=limits))
    client = world.client()
    named = [b"10.0.0.1"] * 3 + [b"10.0.0.2"] * 2
    assert [await ask(world, client, FORWARDED % each) for each in named] == [200, 200, 429, 200, 429]


async def test_counts_outlive_a_change_of_the_rest_of_the_policy(world: World) -> None:
    limit = RateLimit(2, 60.0)
    client = world.client()
    for retries, expected in ((1, 200), (2, 200), (3, 429)):
        serve(world, ServicePolicy(rate_limits=(limit,), retries=retries))
        assert await ask(world, client) == expected
    serve(world, ServicePolicy(rate_limits=(RateLimit(1, 30.0),)))
    assert await ask(world, client) == 200
    serve(world, None)
    assert await ask(world, client) == 200


async def test_a_flood_is_a_line_of_the_log_a_second(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    serve(world, ServicePolicy(rate_limits=(RateLimit(1, 60.0),)))
    client = world.client()
    for _ in range(50):
        await ask(world, client)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["a request over a rate_limit of its service was refused (app.example)"]
    assert world.counters.refused == {"rate_limit": 49}


async def test_two_workers_count_together(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    other = World(world.clock)
    memory = memoryview(bytearray(Buckets.size(2)))
    clients = []
    for number, each in enumerate((world, other)):
        each.rules.buckets = Buckets(memory, 2, number)
        serve(each, ServicePolicy(rate_limits=(RateLimit(10, 60.0),)))
        clients.append((each, each.client()))
    monkeypatch.setattr(exchange, "monotonic", world.clock)
    found = [await ask(*clients[turn % 2]) for turn in range(30)]
    assert found == [200] * 10 + [429] * 20
    await other.close()


# Addresses


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (ServicePolicy(allow=("192.0.2.0/24",)), 200),
        (ServicePolicy(allow=("198.51.100.0/24", "2001:db8::/32")), 403),
        (ServicePolicy(deny=("192.0.2.7",)), 403),
        (ServicePolicy(deny=("192.0.2.8",)), 200),
        (ServicePolicy(allow=("192.0.2.0/24",), deny=("192.0.2.7/32",)), 403),
        (ServicePolicy(allow=("::ffff:192.0.2.0/120",)), 200),
    ],
)
async def test_a_service_is_for_those_whom_its_lists_let_in(
    world: World, policy: ServicePolicy, expected: int
) -> None:
    serve(world, policy)
    client = world.client()
    assert await ask(world, client) == expected
    assert bool(world.loop.addresses) is (expected == 200)
    assert (world.counters.errors == {"address_refused": 1}) is (expected == 403)


async def test_a_refused_address_is_told_nothing_else(end: ClientEnd) -> None:
    serve(end.world, ServicePolicy(allow=("10.0.0.0/8",), rate_limits=(RateLimit(1, 60.0),)))
    for _ in range(2):  # no token is taken
        end.begin()
        await settle()
        assert end.seen().status == 403
        assert b"not for your address" in end.seen().body


async def test_behind_a_trusted_proxy_the_client_is_who_it_names(world: World) -> None:
    trust(world, "192.0.2.0/24")
    serve(world, ServicePolicy(allow=("198.51.100.0/24",)))
    client = world.client()
    named = {
        b"198.51.100.1": 200,
        b"203.0.113.1": 403,
        b"198.51.100.1, 203.0.113.1": 403,  # what the client says itself counts for nothing
        b"203.0.113.1, 198.51.100.1": 200,
        b"198.51.100.1, 192.0.2.1": 200,
        b"198.51.100.1:4711": 200,
        b"198.51.100.1, nonsense": 403,  # then it is the proxy that wrote it
        b"": 403,
    }
    for chain, expected in named.items():
        assert await ask(world, client, FORWARDED % chain) == expected, chain


@pytest.mark.parametrize("has_failed", [False, True], ids=["queued", "tried again"])
async def test_who_comes_to_another_service_on_the_way_passes_its_gates(
    world: World, *, has_failed: bool
) -> None:
    leases = tuple(
        Lease("*.example", f"b{n}", Backend("127.0.0.1", 9000 + n), float("inf"), None, max_in_flight=1)
        for n in range(2 if has_failed else 1)
    )
    policy = ServicePolicy(queue_seconds=60)
    world.apply(RoutingTable(2, {"*.example": Service("*.example", leases, policy=policy)}))
    busy, client = world.client(), world.client()
    busy.send(get(b"/"))
    first = await world.backend()
    client.send(get(b"/"))
    await settle()
    closed = Service("app.example", leases, policy=ServicePolicy(deny=("192.0.2.7",)))
    world.apply(RoutingTable(3, {**world.table.services, "app.example": closed}))
    if has_failed:
        (await world.backend()).vanish()
    else:
        world.queues.follow(world.table)
    await settle()
    assert statuses(client.received) == [403]
    assert world.done[-1].service == "app.example"
    first.send(OK)


async def test_lists_that_stay_the_same_are_not_made_again(world: World) -> None:
    allow = tuple(f"10.{high}.{low}.0/24" for high in range(10) for low in range(100))
    gates = set()
    for retries in (1, 2):
        serve(world, ServicePolicy(allow=allow, retries=retries))
        assert await ask(world, world.client()) == 403
        gates.add(world.rules.of(world.table.services["app.example"]).gates[0])
    assert len(gates) == 1
