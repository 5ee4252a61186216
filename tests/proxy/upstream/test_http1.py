"""The backend's side: what is sent, what is believed, and when a connection may be used again."""

from __future__ import annotations

import pytest

from portero_py.proxy.upstream.http1 import MAX_INFORMATIONAL, TUNNEL_IDLE
from portero_py.wire.framing import CHUNKS_AT_ONCE
from tests.proxy.dialogue import GET, HIGH_WATER, OK, World, get, post, settle, statuses, until

NOWHERE = get(b"/", host=b"nowhere.example")
UPGRADE = get(b"/", b"Connection: Upgrade\r\nUpgrade: websocket\r\n")
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: WebSocket\r\n\r\n"


def reasons(world: World) -> list[str]:
    return [done.error.reason if done.error is not None else "" for done in world.done]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody",
        b"HTTP/1.1 204 No Content\r\nX: y\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
    ],
)
async def test_a_framed_response_passes_however_it_is_cut_and_the_connection_is_used_again(
    world: World, answer: bytes
) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    backend.send(answer)
    assert client.received == answer
    for cut in range(1, len(answer)):
        client.received = b""
        client.send(GET)
        backend.send(answer[:cut])
        backend.send(answer[cut:])
        assert client.received.replace(b"1\r\nb\r\n3\r\nody\r\n", b"4\r\nbody\r\n").replace(
            b"2\r\nbo\r\n2\r\ndy\r\n", b"4\r\nbody\r\n"
        ).replace(b"3\r\nbod\r\n1\r\ny\r\n", b"4\r\nbody\r\n") == (answer)
    assert len(world.loop.connections) == 1


async def test_a_response_until_close_is_chunked_for_the_client(world: World) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\n\r\nab")
    backend.send(b"cd")
    backend.send_end()
    assert client.received == (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n2\r\ncd\r\n0\r\n\r\n"
    )
    assert backend.closed
    assert not client.closed


async def test_a_response_until_close_may_end_without_an_end_of_file(world: World) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    backend.send(b"HTTP/1.0 200 OK\r\n\r\nab")
    backend.vanish()
    assert client.received.endswith(b"2\r\nab\r\n0\r\n\r\n")


async def test_a_reset_in_a_response_until_close_is_no_end(world: World) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\n\r\nab")
    backend.vanish(ConnectionResetError())
    assert client.received.endswith(b"\r\n\r\n2\r\nab\r\n")
    assert client.closed
    assert reasons(world) == ["upstream_closed"]


async def test_a_head_response_has_no_body_whatever_it_says(world: World) -> None:
    client = world.client()
    client.send(b"HEAD / HTTP/1.1\r\nHost: app.example\r\n\r\n")
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
    assert client.received == b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
    client.send(GET)
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
    assert client.received.endswith(b"\r\n\r\nhello")
    client.send(b"HEAD / HTTP/1.1\r\nHost: app.example\r\n\r\n")
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
    assert statuses(client.received) == [200, 200, 200]
    assert client.received.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nx",
        b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nok",
    ],
)
async def test_a_connection_with_anything_odd_is_not_used_again(world: World, answer: bytes) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    backend.send(answer)
    assert backend.closed
    client.send(GET)
    await settle()
    second = await world.backend()
    second.send(OK)
    assert len(statuses(client.received)) == 2


async def test_bytes_behind_a_body_that_came_in_pieces_end_the_connection(world: World) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab")
    backend.send(b"cdHTTP/1.1")
    assert client.received.endswith(b"\r\n\r\nabcd")
    assert backend.closed


async def test_unasked_for_bytes_end_an_idle_connection(world: World) -> None:
    backend = await world.idle_backend()
    backend.send(OK)
    assert backend.closed
    assert [pool.idle for pool in world.all_pools()] == [0]


