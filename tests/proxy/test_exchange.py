"""Route, claim, send, retry, release: what an exchange decides, seen from both of its ends."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import cast

import pytest

from portero_py.core.balancing.balancers import Balancers
from portero_py.core.certificates import Certificate
from portero_py.core.model import Service
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import BodyTooLarge
from portero_py.proxy.downstream.http1 import Http1Downstream
from portero_py.proxy.exchange import CONNECT_PATIENCE, Exchange
from portero_py.proxy.upstream.http1 import UpstreamHttp1
from tests.proxy.dialogue import (
    GET,
    HIGH_WATER,
    OK,
    ScriptedTransport,
    World,
    get,
    post,
    settle,
    statuses,
    until,
)

REFUSED = ConnectionRefusedError(111, "Connection refused")


def reasons(world: World) -> list[str]:
    return [done.error.reason if done.error is not None else "" for done in world.done]


async def test_an_unknown_host_is_a_404(world: World) -> None:
    client = world.client()
    client.send(get(b"/", host=b"nowhere.example"))
    assert statuses(client.received) == [404]
    assert reasons(world) == ["no_such_service"]
    assert not client.closed


async def test_a_service_without_backends_is_a_503_that_says_when_to_come_back(world: World) -> None:
    world.table = RoutingTable(2, {"app.example": Service("app.example", ())})
    client = world.client()
    client.send(GET)
    assert statuses(client.received) == [503]
    assert b"\r\nRetry-After: 2\r\n" in client.received
    assert reasons(world) == ["no_backend"]


async def test_connect_is_a_405(world: World) -> None:
    client = world.client()
    client.send(b"CONNECT app.example:443 HTTP/1.1\r\nHost: app.example\r\n\r\n")
    assert statuses(client.received) == [405]
    assert b"\r\nAllow: " in client.received


async def test_a_host_of_another_certificate_is_a_421(world: World) -> None:
    client = world.client()
    assert isinstance(client.protocol, Http1Downstream)
    client.protocol._peer.certificate = cast("Certificate", object())
    client.send(GET)
    (await world.backend()).send(OK)
    world.misdirects = True
    client.send(GET + get(b"/", host=b"APP.example"))
    world.loop.connections[0].send(OK)
    assert statuses(client.received) == [200, 200, 421]


async def test_a_body_over_the_limit_is_a_413_before_anything_is_sent(world: World) -> None:
    world.limits = replace(world.limits, body_bytes=3)
    client = world.client()
    client.send(post(b"abcd"))
    assert statuses(client.received) == [413]
    assert world.loop.connections == []
    assert client.ended


async def test_a_chunked_body_over_the_limit_is_a_413_and_the_backend_is_given_up(world: World) -> None:
    world.limits = replace(world.limits, body_bytes=3)
    client = world.client()
    client.send(b"POST / HTTP/1.1\r\nHost: app.example\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
    backend = await world.backend()
    client.send(b"1\r\nd\r\n0\r\n\r\n" + GET)
    assert statuses(client.received) == [413]
    assert not backend.received.endswith(b"0\r\n\r\n")
    await settle()
    assert backend.aborted
    assert [type(done.error) for done in world.done] == [BodyTooLarge]


async def test_a_body_over_the_limit_behind_an_early_response_cuts_it_off(world: World) -> None:
    world.limits = replace(world.limits, body_bytes=3)
    client = world.client()
    client.send(b"POST / HTTP/1.1\r\nHost: app.example\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\na")
    client.send(b"3\r\nbcd\r\n0\r\n\r\n")
    assert client.received.endswith(b"\r\n\r\na")
    assert client.closed


async def test_requests_take_turns_over_the_backends(world: World) -> None:
    world.register(3)
    client = world.client()
    for _ in range(6):
        client.send(GET)
        await settle()
        [connection for connection in world.loop.connections if connection.received][-1].send(OK)
        for connection in world.loop.connections:
            connection.received = b""
    assert [port for _, port in world.loop.addresses] == [9000, 9001, 9002]


async def test_a_refused_connection_costs_the_client_nothing_while_another_backend_can_serve(
    world: World,
) -> None:
    world.register(3)
    world.loop.outcomes = [REFUSED, REFUSED]
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    backend.send(OK)
    assert statuses(client.received) == [200]
    assert [port for _, port in world.loop.addresses] == [9000, 9001, 9002]
    assert [(done.status, done.retries, done.error) for done in world.done] == [(200, 2, None)]


async def test_when_no_backend_can_be_reached_it_is_a_502(world: World) -> None:
    world.register(2)
    world.loop.outcomes = [REFUSED, REFUSED]
    client = world.client()
    client.send(GET)
    await settle()
    assert statuses(client.received) == [502]
    assert b"127.0.0.1" not in client.received
    assert str(world.done[0].error) == "backend 127.0.0.1:9001 cannot be reached: Connection refused"


async def test_every_lease_is_tried_while_connects_are_refused(world: World) -> None:
    world.register(10)
    client = world.client()
    for _ in range(3):
        world.loop.outcomes = [REFUSED] * 9
        client.send(GET)
        await until(lambda: bool(world.loop.connections))
        world.loop.connections.pop().send(OK + b"close, please")
    assert statuses(client.received) == [200] * 3
    assert [done.retries for done in world.done] == [9] * 3
    assert world.counters.retries["app.example", "connect_failed"] == 27


async def test_a_request_that_was_sent_goes_to_three_other_backends_at_most(world: World) -> None:
    world.register(9)

    def greet(transport: ScriptedTransport) -> None:
        asyncio.get_running_loop().call_soon(transport.vanish)

    world.loop.greet = greet
    client = world.client()
    client.send(GET)
    await until(lambda: bool(world.done))
    assert statuses(client.received) == [502]
    assert len(world.loop.addresses) == 1 + 3


async def test_backends_that_swallow_packets_are_tried_for_four_time_outs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.register(9)

    async def swallow(*_: object, **__: object) -> None:
        world.loop.addresses.append(("", 0))
        world.clock.now += world.timeouts.connect
        raise TimeoutError

    monkeypatch.setattr(world.loop, "create_connection", swallow)
    client = world.client()
    client.send(GET)
    await until(lambda: bool(world.done))
    assert statuses(client.received) == [502]
    assert len(world.loop.addresses) == CONNECT_PATIENCE


async def test_the_patience_begins_anew_with_every_connection_that_was_made(world: World) -> None:
    world.register(3)
    world.loop.outcomes = [REFUSED]
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    world.clock.now += 50
    world.loop.outcomes = [REFUSED]
    backend.vanish()
    await settle()
    assert statuses(client.received) == [502]
    assert len(world.loop.addresses) == 3, "the last lease was not tried"


async def test_a_service_that_vanishes_between_two_tries_is_a_502(world: World) -> None:
    world.register(2)
    world.loop.outcomes = [REFUSED]
    client = world.client()
    client.send(GET)
    world.table = RoutingTable(2, {})
    await settle()
    assert statuses(client.received) == [502]


async def test_a_backend_that_closes_as_soon_as_it_is_reached_is_left_for_another(world: World) -> None:
    world.register(2)
    world.loop.greet = lambda transport: transport.vanish() if len(world.loop.connections) == 1 else None
    client = world.client()
    client.send(post(b"abc"))
    await world.backend()
    backend = await world.backend()
    assert backend.received.endswith(b"\r\n\r\nabc")
    backend.send(OK)
    assert statuses(client.received) == [200]


async def test_a_backend_that_speaks_first_is_no_http_server(world: World) -> None:
    world.loop.greet = lambda transport: transport.send(b"SSH-2.0-OpenSSH\r\n")
    client = world.client()
    client.send(GET)
    await settle()
    assert statuses(client.received) == [502]


async def test_a_stale_idle_connection_is_replaced_by_a_new_one_to_the_same_backend(world: World) -> None:
    stale = await world.idle_backend()
    client = world.client()
    client.send(GET)
    assert stale.received.startswith(b"GET / ")
    stale.send_end()
    backend = await world.backend()
    assert backend.received == stale.received
    backend.send(OK)
    assert statuses(client.received) == [200]
    assert world.done[-1].error is None


async def test_a_stale_idle_connection_does_not_cost_an_upgrade(world: World) -> None:
    stale = await world.idle_backend()
    client = world.client()
    client.send(get(b"/", b"Connection: Upgrade\r\nUpgrade: websocket\r\n"))
    stale.vanish()
    backend = await world.backend()
    backend.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
    assert statuses(client.received) == [101]
    backend.vanish()


async def test_every_retry_of_a_stale_connection_uses_a_new_one(world: World) -> None:
    stale = await world.idle_backend()
    client = world.client()
    client.send(GET)
    stale.vanish()
    (await world.backend()).vanish()
    await settle()
    assert statuses(client.received) == [502]
    assert len(world.loop.connections) == 2


async def test_a_fresh_connection_that_breaks_in_silence_moves_the_request_to_another_backend(
    world: World,
) -> None:
    world.register(2)
    client = world.client()
    client.send(GET)
    (await world.backend()).send_end()
    backend = await world.backend()
    backend.send(OK)
    assert statuses(client.received) == [200]
    assert [port for _, port in world.loop.addresses] == [9000, 9001]


@pytest.mark.parametrize("request_bytes", [post(b"abc"), b"PATCH / HTTP/1.1\r\nHost: app.example\r\n\r\n"])
async def test_what_a_backend_may_have_acted_on_is_not_sent_again(world: World, request_bytes: bytes) -> None:
    world.register(2)
    client = world.client()
    client.send(request_bytes)
    (await world.backend()).vanish()
    await settle()
    assert statuses(client.received) == [502]
    assert len(world.loop.connections) == 1


async def test_a_request_that_was_answered_in_part_is_not_sent_again(world: World) -> None:
    world.register(2)
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    backend.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
    backend.vanish()
    await settle()
    assert statuses(client.received) == [103, 502]
    assert len(world.loop.connections) == 1


async def test_a_body_that_was_not_begun_may_still_go_elsewhere(world: World) -> None:
    stale = await world.idle_backend()
    client = world.client()
    client.send(post(b"abc")[:-3])
    stale.vanish()
    backend = await world.backend()
    client.send(b"abc")
    assert stale.received == b""
    assert backend.received.endswith(b"\r\n\r\nabc")
    backend.send(OK)
    assert statuses(client.received) == [200]


async def test_a_body_waits_while_a_connection_is_made(world: World) -> None:
    connected = asyncio.Event()
    world.loop.outcomes = [connected]
    client = world.client()
    client.send(post(b"abcdef")[:-3])
    assert not client.reading
    await settle()
    await world.pass_time(2)
    connected.set()
    backend = await world.backend()
    assert backend.received.endswith(b"\r\n\r\nabc")
    client.send(b"def")
    assert backend.received.endswith(b"\r\n\r\nabcdef")
    backend.send(OK)
    assert statuses(client.received) == [200]


async def test_a_whole_chunked_body_waits_while_a_connection_is_made(world: World) -> None:
    connected = asyncio.Event()
    world.loop.outcomes = [connected]
    client = world.client()
    client.send(
        b"POST / HTTP/1.1\r\nHost: app.example\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3\r\nabc\r\n3\r\ndef\r\n0\r\nX-Sum: 1\r\n\r\n"
    )
    await settle()
    connected.set()
    backend = await world.backend()
    assert backend.received.endswith(b"\r\n\r\n6\r\nabcdef\r\n0\r\nX-Sum: 1\r\n\r\n")
    backend.send(OK)
    assert client.reading
    assert statuses(client.received) == [200]


async def test_a_body_goes_on_when_the_second_backend_has_an_idle_connection(world: World) -> None:
    world.register(2)
    idle = await world.idle_backend()  # to 9000
    world.loop.outcomes = [REFUSED]
    client = world.client()
    client.send(post(b"abcdef")[:-3])  # 9001 refuses
    assert not client.reading
    await settle()
    assert idle.received.endswith(b"\r\n\r\nabc")
    client.send(b"def")
    idle.send(OK)
    assert statuses(client.received) == [200]


async def test_a_body_stays_held_back_when_the_new_connection_is_full_at_once(world: World) -> None:
    connected = asyncio.Event()
    world.loop.outcomes = [connected]
    world.loop.greet = lambda transport: transport.stop_reading()
    client = world.client()
    client.send(post(bytes(300_000))[:200_000])
    await settle()
    connected.set()
    backend = await world.backend()
    assert not client.reading
    backend.read_all()
    assert client.reading
    client.vanish()
    await settle()


async def test_a_new_connection_is_held_back_when_the_client_is_behind_already(world: World) -> None:
    world.register(2)
    connected = asyncio.Event()
    client = world.client()
    client.send(GET)
    first = await world.backend()
    client.stop_reading()
    world.loop.outcomes = [connected]  # the next turn is the other backend's
    client.send(get(b"/2"))
    first.send(b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n" + bytes(60_000))
    await settle()
    client.unsent = HIGH_WATER + 1
    assert client.protocol is not None
    client._writing_paused = True
    client.protocol.pause_writing()  # uvloop may notice only at the end of its iteration
    connected.set()
    second = await world.backend()
    assert not second.reading
    client.read_all()
    assert second.reading
    second.send(OK)
    assert statuses(client.received) == [200, 200]


async def test_a_client_that_leaves_while_a_connection_is_made_leaves_it_to_the_pool(world: World) -> None:
    connected = asyncio.Event()
    world.loop.outcomes = [connected]
    client = world.client()
    client.send(GET)
    await settle()
    client.vanish()
    connected.set()
    backend = await world.backend()
    assert backend.received == b""
    assert [pool.idle for pool in world.all_pools()] == [1]
    assert [done.status for done in world.done] == [499]


async def test_a_client_that_leaves_before_a_connection_fails_is_not_told(world: World) -> None:
    world.loop.outcomes = [REFUSED]
    client = world.client()
    client.send(GET)
    client.vanish()
    await settle()
    assert client.received == b""
    assert reasons(world) == ["client_gone"]


async def test_a_client_that_leaves_in_its_upload_ends_the_backends_connection(world: World) -> None:
    client = world.client()
    client.send(post(b"abc")[:-1])
    backend = await world.backend()
    client.vanish(ConnectionResetError())
    await settle()
    assert backend.aborted
    assert reasons(world) == ["client_gone"]


async def test_a_client_that_leaves_in_its_download_ends_the_backends_connection(world: World) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab")
    client.vanish()
    await settle()
    assert backend.aborted
    assert [(done.status, done.upstream_status) for done in world.done] == [(499, 200)]


async def test_a_response_to_a_closing_client_goes_nowhere_and_ends_the_exchange(world: World) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    client.close()
    backend.send(b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK)
    assert client.received == b""
    await settle()


async def test_a_streamed_response_to_a_closing_client_goes_nowhere(world: World) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    client.close()
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\na")
    backend.send(b"bc")
    assert client.received == b""
    await settle()


async def test_an_answer_to_head_by_portero_has_no_body(world: World) -> None:
    client = world.client()
    client.send(b"HEAD / HTTP/1.1\r\nHost: nowhere.example\r\n\r\n")
    head, _, body = client.received.partition(b"\r\n\r\n")
    assert b"\r\nContent-Length: " in head
    assert body == b""


class Fault(Exception):
    """Something of our own that should not happen."""


def fail(*_: object, **__: object) -> None:
    raise Fault


async def test_a_fault_when_a_connection_is_ready_is_a_500(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = world.client()
    client.send(GET)
    with monkeypatch.context() as patched:
        patched.setattr(UpstreamHttp1, "send_head", fail)
        backend = await world.backend()
        await settle()
    assert statuses(client.received) == [500]
    assert backend.aborted
    assert reasons(world) == ["internal_error"]
    assert [record.exc_info is not None for record in caplog.records if record.name.startswith("portero")]


@pytest.mark.parametrize("how", ["connect", "break"])
async def test_a_fault_in_a_retry_is_a_500(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    world.register(2)
    world.loop.outcomes = [REFUSED] if how == "connect" else []
    client = world.client()
    client.send(GET)
    with monkeypatch.context() as patched:
        patched.setattr(Balancers, "pick", fail)
        if how == "break":
            (await world.backend()).vanish()
        await settle()
    assert statuses(client.received) == [500]
    assert "Fault" in caplog.text


@pytest.mark.parametrize("answer", [OK, OK[:-1], OK[:-2]])
async def test_a_response_that_cannot_be_passed_on_ends_the_clients_connection(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answer: bytes
) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    with monkeypatch.context() as patched:
        for method in ("send_response", "send_head", "send_body"):
            patched.setattr(Http1Downstream, method, fail)
        backend.send(answer)
    await settle()
    assert client.closed
    assert backend.aborted
    assert len(world.done) == 1
    assert [pool.idle for pool in world.all_pools()] == [0]
    assert "Fault" in caplog.text


async def test_a_time_out_that_cannot_be_told_ends_the_clients_connection(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = world.client()
    client.send(GET)
    await world.backend()
    with monkeypatch.context() as patched:
        patched.setattr(Http1Downstream, "send_response", fail)
        await world.pass_time(67)
    assert client.closed
    assert [done.error and done.error.reason for done in world.done] == ["internal_error"]
    assert "Fault" in caplog.text


async def test_the_end_of_a_response_that_cannot_be_told_ends_the_clients_connection(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\n\r\nabc")
    with monkeypatch.context() as patched:
        patched.setattr(Http1Downstream, "send_end", fail)
        backend.send_end()
    assert client.closed
    assert len(world.done) == 1
    assert "Fault" in caplog.text


async def test_a_fault_in_the_next_request_is_not_the_last_ones(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client, other = world.client(), world.client()
    client.send(GET + get(b"/2"))
    backend = await world.backend()
    with monkeypatch.context() as patched:
        patched.setattr(Exchange, "start", fail)
        backend.send(OK)
    await settle()
    assert client.aborted
    assert [(done.status, done.head.target) for done in world.done] == [(200, b"/"), (499, b"/2")]
    assert not backend.closed, "it has done nothing wrong"
    other.send(GET)
    backend.send(OK)
    assert statuses(other.received) == [200]
    assert "Fault" in caplog.text


async def test_a_trusted_proxys_request_id_is_kept(world: World) -> None:
    client = world.client()
    assert isinstance(client.protocol, Http1Downstream)
    client.protocol._peer.forwarding._trusted = True
    client.send(get(b"/", b"X-Request-ID: theirs\r\nX-Forwarded-For: 198.51.100.1\r\n"))
    backend = await world.backend()
    assert b"\r\nX-Request-ID: theirs\r\n" in backend.received
    assert b"\r\nX-Forwarded-For: 198.51.100.1, 192.0.2.7\r\n" in backend.received
    backend.send(OK)


async def test_what_a_stranger_says_about_himself_is_dropped(world: World) -> None:
    client = world.client()
    client.send(get(b"/", b"X-Request-ID: theirs\r\nX-Forwarded-For: 198.51.100.1\r\nX_Real_IP: 1\r\n"))
    backend = await world.backend()
    assert b"theirs" not in backend.received
    assert b"198.51.100.1" not in backend.received
    assert b"Real" not in backend.received
    backend.send(OK)
