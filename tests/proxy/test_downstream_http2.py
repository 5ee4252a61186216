"""The shell around the HTTP/2 core, between a scripted exchange and a scripted socket and clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import hpack
import pytest

from portero_py.config import Limits, Timeouts
from portero_py.errors import BodyTimeout, ClientGone, NoBackend, PorteroError, UpstreamClosed
from portero_py.proxy.client import Client
from portero_py.proxy.deadlines import DeadlineWheel
from portero_py.proxy.downstream_http2 import OUTPUT_LIMIT, Http2Downstream, Http2Stream
from portero_py.proxy.endpoints import Downstream
from portero_py.proxy.worker import Worker
from portero_py.wire.http2_frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    ErrorCode,
    settings_frame,
    window_frame,
)
from portero_py.wire.message import Fields, RequestHead, ResponseHead
from tests.wire.http2_dialogue import GET, POST, Frame, frame, split_frames

OK = ResponseHead(200, b"OK", [(b"Content-Type", b"text/plain")], -1)


class Loop:
    """A clock that stands still, and callbacks that wait to be run."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.soon: list[Callable[[], None]] = []

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)

    def run(self) -> None:
        callbacks, self.soon = self.soon, []
        for callback in callbacks:
            callback()


class Socket:
    """What the client received, and what the shell asked of the transport."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.reading = True
        self.ended = False
        self.closed = False
        self.aborted = False
        self.fills_at = 1 << 60
        self.shell: Http2Downstream

    def write(self, data: bytes) -> None:
        assert not self.closed
        assert not self.ended
        self.writes.append(data)
        if sum(map(len, self.writes)) >= self.fills_at:
            self.fills_at = 1 << 60
            self.shell.pause_writing()

    def is_closing(self) -> bool:
        return self.closed

    def write_eof(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


STALLED = Timeouts().body_idle


class FakeWorker:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.timeouts = Timeouts(head=15, body_idle=60, keep_alive=75)
        self.loop = Loop()
        self.deadlines = DeadlineWheel(self.loop.now)
        self.refused: list[str] = []

    def next_request_id(self) -> bytes:
        return b"request-1"

    def request_refused(self, client: Client, error: PorteroError, request_id: bytes) -> None:
        self.refused.append(error.reason)

    def connection_closed(self, connection: Http2Downstream) -> None:
        self.deadlines.forget(connection)


class Scripted:
    """An exchange that writes down what it is told."""

    def __init__(self, worker: Worker, client: Client, downstream: Downstream, head: RequestHead) -> None:
        assert isinstance(downstream, Http2Stream)
        self.downstream = downstream
        self.head = head
        self.request_id = b"request-7"
        self.said: list[object] = []

    def start(self) -> None:
        self.said.append("start")

    def request_body(self, data: bytes) -> None:
        self.said.append(data)

    def request_end(self, trailers: Fields | None) -> None:
        self.said.append(("end", trailers))

    def downstream_paused(self) -> None:
        self.said.append("paused")

    def downstream_resumed(self) -> None:
        self.said.append("resumed")

    def downstream_gone(self, error: PorteroError) -> None:
        self.said.append(type(error))


class Stage:
    """A connection that has exchanged its greetings."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.worker = FakeWorker(limits or Limits())
        self.loop = self.worker.loop
        self.socket = Socket()
        self.exchanges: list[Scripted] = []
        self.encoder = hpack.Encoder()
        self.decoder = hpack.Decoder()
        self.shell = Http2Downstream(
            cast("Worker", self.worker),
            cast("Client", None),
            cast("asyncio.Transport", self.socket),
            self._exchange,
        )
        self.socket.shell = self.shell
        self.worker.deadlines.watch(self.shell)
        self.loop.run()
        assert [one.kind for one in self.frames()] == [SETTINGS, WINDOW_UPDATE]
        self.send(PREFACE + settings_frame(()))
        self.frames()

    def _exchange(
        self, worker: Worker, client: Client, downstream: Downstream, head: RequestHead, /
    ) -> Scripted:
        made = Scripted(worker, client, downstream, head)
        self.exchanges.append(made)
        return made

    def send(self, data: bytes) -> None:
        self.shell.data_received(data)

    def request(self, number: int, fields: list[tuple[str, str]] = GET, *, ends: bool = True) -> Scripted:
        block = self.encoder.encode(fields)
        self.send(frame(HEADERS, END_HEADERS | (END_STREAM if ends else 0), number, block))
        return self.exchanges[-1]

    def frames(self) -> list[Frame]:
        data, self.socket.writes = b"".join(self.socket.writes), []
        return split_frames(data)

    def response(self) -> tuple[dict[str, str], list[Frame]]:
        frames = self.frames()
        block = b"".join(one.payload for one in frames if one.kind == HEADERS)
        return {str(name): str(value) for name, value in self.decoder.decode(block)}, frames

    def goaways(self) -> list[int]:
        return [int.from_bytes(one.payload[4:8], "big") for one in self.frames() if one.kind == GOAWAY]

    def resets(self) -> list[int]:
        return [int.from_bytes(one.payload, "big") for one in self.frames() if one.kind == RST_STREAM]

    def wait(self, seconds: float) -> None:
        """Let the clock run, a second at a time, with the wheel turning."""
        end = self.loop.now + seconds
        while self.loop.now < end:
            self.loop.now = min(end, self.loop.now + 1.0)
            self.worker.deadlines.advance(self.loop.now)
            self.loop.run()


