"""Leaky buckets, and what a client must do to empty one."""

from __future__ import annotations

import pytest

from portero_py.wire.http2.floods import Bucket
from portero_py.wire.http2.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    ConnectionFault,
    ErrorCode,
)
from portero_py.wire.http2.stream import Stream
from portero_py.wire.message import ResponseHead
from tests.wire.http2.dialogue import GET, POST, Dialogue, frame

CALM = ErrorCode.ENHANCE_YOUR_CALM
CANCEL = int(ErrorCode.CANCEL).to_bytes(4, "big")


def test_a_bucket_holds_its_burst_and_refills_at_its_rate() -> None:
    bucket = Bucket("drops", 3, 2)
    for _ in range(3):
        bucket.draw(100.0)
    with pytest.raises(ConnectionFault, match="too many drops"):
        bucket.draw(100.0)
    bucket = Bucket("drops", 3, 2)
    for _ in range(3):
        bucket.draw(100.0)
    bucket.draw(100.5)
    with pytest.raises(ConnectionFault):
        bucket.draw(100.6)


def test_a_bucket_never_holds_more_than_its_burst() -> None:
    bucket = Bucket("drops", 2, 1)
    bucket.draw(0.0)
    bucket.give(50)
    bucket.draw(0.0)
    bucket.draw(0.0)
    with pytest.raises(ConnectionFault):
        bucket.draw(0.0)


def test_rapid_reset_ends_the_connection_and_every_request_is_given_up() -> None:
    dialogue = Dialogue()
    stream = 1
    while not dialogue.connection.finished:
        dialogue.request(stream)
        dialogue.send_frame(RST_STREAM, 0, stream, CANCEL)
        stream += 2
        assert stream < 3000
    assert dialogue.failed() == CALM
    heads = [said for said in dialogue.said if said[0] == "head"]
    lost = [said for said in dialogue.said if said[0] == "lost"]
    assert len(heads) == len(lost) > 1000


def test_a_browser_that_cancels_500_requests_every_20_seconds_is_served() -> None:
    dialogue = Dialogue()
    stream = 1
    for _ in range(10):
        for _ in range(500):
            dialogue.request(stream)
            dialogue.send_frame(RST_STREAM, 0, stream, CANCEL)
            stream += 2
        dialogue.now += 20
    assert not dialogue.connection.finished


@pytest.mark.parametrize(
    "offence",
    [
        frame(WINDOW_UPDATE, 0, 0, bytes(4)),
        frame(DATA, END_STREAM, 0, b"too much"),
        frame(HEADERS, END_HEADERS, 0, b""),
        frame(PRIORITY, 0, 0, b""),
    ],
    ids=["window", "data", "headers", "priority"],
)
def test_making_us_reset_streams_is_rapid_reset_too(offence: bytes) -> None:
    """MadeYouReset: every stream is opened, and then broken so that we must reset it."""
    dialogue = Dialogue()
    for stream in range(1, 400, 2):
        dialogue.request(stream, [*POST, ("content-length", "3")], ends=False)
        dialogue.send(offence[:5] + stream.to_bytes(4, "big") + offence[9:])
        if dialogue.connection.finished:
            break
    assert dialogue.connection.fault is not None
    assert dialogue.connection.fault.code in (CALM, ErrorCode.FRAME_SIZE_ERROR)
    assert len([said for said in dialogue.said if said[0] == "head"]) <= 101


def test_malformed_requests_are_bounded_as_well() -> None:
    dialogue = Dialogue()
    for stream in range(1, 400, 2):
        dialogue.request(stream, [*GET, ("connection", "close")])
    assert dialogue.failed() == CALM


def test_requests_beyond_the_limit_are_refused_then_the_connection_ends() -> None:
    dialogue = Dialogue(streams=2)
    for stream in range(1, 4000, 2):
        dialogue.request(stream)
    assert dialogue.failed() == CALM
    assert len([said for said in dialogue.said if said[0] == "head"]) == 2


