"""Dialogues with one connection: what the client sends, what the streams are told, what the client gets."""

from __future__ import annotations

from itertools import pairwise, permutations

import pytest

from portero_py.errors import ClientGone
from portero_py.wire.http2.ended import EARLY_STREAMS
from portero_py.wire.http2.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PRIORITY_FLAG,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    ErrorCode,
    settings_frame,
)
from portero_py.wire.http2.heads import HeadLimits
from portero_py.wire.http2.server_stream import ServerStream
from portero_py.wire.http2.streams import FIRST_WINDOW
from portero_py.wire.message import RequestHead, ResponseHead
from tests.wire.http2.dialogue import GET, POST, Dialogue, frame

OK = ResponseHead(200, b"OK", [(b"Content-Type", b"text/plain")], -1)
PROTOCOL, CLOSED = ErrorCode.PROTOCOL_ERROR, ErrorCode.STREAM_CLOSED
SIZE, FLOW = ErrorCode.FRAME_SIZE_ERROR, ErrorCode.FLOW_CONTROL_ERROR


# The beginning


def test_the_server_greets_first_and_acknowledges_the_clients_settings() -> None:
    dialogue = Dialogue(greet=False)
    settings, window = dialogue.frames()
    assert (settings.kind, window.kind) == (SETTINGS, WINDOW_UPDATE)
    assert dialogue.woken == 1
    assert dialogue.connection.unfinished_head == -1
    dialogue.send(PREFACE + settings_frame(()))
    assert dialogue.frames() == [(SETTINGS, ACK, 0, b"")]
    assert dialogue.connection.unfinished_head == 0


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\n", b"PRI * HTTP/2.0\r\n\r\nXX", PREFACE + frame(PING, 0, 0, bytes(8))],
)
def test_whoever_does_not_begin_with_preface_and_settings_is_sent_away(data: bytes) -> None:
    dialogue = Dialogue(greet=False)
    dialogue.send(data)
    assert dialogue.failed() == PROTOCOL


@pytest.mark.parametrize("first", [HEADERS, DATA])
def test_a_request_before_settings_is_an_error(first: int) -> None:
    dialogue = Dialogue(greet=False)
    dialogue.send(PREFACE + frame(first, END_HEADERS, 1, b"\x82"))
    assert dialogue.failed() == PROTOCOL


def test_an_acknowledgement_does_not_stand_for_the_clients_settings() -> None:
    dialogue = Dialogue(greet=False)
    dialogue.send(PREFACE + frame(SETTINGS, ACK, 0))
    assert dialogue.failed() == PROTOCOL


# Requests and responses


def test_a_request_without_a_body_is_told_once_and_answered() -> None:
    dialogue = Dialogue()
    stream = dialogue.open(1)
    assert dialogue.said == [("head", 1, b"GET", b"/")]
    stream.send_head(OK)
    stream.send_body(b"hello")
    stream.send_body(b"world")
    stream.send_end(None)
    frames = dialogue.frames()
    assert [(one.kind, one.flags) for one in frames] == [
        (HEADERS, END_HEADERS),
        (DATA, 0),
        (DATA, END_STREAM),
    ]
    assert dialogue.response(frames) == [(":status", "200"), ("content-type", "text/plain")]
    assert b"".join(one.payload for one in frames[1:]) == b"helloworld"
    assert dialogue.connection.streams == {}


def test_a_whole_response_at_once_ends_with_its_last_frame() -> None:
    dialogue = Dialogue()
    dialogue.open(1).send_response(OK, b"hello")
    dialogue.open(3).send_response(ResponseHead(204, b"", [], 0), b"")
    assert [(one.kind, one.flags, one.stream) for one in dialogue.frames()] == [
        (HEADERS, END_HEADERS, 1),
        (DATA, END_STREAM, 1),
        (HEADERS, END_HEADERS | END_STREAM, 3),
    ]


def test_a_response_without_a_body_ends_with_its_head() -> None:
    dialogue = Dialogue()
    stream = dialogue.open(1)
    stream.send_head(OK)
    stream.send_end(None)
    assert [(one.kind, one.flags) for one in dialogue.frames()] == [(HEADERS, END_HEADERS | END_STREAM)]