def test_all_responses_of_one_turn_leave_in_one_write() -> None:
    stage = Stage()
    exchanges = [stage.request(number) for number in (1, 3, 5)]
    for exchange in exchanges:
        exchange.downstream.send_head(OK)
        exchange.downstream.send_body(b"hello")
        exchange.downstream.flush()
        exchange.downstream.send_end(None)
    assert stage.socket.writes == []
    assert len(stage.loop.soon) == 1
    stage.loop.run()
    assert len(stage.socket.writes) == 1
    assert [(one.stream, one.kind) for one in stage.frames()] == [
        (number, kind) for number in (1, 3, 5) for kind in (HEADERS, DATA)
    ]


def test_an_answer_inside_of_the_request_leaves_with_the_read() -> None:
    stage = Stage()
    block = stage.encoder.encode([*GET, ("connection", "close")])
    stage.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, block) + frame(PING, 0, 0, bytes(8)))
    assert len(stage.socket.writes) == 1
    assert [one.kind for one in stage.frames()] == [RST_STREAM, PING]
    assert stage.worker.refused == ["bad_request"]
    assert stage.exchanges == []


def test_a_request_is_told_to_its_exchange() -> None:
    stage = Stage()
    exchange = stage.request(1, POST, ends=False)
    stage.send(frame(DATA, 0, 1, b"body") + frame(DATA, END_STREAM, 1, b"!"))
    assert exchange.said == ["start", b"body", b"!", ("end", None)]
    assert exchange.head.authority == b"app.example"


@pytest.mark.parametrize(
    ("field", "status", "reason"),
    [(("x", "y" * 3000), "431", "headers_too_large"), ((":path", "/" + "y" * 300), "414", "uri_too_long")],
)
def test_a_head_over_a_limit_is_answered_without_an_exchange(
    field: tuple[str, str], status: str, reason: str
) -> None:
    stage = Stage(Limits(request_line=200, header_bytes=2000))
    fields = [pair for pair in GET if pair[0] != field[0]]
    fields = [field, *fields] if field[0] == ":path" else [*fields, field]
    stage.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, stage.encoder.encode(fields)))
    head, frames = stage.response()
    assert head[":status"] == status
    assert frames[-1].flags == END_STREAM
    assert frames[-1].payload.startswith(status.encode())
    assert stage.worker.refused == [reason]
    assert stage.exchanges == []


@pytest.mark.parametrize(
    ("error", "code"),
    [(UpstreamClosed("gone"), ErrorCode.INTERNAL_ERROR), (ClientGone("gone"), ErrorCode.CANCEL)],
)
def test_an_abort_is_a_reset(error: PorteroError, code: ErrorCode) -> None:
    stage = Stage()
    exchange = stage.request(1)
    exchange.downstream.send_head(OK)
    exchange.downstream.abort(error)
    stage.loop.run()
    assert stage.resets() == [code]
    assert exchange.said == ["start"]


def test_a_client_that_resets_or_vanishes_ends_its_exchanges() -> None:
    stage = Stage()
    one, other = stage.request(1), stage.request(3)
    stage.send(frame(RST_STREAM, 0, 1, bytes(4)))
    assert one.said == ["start", ClientGone]
    assert other.said == ["start"]
    stage.shell.connection_lost(None)
    assert other.said == ["start", ClientGone]
    assert len(stage.worker.deadlines) == 0
    stage.loop.run()


def test_no_half_closed_connections() -> None:
    assert Stage().shell.eof_received() is False


def test_there_is_no_tunnel() -> None:
    with pytest.raises(AssertionError):
        Stage().request(1).downstream.start_tunnel()


def test_a_connection_error_is_sent_counted_and_closes() -> None:
    stage = Stage()
    exchange = stage.request(1)
    stage.send(frame(PING, 0, 1, bytes(8)))
    assert stage.goaways() == [ErrorCode.PROTOCOL_ERROR]
    assert stage.socket.ended
    assert not stage.socket.closed
    assert stage.worker.refused == ["http2_connection"]
    assert exchange.said[-1] != "start"
    stage.send(b"more")
    assert stage.socket.writes == []
    stage.wait(7)
    assert stage.socket.aborted