@pytest.mark.parametrize(
    ("nonsense", "patience"),
    [
        (frame(PING, 0, 0, bytes(8)), 4000),
        (frame(PING, ACK, 0, bytes(8)), 4000),
        (frame(SETTINGS, 0, 0), 50),
        (frame(SETTINGS, ACK, 0), 4000),
        (frame(DATA, 0, 1), 4000),
        (frame(DATA, 8, 1, b"\x05" + bytes(5)), 4000),
        (frame(PRIORITY, 0, 77, bytes(5)), 4000),
        (frame(0xFA, 0, 1, b"unknown"), 4000),
        (frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\1"), 4000),
        (frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\1"), 4000),
    ],
    ids=["ping", "pong", "settings", "ack", "data", "padding", "priority", "unknown", "window", "window 0"],
)
def test_a_flood_of_frames_that_bring_nothing_forward_ends_the_connection(
    nonsense: bytes, patience: int
) -> None:
    dialogue = Dialogue()
    dialogue.upload(1)
    dialogue.send(nonsense * (patience - 5))
    assert not dialogue.connection.finished
    dialogue.frames()
    dialogue.send(nonsense * 10)
    assert dialogue.failed() == CALM
    assert dialogue.said[-1] == ("lost", 1, "http2_connection")


def test_a_client_that_pings_for_every_response_is_served() -> None:
    dialogue = Dialogue()
    dialogue.answer = ResponseHead(200, b"OK", [], 5)
    for stream in range(1, 20000, 2):
        dialogue.send_frame(PING, 0, 0, bytes(8))
        dialogue.send_frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\5")
        dialogue.request(stream)
        dialogue.connection.output.take()
    assert not dialogue.connection.finished


def test_a_header_block_in_endless_pieces_ends_the_connection() -> None:
    dialogue = Dialogue()
    dialogue.send_frame(HEADERS, END_STREAM, 1)
    dialogue.send(frame(CONTINUATION, 0, 1) * 20)
    assert dialogue.failed() == CALM
    assert dialogue.said == []


def test_a_header_block_without_end_ends_the_connection() -> None:
    dialogue = Dialogue()
    dialogue.send_frame(HEADERS, END_STREAM, 1, bytes(16384))
    dialogue.send(frame(CONTINUATION, 0, 1, bytes(16384)) * 8)
    assert dialogue.failed() == CALM


def test_a_frame_of_settings_without_end_ends_the_connection() -> None:
    dialogue = Dialogue()
    dialogue.send_frame(SETTINGS, 0, 0, setting(4, 1000) * 32)
    assert not dialogue.connection.finished
    dialogue.send_frame(SETTINGS, 0, 0, setting(4, 1000) * 33)
    assert dialogue.connection.fault is not None
    assert dialogue.connection.fault.code is CALM


def test_windows_are_changed_once_a_frame_however_often_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    changes: list[int] = []
    monkeypatch.setattr(Stream, "open_window", lambda self, change: changes.append(change))
    dialogue = Dialogue()
    dialogue.request(1)
    dialogue.send_frame(SETTINGS, 0, 0, setting(4, 7) + setting(4, 100_000) + setting(4, 65_536))
    assert changes == [1]
    dialogue.send_frame(SETTINGS, 0, 0, setting(4, 5) + setting(4, 65_536))
    assert changes == [1]


def test_a_window_that_would_be_too_large_for_a_moment_is_a_fault_too() -> None:
    dialogue = Dialogue()
    dialogue.request(1)
    dialogue.send_frame(WINDOW_UPDATE, 0, 1, (1).to_bytes(4, "big"))
    dialogue.send_frame(SETTINGS, 0, 0, setting(4, 2**31 - 1) + setting(4, 65_535))
    assert dialogue.connection.fault is not None
    assert dialogue.connection.fault.code is ErrorCode.FLOW_CONTROL_ERROR


def setting(identifier: int, value: int) -> bytes:
    return identifier.to_bytes(2, "big") + value.to_bytes(4, "big")