def test_an_end_that_comes_in_a_later_batch_is_an_empty_frame() -> None:
    dialogue = Dialogue()
    stream = dialogue.open(1)
    stream.send_head(OK)
    stream.send_body(b"x")
    assert [one.flags for one in dialogue.frames()] == [END_HEADERS, 0]
    stream.send_end(None)
    assert dialogue.frames() == [(DATA, END_STREAM, 1, b"")]


def test_the_end_of_one_stream_does_not_end_another_of_the_same_batch() -> None:
    dialogue = Dialogue()
    one, other = dialogue.open(1), dialogue.open(3)
    for stream in (one, other):
        stream.send_head(OK)
        stream.send_body(b"x")
    one.send_end(None)
    assert [(f.stream, f.flags) for f in dialogue.frames() if f.kind == DATA] == [(1, END_STREAM), (3, 0)]


def test_output_outside_of_receive_is_told_once_a_batch() -> None:
    dialogue = Dialogue()
    dialogue.woken = 0
    one, other = dialogue.open(1), dialogue.open(3)
    assert dialogue.woken == 0
    one.send_response(OK, b"a")
    other.send_head(OK)
    other.send_body(b"b")
    assert dialogue.woken == 1
    dialogue.frames()
    other.send_body(b"c")
    assert dialogue.woken == 2


def test_output_after_a_receive_that_had_none_is_told() -> None:
    dialogue = Dialogue()
    stream = dialogue.open(1)
    dialogue.woken = 0
    dialogue.send_frame(PRIORITY, 0, 1, bytes(5))
    stream.send_head(OK)
    assert dialogue.woken == 1


def test_informational_responses_come_before_the_final_one() -> None:
    dialogue = Dialogue()
    stream = dialogue.upload(1)
    stream.send_informational(ResponseHead(100, b"Continue", [], 0))
    (first,) = dialogue.frames()
    assert first.flags == END_HEADERS
    assert dialogue.response([first]) == [(":status", "100")]
    dialogue.data(1, b"x", ends=True)
    stream.send_response(OK, b"y")
    assert dialogue.response(dialogue.frames())[0] == (":status", "200")


def test_a_step_out_of_order_is_a_mistake_of_the_caller() -> None:
    dialogue = Dialogue()
    stream = dialogue.open(1)
    with pytest.raises(RuntimeError, match="send_body"):
        stream.send_body(b"x")
    with pytest.raises(RuntimeError, match="send_end"):
        stream.send_end(None)
    stream.send_head(OK)
    for step in (stream.send_head, stream.send_informational):
        with pytest.raises(RuntimeError):
            step(OK)
    with pytest.raises(RuntimeError, match="send_response"):
        stream.send_response(OK, b"x")


def test_a_body_is_told_as_it_comes_and_trailers_with_its_end() -> None:
    dialogue = Dialogue()
    dialogue.upload(1)
    dialogue.data(1, b"one")
    dialogue.send_frame(DATA, PADDED, 1, b"\x03two\0\0\0")
    block = dialogue.encoder.encode([("x-sum", "5")])
    dialogue.send_frame(HEADERS, END_HEADERS | END_STREAM, 1, block)
    assert dialogue.said[1:] == [("body", 1, b"one"), ("body", 1, b"two"), ("end", 1, [(b"x-sum", b"5")])]


def test_an_empty_last_frame_ends_the_request() -> None:
    dialogue = Dialogue()
    dialogue.upload(1, 3)
    dialogue.data(1, b"abc")
    dialogue.data(1, b"", ends=True)
    assert dialogue.said[1:] == [("body", 1, b"abc"), ("end", 1, None)]


def test_trailers_of_a_response_follow_its_body() -> None:
    dialogue = Dialogue()
    stream = dialogue.open(1)
    stream.send_head(OK)
    stream.send_body(b"x")
    stream.send_end([(b"Grpc-Status", b"0"), (b"Connection", b"x")])
    head, body, trailers = dialogue.frames()
    dialogue.response([head])
    assert (body.flags, trailers.flags) == (0, END_HEADERS | END_STREAM)
    assert dialogue.response([trailers]) == [("grpc-status", "0")]