@pytest.mark.parametrize(
    "answer",
    [
        b"garbage\r\n\r\n",
        b"\x00",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1, 2\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 1\n\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 40_000,
        b"HTTP/1.1 200 OK\r\nX: y\r\n" * 2000,
        b"HTTP/1.1 200 " + b"x" * 40_000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * (MAX_INFORMATIONAL + 1),
        SWITCH,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_a_malformed_response_is_a_502_and_ends_the_connection(world: World, answer: bytes) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    backend.send(answer)
    assert [code for code in statuses(client.received) if code != 100] == [502]
    await settle()
    assert backend.aborted
    assert reasons(world) == ["bad_response"]
    assert [done.status for done in world.done] == [502]
    assert len(world.loop.connections) == 1
    assert b"127.0.0.1:9000" not in client.received


async def test_a_malformed_chunk_after_the_head_was_passed_on_cuts_the_response_off(world: World) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert statuses(client.received) == [200]
    backend.send(b"zz\r\n")
    assert statuses(client.received) == [200]
    assert client.closed
    assert reasons(world) == ["bad_response"]


@pytest.mark.parametrize("reset", [False, True])
async def test_a_backend_that_dies_in_its_body_cuts_the_response_off(world: World, reset: bool) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab")
    if reset:
        backend.vanish(ConnectionResetError())
    else:
        backend.send_end()
    assert client.received.endswith(b"\r\n\r\nab")
    assert client.closed
    assert reasons(world) == ["upstream_closed"]


async def test_a_backend_that_closes_inside_a_head_is_a_502(world: World) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\n")
    backend.send_end()
    assert statuses(client.received) == [502]
    assert len(world.loop.connections) == 1


async def test_informational_responses_are_passed_on_as_they_come(world: World) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    backend.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
    assert client.received == b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    backend.send(b"HTTP/1.1 102 Processing\r\n\r\n" + OK)
    assert statuses(client.received) == [103, 102, 200]


async def test_informational_responses_are_passed_on_up_to_the_length_of_one_head(world: World) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    hint = b"HTTP/1.1 103 Early Hints\r\nLink: %b\r\n\r\n" % (b"x" * 10_000)
    for _ in range(6):
        backend.send(hint)
    assert client.received == 3 * hint
    backend.send(OK)
    assert statuses(client.received) == [103, 103, 103, 200]
    client.send(GET)
    backend.send(hint + OK)
    assert statuses(client.received)[4:] == [103, 200], "each response has its own"


async def test_a_body_of_very_many_chunks_is_decoded_in_turns_with_the_others(world: World) -> None:
    client, other = world.client(), world.client()
    client.send(GET)
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
    backend.send(b"1\r\ny\r\n" * (3 * CHUNKS_AT_ONCE + 10) + b"0\r\n\r\n")
    assert not backend.reading
    assert client.received.count(b"y") == CHUNKS_AT_ONCE
    other.send(NOWHERE)
    assert statuses(other.received) == [404], "the other's turn"
    await until(lambda: client.received.endswith(b"\r\n0\r\n\r\n"))
    assert client.received.count(b"y") == 3 * CHUNKS_AT_ONCE + 10
    client.received = b""
    client.send(GET)
    backend.send(OK)
    assert statuses(client.received) == [200], "the connection is used again"


async def test_a_response_of_very_many_chunks_waits_for_its_client(world: World) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
    client.stop_reading()
    client.unsent = HIGH_WATER
    backend.send(b"1\r\ny\r\n" * (2 * CHUNKS_AT_ONCE + 10) + b"0\r\n\r\n")
    await settle()
    assert client.received.count(b"y") == CHUNKS_AT_ONCE
    client.read_all()
    assert not backend.reading, "there is more to decode first"
    await until(lambda: client.received.endswith(b"\r\n0\r\n\r\n"))
    assert client.received.count(b"y") == 2 * CHUNKS_AT_ONCE + 10
    assert backend.reading


async def test_a_backend_that_breaks_while_its_chunks_wait_for_their_turn_is_noticed(world: World) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    backend.send(b"1\r\ny\r\n" * 2 * CHUNKS_AT_ONCE)
    backend.vanish(ConnectionResetError())
    await settle()
    assert client.closed


async def test_a_backend_that_says_it_is_at_work_has_its_time_again(world: World) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    await world.pass_time(50)
    backend.send(b"HTTP/1.1 102 Processing\r\n\r\n")
    await world.pass_time(50)
    assert statuses(client.received) == [102]
    await world.pass_time(16)
    assert statuses(client.received) == [102, 504]


async def test_an_upload_that_was_told_to_continue_may_take_its_time(world: World) -> None:
    client = world.client()
    upload = post(b"abcd", b"Expect: 100-continue\r\n")
    client.send(upload[:-4])
    backend = await world.backend()
    assert b"\r\nExpect: 100-continue\r\n" in backend.received
    backend.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert client.received == b"HTTP/1.1 100 Continue\r\n\r\n"
    for byte in b"abcd":
        await world.pass_time(50)
        client.send(bytes([byte]))
    backend.send(OK)
    assert statuses(client.received) == [100, 200]
    assert not client.closed


async def test_a_backend_that_never_says_continue_is_a_504(world: World) -> None:
    client = world.client()
    client.send(post(b"abcd", b"Expect: 100-continue\r\n")[:-4])
    await settle()
    await world.pass_time(59)
    client.send(b"a")  # it may send without waiting (RFC 9110, 10.1.1)
    await world.pass_time(10)
    assert client.received == b""
    client.send(b"bcd")
    await world.pass_time(67)
    assert statuses(client.received) == [504]


async def test_a_refused_expectation_ends_the_connection_after_the_answer(world: World) -> None:
    client = world.client()
    client.send(post(b"abcd", b"Expect: 100-continue\r\n")[:-4])
    backend = await world.backend()
    backend.send(b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 0\r\n\r\n")
    assert statuses(client.received) == [417]
    assert b"\r\nConnection: close\r\n" in client.received
    assert backend.closed
    client.send(b"abcd" + GET)
    assert statuses(client.received) == [417]
    assert [done.status for done in world.done] == [417]


async def test_an_early_response_streams_while_the_request_still_comes(world: World) -> None:
    client = world.client()
    client.send(post(b"abcd")[:-3])
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nA")
    client.send(b"b")
    backend.send(b"B")
    client.send(b"cd")
    backend.send(b"CD")
    assert backend.received.endswith(b"abcd")
    assert client.received.endswith(b"\r\nConnection: close\r\n\r\nABCD")
    assert client.ended


async def test_both_ways_at_once_neither_is_idle(world: World) -> None:
    client = world.client()
    client.send(post(b"abcd")[:-4])
    backend = await world.backend()
    client.send(b"a")
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nA")
    for byte in b"bcd":
        await world.pass_time(50)
        client.send(bytes([byte]))
    await world.pass_time(50)
    backend.send(b"BCD")
    assert client.received.endswith(b"ABCD")


async def test_a_response_before_the_request_was_meant_for_somebody_else(world: World) -> None:
    stale = await world.idle_backend()
    client = world.client()
    client.send(post(b"abc")[:-3])
    stale.send(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    assert client.received == b""
    assert stale.received == b""
    backend = await world.backend()
    client.send(b"abc")
    assert backend.received.endswith(b"\r\n\r\nabc")
    backend.send(OK)
    assert statuses(client.received) == [200]
    assert not client.closed


async def test_a_slow_backend_is_a_504(world: World) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    await world.pass_time(59)
    assert client.received == b""
    await world.pass_time(7)
    assert statuses(client.received) == [504]
    assert backend.aborted
    assert reasons(world) == ["upstream_timeout"]
    assert not client.closed


async def test_a_backend_that_stops_in_its_body_cuts_the_response_off(world: World) -> None:
    client = world.client()
    client.send(GET)
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(3):
        await world.pass_time(50)
        backend.send(b"1\r\na\r\n")
    await world.pass_time(67)
    assert backend.aborted
    assert client.closed
    assert reasons(world) == ["upstream_timeout"]


async def test_a_backend_that_stops_reading_is_given_up_and_a_slow_one_is_not(world: World) -> None:
    client = world.client()
    client.send(post(bytes(500_000))[:1000])
    backend = await world.backend()
    backend.stop_reading()
    client.send(bytes(100_000))
    assert not client.reading
    for _ in range(3):
        backend.unsent -= 1000
        await world.pass_time(61)
        assert client.received == b""
    await world.pass_time(82)
    assert statuses(client.received) == [504]


async def test_a_backend_that_reads_again_gets_the_rest(world: World) -> None:
    client = world.client()
    upload = post(bytes(200_000))
    client.send(upload[:1000])
    backend = await world.backend()
    backend.stop_reading()
    client.send(upload[1000:100_000])
    assert not client.reading
    await world.pass_time(30)
    backend.read_all()
    client.send(upload[100_000:])
    assert backend.received.endswith(bytes(200_000))
    backend.send(OK)
    assert statuses(client.received) == [200]


async def test_an_answer_to_an_upload_that_nobody_read_ends_the_connection(world: World) -> None:
    client = world.client()
    upload = post(bytes(100_000))
    client.send(upload[:1000])
    backend = await world.backend()
    backend.stop_reading()
    client.send(upload[1000:])
    backend.send(OK)
    assert statuses(client.received) == [200]
    assert backend.closed
    assert [pool.idle for pool in world.all_pools()] == [0]
    await world.pass_time(17)
    assert backend.aborted


async def test_a_slow_client_holds_the_backend_back_and_is_not_counted_against_it(world: World) -> None:
    client = world.client()
    client.stop_reading()
    client.send(GET)
    backend = await world.backend()
    total = 0
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    while backend.reading:
        backend.send(bytes(10_000))
        total += 10_000
    assert total < HIGH_WATER + 20_000
    for _ in range(3):
        client.unsent -= 1000
        await world.pass_time(60)
    client.read_all()
    assert backend.reading
    backend.send(bytes(1_000_000 - total))
    client.read_all()
    assert client.received.endswith(bytes(1_000_000))
    assert not client.closed


async def test_a_response_that_ends_while_the_client_is_behind_frees_the_connection(world: World) -> None:
    client = world.client()
    client.stop_reading()
    client.send(GET)
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + bytes(1000))
    backend.send(bytes(99_000))
    assert backend.reading
    assert [pool.idle for pool in world.all_pools()] == [1]
    client.read_all()


async def test_a_slow_client_in_both_directions_is_not_counted_against_the_backend(world: World) -> None:
    client = world.client()
    client.send(post(bytes(500_000))[:1000])
    backend = await world.backend()
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 500000\r\n\r\nab")
    backend.stop_reading()
    client.stop_reading()
    client.send(bytes(100_000))
    backend.send(bytes(100_000))
    assert not client.reading
    assert not backend.reading
    backend.read_all()
    for _ in range(3):
        client.unsent -= 1000
        await world.pass_time(50)
        client.send(b"x")
        assert not backend.aborted
    client.vanish()


async def test_a_tunnel_passes_bytes_both_ways_and_what_came_early(world: World) -> None:
    client = world.client()
    client.send(UPGRADE + b"early")
    backend = await world.backend()
    assert b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" in backend.received
    assert not backend.received.endswith(b"early")
    backend.send(SWITCH + b"hello")
    assert client.received == (
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\n\r\nhello"
    )
    assert backend.received.endswith(b"early")
    client.send(b"GET / HTTP/1.1\r\n\r\n")
    assert backend.received.endswith(b"GET / HTTP/1.1\r\n\r\n")
    backend.send(b"0\r\n\r\n")
    assert client.received.endswith(b"hello0\r\n\r\n")
    backend.send_end()
    client.send_end()
    assert client.closed
    assert [(done.status, done.bytes_in, done.bytes_out) for done in world.done] == [(101, 23, 10)]


async def test_a_backend_that_ends_its_side_of_a_tunnel_still_hears_the_client(world: World) -> None:
    client = world.client()
    client.send(UPGRADE)
    backend = await world.backend()
    backend.send(SWITCH + b"all I had to say")
    backend.send_end()
    assert client.received.endswith(b"all I had to say")
    assert client.ended
    assert not client.closed
    assert not backend.closed
    await world.pass_time(300)  # far beyond the time-outs of messages
    client.send(b"thank you")
    assert backend.received.endswith(b"thank you")
    client.send_end()
    await settle()
    assert backend.closed
    assert not backend.aborted, "what the client said last may be on its way"
    assert client.closed
    assert [(done.status, done.error) for done in world.done] == [(101, None)]


async def test_a_backend_that_ends_its_side_holds_back_a_faster_client(world: World) -> None:
    client = world.client()
    client.send(UPGRADE)
    backend = await world.backend()
    backend.send(SWITCH)
    backend.send_end()
    backend.stop_reading()
    client.send(bytes(HIGH_WATER + 1))
    assert not client.reading
    backend.read_all()
    assert client.reading
    client.stop_reading()
    assert client.protocol is not None
    client.protocol.pause_writing()  # of what the backend said before
    client.protocol.resume_writing()
    client.vanish()
    await settle()
    assert backend.aborted


async def test_a_half_closed_tunnel_that_is_silent_ends_after_an_hour(world: World) -> None:
    client = world.client()
    client.send(UPGRADE)
    backend = await world.backend()
    backend.send(SWITCH)
    backend.send_end()
    world.clock.now += TUNNEL_IDLE - 20
    await world.pass_time(7)
    client.send(b"still here")
    await world.pass_time(30)
    assert not client.closed
    world.clock.now += TUNNEL_IDLE
    await world.pass_time(7)
    assert client.closed
    assert backend.aborted


@pytest.mark.parametrize("reset", [False, True])
async def test_a_backend_that_vanishes_behind_its_end_of_a_tunnel_ends_it(world: World, reset: bool) -> None:
    client = world.client()
    client.send(UPGRADE)
    backend = await world.backend()
    backend.send(SWITCH)
    backend.send_end()
    backend.vanish(ConnectionResetError() if reset else None)
    await world.pass_time(7)
    assert client.closed
    assert reasons(world) == ["upstream_closed" if reset else ""]


async def test_a_tunnel_to_a_tls_client_ends_with_its_backend(world: World) -> None:
    client = world.client(tls=True)
    client.send(UPGRADE)
    backend = await world.backend()
    backend.send(SWITCH)
    client.send(b"the last word")
    backend.send_end()
    assert client.ended
    client.send(b"too late")  # a reset for it would overtake what the backend said
    assert not client.closed
    assert backend.received.endswith(b"the last word")
    assert backend.closed
    assert not backend.aborted


async def test_a_tunnel_to_a_tls_backend_ends_with_it_and_never_waits_long_for_it(world: World) -> None:
    for first in ("backend", "client"):
        client = world.client()
        client.send(UPGRADE)
        backend = await world.backend()
        backend._tls = True
        backend.send(SWITCH)
        if first == "backend":
            backend.send_end()
            assert client.ended
            assert backend.closed
            continue
        client.send_end()
        assert not backend.ended, "TLS of the loop has no half-closed connection"
        await world.pass_time(50)
        backend.send(b"late")
        assert client.received.endswith(b"late")
        await world.pass_time(67)
        assert backend.aborted
        assert client.closed


async def test_a_426_says_what_to_upgrade_to(world: World) -> None:
    client = world.client()
    backend = None
    for connection in (b"close", b"Upgrade, close", b"upgrade, x-hop"):
        client.send(GET)
        backend = await world.backend()
        client.received = b""
        backend.send(
            b"HTTP/1.1 426 Upgrade Required\r\nConnection: %b\r\nUpgrade: websocket\r\nX-Hop: 1\r\n"
            b"Content-Length: 0\r\n\r\n" % connection
        )
        lines = client.received.split(b"\r\n")
        assert lines[0] == b"HTTP/1.1 426 Upgrade Required"
        assert b"Upgrade: websocket" in lines
        assert b"Connection: upgrade" in lines
        assert (b"X-Hop: 1" in lines) == (b"x-hop" not in connection)
        if b"close" not in connection:
            backend.send(b"unasked for")


async def test_a_tunnel_ends_with_its_client(world: World) -> None:
    client = world.client()
    client.send(UPGRADE)
    backend = await world.backend()
    backend.send(SWITCH)
    client.send_end()
    assert backend.ended
    assert not client.closed
    backend.send(b"bye")
    assert client.received.endswith(b"bye")
    backend.vanish()
    assert client.closed


async def test_the_end_of_a_client_before_its_tunnel_began_is_passed_on(world: World) -> None:
    client = world.client()
    client.send(UPGRADE)
    backend = await world.backend()
    client.send_end()
    backend.send(SWITCH)
    assert backend.ended
    backend.send_end()
    assert client.closed


async def test_a_tunnel_holds_back_whoever_is_faster(world: World) -> None:
    client = world.client()
    client.send(UPGRADE)
    backend = await world.backend()
    backend.send(SWITCH)
    client.stop_reading()
    backend.send(bytes(HIGH_WATER + 1))
    assert not backend.reading
    client.read_all()
    assert backend.reading
    backend.stop_reading()
    client.send(bytes(HIGH_WATER + 1))
    assert not client.reading
    backend.read_all()
    assert client.reading
    await world.pass_time(200)
    assert not client.closed
    client.vanish()
    await settle()
    assert backend.aborted


async def test_a_silent_tunnel_ends_after_an_hour(world: World) -> None:
    client = world.client()
    client.send(UPGRADE)
    backend = await world.backend()
    backend.send(SWITCH)
    world.clock.now += TUNNEL_IDLE - 10
    await world.pass_time(5)
    client.send(b"still here")
    await world.pass_time(30)
    assert not client.closed
    world.clock.now += TUNNEL_IDLE
    await world.pass_time(7)
    assert client.closed
    assert backend.aborted


async def test_a_client_that_leaves_its_tunnel_unread_is_given_up(world: World) -> None:
    client = world.client()
    client.send(UPGRADE)
    backend = await world.backend()
    backend.send(SWITCH)
    client.stop_reading()
    backend.send(bytes(HIGH_WATER + 1))
    await world.pass_time(87)
    assert client.aborted


async def test_a_refused_upgrade_is_an_ordinary_response(world: World) -> None:
    client = world.client()
    client.send(UPGRADE + NEXT)
    backend = await world.backend()
    backend.send(b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 0\r\n\r\n")
    assert b"GET /next " in backend.received
    backend.send(OK)
    assert statuses(client.received) == [426, 200]


@pytest.mark.parametrize("named", [b"", b"Upgrade: h2c\r\n", b"Upgrade:\r\n"])
async def test_a_switch_to_what_was_not_asked_for_is_a_502(world: World, named: bytes) -> None:
    client = world.client()
    client.send(UPGRADE)
    backend = await world.backend()
    backend.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\n" + named + b"\r\nhello")
    assert statuses(client.received) == [502]
    await settle()
    assert backend.aborted


NEXT = get(b"/next")
