"""Heads: bytes to messages and back, and that no request is ever taken for another."""

from __future__ import annotations

from itertools import product

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from portero_py.errors import (
    BadRequest,
    BadResponse,
    HeadTooLarge,
    Http2Preface,
    TargetTooLong,
    VersionRefused,
    WireError,
)
from portero_py.wire import http1
from portero_py.wire.headers import REQUEST_KINDS, Forwarded
from portero_py.wire.http1 import RequestParser, ResponseParser, find_head, request_bytes, response_bytes
from portero_py.wire.http2.hpack import response_list
from portero_py.wire.message import CHUNKED, UNTIL_CLOSE, Field, Fields, RequestHead, ResponseHead

HOST = b"Host: app.example\r\n"
TOKEN = st.text("abcXYZ019!#$%&'*+-.^_`|~", min_size=1, max_size=12).map(str.encode)
VALUE = st.binary(max_size=20).map(lambda raw: bytes(c for c in raw if c >= 0x20 and c != 0x7F).strip(b" "))


class Independent:
    """llhttp without anything of ours around it."""

    def __init__(self, raw: bytes) -> None:
        self.fields: Fields = []
        self.target = b""
        self.complete = False
        parser = httptools.HttpRequestParser(self)
        try:
            parser.feed_data(raw)
        except httptools.HttpParserUpgrade:
            pass
        self.method = parser.get_method()

    def on_url(self, target: bytes) -> None:
        self.target += target

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name, value))

    def on_headers_complete(self) -> None:
        self.complete = True


def parse(raw: bytes) -> RequestHead:
    return RequestParser(8192, 100).parse(raw)


def request(fields: bytes, line: bytes = b"GET / HTTP/1.1") -> bytes:
    return line + b"\r\n" + HOST + fields + b"\r\n"


def parse_response(raw: bytes, method: bytes = b"GET") -> tuple[ResponseHead, bool]:
    return ResponseParser(100).parse(raw, method)


def seen(head: RequestHead) -> tuple[object, ...]:
    """Everything that a request says, the lines for the backend included."""
    return (
        head.method,
        head.target,
        head.authority,
        head.version,
        head.fields,
        list(head.forwarded),
        head.body_length,
        head.expects_continue,
        head.keep_alive,
        head.upgrade,
        head.wants_trailers,
        request_bytes(head, Forwarded([]), b"1"),
    )


# Finding a head


def find(buffer: bytes) -> int | type[WireError]:
    try:
        return find_head(buffer, 100, 200, BadRequest)
    except WireError as error:
        return type(error)


def test_a_head_ends_with_its_empty_line() -> None:
    assert find(b"GET / HTTP/1.1\r\nA: b\r\n\r\nbody") == 24
    assert find(b"GET / HTTP/1.1\r\nA: b\r\n\r") == 0
    assert find(b"") is BadRequest


@pytest.mark.parametrize(
    ("buffer", "result"),
    [
        (b"GET /" + b"x" * 96, TargetTooLong),
        (b"GET /" + b"x" * 200, TargetTooLong),
        (b"GET / HTTP/1.1\r\nA: " + b"x" * 200, HeadTooLarge),
        (b"GET / HTTP/1.1\r\nA: " + b"x" * 200 + b"\r\n\r\n", HeadTooLarge),
        (b"GET /" + b"x" * 200 + b" HTTP/1.1\r\n\r\n", TargetTooLong),
        (b"GET /" + b"x" * 95, 0),
        (b"GET / HTTP/1.1\nHost: a\n\n", BadRequest),
        (b"GET / HTTP/1.1\r\nHost: a\n\r\nX: y", BadRequest),
        (b"\x16\x03\x01", BadRequest),
        (b" GET", BadRequest),
        (b"\nGET", BadRequest),
    ],
)
def test_what_is_too_long_or_can_never_become_a_head_is_refused_at_once(
    buffer: bytes, result: int | type[WireError]
) -> None:
    assert find(buffer) == result


@given(st.lists(st.tuples(TOKEN, VALUE), max_size=3), st.binary(max_size=9))
def test_a_head_is_found_at_the_same_place_however_it_comes(fields: list[Field], rest: bytes) -> None:
    raw = request(b"".join([b"%b: %b\r\n" % field for field in fields]))
    if len(raw) <= 200:
        assert [find(raw[:end]) for end in range(1, len(raw))] == [0] * (len(raw) - 1)
        assert find(raw + rest) == len(raw)


# Requests