def test_trailers_that_may_not_be_sent_leave_an_ordinary_end() -> None:
    dialogue = Dialogue()
    stream = dialogue.open(1)
    stream.send_head(OK)
    stream.send_body(b"x")
    stream.send_end([(b"Connection", b"x")])
    assert [one.flags for one in dialogue.frames()] == [END_HEADERS, END_STREAM]


def test_a_head_larger_than_a_frame_goes_on_in_continuation() -> None:
    dialogue = Dialogue()
    fields = [(b"X-%d" % n, bytes([65 + n]) * 9000) for n in range(4)]
    dialogue.open(1).send_response(ResponseHead(200, b"OK", fields, 0), b"")
    frames = dialogue.frames()
    assert [(one.kind, one.flags) for one in frames] == [
        (HEADERS, END_STREAM),
        *[(CONTINUATION, 0)] * (len(frames) - 2),
        (CONTINUATION, END_HEADERS),
    ]
    assert len(dialogue.response(frames)) == 5


def test_a_response_before_the_end_of_the_request_is_followed_by_a_reset_a_moment_later() -> None:
    dialogue = Dialogue()
    dialogue.upload(1).send_response(OK, b"enough")
    assert [(one.kind, one.flags) for one in dialogue.frames()] == [
        (HEADERS, END_HEADERS),
        (DATA, END_STREAM),
    ]
    assert dialogue.connection.streams == {}
    dialogue.connection.reset_early()
    dialogue.upload(3).send_response(OK, b"enough")
    assert dialogue.resets() == [], "one that came a moment ago has its moment"
    dialogue.connection.reset_early()
    assert dialogue.resets() == [(1, ErrorCode.NO_ERROR)]
    dialogue.data(1, b"on its way")
    dialogue.send_frame(HEADERS, END_HEADERS | END_STREAM, 1, dialogue.encoder.encode([("x", "y")]))
    dialogue.connection.reset_early()
    dialogue.connection.reset_early()
    assert dialogue.resets() == [(3, ErrorCode.NO_ERROR)]
    assert not dialogue.connection.finished
    assert dialogue.said == [("head", 1, b"POST", b"/up"), ("head", 3, b"POST", b"/up")]


@pytest.mark.parametrize(
    "end",
    [
        frame(DATA, END_STREAM, 1, b"last"),
        frame(HEADERS, END_HEADERS | END_STREAM, 1),
        frame(RST_STREAM, 0, 1, bytes(4)),
    ],
    ids=["data", "trailers", "reset"],
)
def test_a_client_that_ends_what_was_answered_early_needs_no_reset(end: bytes) -> None:
    dialogue = Dialogue()
    dialogue.upload(1, length=2).send_response(OK, b"enough")
    dialogue.data(1, b"more than it said")
    dialogue.connection.reset_early()
    dialogue.send(end)
    dialogue.connection.reset_early()
    dialogue.connection.reset_early()
    assert dialogue.resets() == []
    dialogue.data(1, b"too late")
    assert dialogue.failed() == CLOSED


