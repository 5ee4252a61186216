"""What `endpoints.py` promises of a `Downstream`, whatever its HTTP version.

What a version does in its own way (framing, pipelining, windows, GOAWAY) is in tests/proxy/downstream/.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from portero_py.errors import NoBackend, UpstreamClosed
from portero_py.wire.message import CHUNKED, ResponseHead
from tests.proxy.client_ends import CLIENT_ENDS, ClientEnd, ScriptedExchange
from tests.proxy.dialogue import World, settle

UNSIZED = ResponseHead(200, b"OK", [(b"X-From", b"backend")], CHUNKED)
EARLY_HINTS = ResponseHead(103, b"Early Hints", [(b"Link", b"</a>")])
#: More than any downstream keeps for a client that does not read, or takes while it is paused.
MUCH = 4 << 20


def sized(body: bytes, status: int = 200) -> ResponseHead:
    return ResponseHead(status, b"OK", [(b"Content-Length", b"%d" % len(body))], len(body))


@pytest.fixture(params=CLIENT_ENDS)
async def end(request: pytest.FixtureRequest, world: World, monkeypatch: pytest.MonkeyPatch) -> ClientEnd:
    return CLIENT_ENDS[request.param](world, monkeypatch)


@pytest.fixture(params=[name for name, kind in CLIENT_ENDS.items() if kind.half_closes is not None])
async def tunnel_end(
    request: pytest.FixtureRequest, world: World, monkeypatch: pytest.MonkeyPatch
) -> ClientEnd:
    return CLIENT_ENDS[request.param](world, monkeypatch)


def answer_ok(exchange: ScriptedExchange) -> None:
    exchange.downstream.send_response(sized(b"ok"), b"ok")


async def test_a_request_without_a_body_is_complete_with_its_head(end: ClientEnd) -> None:
    exchange = end.begin()
    assert exchange.said == ["start"]
    assert exchange.head.method == b"GET"
    assert exchange.head.authority == b"app.example"
    assert exchange.head.body_length == 0
    answer_ok(exchange)
    await settle()
    assert exchange.said == ["start"]


async def test_a_body_comes_in_order_and_its_end_is_said_once(end: ClientEnd) -> None:
    exchange = end.begin(b"POST", body=True)
    assert exchange.said == ["start"]
    assert exchange.head.body_length == CHUNKED
    for piece in (b"one ", b"two ", b"three"):
        end.send_body(piece)
    assert exchange.body == b"one two three"
    end.send_end()
    assert exchange.calls == ["start", ("end", None)]
    answer_ok(exchange)
    await settle()
    assert exchange.calls == ["start", ("end", None)]


async def test_trailers_of_a_request_come_with_its_end(end: ClientEnd) -> None:
    exchange = end.begin(b"POST", body=True)
    end.send_body(b"data")
    end.send_end(((b"x-checksum", b"7"),))
    assert [each[0] for each in exchange.calls if isinstance(each, tuple)] == ["end"]
    [(_, trailers)] = [each for each in exchange.calls if isinstance(each, tuple)]
    assert [(name.lower(), value) for name, value in trailers] == [(b"x-checksum", b"7")]
    answer_ok(exchange)
    await settle()


async def test_a_whole_response_is_one_call(end: ClientEnd) -> None:
    exchange = end.begin()
    exchange.downstream.send_response(sized(b"hello"), b"hello")
    await settle()
    seen = end.seen()
    assert (seen.status, seen.body, seen.complete) == (200, b"hello", True)
    assert seen.fields[b"content-length"] == b"5"


async def test_head_body_and_end_arrive_in_order(end: ClientEnd) -> None:
    exchange = end.begin()
    exchange.downstream.send_head(UNSIZED)
    exchange.downstream.send_body(b"one ")
    await settle()
    assert not end.seen().complete
    exchange.downstream.send_body(b"two")
    exchange.downstream.send_end(None)
    await settle()
    seen = end.seen()
    assert (seen.status, seen.body, seen.complete) == (200, b"one two", True)
    assert seen.fields[b"x-from"] == b"backend"


async def test_a_head_whose_body_has_not_come_is_let_out_by_flush(end: ClientEnd) -> None:
    exchange = end.begin()
    exchange.downstream.send_head(UNSIZED)
    exchange.downstream.flush()
    await settle()
    seen = end.seen()
    assert (seen.status, seen.complete, seen.broken) == (200, False, False)
    exchange.downstream.send_end(None)
    exchange.downstream.flush()  # nothing is held back any more
    await settle()
    assert end.seen().complete


async def test_informational_responses_go_before_the_final_one(end: ClientEnd) -> None:
    exchange = end.begin()
    exchange.downstream.send_informational(EARLY_HINTS)
    exchange.downstream.send_informational(EARLY_HINTS)
    answer_ok(exchange)
    await settle()
    seen = end.seen()
    assert (seen.informational, seen.status, seen.body) == ([103, 103], 200, b"ok")


async def test_trailers_of_a_response_reach_a_client_that_wants_them(end: ClientEnd) -> None:
    exchange = end.begin(fields=((b"te", b"trailers"), *end.te_fields))
    exchange.downstream.send_head(UNSIZED)
    exchange.downstream.send_body(b"data")
    exchange.downstream.send_end([(b"X-Checksum", b"7")])
    await settle()
    seen = end.seen()
    assert seen.complete
    assert seen.body == b"data"
    assert seen.trailers == [(b"x-checksum", b"7")]


@pytest.mark.parametrize(("method", "status"), [(b"HEAD", 200), (b"GET", 204), (b"GET", 304), (b"POST", 204)])
@pytest.mark.parametrize("whole", [True, False])
async def test_a_response_without_a_body_ends_with_its_head(
    end: ClientEnd, method: bytes, status: int, whole: bool
) -> None:
    fields = [(b"Content-Length", b"5")] if method == b"HEAD" else [(b"X-From", b"backend")]
    head = ResponseHead(status, b"OK", fields, 0)
    for _ in range(2):  # the second would show a byte too many of the first
        exchange = end.begin(method)
        if whole:
            exchange.downstream.send_response(head, b"")
        else:
            exchange.downstream.send_head(head)
            exchange.downstream.send_end(None)
        await settle()
        seen = end.seen()
        assert (seen.status, seen.body, seen.complete, seen.broken) == (status, b"", True, False)


async def test_one_exchange_follows_the_other(end: ClientEnd) -> None:
    for _ in range(3):
        exchange = end.begin(b"POST", body=True)
        end.send_body(b"data")
        end.send_end()
        answer_ok(exchange)
        await settle()
        assert end.seen().complete
        assert exchange.said == ["start", b"data", ("end", None)]
    assert len(end.exchanges) == 3
    assert not end.transport.closed


async def test_an_exchange_may_end_while_it_starts(end: ClientEnd) -> None:
    end.on_start = answer_ok
    for _ in range(2):
        exchange = end.begin()
        await settle()
        assert end.seen().complete
        assert exchange.said == ["start"]


async def test_a_paused_client_is_not_read_for_ever_and_goes_on_when_it_is_resumed(end: ClientEnd) -> None:
    exchange = end.begin(b"POST", body=True)
    exchange.downstream.pause_body()
    sent = 0
    while sent < MUCH and end.may_send():
        end.send_body(bytes(1000))
        sent += 1000
    assert sent < MUCH
    assert len(exchange.body) <= sent
    exchange.downstream.resume_body()
    await settle()
    assert end.may_send()
    end.send_body(b"the rest")
    end.send_end()
    assert len(exchange.body) == sent + len(b"the rest")
    assert exchange.calls == ["start", ("end", None)]
    answer_ok(exchange)
    await settle()
    assert end.seen().complete


async def test_a_client_that_reads_slowly_is_told_of_and_so_is_that_it_caught_up(end: ClientEnd) -> None:
    exchange = end.begin()
    exchange.downstream.send_head(UNSIZED)
    end.transport.stop_reading()
    sent = 0
    while sent < MUCH and "paused" not in exchange.said:
        exchange.downstream.send_body(bytes(16_384))
        sent += 16_384
        await settle()
    assert exchange.said == ["start", "paused"]
    end.read_all()
    await settle()
    assert exchange.said == ["start", "paused", "resumed"]
    exchange.downstream.send_end(None)
    await settle()
    seen = end.seen()
    assert (len(seen.body), seen.complete) == (sent, True)


@pytest.mark.parametrize("flushed", [True, False])
async def test_a_client_notices_that_its_response_was_aborted(end: ClientEnd, flushed: bool) -> None:
    exchange = end.begin()
    exchange.downstream.send_head(UNSIZED)
    if flushed:
        exchange.downstream.flush()
        await settle()
    exchange.downstream.abort(UpstreamClosed("the backend is gone"))
    await settle()
    seen = end.seen()
    assert seen.broken or (seen.complete and seen.status == 502 and not flushed)


async def test_a_client_notices_that_its_response_was_aborted_before_its_head(end: ClientEnd) -> None:
    exchange = end.begin()
    exchange.downstream.abort(UpstreamClosed("the backend is gone"))
    await settle()
    assert end.seen().broken


async def test_a_client_notices_that_its_response_was_aborted_in_its_body(end: ClientEnd) -> None:
    exchange = end.begin()
    exchange.downstream.send_head(UNSIZED)
    exchange.downstream.send_body(b"the beginning")
    await settle()
    exchange.downstream.abort(UpstreamClosed("the backend is gone"))
    await settle()
    seen = end.seen()
    assert (seen.body, seen.complete, seen.broken) == (b"the beginning", False, True)


def ends_whole(exchange: ScriptedExchange) -> None:
    answer_ok(exchange)


def ends_in_pieces(exchange: ScriptedExchange) -> None:
    exchange.downstream.send_head(UNSIZED)
    exchange.downstream.send_body(b"ok")
    exchange.downstream.send_end(None)


def ends_aborted(exchange: ScriptedExchange) -> None:
    exchange.downstream.send_head(UNSIZED)
    exchange.downstream.send_body(b"the beginning")
    exchange.downstream.abort(NoBackend("nobody is left"))


@pytest.mark.parametrize("finish", [ends_whole, ends_in_pieces, ends_aborted])
@pytest.mark.parametrize("complete", [True, False])
async def test_after_its_end_an_exchange_hears_nothing_more(
    end: ClientEnd, finish: Callable[[ScriptedExchange], None], complete: bool
) -> None:
    exchange = end.begin(b"POST", body=True)
    end.send_body(b"data")
    if complete:
        end.send_end()
    said = list(exchange.said)
    finish(exchange)
    await settle()
    assert exchange.said == said
    if not complete and not end.transport.closed and end.transport.reading:
        end.send_body(b"more")
        end.send_end()
    await settle()
    end.transport.vanish(ConnectionResetError())
    await settle()
    assert exchange.said == said


@pytest.mark.parametrize("answering", [True, False])
async def test_a_client_that_vanishes_is_gone_once(end: ClientEnd, answering: bool) -> None:
    exchange = end.begin()
    if answering:
        exchange.downstream.send_head(UNSIZED)
        exchange.downstream.send_body(b"the beginning")
        await settle()
    end.transport.vanish(ConnectionResetError())
    await settle()
    assert exchange.said == ["start", ("gone", "client_gone")]


async def test_a_client_that_breaks_the_protocol_is_gone_once(end: ClientEnd) -> None:
    exchange = end.begin(b"POST", body=True)
    end.send_body(b"data")
    end.send_nonsense()
    assert exchange.body == b"data"
    assert [each[0] if isinstance(each, tuple) else each for each in exchange.calls] == ["start", "gone"]
    await settle()
    end.transport.vanish()
    await settle()
    assert len(exchange.calls) == 2


async def test_a_client_that_stops_in_the_middle_of_its_body_is_gone_and_told_why(
    end: ClientEnd,
) -> None:
    exchange = end.begin(b"POST", body=True)
    end.send_body(b"data")
    await end.world.pass_time(end.world.timeouts.body_idle + 15)
    assert exchange.said == ["start", b"data", ("gone", "body_timeout")]
    assert end.seen().status == 408


async def test_a_tunnel_carries_bytes_both_ways(tunnel_end: ClientEnd) -> None:
    exchange = begin_tunnel(tunnel_end)
    tunnel_end.transport.received = b""
    tunnel_end.transport.send(b"up")
    assert exchange.said == ["start", b"up"]
    exchange.downstream.send_body(b"down")
    assert tunnel_end.transport.received == b"down"
    exchange.downstream.send_end(None)
    await settle()
    assert exchange.said == ["start", b"up"]


async def test_a_tunnel_is_half_closed_where_that_can_be_told(tunnel_end: ClientEnd) -> None:
    exchange = begin_tunnel(tunnel_end)
    assert exchange.downstream.half_close() is tunnel_end.half_closes
    assert tunnel_end.transport.ended is tunnel_end.half_closes
    tunnel_end.transport.send(b"still there")
    assert exchange.said == ["start", b"still there"]
    exchange.downstream.send_end(None)
    await settle()


async def test_the_end_of_the_clients_side_of_a_tunnel_is_said(tunnel_end: ClientEnd) -> None:
    exchange = begin_tunnel(tunnel_end)
    tunnel_end.transport.send(b"up")
    tunnel_end.transport.send_end()
    await settle()
    if tunnel_end.half_closes:
        assert exchange.said == ["start", b"up", ("end", None)]
        exchange.downstream.send_body(b"last words")
        exchange.downstream.send_end(None)
        await settle()
        assert tunnel_end.transport.received.endswith(b"last words")
        assert tunnel_end.transport.closed
    else:
        assert exchange.said == ["start", b"up", ("gone", "client_gone")]


def begin_tunnel(end: ClientEnd) -> ScriptedExchange:
    exchange = end.begin(fields=((b"connection", b"upgrade"), (b"upgrade", b"websocket")))
    assert exchange.head.upgrade == b"websocket"
    exchange.downstream.send_head(ResponseHead(101, b"Switching Protocols", [], 0, upgrade=b"websocket"))
    exchange.downstream.start_tunnel()
    assert end.seen().status == 101
    return exchange
