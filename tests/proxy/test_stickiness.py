"""A client stays with its backend by a cookie: whom it goes to, and what each side sees."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

import pytest

from portero_py.config.model import Config, Limits, Log, Registration
from portero_py.core.health import Failure
from portero_py.core.model import Backend, Lease, LeaseState, Service
from portero_py.core.policies import ServicePolicy, Sticky
from portero_py.core.routing_table import RoutingTable
from portero_py.core.stickiness import Stickiness, sticky_key
from portero_py.proxy.exchange import Exchange
from portero_py.proxy.peer import Peers
from portero_py.wire.headers import Forwarding
from tests.proxy.client_ends import Http1Client, Http1TlsClient, Http2Client, Seen
from tests.proxy.dialogue import OK, ScriptedTransport, World, settle

if TYPE_CHECKING:
    from portero_py.proxy.endpoints import Downstream
    from portero_py.proxy.peer import Peer
    from portero_py.proxy.surroundings import Surroundings
    from portero_py.wire.message import RequestHead

INSERT = ServicePolicy(sticky=Sticky("srv"))
PREFIX = ServicePolicy(sticky=Sticky("SID", "prefix"))
REFUSED = ConnectionRefusedError(111, "Connection refused")


class _Real:
    """A client whose exchanges are real ones."""

    exchanges: list[Any]

    def _new_exchange(
        self, surroundings: Surroundings, peer: Peer, downstream: Downstream, head: RequestHead, /
    ) -> Any:
        made = Exchange(surroundings, peer, downstream, head)
        self.exchanges.append(made)
        return made


class RealHttp1(_Real, Http1Client):
    pass


class RealHttp1Tls(_Real, Http1TlsClient):
    pass


class RealHttp2(_Real, Http2Client):
    pass


class Play:
    """A client, and backends A, B, ... of app.example."""

    def __init__(
        self, world: World, monkeypatch: pytest.MonkeyPatch, client: type[RealHttp1 | RealHttp2]
    ) -> None:
        self.world = world
        self.client = client(world, monkeypatch)
        self.is_secure = client is not RealHttp1
        if self.is_secure:  # a scripted transport has no TLS to be seen by
            protocol: Any = self.client.transport.protocol
            there = protocol.peer if client is RealHttp2 else protocol._peer
            there.forwarding = Forwarding(b"192.0.2.7", b"https", trusted=False)

    def serve(self, names: str, policy: ServicePolicy | None = INSERT, **states: LeaseState) -> None:
        """From now on these are the backends; `states` are those that are not READY."""
        leases = tuple(
            Lease(
                "app.example",
                name,
                Backend("127.0.0.1", 9000 + ord(name)),
                1e9,
                60,
                state=states.get(name, LeaseState.READY),
                max_in_flight=0 if policy is None else policy.max_in_flight,
            )
            for name in names
        )
        version = self.world.table.version + 1
        self.world.apply(RoutingTable(version, {"app.example": Service("app.example", leases, None, policy)}))

    async def begin(self, *fields: tuple[bytes, bytes]) -> tuple[str, ScriptedTransport]:
        """Ask; to whom the request went, and the connection."""
        before = {id(each): len(each.received) for each in self.world.loop.connections}
        self.client.begin(fields=fields)
        await settle()
        [backend] = [
            each
            for each in self.world.loop.connections
            if len(each.received) > before.get(id(each), 0) and not each.closed
        ]
        return self.client.exchanges[-1].lease.instance_id, backend

    async def ask(self, *fields: tuple[bytes, bytes], answer: bytes = OK) -> tuple[str, Seen]:
        """Ask and answer; who did, and what the client saw."""
        who, backend = await self.begin(*fields)
        backend.send(answer)
        await settle()
        seen = self.client.seen()
        assert seen.complete
        return who, seen

    async def cookie(self, name: str) -> bytes:
        """The cookie of a client of that backend, as it sends it."""
        for _ in range(10):
            who, seen = await self.ask()
            if who == name:
                return seen.fields[b"set-cookie"].partition(b";")[0]
        raise AssertionError("nobody was sent there")


@pytest.fixture(params=[RealHttp1, RealHttp1Tls, RealHttp2])
async def play(request: pytest.FixtureRequest, world: World, monkeypatch: pytest.MonkeyPatch) -> Play:
    return Play(world, monkeypatch, request.param)


def cookie_line(backend: ScriptedTransport) -> list[bytes]:
    """The Cookie fields of the last request that a backend got."""
    last = backend.received[backend.received.rindex(b"GET ") :]
    return [line for line in last.split(b"\r\n") if line.lower().startswith(b"cookie:")]


# insert


async def test_a_client_gets_our_cookie_once_and_stays(play: Play) -> None:
    play.serve("ABC")
    cookie = await play.cookie("B")
    for _ in range(5):
        who, seen = await play.ask((b"cookie", b"a=1; " + cookie))
        assert (who, seen.fields.get(b"set-cookie")) == ("B", None)
    others = {(await play.ask())[0] for _ in range(3)}
    assert others == set("ABC")


async def test_the_cookie_is_opaque_and_has_its_attributes(play: Play) -> None:
    play.serve("A")
    _, seen = await play.ask()
    value, *attributes = seen.fields[b"set-cookie"].split(b"; ")
    assert len(value) == len(b"srv=") + 32
    secure = [b"Secure"] if play.is_secure else []
    assert attributes == [b"Path=/", b"HttpOnly", b"SameSite=Lax", *secure]
    assert seen.fields[b"cache-control"] == b"private"


async def test_the_backend_never_sees_it(play: Play) -> None:
    play.serve("AB")
    cookie = await play.cookie("A")
    who, backend = await play.begin((b"cookie", b"a=1"), (b"cookie", cookie), (b"cookie", b"b=2"))
    assert who == "A"
    lines = cookie_line(backend)
    assert b"srv=" not in b"".join(lines)
    assert b"a=1" in b"".join(lines)
    assert b"b=2" in b"".join(lines)
    backend.send(OK)
    who, backend = await play.begin((b"cookie", cookie))
    assert cookie_line(backend) == []
    backend.send(OK)


@pytest.mark.parametrize("state", [LeaseState.DRAINING, LeaseState.DOWN, LeaseState.STARTING])
async def test_another_one_is_chosen_when_its_backend_cannot_take_it(play: Play, state: LeaseState) -> None:
    play.serve("AB")
    cookie = await play.cookie("A")
    play.serve("AB", A=state)
    who, seen = await play.ask((b"cookie", cookie))
    assert who == "B"
    moved = seen.fields[b"set-cookie"].partition(b";")[0]
    assert moved != cookie
    play.serve("AB")
    who, seen = await play.ask((b"cookie", moved))
    assert (who, seen.fields.get(b"set-cookie")) == ("B", None)


async def test_another_one_is_chosen_when_its_backend_is_gone(play: Play) -> None:
    play.serve("AB")
    cookie = await play.cookie("A")
    play.serve("B")
    assert b"set-cookie" in (await play.ask((b"cookie", cookie)))[1].fields
    play.serve("AB")  # it is back under its name: so are its clients
    who, seen = await play.ask((b"cookie", cookie))
    assert (who, seen.fields.get(b"set-cookie")) == ("A", None)


async def test_another_one_is_chosen_when_its_backend_fails(play: Play) -> None:
    play.serve("AB")
    cookie = await play.cookie("A")
    for pool in play.world.all_pools():
        pool.empty()
    play.world.loop.broken[9000 + ord("A")] = REFUSED
    for _ in range(3):  # then it is ejected
        who, seen = await play.ask((b"cookie", cookie))
        assert who == "B"
        assert seen.fields[b"set-cookie"].partition(b";")[0] not in (b"", cookie)
    assert play.world.ejected
    tried = len(play.world.loop.addresses)
    assert (await play.ask((b"cookie", cookie)))[0] == "B"
    assert len(play.world.loop.addresses) == tried


async def test_who_is_merely_full_gets_the_next_request_again(play: Play, world: World) -> None:
    play.serve("AB", replace(INSERT, max_in_flight=1))
    cookie = await play.cookie("A")
    other = world.client()
    other.send(b"GET / HTTP/1.1\r\nHost: app.example\r\nCookie: %b\r\n\r\n" % cookie)
    await settle()
    assert [pool.backend.port for pool in world.all_pools() if pool.claims] == [9000 + ord("A")]
    busy = asked_of(world)
    who, seen = await play.ask((b"cookie", cookie))
    assert (who, seen.fields.get(b"set-cookie")) == ("B", None)
    busy.send(OK)
    await settle()
    who, seen = await play.ask((b"cookie", cookie))
    assert (who, seen.fields.get(b"set-cookie")) == ("A", None)


def asked_of(world: World) -> ScriptedTransport:
    """The connection to a backend that has a request to answer, the first of them."""
    for backend in world.loop.connections:
        protocol: Any = backend.protocol
        if protocol._exchange is not None:
            assert isinstance(backend, ScriptedTransport)
            return backend
    raise AssertionError("nobody is asked")


async def test_a_cookie_that_somebody_made_up_is_as_none(play: Play) -> None:
    play.serve("AB")
    await play.cookie("A")
    for value in (b"A", b"x" * 32, b"127.0.0.1:9065", b"", b"=" * 40, b'"' * 3, b"x" * 3000):
        _, seen = await play.ask((b"cookie", b"srv=" + value))
        assert b"set-cookie" in seen.fields


async def test_our_own_replies_set_no_cookie(play: Play) -> None:
    play.serve("AB", A=LeaseState.DRAINING, B=LeaseState.DRAINING)
    play.client.begin()
    seen = play.client.seen()
    assert seen.status == 503
    assert b"set-cookie" not in seen.fields


async def test_an_informational_response_carries_none(play: Play) -> None:
    play.serve("A")
    _, backend = await play.begin()
    backend.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
    await settle()
    backend.send(OK)
    await settle()
    seen = play.client.seen()
    assert (seen.informational, b"set-cookie" in seen.fields) == ([103], True)
    assert play.client.transport.received.lower().count(b"set-cookie") <= 1


async def test_a_response_that_comes_in_pieces_carries_it(play: Play) -> None:
    play.serve("A")
    _, backend = await play.begin()
    backend.send(b"HTTP/1.1 200 OK\r\nCache-Control: public, max-age=9\r\nTransfer-Encoding: chunked\r\n\r\n")
    backend.send(b"2\r\nok\r\n0\r\n\r\n")
    await settle()
    seen = play.client.seen()
    assert (seen.body, b"set-cookie" in seen.fields) == (b"ok", True)
    assert b"public" not in seen.fields[b"cache-control"]


# prefix


async def test_the_applications_cookie_is_marked_and_comes_back_bare(play: Play) -> None:
    play.serve("AB", PREFIX)
    answer = OK.replace(b"\r\n\r\n", b"\r\nSet-Cookie: SID=42; HttpOnly\r\n\r\n", 1)
    who, seen = await play.ask(answer=answer)
    value = seen.fields[b"set-cookie"]
    assert value.startswith(b"SID=")
    assert value.endswith(b"~42; HttpOnly")
    cookie = value.partition(b";")[0]
    for _ in range(3):
        same, backend = await play.begin((b"cookie", b"a=1"), (b"cookie", cookie))
        assert same == who
        assert b"SID=42" in b"".join(cookie_line(backend))
        assert b"~" not in b"".join(cookie_line(backend))
        backend.send(OK)
        await settle()
        assert b"set-cookie" not in play.client.seen().fields


async def test_without_a_cookie_of_the_application_requests_take_turns(play: Play) -> None:
    play.serve("AB", PREFIX)
    assert [(await play.ask((b"cookie", b"SID=42")))[0] for _ in range(4)] == list("ABAB")


async def test_a_marked_cookie_whose_backend_is_gone_comes_to_the_next_one_bare(play: Play) -> None:
    play.serve("AB", PREFIX)
    lease = play.world.table.services["app.example"].leases[0]
    mark = Stickiness(Sticky("SID", "prefix"), play.world.rules.sticky_key).token(lease)
    play.serve("B", PREFIX)
    who, backend = await play.begin((b"cookie", b"SID=%b~42" % mark))
    assert (who, [line.lower() for line in cookie_line(backend)]) == ("B", [b"cookie: sid=42"])
    backend.send(OK.replace(b"\r\n\r\n", b"\r\nSet-Cookie: SID=43\r\n\r\n", 1))
    await settle()
    assert play.client.seen().fields[b"set-cookie"].endswith(b"~43")


# Around it


async def test_a_websocket_carries_it(world: World) -> None:
    world.apply(
        RoutingTable(
            2,
            {
                "app.example": replace(world.table.services["app.example"], policy=INSERT),
            },
        )
    )
    client = world.client(tls=True)
    client.send(
        b"GET / HTTP/1.1\r\nHost: app.example\r\nCookie: srv=x\r\n"
        b"Connection: upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    backend = await world.backend()
    assert b"srv=" not in backend.received
    assert b"pgrade: websocket" in backend.received
    backend.send(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
    )
    assert client.received.startswith(b"HTTP/1.1 101 ")
    assert b"\r\nSet-Cookie: srv=" in client.received
    client.vanish()
    await settle()


async def test_behind_a_trusted_proxy_it_is_secure_when_the_client_came_over_tls(world: World) -> None:
    world.peers = Peers((ip_network("192.0.2.0/24"),))
    world.apply(RoutingTable(2, {"app.example": replace(world.table.services["app.example"], policy=INSERT)}))
    for proto, secure in ((b"https", True), (b"http", False), (b"wss", True), (b"ws", False)):
        client = world.client()
        client.send(b"GET / HTTP/1.1\r\nHost: app.example\r\nX-Forwarded-Proto: %b\r\n\r\n" % proto)
        await settle()
        world.loop.connections[0].send(OK)
        assert (b"; Secure\r\n" in client.received) is secure


async def test_another_secret_makes_other_cookies_at_once(world: World) -> None:
    world.apply(RoutingTable(2, {"app.example": replace(world.table.services["app.example"], policy=INSERT)}))
    rules = world.rules.of(world.table.services["app.example"])
    lease = world.table.services["app.example"].leases[0]

    def token(registration: Registration) -> bytes:
        world.configure(Config(registration=registration, log=Log(access="off")))
        assert rules.sticky is not None
        return rules.sticky.token(lease)

    one, same = token(Registration(secret="one")), token(Registration(secret="one"))
    assert one == same == Stickiness(Sticky("srv"), sticky_key("one")).token(lease)
    assert token(Registration(secret="two")) != one
    assert token(Registration(hmac_keys=(("", "one"), ("k", "two")))) == one
    assert world.rules.of(world.table.services["app.example"]) is rules


async def test_a_client_that_waited_in_the_queue_goes_home(world: World, monkeypatch: Any) -> None:
    play = Play(world, monkeypatch, RealHttp1)
    world.configure(Config(limits=Limits(queue_seconds=30), log=Log(access="off")))
    play.serve("AB", replace(INSERT, max_in_flight=1))
    cookie = await play.cookie("A")
    clients = []
    for _ in range(3):  # both backends are full, and one waits
        client = world.client()
        client.send(b"GET / HTTP/1.1\r\nHost: app.example\r\nCookie: %b\r\n\r\n" % cookie)
        clients.append(client)
        await settle()
    assert len(world.queues) == 1
    asked_of(world).send(OK)
    await settle()
    assert len(world.queues) == 0
    assert all(b"Set-Cookie" not in client.received for client in clients)
    for client in clients:
        client.vanish()
    await settle()


async def test_a_client_stays_by_its_address_where_the_policy_says_so(world: World) -> None:
    world.peers = Peers((ip_network("192.0.2.0/24"),))
    world.register(5)
    service = replace(world.table.services["app.example"], policy=ServicePolicy(balance="source"))
    world.apply(RoutingTable(2, {"app.example": service}))
    homes: dict[int, str] = {}
    for number in range(30):
        for _ in range(2):
            client = world.client()
            client.send(
                b"GET / HTTP/1.1\r\nHost: app.example\r\nX-Forwarded-For: 198.51.100.%d, 192.0.2.9\r\n\r\n"
                % number
            )
            await settle()
            backend = asked_of(world)
            backend.send(OK)
            await settle()
            lease = world.done[-1].lease
            assert lease is not None
            assert homes.setdefault(number, lease.instance_id) == lease.instance_id
    assert len(set(homes.values())) > 2


async def test_a_client_whose_home_is_all_that_is_left_gets_no_cookie_again(play: Play) -> None:
    play.serve("ABC")
    cookie = await play.cookie("A")
    for pool in play.world.all_pools():
        pool.empty()
    home = play.world.table.services["app.example"].leases[0]
    play.world.health.configure(1, 2.0, ())
    service = play.world.table.services["app.example"]
    now = play.world.clock()
    assert play.world.health.failed(home, service, Failure.PROMPT, "refused", began=now, now=now).pause
    play.world.loop.broken = {9000 + ord(name): REFUSED for name in "BC"}
    who, seen = await play.ask((b"cookie", cookie))
    assert (who, seen.fields.get(b"set-cookie")) == ("A", None)
