"""One parser serves all connections of a worker: what a hostile peer sent changes nothing for the others."""

from __future__ import annotations

from random import Random

import pytest

from portero_py.errors import WireError
from portero_py.wire.headers import Forwarded
from portero_py.wire.http1 import RequestParser, ResponseParser, request_bytes, response_bytes
from tests.wire.hostile_heads import request_head, response_head

ROUNDS = 400


def _honest_response(random: Random) -> bytes:
    number = random.choice([0, random.randrange(10**6)])  # one that is remembered, or one that is new
    line = random.choice([b"Content-Length: 5", b"Transfer-Encoding: chunked", b"Content-Length: 300"])
    return b"HTTP/1.1 200 OK\r\nX-Number: %d\r\n%b\r\nSet-Cookie: own\r\n\r\n" % (number, line)


def _honest_request(random: Random) -> bytes:
    number = random.choice([0, random.randrange(10**6)])
    line = random.choice([b"Accept: */*", b"Content-Length: 5", b"Transfer-Encoding: chunked"])
    host = b"Host: honest.example\r\n"
    front, behind = random.choice([(host, b""), (b"", host)])
    return b"POST /own HTTP/1.1\r\n%bX-Number: %d\r\n%b\r\n%b\r\n" % (front, number, line, behind)


def _understood(parser: ResponseParser, raw: bytes, method: bytes) -> object:
    try:
        head, reusable = parser.parse(raw, method)
    except WireError as error:
        return type(error), str(error)
    return response_bytes(head, b""), head.status, head.body_length, head.upgrade, reusable


def _request_understood(parser: RequestParser, raw: bytes) -> object:
    try:
        head = parser.parse(raw)
    except WireError as error:
        return type(error), str(error)
    return (
        request_bytes(head, Forwarded([]), b"1"),
        (head.method, head.target, head.authority, head.version, head.fields),
        (head.body_length, head.expects_continue, head.keep_alive, head.upgrade, head.wants_trailers),
        list(head.forwarded),
    )


@pytest.mark.parametrize("seed", range(10))
def test_no_backend_leaves_anything_that_changes_the_response_of_another(seed: int) -> None:
    random = Random(seed)
    shared = ResponseParser(100)
    for _ in range(ROUNDS):
        for raw in (response_head(random), _honest_response(random)):
            method = random.choice([b"GET", b"GET", b"GET", b"HEAD"])
            assert _understood(shared, raw, method) == _understood(ResponseParser(100), raw, method), raw


@pytest.mark.parametrize("seed", range(10))
def test_no_client_leaves_anything_that_changes_the_request_of_another(seed: int) -> None:
    random = Random(seed)
    shared = RequestParser(8192, 100)
    for _ in range(ROUNDS):
        for raw in (request_head(random, b"hostile.example"), _honest_request(random)):
            assert _request_understood(shared, raw) == _request_understood(RequestParser(8192, 100), raw), raw


@pytest.mark.parametrize("status", [100, 102, 103, 104, 150, 199, 204, 304])
@pytest.mark.parametrize("line", [b"Content-Length: 5", b"Transfer-Encoding: chunked"])
def test_a_length_where_no_body_can_be_is_waited_for_by_nobody(status: int, line: bytes) -> None:
    shared = ResponseParser(100)
    shared.parse(b"HTTP/1.1 %d X\r\n%b\r\n\r\n" % (status, line), b"GET")
    head, _ = shared.parse(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nX-Own: y\r\n\r\n", b"GET")
    assert head.fields == [(b"Content-Length", b"3"), (b"X-Own", b"y")]


def test_the_heads_of_these_tests_are_good_and_bad_ones() -> None:
    """A suite of hostile heads that are all refused at their first line would prove nothing."""
    random = Random(1)
    responses = [_understood(ResponseParser(100), response_head(random), b"GET") for _ in range(1000)]
    requests = [
        _request_understood(RequestParser(8192, 100), request_head(random, b"a")) for _ in range(1000)
    ]
    for understood in (responses, requests):
        good = sum(isinstance(one, tuple) and isinstance(one[0], bytes) for one in understood)
        assert 100 < good < 900
