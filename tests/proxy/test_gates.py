"""Passwords and the server that is asked: who gets in, who waits, who is turned away."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import replace
from ipaddress import ip_network

import bcrypt
import pytest

from portero_py.config.model import Config
from portero_py.core.model import Backend, Lease, Service
from portero_py.core.policies import BasicAuth, FieldChanges, ForwardAuth, Maintenance, ServicePolicy, Sticky
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import PorteroError
from portero_py.proxy.downstream.http1 import Http1Downstream
from portero_py.proxy.exchange import Exchange
from portero_py.proxy.gates import basic_auth
from portero_py.proxy.peer import Peer, Peers
from tests.proxy.dialogue import GET, OK, ScriptedTransport, World, post, settle

HASHED = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()
BASIC = ServicePolicy(basic_auth=BasicAuth((("ann", HASHED),), 'the "lab"'))
FORWARD = ServicePolicy(
    forward_auth=ForwardAuth("http://127.0.0.1:9091/verify?x=1", response_headers=("Remote-User",), timeout=5)
)


def serve(world: World, policy: ServicePolicy | None) -> None:
    """Serve app.example by `policy`."""
    [service] = world.table.services.values()
    services = {"app.example": replace(service, policy=policy)}
    world.apply(RoutingTable(world.table.version + 1, services))


def login(name: str, password: str, method: str = "GET") -> bytes:
    value = base64.b64encode(f"{name}:{password}".encode())
    return (
        f"{method} / HTTP/1.1\r\nHost: app.example\r\n".encode() + b"Authorization: Basic %b\r\n\r\n" % value
    )


async def until_answered(client: ScriptedTransport) -> bytes:
    """What the client got, once a thread has compared."""
    async with asyncio.timeout(60):
        while not client.received:
            await asyncio.sleep(0.001)
    return client.received


async def backend_after_thread(world: World) -> ScriptedTransport:
    """The next connection to a backend, once a thread has compared."""
    made = len(world.loop.connections)
    async with asyncio.timeout(60):
        while len(world.loop.connections) == made:
            await asyncio.sleep(0.001)
    return await world.backend()


# Passwords


async def test_who_says_nothing_is_asked_for_a_name_and_a_password(world: World) -> None:
    serve(world, BASIC)
    client = world.client()
    client.send(GET)
    assert client.received.startswith(b"HTTP/1.1 401 Unauthorized\r\n")
    assert b'\r\nWWW-Authenticate: Basic realm="the \\"lab\\"", charset="UTF-8"\r\n' in client.received


async def test_who_knows_the_password_is_let_in_and_is_known_from_then_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(world, BASIC)
    client = world.client()
    client.send(login("ann", "secret"))
    assert not client.received
    backend = await backend_after_thread(world)
    backend.send(OK)
    assert client.received.startswith(b"HTTP/1.1 200")
    monkeypatch.setattr(basic_auth, "_compare", None)  # nobody compares any more
    client.received = b""
    client.send(login("ann", "secret"))
    backend.send(OK)
    assert client.received.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("name", "password"), [("ann", "Secret"), ("bob", "secret"), ("ann", ""), ("ann", "s" * 90)]
)
async def test_who_does_not_is_not_and_is_known_for_that_too(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str, password: str
) -> None:
    serve(world, BASIC)
    client = world.client()
    client.send(login(name, password))
    assert (await until_answered(client)).startswith(b"HTTP/1.1 401")
    monkeypatch.setattr(basic_auth, "_compare", None)
    again = world.client()
    again.send(login(name, password))
    assert again.received.startswith(b"HTTP/1.1 401")


async def test_several_requests_of_one_user_wait_for_one_comparison(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []

    def compare(password: bytes, hashed: bytes) -> bool:
        compared.append(password)
        return True

    monkeypatch.setattr(basic_auth, "_compare", compare)
    serve(world, BASIC)
    clients = [world.client() for _ in range(6)]
    for client in clients:
        client.send(login("ann", "secret"))
    clients[0].vanish()
    for _ in clients[1:]:
        (await world.backend()).send(OK)
    assert all(client.received.startswith(b"HTTP/1.1 200") for client in clients[1:])
    assert compared == [b"secret"]


async def test_a_guesser_waits_for_himself_and_others_have_their_turns(world: World) -> None:
    serve(world, BASIC)
    guesses = [world.client() for _ in range(basic_auth.CLIENT_WAITS + 3)]
    for number, client in enumerate(guesses):
        client.send(login("ann", f"guess {number}"))
    told = [client for client in guesses if client.received]
    assert len(told) == 3
    assert all(client.received.startswith(b"HTTP/1.1 429") for client in told)
    assert b"\r\nRetry-After: " in told[0].received
    for client in guesses:
        await until_answered(client)


async def test_behind_a_trusted_proxy_each_client_waits_for_himself(world: World) -> None:
    world.peers = Peers((ip_network("192.0.2.0/24"),))
    serve(world, BASIC)
    guesses = [world.client() for _ in range(basic_auth.CLIENT_WAITS + 1)]
    for number, client in enumerate(guesses):
        client.send(login("ann", f"guess {number}")[:-2] + b"X-Forwarded-For: 198.51.100.1\r\n\r\n")
    assert guesses[-1].received.startswith(b"HTTP/1.1 429")
    user = world.client()
    user.send(login("ann", "secret")[:-2] + b"X-Forwarded-For: 198.51.100.2\r\n\r\n")
    (await backend_after_thread(world)).send(OK)
    assert user.received.startswith(b"HTTP/1.1 200")
    for client in guesses:
        await until_answered(client)


async def test_a_body_waits_until_the_user_is_known(world: World) -> None:
    serve(world, BASIC)
    client = world.client()
    head = login("ann", "secret", "POST")[:-2] + b"Content-Length: 5\r\n\r\n"
    client.send(head + b"he")
    assert not client.reading
    backend = await backend_after_thread(world)
    assert backend.received.endswith(b"\r\n\r\nhe")
    client.send(b"llo")
    assert backend.received.endswith(b"\r\n\r\nhello")
    backend.send(OK)
    assert client.received.startswith(b"HTTP/1.1 200")


async def test_who_is_known_stays_so_when_another_part_of_the_policy_changes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(world, BASIC)
    client = world.client()
    client.send(login("ann", "secret"))
    backend = await backend_after_thread(world)
    backend.send(OK)
    monkeypatch.setattr(basic_auth, "_compare", None)
    serve(world, replace(BASIC, body_bytes=10))
    client.received = b""
    client.send(login("ann", "secret"))
    backend.send(OK)
    assert client.received.startswith(b"HTTP/1.1 200")
    monkeypatch.undo()
    serve(world, replace(BASIC, basic_auth=BasicAuth((("bob", HASHED),))))
    other = world.client()
    other.send(login("ann", "secret"))
    assert (await until_answered(other)).startswith(b"HTTP/1.1 401")


async def test_what_could_not_be_compared_is_no_verdict(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compare(password: bytes, hashed: bytes) -> bool:
        raise RuntimeError("no thread")

    serve(world, BASIC)
    with monkeypatch.context() as patched:
        patched.setattr(basic_auth, "_compare", compare)
        for _ in range(3):
            client = world.client()
            client.send(login("ann", "secret"))
            assert (await until_answered(client)).startswith(b"HTTP/1.1 500")
    assert len(caplog.records) == 1  # strangers do not fill the log
    client = world.client()
    client.send(login("ann", "secret"))
    (await backend_after_thread(world)).send(OK)
    assert client.received.startswith(b"HTTP/1.1 200")


async def test_one_that_cannot_be_told_does_not_keep_the_others_waiting(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    serve(world, BASIC)
    told = Exchange.gate_closed
    faults = [RuntimeError("first"), RuntimeError("second")]

    def gate_closed(exchange: Exchange, error: PorteroError) -> None:
        if exchange.peer is strangers[0]:
            raise faults[0]
        told(exchange, error)

    def broke(exchange: Exchange) -> None:
        raise faults[1]

    clients = [world.client() for _ in range(2)]
    strangers = []
    for number, client in enumerate(clients):
        peer = Peer(f"192.0.2.{number + 1}", 5, world.peers.of(client).forwarding)
        assert isinstance(client.protocol, Http1Downstream)
        client.protocol._peer = peer
        strangers.append(peer)
    monkeypatch.setattr(Exchange, "gate_closed", gate_closed)
    with monkeypatch.context() as patched:
        patched.setattr(Exchange, "broke", broke)
        clients[0].send(login("ann", "wrong"))
        clients[1].send(login("ann", "wrong too"))
        assert (await until_answered(clients[1])).startswith(b"HTTP/1.1 401")
    assert any(record.exc_info and record.exc_info[1] is faults[1] for record in caplog.records)
    clients[0].vanish()


async def test_who_has_said_all_is_owed_an_answer_while_the_password_is_compared(world: World) -> None:
    serve(world, BASIC)
    client = world.client()
    client.send(login("ann", "wrong"))
    client.send_end()
    assert (await until_answered(client)).startswith(b"HTTP/1.1 401")


# Another service than at first


def also_serve(world: World, **policies: ServicePolicy | None) -> None:
    """A wildcard and an exact name, as they are given: `any` and `exact`."""
    leases = tuple(Lease("x", f"b{n}", Backend("127.0.0.1", 9000 + n), float("inf"), None) for n in range(3))
    names = {"any": "*.example", "exact": "app.example"}
    services = {
        names[key]: Service(
            names[key],
            tuple(replace(lease, service=names[key], max_in_flight=key == "any") for lease in leases[:2]),
            policy=policy,
        )
        for key, policy in policies.items()
    }
    world.apply(RoutingTable(world.table.version + 1, services))
    world.queues.follow(world.table)


CLOSED = ServicePolicy(maintenance=Maintenance("closed"))


async def test_who_is_served_by_another_service_after_waiting_comes_to_its_gates(world: World) -> None:
    world.configure(replace(Config(), limits=replace(Config().limits, queue_seconds=30)))
    also_serve(world, any=None)
    clients = [world.client() for _ in range(3)]
    for client in clients:
        client.send(GET)
    backends = [await world.backend() for _ in range(2)]
    assert len(world.queues) == 1
    also_serve(world, any=None, exact=CLOSED)
    for backend in backends:
        backend.send(OK)
    await settle()
    assert [client.received[:12] for client in clients] == [
        b"HTTP/1.1 200",
        b"HTTP/1.1 200",
        b"HTTP/1.1 503",
    ]
    assert clients[2].received.endswith(b"closed")


async def test_who_is_sent_to_another_service_after_a_failure_comes_to_its_gates(world: World) -> None:
    also_serve(world, any=None)
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    also_serve(world, any=None, exact=BASIC)
    backend.vanish(ConnectionResetError())
    assert client.received.startswith(b"HTTP/1.1 401")


async def test_who_has_failed_in_one_service_is_nobody_of_that_name_in_another(world: World) -> None:
    also_serve(world, any=None)
    client = world.client()
    world.loop.broken[9000] = ConnectionRefusedError(111, "Connection refused")
    held = asyncio.Event()
    world.loop.outcomes.append(held)
    client.send(GET)
    await settle()
    # The same names, and others who have them.
    leases = tuple(
        Lease("app.example", f"b{n}", Backend("127.0.0.1", 9100 + n), float("inf"), None) for n in range(1)
    )
    world.apply(
        RoutingTable(
            world.table.version + 1,
            {**world.table.services, "app.example": Service("app.example", leases)},
        )
    )
    held.set()
    await settle()
    [backend] = world.loop.connections
    assert world.loop.addresses[-1] == ("127.0.0.1", 9100)
    backend.send(OK)
    await settle()
    assert client.received.startswith(b"HTTP/1.1 200")


async def test_who_was_let_in_to_another_service_comes_to_the_gates_of_the_one_it_reaches(
    world: World,
) -> None:
    also_serve(world, any=FORWARD)
    client = world.client()
    client.send(GET)
    asked = await world.backend()
    also_serve(world, any=FORWARD, exact=BASIC)
    asked.send(b"HTTP/1.1 204 No Content\r\n\r\n")
    assert client.received.startswith(b"HTTP/1.1 401")


async def test_a_service_that_goes_while_its_gate_is_asked_is_unknown(world: World) -> None:
    serve(world, FORWARD)
    client = world.client()
    client.send(GET)
    asked = await world.backend()
    world.apply(RoutingTable(world.table.version + 1, {}))
    world.rules.retain(world.table)
    asked.send(b"HTTP/1.1 204 No Content\r\n\r\n")
    assert client.received.startswith(b"HTTP/1.1 404")


async def test_a_body_goes_with_its_request_to_the_service_that_it_reaches(world: World) -> None:
    also_serve(world, any=FORWARD)
    client = world.client()
    client.send(post(b"")[:-2].replace(b"Content-Length: 0", b"Content-Length: 5") + b"\r\nhe")
    asked = await world.backend()
    also_serve(world, any=FORWARD, exact=FORWARD)
    asked.send(b"HTTP/1.1 204 No Content\r\n\r\n")
    (await world.backend()).send(b"HTTP/1.1 204 No Content\r\n\r\n")
    backend = await world.backend()
    client.send(b"llo")
    assert backend.received.endswith(b"\r\n\r\nhello")
    backend.send(OK)
    assert client.received.startswith(b"HTTP/1.1 200")


# Another server


async def test_the_server_is_asked_about_a_request_and_its_word_goes_on(world: World) -> None:
    serve(world, FORWARD)
    client = world.client()
    client.send(
        b"POST /a?b HTTP/1.1\r\nHost: app.example\r\nCookie: c=1\r\nRemote-User: forged\r\n"
        b"X-Forwarded-Uri: /forged\r\nX_Forwarded_Method: forged\r\nContent-Length: 5\r\n\r\nhello"
    )
    asked = await world.backend()
    assert world.loop.addresses[-1] == ("127.0.0.1", 9091)
    assert asked.received.startswith(b"GET /verify?x=1 HTTP/1.1\r\nHost: 127.0.0.1:9091\r\n")
    for line in (
        b"Cookie: c=1",
        b"X-Forwarded-Method: POST",
        b"X-Forwarded-Uri: /a?b",
        b"X-Forwarded-Host: app.example",
        b"X-Forwarded-For: 192.0.2.7",
        b"X-Forwarded-Proto: http",
    ):
        assert b"\r\n" + line + b"\r\n" in asked.received
    assert b"Content-Length" not in asked.received
    assert asked.received.lower().count(b"x-forwarded-uri") == 1
    assert b"forged" not in asked.received.replace(b"Remote-User: forged", b"")
    asked.send(b"HTTP/1.1 200 OK\r\nRemote-User: ann\r\nOther: x\r\nContent-Length: 2\r\n\r\nok")
    backend = await world.backend()
    assert backend.received.count(b"Remote-User: ann\r\n") == 1
    assert b"Remote-User: forged" not in backend.received
    assert b"Other" not in backend.received
    assert backend.received.endswith(b"hello")
    backend.send(OK)
    assert client.received.startswith(b"HTTP/1.1 200")


async def test_a_field_that_the_answer_has_not_is_not_the_clients_either(world: World) -> None:
    serve(world, FORWARD)
    client = world.client()
    client.send(GET[:-2] + b"remote-user: forged\r\nREMOTE_USER: forged\r\n\r\n")
    (await world.backend()).send(b"HTTP/1.1 204 No Content\r\n\r\n")
    backend = await world.backend()
    assert b"forged" not in backend.received
    backend.send(OK)
    assert client.received.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
async def test_any_other_answer_is_the_clients(world: World, method: bytes) -> None:
    serve(world, FORWARD)
    client = world.client()
    client.send(GET.replace(b"GET", method))
    (await world.backend()).send(
        b"HTTP/1.1 302 Found\r\nLocation: https://login.example/\r\nSet-Cookie: a=1\r\n"
        b"Content-Length: 2\r\n\r\nno"
    )
    assert client.received.startswith(
        b"HTTP/1.1 302 Found\r\nLocation: https://login.example/\r\nSet-Cookie: a=1"
    )
    assert client.received.endswith(b"\r\n\r\nno" if method == b"GET" else b"\r\n\r\n")
    assert world.done[0].status == 302


async def test_an_answer_in_pieces_is_passed_on_whole(world: World) -> None:
    serve(world, FORWARD)
    client = world.client()
    client.send(GET)
    asked = await world.backend()
    asked.send(b"HTTP/1.1 403 Forbidden\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n")
    asked.send(b"1\r\n!\r\n0\r\n\r\n")
    assert client.received.startswith(b"HTTP/1.1 403 Forbidden\r\n")
    assert b"\r\nContent-Length: 3\r\n" in client.received
    assert client.received.endswith(b"\r\n\r\nno!")


async def test_nobody_gets_in_while_the_server_cannot_be_asked(world: World) -> None:
    serve(world, FORWARD)
    world.loop.outcomes.append(ConnectionRefusedError(111, "refused"))
    client = world.client()
    client.send(GET)
    assert (await until_answered(client)).startswith(b"HTTP/1.1 502")
    assert world.done[0].error is not None
    assert world.done[0].error.reason == "auth_unreachable"


async def test_a_stale_connection_is_no_reason_and_a_second_failure_is(world: World) -> None:
    serve(world, FORWARD)
    client = world.client()
    client.send(GET)
    asked = await world.backend()
    asked.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
    client.received = b""
    client.send(GET)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asked.vanish(ConnectionResetError())
    (await world.backend()).vanish(ConnectionResetError())
    assert (await until_answered(client)).startswith(b"HTTP/1.1 502")


async def test_who_leaves_is_asked_about_no_more(world: World) -> None:
    serve(world, FORWARD)
    client = world.client()
    client.send(GET)
    asked = await world.backend()
    client.vanish()
    assert asked.closed
    assert world.done[0].status == 499


async def test_an_answer_without_end_is_cut_off(world: World) -> None:
    serve(world, FORWARD)
    client = world.client()
    client.send(GET)
    asked = await world.backend()
    asked.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 10000000\r\n\r\n" + b"x" * 300_000)
    assert client.received.startswith(b"HTTP/1.1 502")
    assert asked.closed


@pytest.mark.parametrize(
    ("sticky", "shown"),
    [(None, b"SID=%b~1; a=2"), (Sticky("SID", "prefix"), b"SID=1; a=2"), (Sticky("SID"), b"a=2")],
)
async def test_who_is_asked_sees_cookies_as_the_application_does(
    world: World, sticky: Sticky | None, shown: bytes
) -> None:
    serve(world, replace(FORWARD, sticky=sticky))
    client = world.client()
    client.send(GET[:-2] + b"Cookie: SID=%b~1; a=2\r\n\r\n" % (b"m" * 32))
    asked = await world.backend()
    assert b"\r\nCookie: %b\r\n" % shown.replace(b"%b", b"m" * 32) in asked.received
    asked.send(b"HTTP/1.1 204 No Content\r\n\r\n")
    backend = await world.backend()
    assert b"\r\nCookie: %b\r\n" % shown.replace(b"%b", b"m" * 32) in backend.received
    backend.send(OK)
    assert client.received.startswith(b"HTTP/1.1 200")


async def test_what_frames_a_request_is_not_taken_from_the_answer(world: World) -> None:
    names = ("Content-Length", "Host", "Transfer-Encoding", "X-Forwarded-For", "Connection", "X-User")
    auth = ForwardAuth("http://127.0.0.1:9091/", response_headers=names)
    serve(world, ServicePolicy(forward_auth=auth))
    client = world.client()
    client.send(post(b"hello"))
    (await world.backend()).send(
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nHost: other.example\r\nX-Forwarded-For: 192.0.2.99\r\n"
        b"X-User: ann\r\n\r\nok"
    )
    backend = await world.backend()
    assert b"\r\nContent-Length: 5\r\n" in backend.received
    assert backend.received.count(b"Content-Length") == backend.received.count(b"\nHost: ") == 1
    assert b"other.example" not in backend.received
    assert b"192.0.2.99" not in backend.received
    assert b"\r\nX-User: ann\r\n" in backend.received
    backend.send(OK)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000,
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_nobody_gets_in_by_an_answer_that_is_none(world: World, answer: bytes) -> None:
    serve(world, FORWARD)
    client = world.client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    asked = await world.backend()
    assert b"Upgrade" not in asked.received
    asked.send(answer)
    assert client.received.startswith(b"HTTP/1.1 502")
    assert asked.closed


async def test_a_hundred_is_the_backends_and_comes_when_the_gate_is_open(world: World) -> None:
    serve(world, FORWARD)
    client = world.client()
    client.send(post(b"hello", b"Expect: 100-continue\r\n")[:-5])
    asked = await world.backend()
    assert b"Expect" not in asked.received
    asked.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n")
    assert not client.received
    asked.send(b"HTTP/1.1 204 No Content\r\n\r\n")
    backend = await world.backend()
    assert b"\r\nExpect: 100-continue\r\n" in backend.received
    backend.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert bytes(client.received).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
    client.send(b"hello")
    backend.send(OK)
    assert client.received.endswith(b"ok")


async def test_an_upgrade_goes_through_a_gate_and_becomes_a_tunnel(world: World) -> None:
    serve(
        world, replace(FORWARD, response_headers=FieldChanges(set=(("X-Here", "yes"),), remove=("X-Inner",)))
    )
    client = world.client()
    client.send(
        b"GET / HTTP/1.1\r\nHost: app.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nearly"
    )
    (await world.backend()).send(b"HTTP/1.1 204 No Content\r\n\r\n")
    backend = await world.backend()
    assert b"\r\nUpgrade: websocket\r\n" in backend.received
    backend.send(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX-Inner: 1\r\n\r\n"
    )
    assert client.received.startswith(b"HTTP/1.1 101 ")
    assert b"\r\nX-Here: yes\r\n" in client.received
    assert b"X-Inner" not in client.received
    assert b"\r\nUpgrade: websocket\r\n" in client.received
    assert backend.received.endswith(b"early")
    backend.vanish()
    client.vanish()


async def test_a_server_that_is_down_does_not_fill_the_log(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    serve(world, FORWARD)
    for _ in range(5):
        world.loop.outcomes.append(ConnectionRefusedError(111, "refused"))
        client = world.client()
        client.send(GET)
        assert (await until_answered(client)).startswith(b"HTTP/1.1 502")
    assert len([record for record in caplog.records if "forward_auth" in record.message]) == 1


async def test_its_connections_end_with_the_worker_those_that_are_being_made_too(world: World) -> None:
    serve(world, FORWARD)
    client = world.client()
    client.send(GET)
    asked = await world.backend()
    asked.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
    others = [world.client() for _ in range(2)]
    others[0].send(GET)
    await settle()
    world.loop.outcomes.append(asyncio.Event())  # it never comes
    others[1].send(GET)
    await settle()
    before = len(asyncio.all_tasks())
    for other in others:
        other.vanish()
    await world.pools.close()
    assert len(asyncio.all_tasks()) == before - 1
    assert all(connection.closed for connection in world.loop.connections)


async def test_short_descriptors_close_its_idle_connections(world: World) -> None:
    serve(world, FORWARD)
    client = world.client()
    client.send(GET)
    asked = await world.backend()
    asked.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
    assert not asked.closed
    world.pools.close_idle()
    assert asked.closed


async def test_what_is_said_of_the_resource_is_not_said_to_the_server(world: World) -> None:
    serve(world, FORWARD)
    client = world.client()
    conditions = b'If-None-Match: "1"\r\nRange: bytes=0-1\r\nIf-Modified-Since: x\r\n'
    client.send(GET[:-2] + conditions + b"\r\n")
    asked = await world.backend()
    for line in conditions.split(b"\r\n"):
        assert not line or line not in asked.received
    asked.send(b"HTTP/1.1 204 No Content\r\n\r\n")
    backend = await world.backend()
    assert b"\r\n" + conditions in backend.received
    backend.send(OK)
