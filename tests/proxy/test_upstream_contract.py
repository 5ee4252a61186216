"""What `endpoints.py` and `upstream/connection.py` promise of an `Upstream` and its connection.

What a version does in its own way (framing, reuse, tunnels through TLS) is in tests/proxy/upstream/.
"""

from __future__ import annotations

import asyncio

import pytest

from portero_py.proxy.upstream.pool import FRESH_SECONDS, IDLE_SECONDS
from portero_py.wire.message import CHUNKED
from tests.proxy.backend_ends import BACKEND_ENDS, BackendEnd, ScriptedExchange
from tests.proxy.dialogue import World, settle


@pytest.fixture(params=BACKEND_ENDS)
async def end(request: pytest.FixtureRequest, world: World) -> BackendEnd:
    return BACKEND_ENDS[request.param](world)


@pytest.fixture(params=[name for name, kind in BACKEND_ENDS.items() if kind.tunnels])
async def tunnel_end(request: pytest.FixtureRequest, world: World) -> BackendEnd:
    return BACKEND_ENDS[request.param](world)


# The pool and its connections


async def test_who_asks_for_a_connection_is_told_once_that_it_is_there(end: BackendEnd) -> None:
    exchange = end.exchange()
    end.pool.connect(exchange)
    assert exchange.said == []
    await settle()
    assert exchange.said == ["ready"]


async def test_who_asks_for_a_connection_that_cannot_be_made_is_told_once(end: BackendEnd) -> None:
    end.world.loop.outcomes = [ConnectionRefusedError(111, "Connection refused")]
    exchange = end.exchange()
    end.pool.connect(exchange)
    await settle()
    assert exchange.said == [("connect failed", "connect_failed")]
    assert end.pool.is_empty


async def test_who_asks_for_a_connection_that_is_lost_at_once_is_told(end: BackendEnd) -> None:
    end.world.loop.greet = lambda transport: transport.break_off()
    exchange = end.exchange()
    end.pool.connect(exchange)
    await settle()
    assert exchange.said == [("connect failed", "connect_failed")]


async def test_who_waits_for_a_connection_when_portero_ends_is_told(end: BackendEnd) -> None:
    end.world.loop.outcomes = [asyncio.Event()]
    exchange = end.exchange()
    end.pool.connect(exchange)
    await settle()
    await end.world.pools.close()
    assert exchange.said == ["connect cancelled"]


async def test_a_connection_that_nobody_waits_for_any_more_is_kept_for_the_next(end: BackendEnd) -> None:
    exchange = end.exchange()
    end.pool.connect(exchange).give_up()
    await settle()
    assert exchange.said == []
    assert end.pool.idle == 1
    assert end.again() is not None


async def test_a_connection_carries_one_exchange_after_the_other(end: BackendEnd) -> None:
    exchange = end.exchange()
    await end.asked(exchange)
    end.answer(200, b"one")
    assert exchange.said == [("response", 200, b"one")]
    for body in (b"two", b"three"):
        upstream, exchange = end.again(), end.exchange()
        assert upstream is not None
        end.send_head(upstream, exchange)
        end.answer(200, body)
        assert exchange.said == [("response", 200, body)]
    assert len(end.requests()) == 3
    assert len(end.world.loop.connections) == 1


async def test_an_idle_connection_that_the_backend_closes_is_not_given_out(end: BackendEnd) -> None:
    exchange = end.exchange()
    await end.asked(exchange)
    end.answer(200, b"ok")
    end.transport.vanish()
    assert end.again() is None
    assert end.pool.is_empty
    assert exchange.said == [("response", 200, b"ok")]


async def test_an_idle_connection_with_bytes_that_nobody_asked_for_is_not_given_out(end: BackendEnd) -> None:
    exchange = end.exchange()
    await end.asked(exchange)
    end.answer(200, b"ok")
    end.send_nonsense()
    await settle()
    assert end.again() is None
    assert end.transport.closed
    assert exchange.said == [("response", 200, b"ok")]


