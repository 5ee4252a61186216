"""The vocabulary: what a head is when nobody said more."""

from __future__ import annotations

from portero_py.wire.message import (
    CHUNKED,
    UNTIL_CLOSE,
    RequestHead,
    ResponseHead,
    request_with,
    response_with,
)


def test_a_request_head_has_nothing_that_nobody_gave_it() -> None:
    head = RequestHead(b"GET", b"/", b"app.example", b"2", [])
    assert (head.body_length, head.expects_continue, head.keep_alive) == (0, False, True)
    assert (head.forwarded, head.upgrade, head.wants_trailers, head.lines) == ((), b"", False, None)


def test_a_request_head_has_what_it_was_given() -> None:
    forwarded = [(b"X-Request-ID", b"1")]
    head = RequestHead(
        b"POST",
        b"/",
        b"app.example",
        b"2",
        [(b"a", b"b")],
        CHUNKED,
        expects_continue=True,
        forwarded=forwarded,
        wants_trailers=True,
    )
    assert (head.body_length, head.expects_continue, head.wants_trailers) == (CHUNKED, True, True)
    assert head.forwarded == forwarded
    assert RequestHead(b"GET", b"/", b"a", b"2", []).forwarded == ()


def test_a_response_head_has_what_it_was_given() -> None:
    head = ResponseHead(101, b"Switching Protocols", [], upgrade=b"websocket")
    assert (head.status, head.body_length, head.upgrade, head.lines) == (101, 0, b"websocket", b"")


def test_the_two_unknown_lengths_differ_from_each_other_and_from_every_length() -> None:
    assert len({CHUNKED, UNTIL_CLOSE}) == 2
    assert max(CHUNKED, UNTIL_CLOSE) < 0


def test_a_head_with_other_fields_is_the_same_beside_them() -> None:
    head = RequestHead(
        b"POST",
        b"/a",
        b"app.example",
        b"1.1",
        [(b"A", b"1")],
        7,
        expects_continue=True,
        forwarded=[(b"X-Forwarded-For", b"192.0.2.1")],
        wants_trailers=True,
    )
    head.keep_alive = False
    head.lines = b"A: 1\r\n"
    plain = request_with(head, [(b"B", b"2")])
    assert (plain.method, plain.target, plain.authority, plain.version, plain.fields, plain.body_length) == (
        *(b"POST", b"/a", b"app.example", b"1.1", [(b"B", b"2")], 7),
    )
    assert (plain.expects_continue, plain.forwarded, plain.wants_trailers) == (True, head.forwarded, True)
    assert (plain.keep_alive, plain.upgrade, plain.lines) == (False, b"", None)
    head.upgrade = b"websocket"
    moved = request_with(head, [], b"/b")
    assert (moved.target, moved.upgrade, head.target, head.fields) == (
        b"/b",
        b"websocket",
        b"/a",
        [(b"A", b"1")],
    )


def test_a_response_with_other_fields_is_the_same_beside_them() -> None:
    head = ResponseHead(101, b"Switching", [(b"A", b"1")], 0, upgrade=b"websocket")
    other = response_with(head, [(b"B", b"2")])
    assert (other.status, other.phrase, other.fields, other.body_length, other.upgrade) == (
        *(101, b"Switching", [(b"B", b"2")], 0, b"websocket"),
    )
