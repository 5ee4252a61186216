"""Flow control at both levels, in both directions, and the socket that takes no more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portero_py.wire.http2.connection import CONNECTION_WINDOW
from portero_py.wire.http2.frames import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    PADDED,
    RST_STREAM,
    WINDOW_UPDATE,
    ErrorCode,
    settings_frame,
    window_frame,
)
from portero_py.wire.http2.output import BATCH_LIMIT, SENT_FRAME_LIMIT
from portero_py.wire.http2.stream import HIGH_WATER, SMALL
from portero_py.wire.http2.streams import FIRST_WINDOW, GROWN_STREAMS, STREAM_WINDOW
from portero_py.wire.message import ResponseHead
from tests.wire.http2.dialogue import Dialogue, Frame, Recorded, frame

OK = ResponseHead(200, b"OK", [], -1)
FULL = b"x" * 16384


def bodies(frames: list[Frame], stream: int) -> bytes:
    return b"".join(one.payload for one in frames if one.kind == DATA and one.stream == stream)


def responding(dialogue: Dialogue, stream: int) -> Recorded:
    opened = dialogue.open(stream)
    opened.send_head(OK)
    dialogue.frames()
    return opened


def windows(dialogue: Dialogue) -> dict[int, int]:
    """The WINDOW_UPDATEs that the client receives."""
    return {one.stream: int.from_bytes(one.payload, "big") for one in dialogue.of(WINDOW_UPDATE)}


# What the client takes of responses


def test_a_body_larger_than_the_window_waits_for_it() -> None:
    dialogue = Dialogue()
    stream = responding(dialogue, 1)
    stream.send_body(b"a" * 70000)
    stream.send_end(None)
    frames = dialogue.frames()
    assert len(bodies(frames, 1)) == 65535
    assert stream.stalled
    assert max(len(one.payload) for one in frames) == 16384
    dialogue.send(window_frame(1, 100000))
    assert dialogue.frames() == []
    dialogue.send(window_frame(0, 5))
    assert bodies(dialogue.frames(), 1) == b"a" * 5
    dialogue.send(window_frame(0, 100000))
    frames = dialogue.frames()
    assert bodies(frames, 1) == b"a" * 4460
    assert frames[-1].flags == END_STREAM
    assert dialogue.connection.streams == {}


def test_a_whole_response_that_does_not_fit_waits_too() -> None:
    dialogue = Dialogue()
    dialogue.send(settings_frame([(INITIAL_WINDOW_SIZE, 3)]))
    dialogue.open(1).send_response(OK, b"hello")
    frames = dialogue.frames()
    assert bodies(frames, 1) == b"hel"
    dialogue.send(window_frame(1, 10))
    assert dialogue.frames() == [(DATA, END_STREAM, 1, b"lo")]


def test_an_empty_response_needs_no_window() -> None:
    dialogue = Dialogue()
    dialogue.send(settings_frame([(INITIAL_WINDOW_SIZE, 0)]))
    dialogue.connection.output.blocked = True
    dialogue.open(1).send_response(OK, b"")
    assert dialogue.frames()[-1].flags == END_HEADERS | END_STREAM


def test_trailers_wait_for_the_body_before_them() -> None:
    dialogue = Dialogue()
    dialogue.send(settings_frame([(INITIAL_WINDOW_SIZE, 3)]))
    stream = responding(dialogue, 1)
    stream.send_body(b"abcd")
    stream.send_end([(b"x", b"y")])
    assert bodies(dialogue.frames(), 1) == b"abc"
    dialogue.send(window_frame(1, 1))
    assert [(one.kind, one.flags) for one in dialogue.frames()] == [
        (DATA, 0),
        (HEADERS, END_HEADERS | END_STREAM),
    ]


def test_waiting_bytes_come_before_new_ones_and_the_end_is_on_the_last_frame() -> None:
    dialogue = Dialogue()
    dialogue.send(settings_frame([(INITIAL_WINDOW_SIZE, 3)]))
    stream = responding(dialogue, 1)
    large = b"e" * SMALL
    stream.send_body(b"abcd")
    stream.send_body(large)
    dialogue.frames()
    dialogue.send(window_frame(1, 10_000))
    stream.send_body(b"f")
    stream.send_end(None)
    frames = dialogue.frames()
    assert bodies(frames, 1) == b"d" + large + b"f"
    assert [one.flags for one in frames] == [0, 0, END_STREAM]


def test_small_pieces_that_wait_are_put_together() -> None:
    dialogue = Dialogue()
    dialogue.connection.output.blocked = True
    stream = responding(dialogue, 1)
    wanted = b""
    for i in range(30_000):
        piece = bytes([i % 251, i % 241])
        wanted += piece
        stream.send_body(piece)
    dialogue.connection.output.blocked = False
    dialogue.connection.output.pump()
    frames = dialogue.frames()
    assert bodies(frames, 1) == wanted
    assert len(frames) == -(-60_000 // SMALL)


def test_a_large_body_in_one_batch_ends_without_an_empty_frame() -> None:
    dialogue = Dialogue()
    stream = responding(dialogue, 1)
    stream.send_body(b"x" * 40000)
    stream.send_end(None)
    assert [one.flags for one in dialogue.frames()] == [0, 0, END_STREAM]


def test_a_window_made_smaller_can_become_negative_and_is_paid_back() -> None:
    dialogue = Dialogue()
    stream = responding(dialogue, 1)
    stream.send_body(b"x" * 60000)
    dialogue.frames()
    dialogue.send(settings_frame([(INITIAL_WINDOW_SIZE, 10)]))
    assert stream.window == 65535 - 60000 - 65525
    dialogue.connection.output.blocked = True
    stream.send_body(b"more")
    dialogue.connection.output.blocked = False
    dialogue.frames()
    dialogue.send(window_frame(1, -stream.window))
    assert dialogue.frames() == []
    dialogue.send(window_frame(1, 2))
    assert bodies(dialogue.frames(), 1) == b"mo"
    dialogue.send(settings_frame([(INITIAL_WINDOW_SIZE, 12)]))
    assert bodies(dialogue.frames(), 1) == b"re"


def test_a_window_that_closes_takes_the_stream_out_of_the_line() -> None:
    dialogue = Dialogue()
    stream = responding(dialogue, 1)
    dialogue.connection.output.blocked = True
    stream.send_body(b"waits for the socket")
    dialogue.send(settings_frame([(INITIAL_WINDOW_SIZE, 0)]))
    dialogue.connection.output.blocked = False
    dialogue.connection.output.pump()
    assert bodies(dialogue.frames(), 1) == b""
    dialogue.send(window_frame(1, 100))
    assert bodies(dialogue.frames(), 1) == b"waits for the socket"


def test_windows_over_the_largest_are_errors() -> None:
    dialogue = Dialogue()
    responding(dialogue, 1)
    responding(dialogue, 3)
    dialogue.send(window_frame(1, 2**31 - 1))
    assert dialogue.resets() == [(1, ErrorCode.FLOW_CONTROL_ERROR)]
    dialogue.send(window_frame(3, 2**31 - 1 - 65535))
    assert not dialogue.connection.finished
    dialogue.send(settings_frame([(INITIAL_WINDOW_SIZE, 65536)]))
    assert dialogue.failed() == ErrorCode.FLOW_CONTROL_ERROR


def test_a_window_update_of_nothing_resets_the_stream() -> None:
    dialogue = Dialogue()
    responding(dialogue, 1)
    dialogue.send(frame(WINDOW_UPDATE, 0, 1, bytes(4)))
    assert dialogue.resets() == [(1, ErrorCode.PROTOCOL_ERROR)]


def test_a_reserved_bit_in_an_increment_is_ignored() -> None:
    dialogue = Dialogue()
    stream = responding(dialogue, 1)
    dialogue.send(frame(WINDOW_UPDATE, 0, 1, b"\x80\0\0\1"))
    assert stream.window == 65536


def test_larger_frames_are_sent_to_a_client_that_takes_them() -> None:
    dialogue = Dialogue()
    dialogue.send(
        settings_frame([(MAX_FRAME_SIZE, 1 << 20), (INITIAL_WINDOW_SIZE, 1 << 20)]) + window_frame(0, 1 << 20)
    )
    responding(dialogue, 1).send_body(b"x" * 100000)
    assert [len(one.payload) for one in dialogue.frames()] == [SENT_FRAME_LIMIT, 100000 - SENT_FRAME_LIMIT]


def test_streams_that_wait_take_turns() -> None:
    dialogue = Dialogue()
    streams = [responding(dialogue, number) for number in (1, 3, 5)]
    dialogue.send(settings_frame([(INITIAL_WINDOW_SIZE, 1 << 20)]))
    streams[0].send_body(b"u" * 65535)
    dialogue.frames()
    for stream in streams:
        stream.send_body(b"x" * 40000)
    assert dialogue.frames() == []
    dialogue.send(window_frame(0, 1 << 20))
    assert [one.stream for one in dialogue.frames()] == [1, 3, 5] * 3


def test_a_response_that_waits_is_held_up_at_its_source_until_it_has_gone() -> None:
    dialogue = Dialogue()
    stream = responding(dialogue, 1)
    stream.send_body(b"x" * (65535 + HIGH_WATER))
    assert ("held up", 1) not in dialogue.said
    stream.send_body(b"x")
    stream.send_body(b"x")
    assert dialogue.said.count(("held up", 1)) == 1
    dialogue.send(window_frame(0, 1000) + window_frame(1, 1000))
    assert ("relieved", 1) not in dialogue.said
    dialogue.send(window_frame(0, 100000) + window_frame(1, 60000))
    assert dialogue.said.count(("relieved", 1)) == 1


def test_a_response_that_has_ended_is_not_relieved() -> None:
    dialogue = Dialogue()
    stream = responding(dialogue, 1)
    stream.send_body(b"x" * 200000)
    stream.send_end(None)
    dialogue.send(window_frame(0, 200000) + window_frame(1, 200000))
    dialogue.connection.output.take()
    dialogue.connection.output.pump()
    assert dialogue.connection.streams == {}
    assert ("relieved", 1) not in dialogue.said


def test_a_full_socket_keeps_bodies_in_their_streams_but_lets_heads_through() -> None:
    dialogue = Dialogue()
    stream = dialogue.open(1)
    dialogue.connection.output.blocked = True
    stream.send_head(OK)
    stream.send_body(b"x" * 100)
    stream.send_end(None)
    assert [one.kind for one in dialogue.frames()] == [HEADERS]
    dialogue.connection.output.blocked = False
    dialogue.woken = 0
    dialogue.connection.output.pump()
    assert dialogue.woken == 1
    assert dialogue.frames() == [(DATA, END_STREAM, 1, b"x" * 100)]


def test_one_batch_is_bounded_and_the_next_goes_on() -> None:
    dialogue = Dialogue()
    dialogue.send(settings_frame([(INITIAL_WINDOW_SIZE, 1 << 24)]) + window_frame(0, 1 << 24))
    streams = [responding(dialogue, number) for number in (1, 3)]
    for stream in streams:
        stream.send_body(b"x" * (BATCH_LIMIT + 1000))
    assert BATCH_LIMIT <= len(dialogue.connection.output.take()) < BATCH_LIMIT + 20000
    dialogue.connection.output.pump()
    assert BATCH_LIMIT <= len(dialogue.connection.output.take()) < BATCH_LIMIT + 20000


def test_a_stream_that_ends_with_bytes_waiting_leaves_the_line() -> None:
    dialogue = Dialogue()
    one, other = responding(dialogue, 1), responding(dialogue, 3)
    dialogue.connection.output.blocked = True
    one.send_body(b"never")
    other.send_body(b"later")
    one.reset(ErrorCode.CANCEL)
    dialogue.connection.output.blocked = False
    dialogue.connection.output.pump()
    frames = dialogue.frames()
    assert bodies(frames, 1) == b""
    assert bodies(frames, 3) == b"later"


# What the client may send of requests


def test_window_is_given_back_as_bodies_are_delivered() -> None:
    dialogue = Dialogue()
    dialogue.upload(1)
    dialogue.data(1, FULL)
    assert windows(dialogue) == {}
    dialogue.data(1, FULL)
    grows = STREAM_WINDOW - FIRST_WINDOW
    assert windows(dialogue) == {1: grows + FIRST_WINDOW // 2}, "who is read by his backend gets more"
    for _ in range(8):
        dialogue.data(1, FULL)
    assert windows(dialogue) == {1: STREAM_WINDOW // 2}
    for _ in range(22):
        dialogue.data(1, FULL)
    assert windows(dialogue)[0] == CONNECTION_WINDOW // 2


def test_only_so_many_streams_get_a_larger_window_at_the_same_time() -> None:
    dialogue = Dialogue()
    streams = [dialogue.upload(number) for number in range(1, 2 * GROWN_STREAMS + 2, 2)]
    for stream in streams:
        dialogue.data(stream.id, FULL)
        dialogue.data(stream.id, FULL)
    assert [stream.receive_window for stream in streams] == [STREAM_WINDOW] * GROWN_STREAMS + [FIRST_WINDOW]
    streams[0].reset(ErrorCode.CANCEL)
    dialogue.data(streams[-1].id, FULL)
    dialogue.data(streams[-1].id, FULL)
    assert streams[-1].receive_window == STREAM_WINDOW, "there was room again"


@pytest.mark.parametrize("grown", [False, True])
def test_uploads_that_nobody_reads_leave_the_others_their_way(grown: bool) -> None:
    dialogue = Dialogue()
    sent = 0
    for number in range(1, 101, 2):
        stream = dialogue.upload(number)
        if grown:
            dialogue.data(number, FULL)
            dialogue.data(number, FULL)
            sent += 2 * len(FULL)
        stream.pause_body()
        for _ in range(stream.receive_window // len(FULL)):
            dialogue.data(number, FULL)
            sent += len(FULL)
    allowed = CONNECTION_WINDOW + sum(
        int.from_bytes(one.payload, "big") for one in dialogue.of(WINDOW_UPDATE) if one.stream == 0
    )
    assert allowed - sent >= CONNECTION_WINDOW // 2
    delivered = [len(said[2]) for said in dialogue.said if said[0] == "body" and isinstance(said[2], bytes)]
    assert sum(delivered) == sent
    withheld = sum(delivered) - (50 * 2 * len(FULL) if grown else 0)
    assert withheld <= 50 * FIRST_WINDOW + GROWN_STREAMS * (STREAM_WINDOW - FIRST_WINDOW)
    dialogue.upload(101)
    dialogue.data(101, b"gets through", ends=True)
    assert dialogue.said[-2:] == [("body", 101, b"gets through"), ("end", 101, None)]


def test_no_window_is_given_back_during_a_pause() -> None:
    dialogue = Dialogue()
    stream = dialogue.upload(1)
    stream.pause_body()
    for _ in range(4):
        dialogue.data(1, FULL)
    assert windows(dialogue) == {}
    assert stream.receive_window == 0
    stream.resume_body()
    assert windows(dialogue) == {1: STREAM_WINDOW}
    assert stream.receive_window == STREAM_WINDOW


def test_a_pause_inside_of_the_delivery_withholds_what_was_delivered() -> None:
    dialogue = Dialogue()
    stream = dialogue.upload(1)
    say = dialogue.say

    def pause(what: str, about: Recorded, *more: object) -> None:
        say(what, about, *more)
        about.pause_body()

    dialogue.say = pause  # type: ignore[method-assign,assignment]
    dialogue.data(1, FULL)
    dialogue.data(1, FULL)
    assert windows(dialogue) == {}
    stream.resume_body()
    stream.resume_body()
    assert windows(dialogue) == {1: STREAM_WINDOW - FIRST_WINDOW // 2}


def test_more_than_the_streams_window_ends_the_connection() -> None:
    dialogue = Dialogue()
    dialogue.upload(1).pause_body()
    for _ in range(4):
        dialogue.data(1, FULL)
    dialogue.data(1, b"x")
    assert dialogue.failed() == ErrorCode.FLOW_CONTROL_ERROR


def test_a_resumption_gives_nothing_back_when_the_response_is_complete() -> None:
    dialogue = Dialogue()
    dialogue.send(settings_frame([(INITIAL_WINDOW_SIZE, 1)]))
    stream = dialogue.upload(1)
    stream.pause_body()
    for _ in range(4):
        dialogue.data(1, FULL)
    stream.send_response(OK, b"abc")
    stream.resume_body()
    assert windows(dialogue) == {}


def test_padding_counts_and_so_does_data_that_nobody_wants() -> None:
    dialogue = Dialogue()
    stream = dialogue.upload(1)
    stream.send_response(OK, b"enough")
    dialogue.frames()
    for _ in range(4):
        dialogue.data(1, FULL)
    dialogue.upload(3)
    for _ in range(28):
        dialogue.send_frame(DATA, PADDED, 3, b"\xff" + bytes(16383))
    assert windows(dialogue)[0] == CONNECTION_WINDOW // 2


@pytest.mark.parametrize("trailers", [True, False])
def test_the_body_of_a_request_whose_response_is_still_leaving_is_thrown_away(trailers: bool) -> None:
    dialogue = Dialogue()
    dialogue.send(settings_frame([(INITIAL_WINDOW_SIZE, 1)]))
    stream = dialogue.upload(1)
    stream.send_response(OK, b"abc")
    dialogue.data(1, FULL)
    assert dialogue.said == [("head", 1, b"POST", b"/up")]
    if trailers:
        dialogue.send_frame(HEADERS, END_HEADERS | END_STREAM, 1, dialogue.encoder.encode([("x", "y")]))
    else:
        dialogue.data(1, b"the last of it", ends=True)
    dialogue.frames()
    dialogue.send(window_frame(1, 10))
    frames = dialogue.frames()
    assert [(one.kind, one.flags) for one in frames] == [(DATA, END_STREAM)]
    assert dialogue.said == [("head", 1, b"POST", b"/up")]


def test_an_unfinished_request_is_reset_after_its_delayed_response() -> None:
    dialogue = Dialogue()
    dialogue.send(settings_frame([(INITIAL_WINDOW_SIZE, 1)]))
    dialogue.upload(1).send_response(OK, b"abc")
    dialogue.frames()
    dialogue.connection.reset_early()
    dialogue.connection.reset_early()
    dialogue.send(window_frame(1, 10))
    assert [one.kind for one in dialogue.frames()] == [DATA]
    dialogue.connection.reset_early()
    dialogue.connection.reset_early()
    assert [one.kind for one in dialogue.frames()] == [RST_STREAM]


@pytest.mark.parametrize(
    "end",
    [
        frame(RST_STREAM, 0, 1, bytes(4)),
        frame(WINDOW_UPDATE, 0, 1, bytes(4)),
        frame(WINDOW_UPDATE, 0, 0, bytes(4)),
    ],
    ids=["client", "stream error", "connection error"],
)
def test_whoever_has_given_his_whole_response_hears_nothing_of_its_fate(end: bytes) -> None:
    dialogue = Dialogue()
    dialogue.send(settings_frame([(INITIAL_WINDOW_SIZE, 1)]))
    dialogue.open(1).send_response(OK, b"abc")
    dialogue.send(end)
    assert dialogue.connection.streams == {}
    assert dialogue.said == [("head", 1, b"GET", b"/")]


def test_progress_is_made_by_bodies_and_by_responses_that_leave() -> None:
    dialogue = Dialogue()
    stream = dialogue.upload(1)
    other = responding(dialogue, 3)
    dialogue.connection.output.window = 0
    moves: list[tuple[Callable[[], None], bool]] = [
        (lambda: dialogue.data(1, b"x"), True),
        (lambda: stream.send_head(OK), True),
        (lambda: other.send_body(b"x"), False),
        (lambda: dialogue.send(window_frame(3, 1)), False),
        (lambda: dialogue.send(window_frame(0, 1)), True),
        (lambda: dialogue.send_frame(DATA, 0, 1), False),
    ]
    for move, counts in moves:
        before = dialogue.connection.progress
        move()
        assert (dialogue.connection.progress > before) is counts


def test_signs_of_life_are_seen_without_a_clock() -> None:
    dialogue = Dialogue()
    stream = dialogue.upload(1)
    signs: list[Callable[[], None]] = [
        lambda: dialogue.data(1, b"x"),
        stream.resume_body,
        lambda: stream.send_head(OK),
        lambda: stream.send_body(b"x"),
    ]
    for sign in signs:
        stream.idle_since = 7.0
        sign()
        assert stream.idle_since == 0.0
    dialogue.connection.output.window = 0
    stream.send_body(b"begins to wait")
    assert stream.idle_since == 0.0
    stream.idle_since = 7.0
    stream.send_body(b"waits too")
    dialogue.data(1, b"")
    assert stream.idle_since == 7.0


@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 3, 5]),
            st.sampled_from(["body", "open", "open all", "take"]),
            st.integers(1, 50000),
        ),
        max_size=30,
    )
)
def test_never_more_is_sent_than_the_windows_allow_and_every_byte_in_order(
    steps: list[tuple[int, str, int]],
) -> None:
    dialogue = Dialogue()
    streams = {number: responding(dialogue, number) for number in (1, 3, 5)}
    allowed = dict.fromkeys((0, 1, 3, 5), 65535)
    wanted = dict.fromkeys((1, 3, 5), b"")
    got = dict.fromkeys((1, 3, 5), b"")

    def take() -> None:
        for one in dialogue.of(DATA):
            got[one.stream] += one.payload
            allowed[one.stream] -= len(one.payload)
            allowed[0] -= len(one.payload)
            assert allowed[one.stream] >= 0
            assert allowed[0] >= 0

    for number, what, size in steps:
        if what == "body":
            data = bytes([size % 251]) * size
            wanted[number] += data
            streams[number].send_body(data)
        elif what == "take":
            take()
        else:
            opened = number if what == "open" else 0
            allowed[opened] += size
            dialogue.send(window_frame(opened, size))
    for number in (0, 1, 3, 5):
        dialogue.send(window_frame(number, 10_000_000))
        allowed[number] += 10_000_000
    for _ in range(20):
        take()
        dialogue.connection.output.pump()
    assert got == wanted