# Backpressure


def test_a_small_window_holds_up_the_backend_and_its_opening_lets_it_go_on() -> None:
    stage = Stage()
    exchange = stage.request(1)
    exchange.downstream.send_head(OK)
    exchange.downstream.send_body(b"x" * 200_000)
    assert exchange.said == ["start", "paused"]
    stage.loop.run()
    stage.send(window_frame(0, 200_000) + window_frame(1, 200_000))
    assert exchange.said == ["start", "paused", "resumed"]
    assert sum(len(one.payload) for one in stage.frames() if one.kind == DATA) == 200_000


def test_a_socket_that_takes_no_more_holds_up_the_backends() -> None:
    stage = Stage()
    stage.send(settings_frame([(4, 1 << 24)]) + window_frame(0, 1 << 24))
    exchange = stage.request(1)
    stage.frames()
    exchange.downstream.send_head(OK)
    stage.socket.fills_at = 100_000
    for _ in range(4):
        exchange.downstream.send_body(b"x" * 100_000)
    stage.loop.run()
    written = stage.frames()
    assert sum(len(one.payload) for one in written if one.kind == DATA) < 300_000
    assert exchange.said == ["start", "paused"]
    stage.shell.resume_writing()
    assert exchange.said == ["start", "paused", "resumed"]
    written += stage.frames()
    assert sum(len(one.payload) for one in written if one.kind == DATA) == 400_000


def test_a_client_that_asks_and_does_not_read_is_read_no_more() -> None:
    stage = Stage()
    stage.shell.pause_writing()
    sent = 0
    while stage.socket.reading:
        stage.send(frame(PING, 0, 0, bytes(8)) * 100)
        sent += 100
        assert sent < 10_000
    assert stage.socket.writes == []
    assert sent * 17 >= OUTPUT_LIMIT
    stage.shell.resume_writing()
    assert stage.socket.reading
    assert len(stage.frames()) == sent


def test_a_request_body_that_the_backend_does_not_read_gets_no_window() -> None:
    stage = Stage()
    exchange = stage.request(1, POST, ends=False)
    exchange.downstream.pause_body()
    for _ in range(16):
        stage.send(frame(DATA, 0, 1, bytes(16384)))
    assert stage.frames() == []
    exchange.downstream.resume_body()
    stage.loop.run()
    assert [one.stream for one in stage.frames()] == [1]


# Time


def test_an_idle_connection_is_closed_with_a_goaway() -> None:
    stage = Stage()
    stage.wait(74)
    assert not stage.socket.closed
    stage.wait(20)
    assert stage.goaways() == [ErrorCode.NO_ERROR]
    assert stage.socket.closed


def test_pings_do_not_keep_an_idle_connection_but_requests_do() -> None:
    stage = Stage()
    for number in (1, 3, 5):
        stage.request(number).downstream.send_response(OK, b"x")
        stage.wait(50)
    assert not stage.socket.closed
    for _ in range(5):
        stage.send(frame(PING, 0, 0, bytes(8)))
        stage.wait(10)
    assert stage.socket.closed


def test_a_long_quiet_response_keeps_its_connection() -> None:
    stage = Stage()
    exchange = stage.request(1)
    stage.wait(500)
    assert not stage.socket.closed
    assert exchange.said == ["start"]


def test_a_client_that_never_sends_its_preface_is_closed() -> None:
    worker = FakeWorker(Limits())
    socket = Socket()
    shell = Http2Downstream(cast("Worker", worker), cast("Client", None), cast("asyncio.Transport", socket))
    socket.shell = shell
    worker.deadlines.watch(shell)
    shell.data_received(PREFACE[:10])
    for _ in range(21):
        worker.loop.now += 1
        worker.deadlines.advance(worker.loop.now)
    assert socket.ended
    assert worker.refused == ["http2_connection"]


def test_a_client_that_ends_its_side_and_does_not_take_the_rest_is_ended() -> None:
    stage = Stage()
    stage.request(1)
    assert not stage.shell.eof_received()
    assert stage.socket.closed
    assert not stage.socket.aborted
    stage.wait(12)
    assert stage.socket.aborted


def test_the_clients_end_after_ours_is_no_news() -> None:
    stage = Stage()
    stage.send(frame(PING, 0, 1, bytes(8)))
    assert stage.socket.ended
    assert not stage.shell.eof_received()