def test_what_still_comes_of_an_early_answers_request_is_judged() -> None:
    dialogue = Dialogue()
    dialogue.upload(1).send_response(OK, b"enough")
    for _ in range(FIRST_WINDOW // 16384):
        dialogue.data(1, bytes(16384))
    assert dialogue.of(WINDOW_UPDATE) == []
    dialogue.data(1, b"x")
    assert dialogue.failed() == FLOW
    dialogue = Dialogue()
    dialogue.upload(1).send_response(OK, b"enough")
    dialogue.send_frame(HEADERS, END_HEADERS, 1)
    assert dialogue.failed() == PROTOCOL
    assert not dialogue.connection.ended.early


def test_of_too_many_early_answers_the_oldest_is_reset_at_once() -> None:
    dialogue = Dialogue()
    for number in range(1, 2 * EARLY_STREAMS + 4, 2):
        dialogue.upload(number).send_response(OK, b"x")
    assert dialogue.resets() == [(1, ErrorCode.NO_ERROR), (3, ErrorCode.NO_ERROR)]


def test_the_connection_ends_behind_the_last_early_answers_reset() -> None:
    dialogue = Dialogue()
    stream = dialogue.upload(1)
    dialogue.connection.finish_drain()
    stream.send_response(OK, b"enough")
    dialogue.connection.reset_early()
    assert not dialogue.connection.finished
    dialogue.connection.reset_early()
    assert dialogue.connection.finished


def test_a_reset_by_us_is_sent_once() -> None:
    dialogue = Dialogue()
    stream = dialogue.open(1)
    stream.reset(ErrorCode.INTERNAL_ERROR)
    stream.reset(ErrorCode.INTERNAL_ERROR)
    assert dialogue.resets() == [(1, ErrorCode.INTERNAL_ERROR)]


def test_the_same_block_again_is_the_same_request_again() -> None:
    dialogue = Dialogue()
    fields = [*GET, ("accept", "x"), ("x-forwarded-for", "192.0.2.7")]
    for stream in (1, 3, 5, 7):
        opened = dialogue.open(stream, fields)
        assert opened.head.fields == [(b"accept", b"x")]
        assert list(opened.head.forwarded) == [(b"x-forwarded-for", b"192.0.2.7")]
    dialogue.request(9, [*GET, ("accept", "other")])
    again = dialogue.open(11, fields)
    assert again.head.fields == [(b"accept", b"x")]


def test_a_block_means_something_else_after_the_table_changed() -> None:
    """Index 62 is the newest entry: the same byte, two values."""
    dialogue = Dialogue()
    upload = dialogue.upload(1)
    base = b"\x82\x87\x84\x01\x01a"
    dialogue.send_frame(HEADERS, 5, 3, base + b"\x40\x01x\x011")
    for stream in (5, 7):
        dialogue.send_frame(HEADERS, 5, stream, base + b"\xbe")
        opened = dialogue.stream(stream)
        assert opened is not None
        assert opened.head.fields == [(b"x", b"1")]
    dialogue.send_frame(HEADERS, 5, 1, b"\x40\x01x\x012")
    assert upload.received
    dialogue.send_frame(HEADERS, 5, 9, base + b"\xbe")
    opened = dialogue.stream(9)
    assert opened is not None
    assert opened.head.fields == [(b"x", b"2")]


def test_more_different_blocks_than_are_kept_are_all_read() -> None:
    dialogue = Dialogue()
    for number in range(40):
        block = b"\x82\x87\x04" + bytes([6]) + b"/%05d" % number + b"\x01\x01a"
        dialogue.send_frame(HEADERS, END_HEADERS | END_STREAM, 2 * number + 1, block)
    assert [said[3] for said in dialogue.said] == [b"/%05d" % number for number in range(40)]


def test_a_header_block_in_pieces_padded_and_with_priority_is_one_request() -> None:
    dialogue = Dialogue()
    block = dialogue.encoder.encode(GET)
    payload = b"\x04" + b"\0\0\0\1\x10" + block[:2] + bytes(4)
    dialogue.send_frame(HEADERS, END_STREAM | PADDED | PRIORITY_FLAG, 1, payload)
    assert dialogue.connection.unfinished_head == 1
    dialogue.send_frame(CONTINUATION, 0, 1, block[2:3])
    dialogue.send_frame(CONTINUATION, END_HEADERS, 1, block[3:])
    assert dialogue.said == [("head", 1, b"GET", b"/")]
    assert dialogue.connection.unfinished_head == 0


# Malformed requests: stream errors


def test_a_malformed_request_is_reset_and_nothing_of_it_is_told() -> None:
    dialogue = Dialogue()
    dialogue.request(1, [*GET, ("transfer-encoding", "chunked")])
    assert dialogue.said == [("lost", 1, "bad_request")]
    assert dialogue.resets() == [(1, PROTOCOL)]
    dialogue.request(3)
    assert dialogue.said[-1] == ("head", 3, b"GET", b"/")


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ([*GET[:3], (":path", "/" + "x" * 100)], 414),
        ([*GET, ("x", "y" * 1000)], 431),
        ([*GET, *[("x", "y")] * 20], 431),
    ],
)
def test_a_head_over_a_limit_is_answered_and_the_connection_goes_on(
    fields: list[tuple[str, str]], status: int
) -> None:
    dialogue = Dialogue(limits=HeadLimits(100, 1000, 20))
    dialogue.request(1, fields)
    assert dialogue.said == [("refused", 1, status)]
    assert dialogue.response(dialogue.frames()) == [(":status", str(status))]
    dialogue.request(3, [*GET, ("x", "y")])
    dialogue.request(5, [*GET, ("x", "y")])
    assert [said[0] for said in dialogue.said] == ["refused", "head", "head"]