async def test_an_idle_connection_ends_after_its_time(end: BackendEnd) -> None:
    await end.asked(end.exchange())
    end.answer(200, b"ok")
    end.world.clock.now += FRESH_SECONDS + 0.1
    assert end.pool.take(end.world.clock(), retriable=False) is None
    await end.world.pass_time(IDLE_SECONDS + 8)
    assert end.transport.closed
    assert end.pool.is_empty


# Requests


async def test_a_request_without_a_body_is_sent_with_its_head(end: BackendEnd) -> None:
    exchange = end.exchange()
    await end.asked(exchange)
    [request] = end.requests()
    assert (request.method, request.path, request.body) == (b"GET", b"/path", b"")
    assert request.values(b"x-from") == [b"client"]
    assert request.values(b"x-forwarded-for") == [b"192.0.2.7"]
    assert request.values(b"x-request-id") == [b"id-7"]
    assert exchange.said == []
    end.answer(200, b"ok")


@pytest.mark.parametrize("length", [11, CHUNKED])
async def test_a_body_arrives_in_order_and_whole(end: BackendEnd, length: int) -> None:
    upstream = await end.asked(end.exchange(b"POST", length))
    for piece in (b"one ", b"two ", b"end"):
        assert end.requests() == []
        upstream.send_body(piece)
    upstream.send_end(None)
    [request] = end.requests()
    assert (request.method, request.body, request.trailers) == (b"POST", b"one two end", [])
    end.answer(200, b"ok")


async def test_a_body_of_no_bytes_arrives_too(end: BackendEnd) -> None:
    upstream = await end.asked(end.exchange(b"POST", CHUNKED))
    upstream.send_end(None)
    [request] = end.requests()
    assert request.body == b""
    end.answer(200, b"ok")


async def test_trailers_of_a_request_arrive(end: BackendEnd) -> None:
    upstream = await end.asked(end.exchange(b"POST", CHUNKED))
    upstream.send_body(b"data")
    upstream.send_end([(b"X-Checksum", b"7")])
    [request] = end.requests()
    assert (request.body, request.trailers) == (b"data", [(b"x-checksum", b"7")])
    end.answer(200, b"ok")


async def test_a_backend_that_reads_slowly_is_told_of_and_so_is_that_it_caught_up(end: BackendEnd) -> None:
    exchange = end.exchange(b"POST", CHUNKED)
    upstream = await end.asked(exchange)
    end.transport.stop_reading()
    sent = 0
    while sent < 4 << 20 and exchange.said != ["paused"]:
        upstream.send_body(bytes(16_384))
        sent += 16_384
    assert exchange.said == ["paused"]
    end.transport.read_all()
    await settle()
    assert exchange.said == ["paused", "resumed"]
    upstream.send_end(None)
    assert len(end.requests()[0].body) == sent
    end.answer(200, b"ok")


async def test_a_body_that_meets_a_breaking_connection_comes_back_and_nothing_was_sent(
    end: BackendEnd,
) -> None:
    exchange = end.exchange(b"POST", 4)
    upstream = await end.asked(exchange)
    end.transport.break_off()
    upstream.send_body(b"da")
    upstream.send_body(b"ta")
    upstream.send_end(None)
    assert exchange.refused_body == b"data"
    end.transport.vanish(ConnectionResetError())
    assert exchange.said == [("failed", "upstream_closed", "silent", "unsent")]
    assert end.transport.received == b""


# Responses


async def test_a_response_that_is_at_hand_is_one_call(end: BackendEnd) -> None:
    exchange = end.exchange()
    await end.asked(exchange)
    end.answer(200, b"hello")
    assert exchange.said == [("response", 200, b"hello")]
    assert (b"X-From", b"backend") in exchange.heads[0].fields


