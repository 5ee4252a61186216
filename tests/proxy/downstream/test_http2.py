"""The shell around the HTTP/2 core, between a scripted exchange and a scripted socket and clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import cast

import hpack
import pytest

from portero_py.config.model import Limits, Timeouts
from portero_py.core.counters import Counters
from portero_py.errors import BodyTimeout, ClientGone, NoBackend, PorteroError, UpstreamClosed
from portero_py.proxy.budget import Budget
from portero_py.proxy.deadlines import DeadlineWheel
from portero_py.proxy.downstream.http2 import OUTPUT_LIMIT, Http2Downstream, Http2Stream
from portero_py.proxy.downstream.leaving import Leaving
from portero_py.proxy.endpoints import Downstream, RequestSide
from portero_py.proxy.peer import Peer
from portero_py.proxy.refusals import Refusals
from portero_py.proxy.surroundings import Surroundings
from portero_py.wire.headers import Forwarding
from portero_py.wire.http2.frames import (
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
    InternalFault,
    settings_frame,
    window_frame,
)
from portero_py.wire.message import Fields, RequestHead, ResponseHead
from tests.wire.http2.dialogue import GET, POST, Frame, frame, split_frames

OK = ResponseHead(200, b"OK", [(b"Content-Type", b"text/plain")], -1)


class Call:
    """A callback that has not been run."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.run = callback

    def cancel(self) -> None:
        self.run = lambda: None


class Loop:
    """A clock that stands still, and callbacks that wait to be run."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.soon: list[Call] = []
        self.later: list[tuple[float, Call]] = []

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[[], None]) -> Call:
        self.soon.append(Call(callback))
        return self.soon[-1]

    def call_later(self, seconds: float, callback: Callable[..., None], *arguments: object) -> Call:
        call = Call(partial(callback, *arguments))
        self.later.append((self.now + seconds, call))
        return call

    def run(self) -> None:
        """One turn."""
        due = [call for when, call in self.later if when <= self.now]
        self.later = [(when, call) for when, call in self.later if when > self.now]
        calls, self.soon = self.soon + due, []
        for call in calls:
            call.run()


class Socket:
    """What the client received, and what the shell asked of the transport."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.reading = True
        self.ended = False
        self.closed = False
        self.aborted = False
        self.fills_at = 1 << 60
        self.unsent = 0  # what the client has not taken, if a test wants it so
        self.shell: Http2Downstream
        self.protocol: asyncio.Protocol | None = None

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

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def get_extra_info(self, name: str) -> None:
        """No socket that the kernel knows."""

    def set_protocol(self, protocol: asyncio.Protocol) -> None:
        self.protocol = protocol

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


PEER = Peer("192.0.2.7", 50000, Forwarding(b"192.0.2.7", b"https", trusted=False))
IDLE = Timeouts().body_idle


class FakeSurroundings:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.timeouts = Timeouts(head=15, body_idle=60, keep_alive=75)
        self.loop = Loop()
        self.deadlines = DeadlineWheel(self.loop.now)
        self.counters = Counters()
        self.refusals = Refusals(cast("asyncio.AbstractEventLoop", self.loop), self.counters)
        self.budget = Budget(cast("asyncio.AbstractEventLoop", self.loop), self.counters, self.refusals)
        self.refused: list[str] = []
        self.versions: set[bytes] = set()
        self.leaving: Leaving | None = None

    def next_request_id(self) -> bytes:
        return b"request-1"

    def request_refused(
        self, peer: Peer, error: PorteroError, request_id: bytes, version: bytes = b"1.1"
    ) -> None:
        self.refused.append(error.reason)
        self.versions.add(version)

    def connection_succeeded(self, former: Http2Downstream, successor: Leaving) -> None:
        self.deadlines.forget(former)
        self.deadlines.watch(successor)
        self.leaving = successor

    def connection_closed(self, connection: Http2Downstream) -> None:
        self.deadlines.forget(connection)