@pytest.mark.parametrize(
    ("sent", "ends"),
    [([b"abcd"], False), ([b"ab", b"cd"], False), ([b"ab"], True), ([b""], True), ([b"abcd"], True)],
)
def test_a_body_that_is_not_as_long_as_it_said_is_reset(sent: list[bytes], ends: bool) -> None:
    dialogue = Dialogue()
    dialogue.upload(1, 3)
    for data in sent:
        dialogue.data(1, data, ends=ends and data is sent[-1])
    assert dialogue.resets() == [(1, PROTOCOL)]
    assert dialogue.said[-1] == ("lost", 1, "bad_request")
    assert ("end", 1, None) not in dialogue.said
    assert sum(len(str(said[2])) for said in dialogue.said if said[0] == "body") <= len(str(b"ab"))


@pytest.mark.parametrize(
    ("length", "fields", "flags", "code"),
    [
        (3, [("x", "y")], END_STREAM, PROTOCOL),  # body missing
        (None, [("x", "y")], 0, PROTOCOL),  # not the end
        (None, [(":path", "/")], END_STREAM, PROTOCOL),
        (None, [("content-length", "0")], END_STREAM, PROTOCOL),
        (None, [("x", "y" * 40000)], END_STREAM, PROTOCOL),
    ],
)
def test_malformed_trailers_are_reset(
    length: int | None, fields: list[tuple[str, str]], flags: int, code: ErrorCode
) -> None:
    dialogue = Dialogue()
    dialogue.upload(1, length)
    block = dialogue.encoder.encode(fields)
    dialogue.send_frame(HEADERS, flags, 1, block[:16000])
    dialogue.send_frame(CONTINUATION, 0, 1, block[16000:32000])
    dialogue.send_frame(CONTINUATION, END_HEADERS, 1, block[32000:])
    assert dialogue.resets() == [(1, code)]
    assert dialogue.said[-1][0] == "lost"


@pytest.mark.parametrize(
    "late", [frame(DATA, 0, 1, b"x"), frame(HEADERS, 5, 1, b"\x82")], ids=["data", "headers"]
)
def test_frames_behind_the_end_of_the_request_are_a_stream_error(late: bytes) -> None:
    dialogue = Dialogue()
    dialogue.request(1)
    dialogue.send(late)
    assert dialogue.resets() == [(1, CLOSED)]
    assert dialogue.said[-1] == ("lost", 1, "bad_request")


def test_a_request_that_resets_itself_in_its_head_is_told_nothing_more() -> None:
    class Aborting(ServerStream):
        bodies = 0

        def on_head(self, head: RequestHead) -> None:
            self.reset(ErrorCode.CANCEL)

    dialogue = Dialogue()
    dialogue.connection._make_stream = Aborting
    block = dialogue.encoder.encode(POST)
    dialogue.send_frame(HEADERS, END_HEADERS, 1, block)
    dialogue.data(1, b"x", ends=True)
    assert dialogue.resets() == [(1, ErrorCode.CANCEL)]
    assert not dialogue.connection.finished


# Streams: order and number


