"""Passwords and the server that is asked: who gets in, who waits, who is turned away."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import replace

import bcrypt
import pytest

from portero_py.core.policies import BasicAuth, ForwardAuth, ServicePolicy, Sticky
from portero_py.core.routing_table import RoutingTable
from portero_py.proxy.gates import basic_auth
from tests.proxy.dialogue import GET, OK, ScriptedTransport, World

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
    serve(world, replace(BASIC, basic_auth=BasicAuth((("bob", HASHED),))))
    other = world.client()
    other.send(login("ann", "secret"))
    assert (await until_answered(other)).startswith(b"HTTP/1.1 401")


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
