"""Frames are followed however their bytes are cut, and the proxy's own one only ever stands between two."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode

from portero_py.wire.websocket import GOING_AWAY, Frames, Goodbye

FRAMES = st.builds(
    lambda opcode, size, mask: Frame(opcode, b"x" * size).serialize(mask=mask),
    st.sampled_from([Opcode.TEXT, Opcode.BINARY, Opcode.CONT, Opcode.PING]),
    st.sampled_from([0, 1, 125]),
    st.booleans(),
) | st.builds(
    lambda size: Frame(Opcode.BINARY, b"x" * size).serialize(mask=False),
    st.sampled_from([126, 65_535, 65_536, 70_000]),
)


def cut(stream: bytes, cuts: list[int]) -> list[bytes]:
    """The bytes in pieces, none of them empty."""
    places = [0, *sorted({place % len(stream) for place in cuts}), len(stream)] if stream else []
    return [stream[a:b] for a, b in pairwise(places) if a < b]


@given(st.lists(FRAMES, max_size=6), st.lists(st.integers(0, 1 << 20), max_size=12))
def test_after_each_piece_it_is_known_whether_a_frame_has_ended(frames: list[bytes], cuts: list[int]) -> None:
    ends, at = {0}, 0
    for frame in frames:
        at += len(frame)
        ends.add(at)
    followed, seen = Frames(), 0
    for piece in cut(b"".join(frames), cuts):
        followed.follow(piece)
        seen += len(piece)
        assert followed.is_between == (seen in ends)
    assert not followed.is_closed


@given(
    st.lists(FRAMES, min_size=1, max_size=6),
    st.lists(st.integers(0, 1 << 20), max_size=12),
    st.integers(0, 12),
)
def test_a_frame_that_has_begun_is_brought_to_its_end_and_no_further(
    frames: list[bytes], cuts: list[int], when: int
) -> None:
    """From piece `when` on the proxy wants to close: what passes until it may is the rest of one frame."""
    stream = b"".join(frames)
    ends = {sum(map(len, frames[:count])) for count in range(len(frames) + 1)}
    followed, passed = Frames(), b""
    for number, piece in enumerate(cut(stream, cuts)):
        if number < when:
            followed.follow(piece)
            passed += piece
            continue
        begun = len(passed)
        passed += piece[: followed.end_of_frame(piece)]
        if followed.is_between:
            assert len(passed) == min(end for end in ends if end >= begun)
            return
        assert len(passed) == begun + len(piece)
    assert followed.is_between
    assert passed == stream


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_close_frame_is_noticed(size: int) -> None:
    followed = Frames()
    followed.follow(b"\x81\x01x")
    for at in range(0, len(GOING_AWAY), size):
        followed.follow(GOING_AWAY[at : at + size])
    assert followed.is_closed
    assert followed.is_between


def test_the_proxy_s_own_frame_is_what_servers_send() -> None:
    assert Frame(Opcode.CLOSE, (1001).to_bytes(2, "big")).serialize(mask=False) == GOING_AWAY


def test_a_head_in_pieces_may_be_that_of_a_frame_without_content() -> None:
    followed = Frames()
    followed.follow(b"\x89")
    assert not followed.is_between
    assert followed.end_of_frame(b"\x00\x81") == 1
    assert followed.is_between


def test_between_two_frames_the_goodbye_is_said_at_once_and_the_rest_is_dropped() -> None:
    goodbye = Goodbye()
    assert goodbye.pass_on(b"\x81\x01x") == b"\x81\x01x"
    assert goodbye.say() == GOING_AWAY
    assert goodbye.say() == b""
    assert goodbye.pass_on(b"\x81\x01y") == b""


def test_within_a_frame_the_goodbye_waits_for_its_end() -> None:
    goodbye = Goodbye()
    assert goodbye.pass_on(b"\x81\x04a") == b"\x81\x04a"
    assert goodbye.say() == b""
    assert goodbye.pass_on(b"bc") == b"bc"
    assert goodbye.pass_on(b"d\x81\x01x") == b"d" + GOING_AWAY
    assert goodbye.pass_on(b"y") == b""


def test_who_has_heard_the_backend_s_goodbye_needs_none_of_ours() -> None:
    goodbye = Goodbye()
    assert goodbye.pass_on(b"\x88\x02\x03\xe8") == b"\x88\x02\x03\xe8"
    assert goodbye.say() == b""
    assert goodbye.pass_on(b"\x81") == b""