class Scripted(RequestSide):
    """An exchange that writes down what it is told."""

    def __init__(
        self, surroundings: Surroundings, peer: Peer, downstream: Downstream, head: RequestHead
    ) -> None:
        assert isinstance(downstream, Http2Stream)
        self.downstream = downstream
        self.head = head
        self.request_id = b"request-7"
        self.said: list[object] = []

    @property
    def body_idle(self) -> float:
        return IDLE

    def start(self) -> None:
        self.said.append("start")

    def request_body(self, data: bytes) -> None:
        self.said.append(data)
        self.bytes_in += len(data)

    def request_end(self, trailers: Fields | None) -> None:
        self.said.append(("end", trailers))

    def downstream_paused(self) -> None:
        self.said.append("paused")

    def downstream_resumed(self) -> None:
        self.said.append("resumed")

    def downstream_gone(self, error: PorteroError) -> None:
        self.said.append(type(error))


class Nobody:
    """Holds bytes."""

    def held_bytes(self) -> int:
        raise AssertionError("there is no reason to ask")

    def kill(self) -> None:
        raise AssertionError("there is no reason to end it")


class Stage:
    """A connection that has exchanged its greetings."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.surroundings = FakeSurroundings(limits or Limits())
        self.loop = self.surroundings.loop
        self.socket = Socket()
        self.exchanges: list[Scripted] = []
        self.encoder = hpack.Encoder()
        self.decoder = hpack.Decoder()
        self.shell = Http2Downstream(
            cast("Surroundings", self.surroundings),
            PEER,
            cast("asyncio.Transport", self.socket),
            self._exchange,
        )
        self.socket.shell = self.shell
        self.surroundings.deadlines.watch(self.shell)
        self.loop.run()
        assert [one.kind for one in self.frames()] == [SETTINGS, WINDOW_UPDATE]
        self.send(PREFACE + settings_frame(()))
        self.frames()

    def _exchange(
        self, surroundings: Surroundings, peer: Peer, downstream: Downstream, head: RequestHead, /
    ) -> Scripted:
        made = Scripted(surroundings, peer, downstream, head)
        self.exchanges.append(made)
        return made

    def send(self, data: bytes) -> None:
        (self.socket.protocol or self.shell).data_received(data)

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
            self.surroundings.deadlines.advance(self.loop.now)
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
    assert stage.surroundings.refused == ["bad_request"]
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
    assert stage.surroundings.refused == [reason]
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
    assert len(stage.surroundings.deadlines) == 0
    stage.loop.run()


def test_no_half_closed_connections() -> None:
    assert Stage().shell.eof_received() is False


def test_there_is_no_tunnel() -> None:
    with pytest.raises(AssertionError):
        Stage().request(1).downstream.start_tunnel()


def test_a_connection_error_is_sent_counted_and_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    monkeypatch.setattr("portero_py.proxy.downstream.leaving.monotonic", stage.loop.time)
    exchange = stage.request(1)
    stage.send(frame(PING, 0, 1, bytes(8)))
    assert stage.goaways() == [ErrorCode.PROTOCOL_ERROR]
    assert stage.socket.ended
    assert not stage.socket.closed
    assert stage.surroundings.refused == ["http2_connection"]
    assert exchange.said[-1] != "start"
    assert stage.surroundings.versions == {b"2"}
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
    for _ in range(4):
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
    assert stage.socket.ended


def test_pings_do_not_keep_an_idle_connection_but_requests_do() -> None:
    stage = Stage()
    for number in (1, 3, 5):
        stage.request(number).downstream.send_response(OK, b"x")
        stage.wait(50)
    assert not stage.socket.ended
    for _ in range(5):
        stage.send(frame(PING, 0, 0, bytes(8)))
        stage.wait(10)
    assert stage.socket.ended


def test_a_long_quiet_response_keeps_its_connection() -> None:
    stage = Stage()
    exchange = stage.request(1)
    stage.wait(500)
    assert not stage.socket.closed
    assert exchange.said == ["start"]


def test_a_client_that_never_sends_its_preface_is_closed() -> None:
    surroundings = FakeSurroundings(Limits())
    socket = Socket()
    shell = Http2Downstream(cast("Surroundings", surroundings), PEER, cast("asyncio.Transport", socket))
    socket.shell = shell
    surroundings.deadlines.watch(shell)
    shell.data_received(PREFACE[:10])
    for _ in range(21):
        surroundings.loop.now += 1
        surroundings.deadlines.advance(surroundings.loop.now)
    assert socket.ended
    assert surroundings.refused == ["http2_connection"]


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


def test_a_body_that_comes_too_slowly_is_answered_with_408() -> None:
    stage = Stage(Limits(body_rate=100))
    slow, fast = stage.request(1, POST, ends=False), stage.request(3, POST, ends=False)
    for _ in range(12):
        stage.send(frame(DATA, 0, 1, b"slow") + frame(DATA, 0, 3, bytes(600)))
        stage.wait(5)
    assert slow.said[-1] is BodyTimeout
    assert BodyTimeout not in fast.said
    head, _ = stage.response()
    assert head[":status"] == "408"
    assert stage.surroundings.counters.refused == {"body_rate": 1}


def test_a_body_is_not_measured_while_its_backend_is_behind_nor_in_a_conversation() -> None:
    stage = Stage(Limits(body_rate=100))
    waiting = stage.request(1, POST, ends=False)
    talking = stage.request(3, POST, ends=False)
    grpc = stage.request(5, [*POST, ("content-type", "application/grpc+proto")], ends=False)
    stage.wait(15)
    waiting.downstream.pause_body()
    talking.downstream.send_head(OK)
    for _ in range(10):
        stage.wait(5)
        stage.send(frame(DATA, 0, 3, b"."))
        stage.send(frame(DATA, 0, 5, b"."))
    waiting.downstream.resume_body()
    stage.wait(15)
    stage.send(frame(DATA, 0, 1, b"..") + frame(DATA, 0, 3, b".") + frame(DATA, 0, 5, b"."))
    for exchange in (waiting, talking, grpc):
        assert BodyTimeout not in exchange.said
    stage.wait(20)
    assert waiting.said[-1] is BodyTimeout, "now it is the client who is slow"
    assert BodyTimeout not in talking.said
    assert BodyTimeout not in grpc.said


def test_what_waits_for_a_client_is_in_the_budget_until_it_is_taken() -> None:
    stage = Stage()
    budget = stage.surroundings.budget
    first, second = stage.request(1), stage.request(3)
    for exchange in (first, second):
        exchange.downstream.send_head(OK)
    first.downstream.send_body(b"x" * 165_535)
    assert budget.total >= 100_000
    second.downstream.send_body(b"y" * 50_000)
    assert budget.total >= 150_000
    stage.send(window_frame(0, 1 << 20) + window_frame(1, 1 << 20))
    assert "resumed" in first.said
    stage.wait(1)
    assert budget.total == 0
    second.downstream.send_body(b"y" * 100_000)
    assert budget.total >= 80_000
    stage.send(frame(RST_STREAM, 0, 3, bytes(4)))
    stage.wait(6)
    assert budget.total == 0


def test_a_stream_that_was_behind_waits_for_room_before_its_backend_is_read_again() -> None:
    stage = Stage()
    budget = stage.surroundings.budget
    exchange, lost = stage.request(1), stage.request(3)
    stage.send(window_frame(0, 1 << 20))
    for each in (exchange, lost):
        each.downstream.send_head(OK)
        each.downstream.send_body(b"x" * 165_535)
    budget.most = 11 << 20
    budget.holds(Nobody(), 10 << 20)
    stage.send(window_frame(1, 1 << 20) + window_frame(3, 1 << 20))
    assert "resumed" not in exchange.said
    assert budget.waiting == 2
    stage.send(frame(RST_STREAM, 0, 3, bytes(4)))
    assert budget.waiting == 1
    budget.most = 0
    stage.wait(1)
    assert exchange.said[-1] == "resumed"
    assert lost.said[-1] is ClientGone


def test_a_response_that_the_client_does_not_take_is_given_up() -> None:
    stage = Stage()
    stage.send(window_frame(0, 1 << 20))
    running, complete = stage.request(1), stage.request(3)
    running.downstream.send_head(OK)
    running.downstream.send_body(b"x" * 100_000)
    complete.downstream.send_response(OK, b"y" * 100_000)
    stage.wait(IDLE - 10)
    stage.send(window_frame(1, 10))
    stage.wait(20)
    assert running.said == ["start"]
    assert stage.resets() == [], "the connection has moved"
    stage.wait(IDLE)
    assert running.said[-1] is ClientGone
    assert complete.said == ["start"]
    assert stage.resets() == [ErrorCode.CANCEL] * 2


@pytest.mark.parametrize(
    "nonsense",
    [
        frame(PING, 0, 0, bytes(8)),
        window_frame(0, 1),
        window_frame(1, 1),
        settings_frame(()),
        frame(DATA, 0, 5),
    ],
    ids=["ping", "connection window", "window of an end", "settings", "empty data"],
)
def test_frames_that_move_no_body_buy_a_stalled_stream_no_time(nonsense: bytes) -> None:
    stage = Stage()
    ending, stalled, upload = stage.request(1), stage.request(3), stage.request(5, POST, ends=False)
    stage.send(window_frame(0, 1 << 20))
    ending.downstream.send_response(OK, b"x" * 65_535)
    stalled.downstream.send_head(OK)
    stalled.downstream.send_body(b"x" * 100_000)
    for _ in range(12):
        stage.send(nonsense)
        stage.wait(6)
    assert stalled.said[-1] is ClientGone
    assert upload.said[-1] is BodyTimeout


def test_streams_wait_for_a_slow_client_while_anything_moves_but_not_for_ever() -> None:
    """A client that takes 35 KB/s on 128 streams comes back to each of them after a minute and more."""
    stage = Stage()
    moving, stalled = stage.request(1), stage.request(3)
    upload = stage.request(5, POST, ends=False)
    stage.send(window_frame(0, 1 << 20))
    moving.downstream.send_head(OK)
    moving.downstream.send_body(b"x" * 200_000)
    stalled.downstream.send_head(OK)
    stalled.downstream.send_body(b"x" * 100_000)
    for _ in range(11):
        stage.send(window_frame(1, 1))
        stage.wait(50)
    assert stalled.said == ["start"]
    assert upload.said == ["start"]
    for _ in range(2):
        stage.send(window_frame(1, 1))
        stage.wait(50)
    assert stalled.said[-1] is ClientGone
    assert upload.said[-1] is BodyTimeout
    assert moving.said == ["start", "paused"]


def test_a_body_that_moves_gives_the_other_streams_time_and_a_backends_bytes_do_not() -> None:
    stage = Stage()
    upload, stalled = stage.request(1, POST, ends=False), stage.request(3)
    stalled.downstream.send_head(OK)
    stalled.downstream.send_body(b"x" * 100_000)
    for _ in range(4):
        stage.wait(50)
        stage.send(frame(DATA, 0, 1, b"x"))
    assert stalled.said == ["start"]
    stage.send(frame(DATA, END_STREAM, 1, b"x"))
    for _ in range(7):
        stalled.downstream.send_body(b"x")
        stage.wait(10)
    assert stalled.said[-1] is ClientGone
    assert upload.said[-1] == ("end", None)


def test_a_full_socket_whose_client_takes_something_is_left_alone() -> None:
    stage = Stage()
    exchange = stage.request(1)
    stage.send(settings_frame([(4, 1 << 24)]) + window_frame(0, 1 << 24))
    exchange.downstream.send_head(OK)
    exchange.downstream.send_body(b"x" * 100_000)
    stage.socket.unsent = 90_000
    stage.shell.pause_writing()
    exchange.downstream.send_body(b"x" * 100_000)
    for _ in range(6):
        stage.socket.unsent -= 1
        stage.wait(55)
    assert not stage.socket.aborted
    assert exchange.said == ["start", "paused"]
    for _ in range(2):
        # What is put behind the full socket has not moved.
        stage.request(2 * len(stage.exchanges) + 1).downstream.send_response(OK, b"")
        stage.wait(40)
    assert stage.socket.aborted


def test_a_socket_that_stays_full_is_aborted() -> None:
    stage = Stage()
    stage.request(1)
    stage.shell.pause_writing()
    stage.wait(IDLE - 1)
    assert not stage.socket.aborted
    stage.wait(20)
    assert stage.socket.aborted


# Turns


def flood(stage: Stage, count: int) -> None:
    """`count` requests in one read."""
    block = stage.encoder.encode(GET)
    numbers = range(1, 2 * count, 2)
    stage.send(b"".join([frame(HEADERS, END_HEADERS | END_STREAM, number, block) for number in numbers]))


def answering(stage: Stage) -> None:
    """Exchanges are answered at once from now on."""

    class Immediate(Scripted):
        def start(self) -> None:
            self.downstream.send_response(ResponseHead(200, b"OK", [(b"ETag", b"x" * 100)], -1), b"")

    def make(
        surroundings: Surroundings, peer: Peer, downstream: Downstream, head: RequestHead, /
    ) -> Scripted:
        stage.exchanges.append(Immediate(surroundings, peer, downstream, head))
        return stage.exchanges[-1]

    stage.shell.new_exchange = make


def test_many_requests_in_one_read_are_dealt_with_in_turns_and_nothing_is_read_meanwhile() -> None:
    stage = Stage()
    answering(stage)
    flood(stage, 1000)
    turns = 1
    while stage.loop.soon:
        assert len(stage.exchanges) == 64 * turns
        assert len(stage.socket.writes) == turns, "each turn's answers leave at its end"
        assert not stage.socket.reading
        assert len(stage.loop.soon) == 1
        stage.loop.run()
        turns += 1
    assert len(stage.exchanges) == 1000
    assert stage.socket.reading


def test_the_rest_of_a_read_waits_for_a_client_that_takes_no_answers() -> None:
    stage = Stage()
    answering(stage)
    stage.shell.pause_writing()
    flood(stage, 6000)
    while stage.loop.soon:
        stage.loop.run()
    held = len(stage.exchanges)
    assert held < 6000
    assert not stage.socket.reading
    stage.shell.resume_writing()
    assert not stage.socket.reading
    while stage.loop.soon:
        stage.loop.run()
    assert len(stage.exchanges) == 6000
    assert stage.socket.reading


def test_a_client_that_goes_takes_the_rest_of_its_read_with_it() -> None:
    stage = Stage()
    answering(stage)
    flood(stage, 100)
    stage.shell.connection_lost(None)
    stage.loop.run()
    assert len(stage.exchanges) == 64


# Early answers


def test_the_reset_behind_an_early_answer_comes_later_and_needs_no_sweep() -> None:
    stage = Stage()
    stage.request(1, POST, ends=False).downstream.send_response(OK, b"enough")
    stage.loop.run()
    assert [one.kind for one in stage.frames()] == [HEADERS, DATA]
    stage.send(frame(DATA, 0, 1, b"on its way"))
    assert len(stage.loop.later) == 1
    stage.loop.now += 0.5
    stage.loop.run()
    assert stage.frames() == []
    stage.loop.now += 0.5
    stage.loop.run()
    assert stage.resets() == [ErrorCode.NO_ERROR]
    assert stage.loop.later == []


def test_the_reset_does_not_come_while_its_answer_waits_for_the_socket() -> None:
    stage = Stage()
    exchange = stage.request(1, POST, ends=False)
    stage.shell.pause_writing()
    exchange.downstream.send_response(OK, b"")
    for _ in range(6):
        stage.loop.run()
        stage.loop.now += 0.5
    stage.shell.resume_writing()
    assert [one.kind for one in stage.frames()] == [HEADERS]
    for _ in range(3):
        stage.loop.run()
        stage.loop.now += 0.5
    assert stage.resets() == [ErrorCode.NO_ERROR]


def test_a_client_that_goes_needs_no_reset() -> None:
    stage = Stage()
    stage.request(1, POST, ends=False).downstream.send_response(OK, b"enough")
    stage.loop.run()
    stage.shell.connection_lost(None)
    stage.loop.now += 5
    stage.loop.run()
    assert stage.loop.later == []


# Faults of our own


class Broken(Scripted):
    """An exchange that fails where none should."""

    where = "start"

    def start(self) -> None:
        super().start()
        if self.where == "start":
            raise ZeroDivisionError

    def request_body(self, data: bytes) -> None:
        raise ZeroDivisionError

    def downstream_resumed(self) -> None:
        raise ZeroDivisionError

    def downstream_gone(self, error: PorteroError) -> None:
        super().downstream_gone(error)
        if self.where in ("gone", "time-out") and len(self.said) == 2:
            raise ZeroDivisionError


@pytest.mark.parametrize("where", ["start", "body", "relieved", "relieved later", "time-out", "gone"])
def test_a_fault_of_our_own_ends_the_connection_tells_everybody_and_is_logged(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage()
    before = stage.request(1)
    made: list[Broken] = []

    def make(surroundings: Surroundings, peer: Peer, downstream: Downstream, head: RequestHead, /) -> Broken:
        made.append(Broken(surroundings, peer, downstream, head))
        made[-1].where = where
        return made[-1]

    stage.shell.new_exchange = make
    block = stage.encoder.encode(POST)
    stage.send(frame(HEADERS, END_HEADERS, 3, block))
    stage.shell.new_exchange = stage._exchange
    if where == "body":
        stage.send(frame(DATA, 0, 3, b"x"))
    elif where == "gone":
        stage.send(frame(RST_STREAM, 0, 3, bytes(4)))
    elif where == "time-out":
        stage.wait(80)
    elif where == "relieved":
        made[0].downstream.send_head(OK)
        made[0].downstream.send_body(b"x" * 200_000)
        stage.shell.pause_writing()
        stage.send(window_frame(0, 200_000) + window_frame(3, 200_000))
        stage.shell.resume_writing()
    elif where == "relieved later":
        stage.send(settings_frame([(4, 1 << 24)]) + window_frame(0, 1 << 24))
        made[0].downstream.send_head(OK)
        made[0].downstream.send_body(b"x" * 600_000)
        stage.loop.run()
    assert stage.goaways() == [ErrorCode.INTERNAL_ERROR]
    assert stage.socket.ended
    assert len(made[0].said) > 1, "its own exchange is told as well"
    assert before.said[-1] is InternalFault
    assert stage.surroundings.refused == ["internal_error"]
    assert [record.exc_info is not None for record in caplog.records] == [True]


def test_a_fault_that_comes_again_while_everybody_is_told_is_logged_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stage = Stage()

    class Hopeless(Broken):
        def downstream_gone(self, error: PorteroError) -> None:
            raise ZeroDivisionError

    stage.shell.new_exchange = Hopeless
    stage.send(frame(HEADERS, END_HEADERS, 1, stage.encoder.encode(POST)))
    assert stage.goaways() == [ErrorCode.INTERNAL_ERROR]
    assert stage.socket.ended
    assert len(caplog.records) == 2


# Drain


def test_the_last_bytes_are_waited_for_as_long_as_the_client_takes_some_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage()
    monkeypatch.setattr("portero_py.proxy.downstream.leaving.monotonic", stage.loop.time)
    exchange = stage.request(1)
    stage.shell.start_drain()
    stage.wait(2)
    exchange.downstream.send_response(OK, b"x")
    stage.socket.unsent = 100_000
    stage.loop.run()
    assert isinstance(stage.socket.protocol, Leaving)
    assert stage.socket.ended
    for _ in range(10):
        stage.socket.unsent -= 1000
        stage.send(window_frame(0, 1000))
        stage.wait(9)
    assert not stage.socket.closed
    stage.wait(12)
    assert stage.socket.aborted


def test_a_client_that_ended_its_side_gets_the_time_it_uses_too() -> None:
    stage = Stage()
    stage.request(1)
    stage.socket.unsent = 100_000
    stage.shell.eof_received()
    for _ in range(10):
        stage.socket.unsent -= 1000
        stage.wait(9)
    assert not stage.socket.aborted
    stage.wait(20)
    assert stage.socket.aborted


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
    assert stage.socket.ended


def test_a_drain_does_not_wait_for_a_client_that_does_not_answer() -> None:
    stage = Stage()
    stage.shell.start_drain()
    stage.wait(3)
    assert stage.goaways() == [ErrorCode.NO_ERROR] * 2
    assert stage.socket.ended


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