def test_streams_over_the_limit_are_refused_and_room_is_used_again() -> None:
    dialogue = Dialogue(streams=2)
    first = dialogue.open(1)
    dialogue.request(3)
    dialogue.request(5)
    assert dialogue.resets() == [(5, ErrorCode.REFUSED_STREAM)]
    first.send_response(OK, b"x")
    dialogue.request(7)
    assert [said[1] for said in dialogue.said] == [1, 3, 7]


@pytest.mark.parametrize("number", [0, 2])
def test_a_client_opens_odd_streams_only(number: int) -> None:
    dialogue = Dialogue()
    dialogue.request(number)
    assert dialogue.failed() == PROTOCOL


def test_stream_numbers_only_grow() -> None:
    dialogue = Dialogue()
    dialogue.request(5)
    dialogue.request(3)
    assert dialogue.failed() == PROTOCOL
    assert dialogue.said[-1] == ("lost", 5, "http2_connection")


@pytest.mark.parametrize(
    ("late", "code"),
    [
        (frame(DATA, 0, 1, b"x"), CLOSED),
        (frame(HEADERS, 5, 1, b"\x82"), CLOSED),
        (frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\1"), None),
        (frame(RST_STREAM, 0, 1, bytes(4)), None),
        (frame(PRIORITY, 0, 1, bytes(5)), None),
    ],
    ids=["data", "headers", "window", "reset", "priority"],
)
@pytest.mark.parametrize("by", ["both", "client"])
def test_frames_on_a_stream_that_both_know_is_closed(late: bytes, code: ErrorCode | None, by: str) -> None:
    dialogue = Dialogue()
    stream = dialogue.open(1)
    if by == "both":
        stream.send_response(OK, b"x")
    else:
        dialogue.send_frame(RST_STREAM, 0, 1, bytes(4))
        assert dialogue.said[-1] == ("lost", 1, "client_gone")
    dialogue.frames()
    dialogue.send(late)
    assert dialogue.connection.finished == (code is not None)
    if code is not None:
        assert dialogue.failed() == code


@pytest.mark.parametrize(
    "early",
    [
        frame(DATA, 0, 1, b"x"),
        frame(RST_STREAM, 0, 1, bytes(4)),
        frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\1"),
        frame(DATA, 0, 0, b"x"),
        frame(RST_STREAM, 0, 0, bytes(4)),
    ],
    ids=["data", "reset", "window", "data 0", "reset 0"],
)
def test_frames_on_an_idle_stream_are_a_connection_error(early: bytes) -> None:
    dialogue = Dialogue()
    dialogue.send(early)
    assert dialogue.failed() == PROTOCOL


# Frames of the wrong shape


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x00\x40\x01" + bytes(6), SIZE),
        (frame(SETTINGS, 0, 1), PROTOCOL),
        (frame(SETTINGS, 0, 0, bytes(5)), SIZE),
        (frame(SETTINGS, ACK, 0, bytes(6)), SIZE),
        (settings_frame([(2, 7)]), PROTOCOL),
        (frame(PING, 0, 1, bytes(8)), PROTOCOL),
        (frame(PING, 0, 0, bytes(7)), SIZE),
        (frame(GOAWAY, 0, 1, bytes(8)), PROTOCOL),
        (frame(GOAWAY, 0, 0, bytes(7)), SIZE),
        (frame(PUSH_PROMISE, 4, 1, bytes(4)), PROTOCOL),
        (frame(PRIORITY, 0, 1, bytes(4)), SIZE),
        (frame(PRIORITY, 0, 0, bytes(5)), PROTOCOL),
        (frame(RST_STREAM, 0, 1, bytes(3)), SIZE),
        (frame(WINDOW_UPDATE, 0, 1, bytes(3)), SIZE),
        (frame(WINDOW_UPDATE, 0, 0, bytes(4)), PROTOCOL),
        (frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), FLOW),
        (frame(CONTINUATION, 4, 1, b"\x82"), PROTOCOL),
        (frame(CONTINUATION, 4, 0, b""), PROTOCOL),
        (frame(HEADERS, END_HEADERS | PADDED, 1, b"\x09"), PROTOCOL),
        (frame(HEADERS, END_HEADERS, 1, b"\xbf"), ErrorCode.COMPRESSION_ERROR),
        (frame(HEADERS, 0, 1, b"\x82") + frame(PING, 0, 0, bytes(8)), PROTOCOL),
        (frame(HEADERS, 0, 1, b"\x82") + frame(DATA, 0, 1, b""), PROTOCOL),
        (frame(HEADERS, 0, 1, b"\x82") + frame(HEADERS, 4, 3, b"\x82"), PROTOCOL),
        (frame(HEADERS, 0, 1, b"\x82") + frame(0xFA, 0, 1), PROTOCOL),
        (frame(HEADERS, 0, 1, b"\x82") + frame(CONTINUATION, 4, 3, b"\x82"), PROTOCOL),
    ],
)
def test_frames_of_the_wrong_shape_are_a_connection_error(data: bytes, code: ErrorCode) -> None:
    dialogue = Dialogue()
    dialogue.send(data)
    assert dialogue.failed() == code
    dialogue.send(frame(PING, 0, 0, bytes(8)))
    assert dialogue.frames() == []


