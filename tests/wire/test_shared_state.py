"""What connections share: whatever a hostile peer sent, the others get what they would get from a fresh one.

Parsers serve all connections of a worker, an encoder all responses of a client's connection, and what was
learnt of an address all connections from there.
"""

from __future__ import annotations

from random import Random

import hpack
import pytest

from portero_py.errors import WireError
from portero_py.wire.headers import Forwarded, Forwarding
from portero_py.wire.http1 import RequestParser, ResponseParser, request_bytes, response_bytes
from portero_py.wire.http2.hpack import HeaderEncoder, response_list
from portero_py.wire.message import Fields, ResponseHead
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


@pytest.mark.parametrize("seed", range(5))
def test_no_backend_changes_what_a_client_of_http_2_reads_of_another(seed: int) -> None:
    random = Random(seed)
    encoder, decoder, parser = HeaderEncoder(), hpack.Decoder(), ResponseParser(100)
    heads: list[ResponseHead] = []
    while len(heads) < ROUNDS:
        try:
            heads.append(parser.parse(response_head(random), b"GET")[0])
        except WireError:
            continue
        heads += [parser.parse(_honest_response(random), b"GET")[0]] * random.choice([1, 2, 4])
        if random.randrange(20) == 0:
            heads.append(random.choice(heads))
    for head in heads:
        block = encoder.encode_response(head.status, head.fields)
        read = [(bytes(name), bytes(value)) for name, value in decoder.decode(block, raw=True)]
        assert read == [(name, value) for name, value, _ in response_list(head.status, head.fields)]


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_no_client_changes_the_forwarded_fields_of_another_from_its_address(seed: int, trusted: bool) -> None:
    random = Random(seed)
    shared = Forwarding(b"192.0.2.1", b"https", trusted=trusted)
    names = [b"X-Forwarded-For", b"x-forwarded-host", b"X-Forwarded-Proto", b"Forwarded", b"X-Request-ID"]
    for _ in range(ROUNDS):
        authority = random.choice([b"a.example", b"A.example", b"b.example:80", b""])
        received: Fields = [(name, b"spoof") for name in names if random.randrange(4) == 0]
        fresh = Forwarding(b"192.0.2.1", b"https", trusted=trusted)
        made, expected = shared.fields(authority, received), fresh.fields(authority, received)
        assert (made.lines, made.fields) == (expected.lines, expected.fields)
        assert shared.request_id(received) == fresh.request_id(received)


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