async def test_a_response_that_comes_in_pieces_is_head_body_and_end(end: BackendEnd) -> None:
    exchange = end.exchange()
    await end.asked(exchange)
    end.answer_unsized()
    assert exchange.said == [("head", 200)]
    end.send_body(b"one ")
    end.send_body(b"two")
    assert exchange.said == [("head", 200), "body"]
    end.send_end()
    assert exchange.said == [("head", 200), "body", ("end", None)]
    assert exchange.body == b"one two"
    assert end.pool.idle == 1


async def test_trailers_of_a_response_come_with_its_end(end: BackendEnd) -> None:
    exchange = end.exchange()
    await end.asked(exchange)
    end.answer_unsized()
    end.send_body(b"data")
    end.send_end(((b"X-Checksum", b"7"),))
    assert exchange.said[-1] == ("end", [(b"X-Checksum", b"7")])


@pytest.mark.parametrize(
    ("method", "status", "body"), [(b"HEAD", 200, b"hello"), (b"GET", 204, None), (b"GET", 304, None)]
)
async def test_a_response_without_a_body_ends_with_its_head(
    end: BackendEnd, method: bytes, status: int, body: bytes | None
) -> None:
    exchange = end.exchange(method)
    await end.asked(exchange)
    end.answer(status, body, whole=False)
    assert exchange.said == [("response", status, b"")]
    assert end.pool.idle == 1


async def test_informational_responses_come_before_the_final_one(end: BackendEnd) -> None:
    exchange = end.exchange()
    await end.asked(exchange)
    end.answer(103)
    end.answer(100)
    assert exchange.said == [103, 100]
    end.answer(200, b"ok")
    assert exchange.said == [103, 100, ("response", 200, b"ok")]


async def test_a_response_may_come_before_the_request_is_complete_and_ends_the_reuse(end: BackendEnd) -> None:
    exchange = end.exchange(b"POST", CHUNKED)
    upstream = await end.asked(exchange)
    upstream.send_body(b"da")
    end.answer(413, b"too much")
    assert exchange.said == [("response", 413, b"too much")]
    await settle()
    assert end.again() is None


async def test_a_paused_backend_is_not_read_until_it_is_resumed(end: BackendEnd) -> None:
    exchange = end.exchange()
    upstream = await end.asked(exchange)
    end.answer_unsized()
    upstream.pause_body()
    assert not end.may_send()
    upstream.pause_body()  # twice is once
    upstream.resume_body()
    assert end.may_send()
    end.send_body(b"data")
    end.send_end()
    assert exchange.said == [("head", 200), "body", ("end", None)]


# Ends


async def test_after_an_abort_nothing_more_is_said_and_nothing_is_kept(end: BackendEnd) -> None:
    for answered in (False, True):
        exchange = end.exchange()
        upstream = await end.asked(exchange)
        if answered:
            end.answer_unsized()
        said = list(exchange.said)
        upstream.abort()
        await settle()
        assert exchange.said == said
        assert end.again() is None


@pytest.mark.parametrize("complete", [True, False])
async def test_after_its_end_an_exchange_hears_nothing_more(end: BackendEnd, complete: bool) -> None:
    exchange = end.exchange(b"POST", CHUNKED)
    upstream = await end.asked(exchange)
    upstream.send_body(b"data")
    if complete:
        upstream.send_end(None)
    end.answer(200, b"ok")
    end.transport.vanish(ConnectionResetError())
    await settle()
    assert exchange.said == [("response", 200, b"ok")]


async def test_a_connection_that_breaks_without_a_word_is_a_silent_failure(end: BackendEnd) -> None:
    exchange = end.exchange()
    await end.asked(exchange)
    end.transport.vanish(ConnectionResetError())
    assert exchange.said == [("failed", "upstream_closed", "silent")]


async def test_a_reused_connection_that_breaks_says_that_it_was_reused(end: BackendEnd) -> None:
    await end.asked(end.exchange())
    end.answer(200, b"ok")
    upstream, exchange = end.again(), end.exchange()
    assert upstream is not None
    end.send_head(upstream, exchange)
    end.transport.vanish(ConnectionResetError())
    assert exchange.said == [("failed", "upstream_closed", "reused", "silent")]