def test_unknown_frames_and_unknown_settings_are_ignored() -> None:
    dialogue = Dialogue()
    dialogue.send(frame(0xFA, 0xFF, 99, b"what") + settings_frame([(0xF00, 1), (8, 0), (2, 0)]))
    assert dialogue.frames() == [(SETTINGS, ACK, 0, b"")]


def test_a_ping_is_answered_with_its_payload() -> None:
    dialogue = Dialogue()
    dialogue.send_frame(PING, 0, 0, b"12345678")
    dialogue.send_frame(PING, ACK, 0, b"nobodys?")
    assert dialogue.frames() == [(PING, ACK, 0, b"12345678")]


# The end


def test_a_graceful_goaway_refuses_nothing_until_the_client_has_seen_it() -> None:
    dialogue = Dialogue()
    running = dialogue.open(1)
    dialogue.connection.start_drain()
    dialogue.connection.start_drain()
    goaway, ping = dialogue.frames()
    assert goaway.payload[:8] == b"\x7f\xff\xff\xff" + bytes(4)
    in_flight = dialogue.open(3)
    dialogue.send_frame(PING, ACK, 0, ping.payload)
    assert dialogue.goaway() == (3, ErrorCode.NO_ERROR)
    assert not dialogue.connection.finished
    dialogue.request(5, ends=False)
    dialogue.data(5, b"ignored")
    dialogue.request(7)
    running.send_response(OK, b"x")
    assert not dialogue.connection.finished
    in_flight.send_response(OK, b"x")
    assert dialogue.connection.finished
    assert [said[1] for said in dialogue.said] == [1, 3]


@pytest.mark.parametrize("steps", list(permutations(["drain", "finish", "request", "late", "fault"])))
def test_no_goaway_names_a_later_stream_than_the_one_before(steps: tuple[str, ...]) -> None:
    dialogue = Dialogue()
    dialogue.request(1)
    last = 2**31 - 1
    for step in steps:
        if step == "drain":
            dialogue.connection.start_drain()
        elif step == "finish":
            dialogue.connection.finish_drain()
        elif step == "fault":
            dialogue.connection.fail(ErrorCode.ENHANCE_YOUR_CALM, "enough")
        else:
            dialogue.request(dialogue.connection.last_stream + 2)
        for one in dialogue.of(GOAWAY):
            named = int.from_bytes(one.payload[:4], "big")
            assert named <= last
            last = named
    for what, stream, *_ in dialogue.said:
        assert what != "head" or (isinstance(stream, int) and stream <= last), "it may be sent again"