def test_a_header_block_must_be_finished_in_time() -> None:
    stage = Stage()
    stage.request(1)
    stage.wait(20)
    stage.send(frame(HEADERS, 0, 3, b"\x82"))
    stage.wait(14)
    stage.send(frame(CONTINUATION, 0, 3, b"\x87"))
    assert not stage.socket.closed
    stage.wait(12)
    assert stage.goaways() == [ErrorCode.ENHANCE_YOUR_CALM]
    assert stage.socket.ended


def test_a_body_that_stops_is_answered_with_408() -> None:
    stage = Stage()
    exchange = stage.request(1, POST, ends=False)
    stage.wait(40)
    stage.send(frame(DATA, 0, 1, b"alive"))
    stage.wait(55)
    assert BodyTimeout not in exchange.said
    stage.wait(15)
    assert exchange.said[-1] is BodyTimeout
    head, frames = stage.response()
    assert head[":status"] == "408"
    assert head["x-request-id"] == "request-7"
    assert frames[-1].kind == RST_STREAM
    assert not stage.socket.closed


def test_a_body_that_stops_during_the_response_is_reset() -> None:
    stage = Stage()
    exchange = stage.request(1, POST, ends=False)
    exchange.downstream.send_head(OK)
    stage.wait(71)
    assert exchange.said[-1] is BodyTimeout
    assert stage.resets() == [ErrorCode.CANCEL]


def test_a_body_that_a_backend_does_not_read_is_not_the_clients_fault() -> None:
    stage = Stage()
    exchange = stage.request(1, POST, ends=False)
    exchange.downstream.pause_body()
    stage.wait(200)
    assert exchange.said == ["start"]


def test_a_response_that_the_client_does_not_take_is_given_up() -> None:
    stage = Stage()
    stage.send(window_frame(0, 1 << 20))
    running, complete = stage.request(1), stage.request(3)
    running.downstream.send_head(OK)
    running.downstream.send_body(b"x" * 100_000)
    complete.downstream.send_response(OK, b"y" * 100_000)
    stage.wait(STALLED - 10)
    stage.send(window_frame(1, 10))
    stage.wait(20)
    assert running.said == ["start"]
    assert stage.resets() == [ErrorCode.CANCEL]
    stage.wait(STALLED)
    assert running.said[-1] is ClientGone
    assert complete.said == ["start"]


def test_a_socket_that_stays_full_is_aborted() -> None:
    stage = Stage()
    stage.request(1)
    stage.shell.pause_writing()
    stage.wait(STALLED - 1)
    assert not stage.socket.aborted
    stage.wait(20)
    assert stage.socket.aborted


# Drain


def test_a_drain_lets_the_exchanges_finish_and_closes() -> None:
    stage = Stage()
    exchange = stage.request(1)
    stage.shell.start_drain()
    stage.loop.run()
    goaway, ping = stage.frames()
    assert (goaway.kind, ping.kind) == (GOAWAY, PING)
    late = stage.request(3)
    stage.send(frame(PING, 1, 0, ping.payload))
    exchange.downstream.send_response(OK, b"x")
    late.downstream.send_response(OK, b"x")
    stage.loop.run()
    assert stage.goaways() == [ErrorCode.NO_ERROR]
    assert stage.socket.closed


def test_a_drain_does_not_wait_for_a_client_that_does_not_answer() -> None:
    stage = Stage()
    stage.shell.start_drain()
    stage.wait(3)
    assert stage.goaways() == [ErrorCode.NO_ERROR] * 2
    assert stage.socket.closed


def test_closing_with_a_full_socket_leaves_the_rest_to_the_transport() -> None:
    stage = Stage()
    stage.shell.pause_writing()
    stage.send(frame(PING, 0, 1, bytes(8)))
    assert stage.goaways() == [ErrorCode.PROTOCOL_ERROR]
    assert stage.socket.ended


def test_a_client_that_was_held_up_is_read_again_when_its_connection_ends() -> None:
    stage = Stage()
    stage.request(1)
    stage.shell.pause_writing()
    for _ in range(6000):
        stage.send(frame(PING, 0, 0, bytes(8)))
        if not stage.socket.reading:
            break
    assert not stage.socket.reading
    stage.shell._connection.fail(ErrorCode.NO_ERROR, "enough")
    stage.shell.on_deadline(stage.loop.now)
    assert stage.socket.ended
    assert stage.socket.reading  # its last words must not become a reset


def test_a_reply_of_the_proxy_reaches_the_client_in_lower_case() -> None:
    from portero_py.proxy.replies import reply

    stage = Stage()
    exchange = stage.request(1)
    exchange.downstream.send_response(*reply(NoBackend("none"), exchange.head, b"id"))
    stage.loop.run()
    head, _ = stage.response()
    assert (head[":status"], head["x-request-id"]) == ("503", "id")
    assert all(name == name.lower() for name in head)