async def test_a_connection_that_breaks_after_an_informational_response_is_not_silent(
    end: BackendEnd,
) -> None:
    exchange = end.exchange()
    await end.asked(exchange)
    end.answer(103)
    end.transport.vanish(ConnectionResetError())
    assert exchange.said == [103, ("failed", "upstream_closed")]


async def test_a_response_that_is_cut_off_is_a_failure_once(end: BackendEnd) -> None:
    exchange = end.exchange()
    await end.asked(exchange)
    end.answer_unsized()
    end.send_body(b"the beginning")
    end.transport.send_end()
    await settle()
    assert exchange.said == [("head", 200), "body", ("failed", "upstream_closed")]
    assert end.pool.is_empty


@pytest.mark.parametrize("answered", [True, False])
async def test_a_backend_that_breaks_the_protocol_is_a_failure_once(end: BackendEnd, answered: bool) -> None:
    exchange = end.exchange()
    await end.asked(exchange)
    if answered:
        end.answer_unsized()
    end.send_nonsense()
    await settle()
    assert [each for each in exchange.said if each != ("head", 200)] == [("failed", "bad_response")]
    assert end.pool.is_empty


@pytest.mark.parametrize("answered", [True, False])
async def test_a_backend_that_takes_too_long_is_timed_out_once(end: BackendEnd, answered: bool) -> None:
    exchange = end.exchange()
    await end.asked(exchange)
    if answered:
        end.answer_unsized()
    timeouts = end.world.timeouts
    await end.world.pass_time(max(timeouts.upstream_head, timeouts.upstream_idle) + 8)
    assert [each for each in exchange.said if each != ("head", 200)] == [("timed out", "upstream_timeout")]
    assert end.pool.is_empty


# Tunnels


async def begin_tunnel(end: BackendEnd, *, half_closes: bool = True) -> ScriptedExchange:
    exchange = end.exchange(half_closes=half_closes, upgrade=b"websocket")
    upstream = await end.asked(exchange)
    end.answer(101)
    upstream.start_tunnel()
    assert exchange.said == [("head", 101)]
    assert exchange.heads[0].upgrade == b"websocket"
    end.transport.received = b""
    exchange.said.clear()
    return exchange


async def test_a_tunnel_carries_bytes_both_ways(tunnel_end: BackendEnd) -> None:
    exchange = await begin_tunnel(tunnel_end)
    tunnel_end.transport.send(b"down")
    exchange.upstream.send_body(b"up")
    assert exchange.body == b"down"
    assert tunnel_end.transport.received == b"up"
    tunnel_end.transport.vanish()
    assert exchange.said == ["body", ("end", None)]


async def test_the_end_of_the_clients_side_of_a_tunnel_is_passed_on(tunnel_end: BackendEnd) -> None:
    exchange = await begin_tunnel(tunnel_end)
    exchange.upstream.send_end(None)
    assert tunnel_end.transport.ended
    tunnel_end.transport.send(b"last words")
    tunnel_end.transport.send_end()
    await settle()
    assert exchange.body == b"last words"
    assert exchange.said == ["body", ("end", None)]


async def test_the_end_of_the_backends_side_of_a_tunnel_is_said_and_the_client_goes_on(
    tunnel_end: BackendEnd,
) -> None:
    exchange = await begin_tunnel(tunnel_end)
    tunnel_end.transport.send_end()
    assert exchange.said == ["half closed"]
    exchange.upstream.send_body(b"last words")
    assert tunnel_end.transport.received == b"last words"
    exchange.upstream.send_end(None)
    await settle()
    assert exchange.said == ["half closed", ("end", None)]
    assert tunnel_end.again() is None


async def test_a_tunnel_whose_client_cannot_be_told_of_a_half_close_ends(tunnel_end: BackendEnd) -> None:
    exchange = await begin_tunnel(tunnel_end, half_closes=False)
    tunnel_end.transport.send_end()
    assert exchange.said == ["half closed", ("end", None)]