def test_what_a_stream_raises_is_raised_when_the_others_have_been_told() -> None:
    dialogue = Dialogue()
    first = dialogue.open(1)
    dialogue.open(3)
    dialogue.open(5)
    say = dialogue.say

    def fall_over(what: str, stream: ServerStream, *more: object) -> None:
        say(what, stream, *more)
        if stream is first or what == "body":
            raise ZeroDivisionError

    dialogue.say = fall_over  # type: ignore[method-assign]
    dialogue.upload(7)
    with pytest.raises(ZeroDivisionError):
        dialogue.data(7, b"x")
    with pytest.raises(ZeroDivisionError):
        dialogue.connection.break_off()
    dialogue.connection.break_off()
    assert dialogue.failed() == ErrorCode.INTERNAL_ERROR
    assert dialogue.connection.fault is not None
    assert dialogue.connection.fault.status == 500
    lost = [said for said in dialogue.said if said[0] == "lost"]
    assert lost == [("lost", number, "internal_error") for number in (1, 3, 5, 7)]


# Turns


def test_a_turn_has_so_many_requests_and_the_rest_waits_for_the_next() -> None:
    dialogue = Dialogue()
    dialogue.answer = ResponseHead(200, b"OK", [], 5)
    block = dialogue.encoder.encode(GET)
    data = b"".join([frame(HEADERS, END_HEADERS | END_STREAM, number, block) for number in range(1, 4801, 2)])
    served = []
    dialogue.connection.receive(data, 1.0)
    while dialogue.connection.behind:
        served.append(len(dialogue.said))
        dialogue.connection.receive(b"", 1.0)
    assert len(dialogue.said) == 2400
    turns = [after - before for before, after in pairwise([0, *served])]
    assert set(turns) == {64}


def test_small_frames_count_less_and_bytes_that_come_meanwhile_are_taken_in_order() -> None:
    dialogue = Dialogue()
    dialogue.upload(1)
    dialogue.connection.receive(frame(DATA, 0, 1, b"a") * 2000, 1.0)
    assert dialogue.connection.behind
    assert len(dialogue.said) == 1 + 1024
    dialogue.connection.receive(frame(DATA, 0, 1, b"b")[:-1], 1.0)
    assert not dialogue.connection.behind
    dialogue.connection.receive(b"b", 1.0)
    assert [said[2] for said in dialogue.said[1:]] == [b"a"] * 2000 + [b"b"]


def test_nothing_is_left_for_the_next_turn_when_the_connection_ends_meanwhile() -> None:
    dialogue = Dialogue()
    dialogue.upload(1)
    dialogue.connection.receive(frame(DATA, 0, 1, b"a") * 2000, 1.0)
    dialogue.connection.fail(ErrorCode.ENHANCE_YOUR_CALM, "enough")
    assert not dialogue.connection.behind


def test_an_idle_connection_ends_with_a_goaway() -> None:
    dialogue = Dialogue()
    dialogue.connection.finish_drain()
    dialogue.connection.finish_drain()
    assert dialogue.goaway() == (0, ErrorCode.NO_ERROR)
    assert dialogue.connection.finished


def test_a_client_that_leaves_is_served_to_the_end() -> None:
    dialogue = Dialogue()
    stream = dialogue.open(1)
    dialogue.send_frame(GOAWAY, 0, 0, bytes(8))
    assert not dialogue.connection.finished
    stream.send_response(OK, b"x")
    assert dialogue.connection.finished


def test_a_lost_connection_tells_every_stream_even_when_one_ends_another() -> None:
    dialogue = Dialogue()
    first, second = dialogue.open(1), dialogue.open(3)

    def end_the_other(what: str, stream: ServerStream, *more: object) -> None:
        dialogue.said.append((what, stream.id))
        if stream is first:
            second.reset(ErrorCode.CANCEL)

    dialogue.say = end_the_other  # type: ignore[method-assign]
    dialogue.connection.lose(ClientGone("gone"))
    assert dialogue.said[2:] == [("lost", 1)]
    assert dialogue.connection.streams == {}


def test_the_shells_own_reasons_end_the_connection_once() -> None:
    dialogue = Dialogue()
    dialogue.connection.fail(ErrorCode.ENHANCE_YOUR_CALM, "too slow")
    dialogue.connection.fail(ErrorCode.ENHANCE_YOUR_CALM, "too slow")
    assert dialogue.failed() == ErrorCode.ENHANCE_YOUR_CALM
