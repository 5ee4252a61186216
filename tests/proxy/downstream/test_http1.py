"""The client's side: bytes in, bytes out, and what happens to those who do not play along."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from portero_py.errors import BadRequest, HeadTimeout, HeadTooLarge, TargetTooLong
from portero_py.proxy.downstream import http1
from portero_py.proxy.downstream.http1 import PIPELINE_LIMIT, Http1Downstream
from portero_py.proxy.downstream.leaving import LINGER_BYTES
from portero_py.wire.framing import CHUNKS_AT_ONCE
from portero_py.wire.websocket import GOING_AWAY
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

NOWHERE = get(b"/", host=b"nowhere.example")


async def test_a_request_goes_to_the_backend_and_its_response_to_the_client_in_one_write_each(
    world: World,
) -> None:
    client = world.client()
    client.send(b"GET /a?b HTTP/1.1\r\nHost: App.example\r\nAccept: */*\r\n\r\n")
    backend = await world.backend()
    assert backend.received == (
        b"GET /a?b HTTP/1.1\r\nHost: App.example\r\nAccept: */*\r\nX-Forwarded-For: 192.0.2.7\r\n"
        b"X-Forwarded-Proto: http\r\nX-Forwarded-Host: App.example\r\nX-Request-ID: id-1\r\n\r\n"
    )
    backend.send(b"HTTP/1.1 200 Fine\r\nX: y\r\nContent-Length: 2\r\n\r\nok")
    assert client.received == b"HTTP/1.1 200 Fine\r\nX: y\r\nContent-Length: 2\r\n\r\nok"
    assert not client.closed


async def test_requests_are_found_however_their_bytes_are_cut(world: World) -> None:
    client = world.client()
    for byte in b"\r\n\r\n" + NOWHERE + b"\r\n" + NOWHERE:
        client.send(bytes([byte]))
    assert statuses(client.received) == [404, 404]


async def test_a_flood_of_empty_lines_costs_no_more_than_reading_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = world.client()
    looks = 0

    def counted(*arguments: object) -> int:
        nonlocal looks
        looks += 1
        return 0

    monkeypatch.setattr(http1, "find_head", counted)
    client.send(b"\r\n" * 500_000)  # with a copy of the rest a line: 250 GB
    assert looks == 0
    await world.pass_time(16)
    assert client.closed


async def test_hundreds_of_pipelined_requests_that_end_at_once_are_all_answered(world: World) -> None:
    client = world.client()
    client.send(NOWHERE * 700)
    assert len(statuses(client.received)) == http1.BURST  # then the others have their turn
    await until(lambda: len(statuses(client.received)) == 700)
    assert statuses(client.received) == [404] * 700


async def test_a_client_that_pipelines_and_leaves_is_answered_to_the_last_request(world: World) -> None:
    client = world.client()
    client.send(NOWHERE * 200)
    client.send_end()
    await until(lambda: client.closed)
    assert statuses(client.received) == [404] * 200


async def test_a_flood_of_pipelined_requests_is_not_read_faster_than_it_is_answered(world: World) -> None:
    client = world.client()
    client.send(NOWHERE * 5000)
    assert not client.reading
    await until(lambda: client.reading)
    await until(lambda: len(statuses(client.received)) == 5000)


async def test_pipelined_requests_are_answered_in_order(world: World) -> None:
    client = world.client()
    client.send(get(b"/1") + NOWHERE + get(b"/2"))
    backend = await world.backend()
    assert client.received == b""
    backend.send(OK)
    assert statuses(client.received) == [200, 404]
    assert b"GET /2 " in backend.received
    backend.send(OK)
    assert statuses(client.received) == [200, 404, 200]
    assert len(world.loop.connections) == 1


async def test_a_client_that_reads_no_answers_gets_no_more_of_them_and_is_given_up(world: World) -> None:
    client = world.client()
    client.stop_reading()
    while client.reading:
        client.send(NOWHERE * 100)
        await settle()
    assert client.unsent < HIGH_WATER + 1000
    assert len(client.received) < HIGH_WATER + 1000
    await world.pass_time(97)
    assert client.aborted


async def test_a_client_that_reads_late_gets_all_its_answers(world: World) -> None:
    client = world.client()
    client.stop_reading()
    sent = 0
    while client.reading:
        client.send(NOWHERE * 100)
        sent += 100
        await settle()
    while len(statuses(client.received)) < sent:
        before = len(client.received)
        client.read_all()
        await settle()
        assert len(client.received) > before
    assert client.reading
    assert statuses(client.received) == [404] * sent


async def test_a_pipelined_upload_that_filled_the_buffer_goes_on_over_an_idle_connection(
    world: World,
) -> None:
    backend = await world.idle_backend()
    body = bytes(PIPELINE_LIMIT * 3)
    upload = post(body)
    client = world.client()
    client.send(GET)
    client.send(upload[: PIPELINE_LIMIT + 1000])
    assert not client.reading
    backend.send(OK)
    client.send(upload[PIPELINE_LIMIT + 1000 :])
    assert backend.received.endswith(body)
    backend.send(OK)
    assert statuses(client.received) == [200, 200]


async def test_a_half_closed_client_gets_the_answers_to_all_its_requests(world: World) -> None:
    client = world.client()
    client.send(get(b"/1") + NOWHERE + get(b"/2"))
    client.send_end()
    backend = await world.backend()
    backend.send(OK)
    assert not client.closed
    backend.send(OK)
    assert statuses(client.received) == [200, 404, 200]
    assert client.closed
    assert not client.aborted


async def test_a_half_closed_client_that_reads_late_gets_the_answers_to_all_its_requests(
    world: World,
) -> None:
    client = world.client()
    client.stop_reading()
    client.send(NOWHERE * 700)
    await settle()
    assert len(statuses(client.received)) < 700
    client.send_end()
    assert not client.closed
    while not client.closed:
        client.read_all()
        await settle()
    assert statuses(client.received) == [404] * 700


async def test_a_half_closed_client_with_half_a_request_is_let_go(world: World) -> None:
    client = world.client()
    client.send(GET + b"GET /")
    client.send_end()
    (await world.backend()).send(OK)
    assert statuses(client.received) == [200]
    assert client.closed


async def test_a_half_closed_client_with_garbage_behind_its_request_is_answered_and_let_go(
    world: World,
) -> None:
    client = world.client()
    client.send(GET + b"garbage\r\n\r\n")
    client.send_end()
    (await world.backend()).send(OK)
    assert statuses(client.received) == [200, 400]
    assert client.closed


async def test_the_end_of_an_idle_connection_ends_it(world: World) -> None:
    client = world.client()
    client.send_end()
    assert client.closed


@pytest.mark.parametrize("tls", [False, True])
async def test_a_client_that_ends_and_does_not_take_the_rest_is_ended(world: World, tls: bool) -> None:
    client = world.client(tls=tls)
    client.stop_reading()
    client.send(GET)
    (await world.backend()).send(OK)
    client.send_end()
    assert client.closed
    assert not client.lost
    await world.pass_time(30)
    assert client.lost


async def test_a_client_that_ends_and_takes_the_rest_slowly_gets_it(world: World) -> None:
    client = world.client()
    client.stop_reading()
    client.send(GET)
    (await world.backend()).send(OK)
    client.send_end()
    for _ in range(5):
        await world.pass_time(9)
        assert not client.lost
        client.unsent -= 5
    client.read_all()
    assert client.lost
    assert not client.aborted


async def test_an_empty_line_before_the_preface_of_http2_makes_it_a_bad_request(world: World) -> None:
    for start in (b"\r\n", b"\r\n\r\n\r\n"):
        together, apart = world.client(), world.client()
        together.send(start + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        apart.send(start)
        apart.send(b"PRI * HTTP/2.0\r\n\r\n")
        assert statuses(together.received) == statuses(apart.received) == [400]


async def test_a_tls_client_that_ends_is_gone(world: World) -> None:
    client = world.client(tls=True)
    client.send(GET)
    backend = await world.backend()
    client.send_end()
    await settle()
    assert client.closed
    assert backend.aborted
    assert [exchange.status for exchange in world.done] == [499]


async def test_an_end_in_the_middle_of_a_body_ends_the_exchange(world: World) -> None:
    client = world.client()
    client.send(post(b"abc")[:-1])
    backend = await world.backend()
    client.send_end()
    await settle()
    assert backend.aborted
    assert [exchange.status for exchange in world.done] == [499]


@pytest.mark.parametrize(
    ("request_bytes", "status", "error"),
    [
        (b"garbage\r\n\r\n", 400, BadRequest),
        (b"\x16\x03\x01\x02", 400, BadRequest),
        (b"GET /" + b"x" * 9000, 414, TargetTooLong),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 33000, 431, HeadTooLarge),
    ],
)
async def test_what_is_no_request_is_answered_and_the_connection_ends(
    world: World, request_bytes: bytes, status: int, error: type[Exception]
) -> None:
    client = world.client()
    client.send(request_bytes)
    assert statuses(client.received) == [status]
    assert b"\r\nConnection: close\r\n" in client.received
    assert client.ended
    assert [type(refused) for refused in world.refused] == [error]
    client.send(GET)
    assert world.done == []
    await world.pass_time(7)
    assert client.closed


async def test_who_goes_on_sending_after_the_last_response_is_cut_off(world: World) -> None:
    client = world.client()
    client.send(b"garbage\r\n\r\n")
    client.send(bytes(LINGER_BYTES))
    assert not client.closed
    client.send(b"x")
    assert client.closed


async def test_a_malformed_chunk_ends_the_exchange_and_the_connection(world: World) -> None:
    client = world.client()
    client.send(b"POST / HTTP/1.1\r\nHost: app.example\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
    backend = await world.backend()
    assert backend.received.endswith(b"\r\n\r\n3\r\nabc\r\n")
    client.send(b"3\r\nabcd")
    assert statuses(client.received) == [400]
    await settle()
    assert backend.aborted
    assert [exchange.status for exchange in world.done] == [400]


async def test_a_malformed_chunk_behind_an_early_response_cuts_it_off(world: World) -> None:
    client = world.client()
    client.send(b"POST / HTTP/1.1\r\nHost: app.example\r\nTransfer-Encoding: chunked\r\n\r\n")
    backend = await world.backend()
    client.send(b"1\r\na\r\n")
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab")
    client.send(b"zz\r\n")
    assert client.received.endswith(b"\r\n\r\nab")
    assert client.closed
    assert [(done.status, done.error and done.error.reason) for done in world.done] == [(200, "bad_request")]


async def test_chunked_bodies_are_framed_anew_and_their_trailers_passed(world: World) -> None:
    client = world.client()
    client.send(
        b"POST / HTTP/1.1\r\nHost: app.example\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3;x=y\r\nabc\r\n0\r\nX-Sum: 1\r\nContent-Length: 7\r\n\r\n" + GET
    )
    backend = await world.backend()
    assert b"Transfer-Encoding: chunked\r\n" in backend.received
    assert backend.received.endswith(b"\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n")
    backend.send(OK)
    backend.send(OK)
    assert statuses(client.received) == [200, 200]


async def test_a_head_that_does_not_come_in_time_is_a_408(world: World) -> None:
    client = world.client()
    client.send(b"GET / HT")
    await world.pass_time(10)
    assert client.received == b""
    client.send(b"TP")
    await world.pass_time(7)
    assert statuses(client.received) == [408]
    assert [type(error) for error in world.refused] == [HeadTimeout]


async def test_the_time_for_a_head_begins_with_its_first_byte(world: World) -> None:
    client = world.client()
    client.send(NOWHERE)
    await world.pass_time(60)
    client.send(b"G")
    await world.pass_time(14)
    assert statuses(client.received) == [404]
    await world.pass_time(3)
    assert statuses(client.received) == [404, 408]


async def test_an_idle_connection_is_closed_without_a_word(world: World) -> None:
    client = world.client()
    client.send(NOWHERE)
    await world.pass_time(74)
    assert not client.closed
    await world.pass_time(3)
    assert client.closed
    assert statuses(client.received) == [404]


async def test_a_body_that_stops_coming_is_a_408(world: World) -> None:
    client = world.client()
    client.send(post(b"abc")[:-1])
    backend = await world.backend()
    await world.pass_time(62)
    assert statuses(client.received) == [408]
    assert backend.aborted
    assert [exchange.status for exchange in world.done] == [408]


async def test_a_client_that_has_been_served_counts_as_idle_before_one_that_has_not(world: World) -> None:
    served, new = world.client(), world.client()
    served.send(NOWHERE)
    for client, idle in ((served, 4.0), (new, 2.0)):
        protocol = client.protocol
        assert isinstance(protocol, Http1Downstream)
        assert protocol.idle_seconds(world.clock.now + 4) == idle
        client.send(NOWHERE[:10])
        assert protocol.idle_seconds(world.clock.now + 4) == 0.0


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_comes_too_slowly_is_a_408(world: World, chunked: bool) -> None:
    world.limits = replace(world.limits, body_rate=100)
    client = world.client()
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 5000"
    client.send(b"POST / HTTP/1.1\r\nHost: app.example\r\n%b\r\n\r\n" % framing)
    backend = await world.backend()
    for _ in range(30):
        client.send(b"1\r\nx\r\n" if chunked else b"x")
        await world.pass_time(1)
        if client.received:
            break
    assert statuses(client.received) == [408]
    assert backend.aborted
    assert world.counters.refused == {"body_rate": 1}


async def test_a_body_that_comes_fast_enough_is_passed_on_however_long_it_takes(world: World) -> None:
    world.limits = replace(world.limits, body_rate=100)
    client = world.client()
    client.send(post(bytes(40_000))[:-40_000])
    backend = await world.backend()
    for burst in range(10):  # 4000 bytes in 30 seconds, but never less than 2000 in 20
        client.send(bytes(4000))
        await world.pass_time(15 if burst % 2 else 10)
        assert not client.received, burst
    backend.send(OK)
    assert statuses(client.received) == [200]
    client.send(GET)  # the next request is not measured
    backend.send(OK)
    await world.pass_time(30)
    assert statuses(client.received) == [200, 200]


async def test_a_body_is_not_measured_while_its_backend_is_behind(world: World) -> None:
    world.limits = replace(world.limits, body_rate=100)
    client = world.client()
    client.send(post(bytes(300_000))[:-300_000])
    backend = await world.backend()
    backend.stop_reading()
    client.send(bytes(100_000))
    for _ in range(4):
        backend.unsent -= 1000
        await world.pass_time(50)
    backend.read_all()
    await world.pass_time(15)
    assert client.received == b"", "the seconds began anew"
    await world.pass_time(12)
    assert statuses(client.received) == [408]


@pytest.mark.parametrize("conversation", ["response", "grpc", "unlimited"])
async def test_a_conversation_is_not_measured(world: World, conversation: str) -> None:
    world.limits = replace(world.limits, body_rate=1000)
    client = world.client()
    kind = b"application/grpc" if conversation == "grpc" else b"text/plain"
    client.send(
        b"POST / HTTP/1.1\r\nHost: app.example\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n"
        % kind
    )
    backend = await world.backend()
    client.send(b"1\r\nx\r\n")
    if conversation == "response":
        backend.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    if conversation == "unlimited":
        world.limits = replace(world.limits, body_rate=0)  # for those too that are there already
    for _ in range(20):
        client.send(b"1\r\nx\r\n")
        backend.send(b"1\r\ny\r\n" if conversation == "response" else b"HTTP/1.1 100 Continue\r\n\r\n")
        await world.pass_time(10)
    assert [(e.status, e.error) for e in world.done] == []
    assert 408 not in statuses(client.received)
    client.vanish()


async def test_a_body_has_all_the_time_that_connecting_takes(world: World) -> None:
    connected = asyncio.Event()
    world.loop.outcomes = [connected]
    client = world.client()
    client.send(post(b"abcdef")[:-3])  # some of the body came with the head
    await world.pass_time(200)
    assert client.received == b""
    connected.set()
    backend = await world.backend()
    await world.pass_time(50)
    client.send(b"def")
    assert backend.received.endswith(b"abcdef")
    backend.send(OK)
    assert statuses(client.received) == [200]


async def test_a_pipelined_body_has_all_the_time_that_connecting_takes(world: World) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    connected = asyncio.Event()
    world.loop.outcomes = [connected]
    upload = post(bytes(PIPELINE_LIMIT + 10))
    client.send(upload[:-1])
    assert not client.reading
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
    await world.pass_time(200)
    assert statuses(client.received) == [200]
    connected.set()
    backend = await world.backend()
    await world.pass_time(50)
    client.send(upload[-1:])
    backend.send(OK)
    assert statuses(client.received) == [200, 200]


async def test_a_body_has_all_the_time_of_its_backend_although_the_client_was_behind_too(
    world: World,
) -> None:
    client = world.client()
    client.stop_reading()
    client.send(post(bytes(500_000))[:1000])
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 500000\r\n\r\n" + bytes(100_000))
    backend.stop_reading()
    client.send(bytes(100_000))
    assert not client.reading
    client.read_all()
    for _ in range(4):
        backend.unsent -= 1000
        await world.pass_time(50)
    assert not client.closed, "a false 408"
    backend.read_all()
    await world.pass_time(67)
    assert client.closed, "now it is the client who is slow"


async def test_a_body_of_very_many_chunks_is_decoded_in_turns_with_the_others(world: World) -> None:
    client, other = world.client(), world.client()
    count = 3 * CHUNKS_AT_ONCE + 10
    head = b"POST / HTTP/1.1\r\nHost: app.example\r\nTransfer-Encoding: chunked\r\n\r\n"
    client.send(head + b"1\r\nx\r\n")
    backend = await world.backend()
    client.send(b"1\r\ny\r\n" * count + b"0\r\n\r\n" + NOWHERE)
    assert not client.reading
    assert backend.received.count(b"y") == CHUNKS_AT_ONCE
    other.send(NOWHERE)
    assert statuses(other.received) == [404], "the other's turn"
    await until(lambda: backend.received.endswith(b"0\r\n\r\n"))
    assert backend.received.count(b"y") == count
    backend.send(OK)
    assert statuses(client.received) == [200, 404]
    assert client.reading


async def test_a_body_of_very_many_chunks_waits_for_its_backend(world: World) -> None:
    client = world.client()
    client.send(b"POST / HTTP/1.1\r\nHost: app.example\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
    backend = await world.backend()
    backend.stop_reading()
    backend.unsent = HIGH_WATER
    client.send(b"1\r\ny\r\n" * 2 * CHUNKS_AT_ONCE + b"0\r\n\r\n")
    await settle()
    assert backend.received.count(b"y") == CHUNKS_AT_ONCE
    assert not client.reading
    backend.read_all()
    assert not client.reading, "there is more to decode first"
    await until(lambda: backend.received.endswith(b"0\r\n\r\n"))
    assert client.reading
    backend.send(OK)
    assert statuses(client.received) == [200]


async def test_a_client_that_leaves_while_its_chunks_wait_for_their_turn_is_forgotten(world: World) -> None:
    client = world.client()
    client.send(b"POST / HTTP/1.1\r\nHost: app.example\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
    backend = await world.backend()
    client.send(b"1\r\ny\r\n" * 2 * CHUNKS_AT_ONCE)
    client.vanish()
    await settle()
    assert backend.received.count(b"y") == CHUNKS_AT_ONCE
    assert backend.aborted


async def test_what_is_sent_behind_the_last_request_does_not_reset_its_answer(world: World) -> None:
    client = world.client()
    client.send(get(b"/last", b"Connection: close\r\n") + GET)
    backend = await world.backend()
    backend.send(OK)
    assert client.received.endswith(b"Connection: close\r\n\r\nok")
    assert client.ended
    assert not client.closed
    client.send(GET)  # read and forgotten
    assert statuses(client.received) == [200]
    assert len(world.done) == 1
    await world.pass_time(7)
    assert client.closed


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_client_that_may_not_know_that_this_was_the_last_answer_is_read_on(
    world: World, streamed: bool
) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    world.draining = True
    if streamed:
        backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no")
        backend.send(b"k")
    else:
        backend.send(OK)
    assert client.ended
    assert not client.closed
    client.send(GET)
    client.send_end()
    assert client.closed
    assert statuses(client.received) == [200]


async def test_who_said_that_nothing_more_comes_is_closed_at_once(world: World) -> None:
    for request in (get(b"/", b"Connection: close\r\n"), b"GET / HTTP/1.0\r\nHost: app.example\r\n\r\n"):
        client = world.client()
        client.send(request)
        await settle()
        world.loop.connections[0].send(OK)
        assert client.closed


async def test_a_short_time_limit_is_kept_although_the_wheel_looked_far_ahead(world: World) -> None:
    backend = await world.idle_backend()
    world.patience.general.upstream_head = 5
    client = world.client()
    client.send(GET)
    await world.pass_time(12)
    assert statuses(client.received) == [504]
    assert backend.aborted


async def test_a_slow_reader_keeps_his_connection_and_one_that_stands_still_does_not(world: World) -> None:
    client = world.client()
    client.stop_reading()
    client.send(GET)
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + bytes(200_000))
    assert not backend.reading
    for _ in range(3):
        client.unsent -= 1000
        await world.pass_time(61)
        assert not client.closed
    await world.pass_time(82)
    assert client.aborted
    assert [done.status for done in world.done] == [499]


async def test_the_last_bytes_reach_a_slow_reader(world: World) -> None:
    client = world.client()
    client.stop_reading()
    client.send(get(b"/", b"Connection: close\r\n"))
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n" + bytes(60_000))
    assert client.closed
    for _ in range(3):
        client.unsent -= 1000
        await world.pass_time(11)
        assert not client.aborted
    await world.pass_time(12)
    assert client.aborted


async def test_a_stalled_reader_is_given_up_although_its_upload_ends(world: World) -> None:
    client = world.client()
    client.stop_reading()
    client.send(post(b"abc")[:-1])
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + bytes(200_000))
    client.send(b"c")
    await world.pass_time(87)
    assert client.aborted
    assert [done.status for done in world.done] == [499]


async def test_drain_closes_idle_connections_and_lets_the_others_finish(world: World) -> None:
    idle, busy, halfway = world.client(), world.client(), world.client()
    busy.send(GET)
    halfway.send(NOWHERE[:-2])
    backend = await world.backend()
    world.draining = True
    for client in (idle, busy, halfway):
        assert isinstance(client.protocol, Http1Downstream)
        client.protocol.start_drain()
    assert idle.closed
    backend.send(OK)
    assert b"\r\nConnection: close\r\n" in busy.received
    assert busy.ended
    halfway.send(b"\r\n")
    assert b"\r\nConnection: close\r\n" in halfway.received
    assert halfway.ended


async def test_who_is_asked_to_finish_within_a_head_has_this_request_and_no_other(world: World) -> None:
    client = world.client()
    client.send(GET[:10])
    assert isinstance(client.protocol, Http1Downstream)
    client.protocol.start_drain()
    client.send(GET[10:])
    backend = await world.backend()
    backend.send(OK)
    assert b"Connection: close\r\n" in client.received
    client.send(GET)
    await world.pass_time(20)
    assert client.received.count(b"HTTP/1.1") == 1
    assert client.closed or client.aborted


async def test_kill_ends_a_connection_at_once(world: World) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    assert isinstance(client.protocol, Http1Downstream)
    client.protocol.kill()
    await settle()
    assert backend.aborted
    assert [done.status for done in world.done] == [499]


async def test_an_http_1_0_client_is_answered_in_its_own_terms(world: World) -> None:
    client = world.client()
    client.send(b"GET / HTTP/1.0\r\nHost: app.example\r\nConnection: keep-alive\r\n\r\n")
    backend = await world.backend()
    backend.send(b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK)
    assert statuses(client.received) == [200]
    assert b"\r\nConnection: keep-alive\r\n" in client.received
    client.send(b"GET / HTTP/1.0\r\nHost: app.example\r\nConnection: keep-alive\r\n\r\n")
    backend.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n")
    backend.send(b"0\r\n\r\n")
    assert client.received.endswith(b"\r\nConnection: close\r\n\r\nab")
    assert client.ended


async def test_a_cut_off_response_without_a_length_resets_an_http_1_0_client(world: World) -> None:
    client = world.client()
    client.send(b"GET / HTTP/1.0\r\nHost: app.example\r\n\r\n")
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n")
    backend.vanish()
    assert client.aborted


async def test_an_http_1_0_keep_alive_response_with_a_body_that_streams_says_so(world: World) -> None:
    client = world.client()
    client.send(b"GET / HTTP/1.0\r\nHost: app.example\r\nConnection: keep-alive\r\n\r\n")
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\na")
    backend.send(b"b")
    assert b"\r\nConnection: keep-alive\r\n\r\nab" in client.received
    assert not client.closed


async def test_a_large_first_piece_is_not_copied_behind_its_head(world: World) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + bytes(200_000))
    backend.send(bytes(100_000))
    assert len(client.received) == len(b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n") + 300_000


async def test_trailers_reach_those_who_want_them(world: World) -> None:
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-Sum: 1\r\n\r\n"
    client = world.client()
    client.send(get(b"/", b"TE: trailers\r\n"))
    backend = await world.backend()
    assert b"TE: trailers\r\nConnection: TE\r\n" in backend.received
    backend.send(answer)
    assert client.received.endswith(b"\r\n\r\n1\r\na\r\n0\r\nX-Sum: 1\r\n\r\n")
    client.send(get(b"/"))
    backend.send(answer)
    assert client.received.endswith(b"\r\n\r\n1\r\na\r\n0\r\n\r\n")


async def test_a_drain_that_meets_a_connection_on_its_way_out_forgets_it(world: World) -> None:
    client = world.client()
    assert isinstance(client.protocol, Http1Downstream)
    client.send_end()  # the transport closes; connection_lost has not been called yet
    client.protocol.start_drain()
    await settle()
    assert len(world.deadlines) == 0
    assert world.counters.connections_open == 0


async def tunnel(world: World, protocol: bytes) -> tuple[ScriptedTransport, ScriptedTransport]:
    """A client and a backend that have switched to `protocol`."""
    client = world.client()
    upgrade = b"Connection: Upgrade\r\nUpgrade: %b\r\n\r\n" % protocol
    client.send(b"GET /chat HTTP/1.1\r\nHost: app.example\r\n" + upgrade)
    backend = await world.backend()
    backend.send(b"HTTP/1.1 101 Switching Protocols\r\n" + upgrade)
    assert isinstance(client.protocol, Http1Downstream)
    assert client.protocol.is_tunnel
    return client, backend


async def test_the_client_of_a_websocket_is_asked_to_close_behind_the_frame_that_is_passing(
    world: World,
) -> None:
    client, backend = await tunnel(world, b"WebSocket")
    assert isinstance(client.protocol, Http1Downstream)
    backend.send(b"\x81\x03he")
    client.protocol.end_tunnel()
    assert client.received.endswith(b"\x81\x03he")
    backend.send(b"y\x81\x05later")
    client.protocol.end_tunnel()
    assert client.received.endswith(b"\r\n\r\n\x81\x03hey" + GOING_AWAY)
    backend.send(b"\x81\x05later")
    assert client.received.endswith(GOING_AWAY)
    client.send(b"\x88\x82its-answer")
    assert backend.received.endswith(b"\x88\x82its-answer")
    backend.send_end()
    assert client.ended
    client.send_end()


async def test_a_websocket_whose_backend_has_ended_its_side_hears_no_goodbye_behind_that_end(
    world: World,
) -> None:
    client, backend = await tunnel(world, b"websocket")
    assert isinstance(client.protocol, Http1Downstream)
    backend.send(b"\x81\x03hey")
    backend.send_end()
    assert client.ended
    client.protocol.end_tunnel()
    assert client.received.endswith(b"\x81\x03hey")
    client.send(b"\x88\x82its-answer")
    assert backend.received.endswith(b"\x88\x82its-answer")
    client.send_end()


async def test_another_tunnel_has_no_word_for_a_goodbye(world: World) -> None:
    client, backend = await tunnel(world, b"chat")
    assert isinstance(client.protocol, Http1Downstream)
    client.protocol.end_tunnel()
    backend.send(b"\x81\x03hey")
    assert client.received.endswith(b"\r\n\r\n\x81\x03hey")
    client.vanish()