@pytest.mark.parametrize(
    ("line", "method", "target", "authority"),
    [
        (b"GET / HTTP/1.1", b"GET", b"/", b"app.example"),
        (b'GET /a?b="c"\\|{} HTTP/1.1', b"GET", b'/a?b="c"\\|{}', b"app.example"),
        (b"GET //x/../y HTTP/1.1", b"GET", b"//x/../y", b"app.example"),
        (b"PURGE-it /x HTTP/1.1", b"PURGE-it", b"/x", b"app.example"),
        (b"get / HTTP/1.1", b"get", b"/", b"app.example"),
        (b"OPTIONS * HTTP/1.1", b"OPTIONS", b"*", b"app.example"),
        (b"CONNECT app.example:443 HTTP/1.1", b"CONNECT", b"app.example:443", b"app.example"),
        (b"GET http://app.example/x?y HTTP/1.1", b"GET", b"/x?y", b"app.example"),
        (b"GET HTTPS://APP.example HTTP/1.1", b"GET", b"/", b"APP.example"),
        (b"GET http://app.example?x HTTP/1.1", b"GET", b"/?x", b"app.example"),
        (b"OPTIONS http://app.example HTTP/1.1", b"OPTIONS", b"*", b"app.example"),
    ],
)
def test_request_lines(line: bytes, method: bytes, target: bytes, authority: bytes) -> None:
    head = parse(request(b"", line))
    assert (head.method, head.target, head.authority, head.version) == (method, target, authority, b"1.1")


@pytest.mark.parametrize(
    "line",
    [
        b"GET  / HTTP/1.1",
        b"GET /  HTTP/1.1",
        b" GET / HTTP/1.1",
        b"GET\t/ HTTP/1.1",
        b"GET / HTTP/1.1 ",
        b"GET / HTTP/0.9",
        b"GET / HTTP/1.10",
        b"GET / HTTP/2",
        b"GET / HTTP/10.0",
        b"GET  / HTTP/2.0",
        b"GET / http/1.1",
        b"GET / ICE/1.0",
        b"GET / RTSP/1.0",
        b"GET /",
        b"GET / HTTP/1.1\rX",
        b"GET /a b HTTP/1.1",
        b"GET /\x00 HTTP/1.1",
        b"GET /\x7f HTTP/1.1",
        b"GET /\xff HTTP/1.1",
        b"GET /#x HTTP/1.1",
        b"G(T / HTTP/1.1",
        b"1GET / HTTP/1.1",
        b"G" * 33 + b" / HTTP/1.1",
        b"GET a HTTP/1.1",
        b"GET * HTTP/1.1",
        b"GET ftp://app.example/ HTTP/1.1",
        b"GET http:/app.example/ HTTP/1.1",
        b"GET http:///x HTTP/1.1",
        b"GET http://u@app.example/ HTTP/1.1",
        b"GET http://other.example/ HTTP/1.1",
        b"GET http://app.example:80/ HTTP/1.1",
        b"CONNECT / HTTP/1.1/x",
        b"CONNECT a:b:c HTTP/1.1",
    ],
)
def test_request_lines_that_are_refused(line: bytes) -> None:
    with pytest.raises(BadRequest):
        parse(request(b"", line))


@pytest.mark.parametrize("version", [b"1.2", b"1.3", b"1.9"])
def test_a_higher_minor_version_is_taken_as_1_1(version: bytes) -> None:
    parser = RequestParser(8192, 100)
    for fields in (b"Connection: Upgrade\r\nUpgrade: websocket\r\n", b"X: y\r\n", b"X: y\r\n"):
        head = parser.parse(request(fields, b"GET / HTTP/%b" % version))
        assert (head.version, head.keep_alive) == (b"1.1", True)
        assert seen(head) == seen(parse(request(fields)))
    with pytest.raises(BadRequest):
        parser.parse(b"GET / HTTP/%b\r\n\r\n" % version)
    head_and_reusable = parse_response(b"HTTP/%b 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" % version)
    assert (head_and_reusable[0].body_length, head_and_reusable[1]) == (CHUNKED, True)


@pytest.mark.parametrize("version", [b"2.0", b"2.1", b"3.0", b"9.9"])
def test_another_major_version_is_not_spoken_here(version: bytes) -> None:
    with pytest.raises(VersionRefused) as refused:
        parse(request(b"", b"GET / HTTP/%b" % version))
    assert refused.value.status == 505


