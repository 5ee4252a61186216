"""The frame codec, against the `hyperframe` package."""

from __future__ import annotations

import pytest
from hyperframe.frame import (
    ContinuationFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from hypothesis import given
from hypothesis import strategies as st

from portero_py.wire.http2 import frames
from portero_py.wire.http2.frames import ConnectionFault, ErrorCode

STREAMS = st.integers(1, 2**31 - 1)
LONG = st.integers(0, 2**32 - 1)


def read(data: bytes) -> Frame:
    found, length = Frame.parse_frame_header(memoryview(data[:9]))
    found.parse_body(memoryview(data[9 : 9 + length]))
    assert len(data) == 9 + length
    return found


@given(st.integers(0, 2**24 - 1), st.integers(0, 255), st.integers(0, 255), STREAMS)
def test_a_frame_header_says_what_went_into_it(length: int, kind: int, flags: int, stream: int) -> None:
    packed = frames.frame_header(length, kind, flags, stream)
    assert int.from_bytes(packed[:3], "big") == length
    assert packed[3:5] == bytes((kind, flags))
    assert int.from_bytes(packed[5:], "big") == stream
    high, low, *rest = frames.FRAME.unpack_from(packed)
    assert (high << 8 | low, *rest) == (length, kind, flags, stream)


@given(STREAMS, st.binary(max_size=400), st.integers(1, 100), st.booleans())
def test_a_header_block_is_cut_into_frames_that_give_it_back(
    stream: int, block: bytes, limit: int, ends: bool
) -> None:
    data = b"".join(frames.header_frames(stream, block, frames.END_STREAM if ends else 0, limit))
    whole = b""
    kinds = []
    while data:
        length = int.from_bytes(data[:3], "big")
        found = read(data[: 9 + length])
        assert isinstance(found, HeadersFrame | ContinuationFrame)
        assert found.stream_id == stream
        assert len(found.data) <= limit
        whole += found.data
        kinds.append(found)
        data = data[9 + length :]
    assert whole == block
    assert isinstance(kinds[0], HeadersFrame)
    assert all(isinstance(one, ContinuationFrame) for one in kinds[1:])
    assert ("END_STREAM" in kinds[0].flags) == ends
    assert ["END_HEADERS" in one.flags for one in kinds] == [False] * (len(kinds) - 1) + [True]


@given(st.dictionaries(st.integers(1, 2**16 - 1), LONG))
def test_settings_are_read_by_another_implementation(settings: dict[int, int]) -> None:
    found = read(frames.settings_frame(settings.items()))
    assert isinstance(found, SettingsFrame)
    assert found.settings == settings


@given(st.binary(min_size=8, max_size=8), st.booleans(), STREAMS, st.sampled_from(list(ErrorCode)))
def test_control_frames_are_read_by_another_implementation(
    payload: bytes, ack: bool, stream: int, code: ErrorCode
) -> None:
    ping = read(frames.ping_frame(payload, ack=ack))
    assert isinstance(ping, PingFrame)
    assert (ping.opaque_data, "ACK" in ping.flags) == (payload, ack)
    reset = read(frames.reset_frame(stream, code))
    assert isinstance(reset, RstStreamFrame)
    assert (reset.stream_id, reset.error_code) == (stream, code)
    window = read(frames.window_frame(stream, stream))
    assert isinstance(window, WindowUpdateFrame)
    assert (window.stream_id, window.window_increment) == (stream, stream)
    goaway = read(frames.goaway_frame(stream, code, payload))
    assert isinstance(goaway, GoAwayFrame)
    assert (goaway.last_stream_id, goaway.error_code, goaway.additional_data) == (stream, code, payload)


@given(LONG)
def test_the_reserved_bit_is_ignored(value: int) -> None:
    assert frames.read_long(value.to_bytes(4, "big")) == value & 0x7FFFFFFF


@pytest.mark.parametrize(
    ("identifier", "value", "code"),
    [
        (frames.ENABLE_PUSH, 2, ErrorCode.PROTOCOL_ERROR),
        (frames.INITIAL_WINDOW_SIZE, 2**31, ErrorCode.FLOW_CONTROL_ERROR),
        (frames.MAX_FRAME_SIZE, 16383, ErrorCode.PROTOCOL_ERROR),
        (frames.MAX_FRAME_SIZE, 2**24, ErrorCode.PROTOCOL_ERROR),
        (frames.ENABLE_CONNECT_PROTOCOL, 2, ErrorCode.PROTOCOL_ERROR),
        (frames.NO_RFC7540_PRIORITIES, 2, ErrorCode.PROTOCOL_ERROR),
    ],
)
def test_a_setting_out_of_range_is_a_connection_error(identifier: int, value: int, code: ErrorCode) -> None:
    payload = identifier.to_bytes(2, "big") + value.to_bytes(4, "big")
    with pytest.raises(ConnectionFault) as caught:
        list(frames.read_settings(payload))
    assert caught.value.code == code


def test_settings_of_a_wrong_length_are_a_frame_size_error() -> None:
    with pytest.raises(ConnectionFault) as caught:
        list(frames.read_settings(bytes(7)))
    assert caught.value.code == ErrorCode.FRAME_SIZE_ERROR


def test_known_settings_in_range_are_returned_and_unknown_ones_left_out() -> None:
    pairs = [(1, 0), (2, 1), (4, 2**31 - 1), (5, 2**24 - 1), (0xFACE, 7), (5, 16384)]
    payload = frames.settings_frame(pairs)[9:]
    assert list(frames.read_settings(payload)) == [pair for pair in pairs if pair[0] != 0xFACE]


@pytest.mark.parametrize(
    ("flags", "payload", "rest"),
    [
        (0, b"abc", b"abc"),
        (frames.PADDED, b"\x02abcxx", b"abc"),
        (frames.PADDED, b"\x00", b""),
        (frames.PRIORITY_FLAG, b"pppppabc", b"abc"),
        (frames.PADDED | frames.PRIORITY_FLAG, b"\x01pppppabcx", b"abc"),
    ],
)
def test_padding_and_priority_are_taken_off(flags: int, payload: bytes, rest: bytes) -> None:
    assert frames.without_padding(flags, payload) == rest


@pytest.mark.parametrize(
    ("flags", "payload", "code"),
    [
        (frames.PADDED, b"", ErrorCode.FRAME_SIZE_ERROR),
        (frames.PADDED, b"\x02a", ErrorCode.PROTOCOL_ERROR),
        (frames.PADDED, b"\x01", ErrorCode.PROTOCOL_ERROR),
        (frames.PRIORITY_FLAG, b"pppp", ErrorCode.FRAME_SIZE_ERROR),
        (frames.PADDED | frames.PRIORITY_FLAG, b"\x01ppppp", ErrorCode.PROTOCOL_ERROR),
    ],
)
def test_impossible_padding_is_a_connection_error(flags: int, payload: bytes, code: ErrorCode) -> None:
    with pytest.raises(ConnectionFault) as caught:
        frames.without_padding(flags, payload)
    assert caught.value.code == code