def test_a_request_line_over_the_limit_is_too_long() -> None:
    long = b"GET /" + b"x" * 30 + b" HTTP/1.1"
    RequestParser(len(long), 100).parse(request(b"", long))
    for line in (long, b"GET /" + b"x" * 30 + b"  HTTP/1.1"):
        with pytest.raises(TargetTooLong):
            RequestParser(len(long) - 1, 100).parse(request(b"", line))


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nhost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
        b"GET / HTTP/1.0\r\nHost: a@b\r\n\r\n",
        b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
        b"GET http://a/ HTTP/1.1\r\n\r\n",
    ],
)
def test_host_is_there_once_and_is_a_host(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        parse(raw)


@pytest.mark.parametrize(
    "line",
    [
        b"X : y",
        b" X: y",
        b"X",
        b": y",
        b"X\x80: y",
        b"X(: y",
        b'"X": y',
        b"X: a\x00b",
        b"X: a\rb",
        b"X: a\nb",
        b"X: a\r\n b",
        b"X: \x7f",
        b"X: a\n\r\n b",
        b"X: a\r\r",
        b"X: a\r\n\nY: b",
        b"Content-Length: 5 5",
        b"Content-Length: \x0b5",
        b"Content-Length: 5\x0b",
        b"Content-Length: +5",
        b"Content-Length: 5, 6",
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Content-Length: 5\r\nContent-Length: 05",
        b"Content-Length:",
        b"Content-Length: \t",
        b"Content-Length: 0000000000000000005",
        b"Transfer-Encoding: \x0bchunked",
        b"Transfer-Encoding: chunked chunked",
        b"Transfer-Encoding: chunked,",
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: identity",
        b"Transfer-Encoding:",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 3",
        b"Content-Length: 3\r\nTransfer-Encoding: chunked",
    ],
)
def test_fields_that_are_refused_in_requests_and_responses(line: bytes) -> None:
    with pytest.raises(BadRequest):
        parse(request(line + b"\r\n", b"POST / HTTP/1.1"))
    with pytest.raises(BadResponse):
        parse_response(b"HTTP/1.1 200 OK\r\n" + line + b"\r\n\r\n")


def test_white_space_around_a_value_is_no_part_of_it() -> None:
    assert parse(b"GET / HTTP/1.1\r\nHost: \ta \r\nX: \t y z \t\r\n\r\n").fields == [(b"X", b"y z")]
    assert parse_response(b"HTTP/1.1 200 OK\r\nX: y \r\n\r\n")[0].fields == [(b"X", b"y")]


@pytest.mark.parametrize("value", [b"5", b"5 ", b"5\t", b"\t 5 \t ", b"005", b"000000000000000005"])
def test_what_goes_on_is_our_own_spelling_of_a_length(value: bytes) -> None:
    requests, responses = RequestParser(8192, 100), ResponseParser(100)
    for _ in range(2):  # the second one is remembered
        head = requests.parse(request(b"A: b\r\ncontent-length:%b\r\n" % value, b"POST / HTTP/1.1"))
        assert head.body_length == 5
        made = request_bytes(head, Forwarded([]), b"1")
        assert made == (
            b"POST / HTTP/1.1\r\nHost: app.example\r\nA: b\r\nContent-Length: 5\r\nX-Request-ID: 1\r\n\r\n"
        )
        answer, _ = responses.parse(b"HTTP/1.1 200 OK\r\ncontent-length:%b\r\nA: b\r\n\r\n" % value, b"GET")
        assert answer.body_length == 5
        assert response_bytes(answer, b"") == b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nA: b\r\n\r\n"


@pytest.mark.parametrize("zero", [b"0", b"00", b" 000 "])
def test_a_length_of_zero_keeps_a_digit(zero: bytes) -> None:
    assert parse(request(b"Content-Length:%b\r\n" % zero)).fields == [(b"Content-Length", b"0")]
    head, _ = parse_response(b"HTTP/1.1 200 OK\r\nContent-Length:%b\r\n\r\n" % zero)
    assert (head.fields, head.body_length) == ([(b"Content-Length", b"0")], 0)


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize(
    "lines", [b"Content-Length: 05, 05\r\n", b"Content-Length: 5\r\nA: b\r\nContent-Length: 5 \r\n"]
)
def test_equal_lengths_of_a_response_are_one(method: bytes, lines: bytes) -> None:
    head, _ = parse_response(b"HTTP/1.1 200 OK\r\n%bX: y\r\n\r\n" % lines, method)
    assert head.body_length == (5 if method == b"GET" else 0)
    assert [field for field in head.fields if field[0] == b"Content-Length"] == [(b"Content-Length", b"5")]
    assert head.fields[-1] == (b"X", b"y")


@pytest.mark.parametrize("value", [b"chunked", b" chunked ", b"\tCHUNKED\t"])
def test_white_space_around_a_coding_is_no_part_of_it(value: bytes) -> None:
    head = parse(request(b"Transfer-Encoding:%b\r\n" % value, b"POST / HTTP/1.1"))
    assert head.body_length == CHUNKED
    assert b"\r\nTransfer-Encoding: chunked\r\n" in request_bytes(head, Forwarded([]), b"1")
    answer, reusable = parse_response(b"HTTP/1.1 200 OK\r\nTransfer-Encoding:%b\r\n\r\n" % value)
    assert (answer.body_length, answer.fields, reusable) == (CHUNKED, [], True)


def test_too_many_fields_are_too_large() -> None:
    RequestParser(8192, 3).parse(request(b"A: b\r\n" * 2))
    with pytest.raises(HeadTooLarge):
        RequestParser(8192, 3).parse(request(b"A: b\r\n" * 3))


def test_hop_by_hop_fields_end_here_and_our_own_are_put_aside() -> None:
    head = parse(
        request(
            b"Keep-Alive: 1\r\nProxy-Connection: x\r\nTrailer: x\r\nHTTP2-Settings: x\r\nTE: gzip\r\n"
            b"Proxy-Authorization: x\r\nConnection: X-Foo, content-length, Cookie\r\nX-Foo: 1\r\n"
            b"Cookie: c\r\n"
            b"X-Forwarded-For: 1\r\nX_Forwarded_For: 2\r\nX-Request_ID: 3\r\nUpgrade: x\r\nX-Bar: 4\r\n"
        )
    )
    assert head.fields == [(b"Cookie", b"c"), (b"X-Bar", b"4")]
    assert head.forwarded == [(b"X-Forwarded-For", b"1")]
    assert head.upgrade == b""


@pytest.mark.parametrize(
    ("raw", "keep_alive"),
    [
        (request(b""), True),
        (request(b"Connection: close\r\n"), False),
        (request(b"Connection: keep-alive, Close\r\n"), False),
        (b"GET / HTTP/1.0\r\n\r\n", False),
        (b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", True),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\nConnection: close\r\n\r\n", False),
    ],
)
def test_whether_a_connection_lives_on(raw: bytes, keep_alive: bool) -> None:
    assert parse(raw).keep_alive is keep_alive


@pytest.mark.parametrize(
    ("line", "fields", "upgrade"),
    [
        (b"GET / HTTP/1.1", b"Connection: Upgrade\r\nUpgrade: WebSocket\r\n", b"WebSocket"),
        (b"GET / HTTP/1.1", b"Upgrade: websocket\r\n", b""),
        (b"GET / HTTP/1.1", b"Connection: Upgrade\r\n", b""),
        (b"GET / HTTP/1.0", b"Connection: Upgrade\r\nUpgrade: websocket\r\n", b""),
        (b"POST / HTTP/1.1", b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 1\r\n", b""),
        (b"GET / HTTP/1.1", b"Connection: Upgrade\r\nUpgrade: h2c\r\n", b""),
        (b"GET / HTTP/1.1", b"Connection: Upgrade\r\nUpgrade: H2C\r\n", b""),
        (b"GET / HTTP/1.1", b"Connection: Upgrade\r\nUpgrade: TLS/1.0\r\n", b""),
        (b"GET / HTTP/1.1", b"Connection: Upgrade\r\nUpgrade: websocket, h2c\r\n", b""),
        (b"GET / HTTP/1.1", b"Connection: Upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n", b""),
    ],
)
def test_which_upgrades_are_passed_on(line: bytes, fields: bytes, upgrade: bytes) -> None:
    head = parse(request(fields, line))
    assert head.upgrade == upgrade
    made = request_bytes(head, Forwarded([]), b"1")
    assert (b"Connection: Upgrade\r\nUpgrade: " in made) == bool(upgrade)
    assert made.lower().count(b"upgrade:") == bool(upgrade)


@pytest.mark.parametrize(
    ("line", "fields", "expects"),
    [
        (b"POST / HTTP/1.1", b"Content-Length: 1\r\nExpect: 100-Continue\r\n", True),
        (b"POST / HTTP/1.1", b"Expect: 100-continue\r\n", False),
        (b"POST / HTTP/1.0", b"Content-Length: 1\r\nExpect: 100-continue\r\n", False),
    ],
)
def test_who_waits_for_a_100(line: bytes, fields: bytes, expects: bool) -> None:
    head = parse(request(fields, line))
    assert head.expects_continue is expects
    assert (b"Expect: 100-continue\r\n" in request_bytes(head, Forwarded([]), b"1")) is expects


def test_an_expectation_that_we_do_not_know_is_passed_on() -> None:
    assert parse(request(b"Expect: tea\r\n")).fields == [(b"Expect", b"tea")]


def test_a_chunked_request_stays_one_and_trailers_may_be_wished_for() -> None:
    head = parse(request(b"Transfer-Encoding: Chunked\r\nTE: Trailers\r\n", b"POST / HTTP/1.1"))
    assert (head.body_length, head.wants_trailers) == (CHUNKED, True)
    made = request_bytes(head, Forwarded([(b"X-Forwarded-For", b"::1")]), b"id")
    assert made == (
        b"POST / HTTP/1.1\r\nHost: app.example\r\nTransfer-Encoding: chunked\r\n"
        b"TE: trailers\r\nConnection: TE\r\n"
        b"X-Forwarded-For: ::1\r\nX-Request-ID: id\r\n\r\n"
    )


@given(
    st.sampled_from([b"GET", b"POST", b"DELETE"]),
    st.lists(st.tuples(TOKEN.filter(lambda name: name.lower() not in REQUEST_KINDS), VALUE), max_size=12),
    st.integers(0, 10**6),
)
def test_what_a_backend_reads_is_what_the_client_wrote(method: bytes, fields: Fields, length: int) -> None:
    raw = b"%b /a?b HTTP/1.1\r\nHost: app.example\r\nContent-Length: %d\r\n" % (method, length)
    raw += b"X-Forwarded-For: spoof\r\nX_Real_IP: spoof\r\nKeep-Alive: spoof\r\n"
    raw += b"".join([b"%b: %b\r\n" % field for field in fields]) + b"\r\n"
    head = parse(raw)
    read = Independent(request_bytes(head, Forwarded([(b"X-Forwarded-For", b"::1")]), b"id"))
    assert read.complete
    assert (read.method, read.target) == (method, b"/a?b")
    assert read.fields == [
        (b"Host", b"app.example"),
        (b"Content-Length", b"%d" % length),
        *fields,
        (b"X-Forwarded-For", b"::1"),
        (b"X-Request-ID", b"id"),
    ]


# What is remembered


LINES = [
    b"GET / HTTP/1.1",
    b"POST /other?x HTTP/1.1",
    b"FOO / HTTP/1.1",
    b"OPTIONS * HTTP/1.1",
    b"OPTIONS http://app.example HTTP/1.1",
    b"CONNECT app.example:443 HTTP/1.1",
    b"CONNECT / HTTP/1.1",
    b"HEAD / HTTP/1.0",
    b"GET http://app.example/ HTTP/1.1",
    b"GET http://other.example/ HTTP/1.1",
    b"PRI / HTTP/1.1",
    b"SOURCE / HTTP/1.1",
]
BLOCKS = [
    b"",
    b"X: y\r\n",
    b"Connection: close\r\n",
    b"Connection: keep-alive\r\n",
    b"Connection: X\r\nX: y\r\n",
    b"Content-Length: 0\r\n",
    b"Content-Length: 3\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"X-Forwarded-For: 1\r\n",
    b"TE: trailers\r\n",
    b"Expect: 100-continue\r\n",
    b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
    b"Connection: Upgrade\r\nUpgrade: h2c\r\n",
    b"Content-Length: 70000\r\n",
    b"X : y\r\n",
]


FRONTS = [HOST, b"host: other.example\r\n", b"HOST: app.example\r\n", b"X: y\r\n" + HOST, HOST + HOST, b""]


@given(
    st.lists(st.tuples(st.sampled_from(LINES), st.sampled_from(FRONTS), st.sampled_from(BLOCKS)), max_size=30)
)
def test_no_request_is_understood_by_another_one_before_it(
    requests: list[tuple[bytes, bytes, bytes]],
) -> None:
    parser = RequestParser(8192, 100)
    for line, front, block in requests:
        raw = line + b"\r\n" + front + block + b"\r\n"
        results: list[object] = []
        for each in (parser, RequestParser(8192, 100)):
            try:
                results.append(seen(each.parse(raw)))
            except WireError as error:
                results.append((type(error), str(error)))
        assert results[0] == results[1]


# What may be the lines of a head, one host or none in each.
HOSTS = [
    b"Host: app.example\r\n",
    b"host: other.example:8443\r\n",
    b"Host: [::1]:80\r\n",
    b"HOST: app.example\r\n",
    b"Host:app.example\r\n",
    b"Host: \tapp.example \r\n",
]
NO_HOSTS = [
    b"Host: \r\n",
    b"Host:\r\n",
    b"Host : app.example\r\n",
    b" Host: app.example\r\n",
    b"Host: app.example\n",
    b"Host: app.example\r\n b\r\n",
    b"Host: app.example\r\n\tb\r\n",
    b"Host: app.example \r\n c: d\r\n",
    b"Host: app.example, other.example\r\n",
    b"Host: app.example:123456\r\n",
    b"Host: u@app.example\r\n",
    b"Host: app.example\rX\r\n",
    b"Host\r\n",
]
OTHERS = [b"X: y\r\n", b"Content-Length: 3\r\n", b"Connection: host, close\r\n"]


def test_a_second_host_or_none_or_a_bad_one_is_refused_whatever_was_remembered() -> None:
    parser = RequestParser(8192, 100)
    lines = HOSTS + NO_HOSTS + OTHERS
    heads = [()] + [picked for count in (1, 2, 3) for picked in product(lines, repeat=count)]
    for _ in range(2):  # the second time all is remembered that ever will be
        for picked in heads:
            raw = b"GET / HTTP/1.1\r\n" + b"".join(picked) + b"\r\n"
            good = (
                sum(line in HOSTS for line in picked) == 1
                and not any(line in NO_HOSTS for line in picked)
                and picked.count(b"Content-Length: 3\r\n") <= 1
            )
            try:
                head = parser.parse(raw)
            except BadRequest:
                assert not good, raw
                continue
            assert good, raw
            assert seen(head) == seen(parse(raw))
            assert request_bytes(head, Forwarded([]), b"1").lower().count(b"host: ") == 1


@pytest.mark.parametrize("space", [b" ", b"\t"])
def test_a_folded_host_is_refused_even_if_what_follows_were_remembered(space: bytes) -> None:
    parser = RequestParser(8192, 100)
    parser._known[space + b"b\r\n\r\n"] = parser.parse(request(b""))
    with pytest.raises(BadRequest):
        parser.parse(request(space + b"b\r\n"))


def test_a_head_is_remembered_whoever_it_is_for() -> None:
    parser = RequestParser(8192, 100)
    for number in range(9):
        head = parser.parse(b"GET / HTTP/1.1\r\nHost: %d.example\r\nX: y\r\n\r\n" % number)
        assert head.authority == b"%d.example" % number
    assert list(parser._known) == [b"X: y\r\n\r\n"]
    parser.parse(b"GET / HTTP/1.1\r\nX: y\r\nHost: app.example\r\n\r\n")
    assert list(parser._known_whole) == [b"X: y\r\nHost: app.example\r\n\r\n"]
    assert len(parser._known) == 1


@pytest.mark.parametrize("front", [b"", HOST, b"HOST: app.example\r\n", b"X: y\r\n" + HOST])
@pytest.mark.parametrize("fields", [b"", b"A: b\r\nc: d\r\n", b"Content-Length: 3\r\nA: b\r\n"])
def test_host_goes_first_to_a_backend_wherever_it_stood(front: bytes, fields: bytes) -> None:
    version = b"1.1" if front else b"1.0"
    parser = RequestParser(8192, 100)
    for _ in range(2):
        head = parser.parse(b"POST / HTTP/%b\r\n%b%b\r\n" % (version, front, fields))
        rest = b"X: y\r\n" if front.startswith(b"X") else b""
        assert request_bytes(head, Forwarded([]), b"1") == (
            b"POST / HTTP/1.1\r\nHost: %b\r\n%b%bX-Request-ID: 1\r\n\r\n"
            % (b"app.example" if front else b"", rest, fields)
        )


def test_a_body_of_known_length_is_remembered_with_its_length_and_no_other_one_is() -> None:
    parser = RequestParser(8192, 100)
    for _ in range(2):
        for length in (0, 3, 70000):
            raw = request(b"Content-Length: %d\r\n" % length, b"POST / HTTP/1.1")
            assert parser.parse(raw).body_length == length
    assert len(parser._known) == 3
    for fields in (b"Transfer-Encoding: chunked\r\n", b"Content-Length: 3\r\nExpect: 100-continue\r\n"):
        parser.parse(request(fields, b"POST / HTTP/1.1"))
    assert len(parser._known) == 3


STATUSES = [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 204 \r\n", b"HTTP/1.1 304 x\r\n"]
STATUSES += [b"HTTP/1.1 100\r\n", b"HTTP/1.1 101 x\r\n"]
ANSWERS = [*BLOCKS, b"Connection: upgrade\r\nUpgrade: websocket\r\n"]


@given(
    st.lists(
        st.tuples(st.sampled_from(STATUSES), st.sampled_from(ANSWERS), st.sampled_from([b"GET", b"HEAD"])),
        max_size=30,
    )
)
def test_no_response_is_understood_by_another_one_before_it(
    responses: list[tuple[bytes, bytes, bytes]],
) -> None:
    parser = ResponseParser(100)
    for line, block, method in responses:
        results: list[object] = []
        for each in (parser, ResponseParser(100)):
            try:
                head, reusable = each.parse(line + block + b"\r\n", method)
            except WireError as error:
                results.append((type(error), str(error)))
            else:
                results.append(
                    (head.status, head.phrase, head.fields, head.body_length, head.upgrade, reusable)
                )
        assert results[0] == results[1]


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "MEMO_SIZE", 2)
    requests, responses = RequestParser(8192, 100), ResponseParser(100)
    for number in range(5):
        assert requests.parse(request(b"X: %d\r\n" % number)).fields == [(b"X", b"%d" % number)]
        head, _ = responses.parse(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % number, b"GET")
        assert head.body_length == number
        requests.parse(b"GET / HTTP/1.1\r\nX: %d\r\n%b\r\n" % (number, HOST))
        assert max(len(requests._known), len(requests._known_whole), len(responses._known)) <= 2
    long = request(b"X: " + b"y" * http1.MEMO_BLOCK + b"\r\n")
    known = len(requests._known)
    assert requests.parse(long).fields == requests.parse(long).fields
    assert len(requests._known) == known


# Responses


@pytest.mark.parametrize(
    ("raw", "status", "phrase", "length", "reusable"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", 200, b"OK", 3, True),
        (b"HTTP/1.1 200\r\nContent-Length: 3\r\n\r\n", 200, b"", 3, True),
        (b"HTTP/1.1 404 N\xc3\xb6 way\r\n\r\n", 404, b"N\xc3\xb6 way", UNTIL_CLOSE, False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 200, b"OK", CHUNKED, True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\n", 200, b"OK", 3, False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\n", 200, b"OK", 3, False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\nConnection: keep-alive\r\n\r\n", 200, b"OK", 3, True),
    ],
)
def test_status_lines_and_lengths(
    raw: bytes, status: int, phrase: bytes, length: int, reusable: bool
) -> None:
    head, again = parse_response(raw)
    assert (head.status, head.phrase, head.body_length, again) == (status, phrase, length, reusable)


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 099 x\r\n\r\n",
        b"HTTP/1.1 000 x\r\n\r\n",
        b"HTTP/1.10 200 x\r\n\r\n",
        b"HTTP/0.9 200 x\r\n\r\n",
        b"HTTP/1.1 20 x\r\n\r\n",
        b"HTTP/1.1 2000 x\r\n\r\n",
        b"HTTP/1.1  200 x\r\n\r\n",
        b"HTTP/2.0 200 x\r\n\r\n",
        b"HTTP/1.1 200 a\rb\r\n\r\n",
        b"HTTP/1.1 200 a\x00b\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        b"\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 101 + b"\r\n",
        b"HTTP/1.1 101 x\r\n\r\n",
        b"HTTP/1.1 101 x\r\nUpgrade: websocket\r\n\r\n",
        b"HTTP/1.1 101 x\r\nConnection: upgrade\r\n\r\n",
    ],
)
def test_responses_that_are_refused(raw: bytes) -> None:
    with pytest.raises(BadResponse):
        parse_response(raw)


@pytest.mark.parametrize("status", [100, 199, 299, 599, 600, 777, 999])
def test_a_status_of_three_digits_is_passed_whoever_defined_it(status: int) -> None:
    raw = b"HTTP/1.1 %d Own\r\nContent-Length: 3\r\n\r\n" % status
    head, _ = parse_response(raw)
    assert (head.status, head.body_length) == (status, 3 if status >= 200 else 0)
    assert response_bytes(head, b"") == (raw if status >= 200 else b"HTTP/1.1 %d Own\r\n\r\n" % status)


def test_hop_by_hop_fields_of_a_response_end_here() -> None:
    head, _ = parse_response(
        b"HTTP/1.1 200 OK\r\nKeep-Alive: 1\r\nConnection: X-Foo\r\nX-Foo: 1\r\nProxy-Authenticate: x\r\n"
        b"Trailer: x\r\nUpgrade: h2\r\nX-Bar: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    assert head.fields == [(b"X-Bar", b"2")]
    assert head.upgrade == b""


@pytest.mark.parametrize(("status", "kept"), [(200, True), (304, True), (204, False), (101, False)])
def test_there_is_no_content_length_where_there_can_be_no_content(status: int, kept: bool) -> None:
    fields = b"Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 3\r\nX: y\r\n"
    head, _ = parse_response(b"HTTP/1.1 %d x\r\n%b\r\n" % (status, fields))
    assert ((b"Content-Length", b"3") in head.fields) is kept
    assert (b"X", b"y") in head.fields


def test_a_response_says_what_it_switches_to() -> None:
    head, _ = parse_response(b"HTTP/1.1 101 x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
    assert (head.upgrade, head.fields) == (b"websocket", [])


@pytest.mark.parametrize("connection", [b"", b"Connection: upgrade\r\n", b"Connection: close, upgrade\r\n"])
def test_a_426_says_what_to_upgrade_to_and_nothing_else_does(connection: bytes) -> None:
    fields = b"%bUpgrade: websocket\r\nContent-Length: 0\r\n\r\n" % connection
    head, _ = parse_response(b"HTTP/1.1 426 Upgrade Required\r\n" + fields)
    assert head.fields == [
        (b"Content-Length", b"0"),
        (b"Connection", b"upgrade"),
        (b"Upgrade", b"websocket"),
    ]
    assert head.upgrade == b""
    assert response_list(426, head.fields)[1:] == [(b"content-length", b"0", True)]  # RFC 9113, 8.2.2
    head, _ = parse_response(b"HTTP/1.1 200 OK\r\n" + fields)
    assert head.fields == [(b"Content-Length", b"0")]
    head, _ = parse_response(b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 0\r\n\r\n")
    assert head.fields == [(b"Content-Length", b"0")]


def test_the_bytes_of_a_response_are_made_once() -> None:
    head = ResponseHead(200, b"OK", [(b"A", b"b")])
    assert response_bytes(head, b"Connection: close\r\n") == (
        b"HTTP/1.1 200 OK\r\nA: b\r\nConnection: close\r\n\r\n"
    )
    assert response_bytes(head, b"") == b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n"


# Field lines


PIECES = [
    b"A",
    b"b-C",
    b":",
    b": ",
    b" ",
    b"\t",
    b"\r\n",
    b"\r",
    b"\n",
    b"\x00",
    b"\x7f",
    b"\xff",
    b",",
    b'"',
    b"1",
]


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=3)), max_size=16).map(b"".join))
def test_field_lines_are_what_llhttp_takes_for_field_lines(lines: bytes) -> None:
    """The other opinion: the parser of Node.js, a new one for each head."""
    raw = request(b"X: y\r\n" + lines + b"\r\n").partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    try:
        read = Independent(raw)
    except httptools.HttpParserError:
        with pytest.raises(BadRequest):
            parse(raw)
    else:
        assert read.complete
        assert [(b"Host", b"app.example"), *parse(raw).fields] == [
            (n, v.strip(b" \t")) for n, v in read.fields
        ]


def test_a_head_without_its_empty_line_is_refused() -> None:
    for raw in (b"GET / HTTP/1.1\r\nHost: a\r\n", b"GET / HTTP/1.1\r\n"):
        with pytest.raises(BadRequest):
            parse(raw)


@pytest.mark.parametrize(
    "line",
    [
        b"X:" + b" " * 4_000_000 + b"\x01\r\n",
        b"X" * 4_000_000 + b"\r\n",
        b"X: y \r\n" * 100_000 + b"\x01\r\n",
    ],
)
def test_a_field_line_is_refused_in_linear_time(line: bytes) -> None:
    """So long that in quadratic time this test would not end today."""
    with pytest.raises(BadRequest):
        parse(request(line))
    with pytest.raises(BadResponse):
        parse_response(b"HTTP/1.1 200 OK\r\n%b\r\n" % line)


@given(st.binary(max_size=60), st.booleans())
def test_garbage_raises_nothing_but_the_given_errors(garbage: bytes, in_fields: bool) -> None:
    raw = request(garbage) if in_fields else garbage + b"\r\n\r\n"
    for attempt in (lambda: parse(raw), lambda: parse_response(raw)):
        try:
            attempt()
        except WireError:
            pass


def test_the_preface_of_http2_is_told_from_other_bad_requests() -> None:
    parser = RequestParser(8192, 100)
    with pytest.raises(Http2Preface):
        parser.parse(http1.PREFACE_HEAD)
    for other in (b"PRI * HTTP/2.0\r\nX: y\r\n\r\n", b"PRI / HTTP/2.0\r\n\r\n", b"GET * HTTP/2.0\r\n\r\n"):
        with pytest.raises(VersionRefused):
            parser.parse(other)
