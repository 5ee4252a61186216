"""Malformed HTTP/2, and what would become a second request in HTTP/1.1 if it were let through.

A malformed request ends in 400, in RST_STREAM or, where the whole connection is at fault, in GOAWAY; nothing
of it is forwarded, and other streams and connections go on. The backend speaks HTTP/1.1 and records the
exact bytes.
"""

from __future__ import annotations

import ssl
import struct
from collections.abc import Callable

import pytest

from tests.e2e.backends import RecordingBackend
from tests.e2e.certificates import Authority, client_context
from tests.e2e.conftest import StartBackend
from tests.e2e.http2_client import (
    ACK,
    COMPRESSION_ERROR,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITIZED,
    PRIORITY,
    PROTOCOL_ERROR,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    STREAM_CLOSED,
    WINDOW_UPDATE,
    Http2Client,
    Outcome,
    fields_of,
    frame,
    rst_stream,
    window_update,
)
from tests.e2e.proxy_process import ProxyProcess

Pairs = list[tuple[bytes, bytes]]
Connect = Callable[[], Http2Client]


@pytest.fixture
def h2_tls(authority: Authority) -> ssl.SSLContext:
    """A client that offers h2 only."""
    return client_context(authority.pem, "h2")


@pytest.fixture
def connect(tls_proxy: ProxyProcess, h2_tls: ssl.SSLContext, service: str) -> Connect:
    """Open an HTTP/2 connection for the test's service."""
    return lambda: Http2Client(("127.0.0.1", tls_proxy.port), h2_tls, service)


@pytest.fixture
def backend(tls_proxy: ProxyProcess, start_backend: StartBackend, service: str) -> RecordingBackend:
    """A backend that serves the test's service."""
    started = start_backend()
    tls_proxy.register(service, started.host, started.port)
    return started


def _without(pairs: Pairs, name: bytes) -> Pairs:
    return [pair for pair in pairs if pair[0] != name]


def _with(pairs: Pairs, name: bytes, value: bytes) -> Pairs:
    return [(name, value) if pair[0] == name else pair for pair in pairs]


HIDDEN = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"

#: Name -> how an ordinary request's fields are spoilt.
MALFORMED: dict[str, Callable[[Pairs], Pairs]] = {
    "CR LF in a value": lambda p: [*p, (b"a", b"b\r\nContent-Length: 0\r\n\r\n" + HIDDEN)],
    "a CR in a value": lambda p: [*p, (b"a", b"b\rc: d")],
    "a LF in a value": lambda p: [*p, (b"a", b"b\nc: d")],
    "a NUL in a value": lambda p: [*p, (b"a", b"b\x00c")],
    "a space before a value": lambda p: [*p, (b"a", b" b")],
    "a space behind a value": lambda p: [*p, (b"a", b"b ")],
    "a tab before a value": lambda p: [*p, (b"a", b"\tb")],
    "CR LF in a name": lambda p: [*p, (b"a: b\r\nc", b"d")],
    "a LF in a name": lambda p: [*p, (b"a\nb", b"c")],
    "a NUL in a name": lambda p: [*p, (b"a\x00", b"b")],
    "a space in a name": lambda p: [*p, (b"a b", b"c")],
    "a colon in a name": lambda p: [*p, (b"a:b", b"c")],
    "Transfer-Encoding behind a colon in a name": lambda p: [*p, (b"transfer-encoding: chunked\r\na", b"b")],
    "an empty name": lambda p: [*p, (b"", b"b")],
    "a name in capitals": lambda p: [*p, (b"Abc", b"b")],
    "a name with a DEL": lambda p: [*p, (b"a\x7f", b"b")],
    "a name that is not ASCII": lambda p: [*p, (b"\xc3\xa9", b"b")],
    "CR LF in the path": lambda p: _with(p, b":path", b"/ HTTP/1.1\r\nHost: x\r\n\r\n" + HIDDEN),
    "a LF in the path": lambda p: _with(p, b":path", b"/a\nb"),
    "a NUL in the path": lambda p: _with(p, b":path", b"/a\x00b"),
    "a space in the path": lambda p: _with(p, b":path", b"/ HTTP/1.1"),
    "a tab in the path": lambda p: _with(p, b":path", b"/\tHTTP/1.1"),
    "a non-ASCII path": lambda p: _with(p, b":path", b"/\xc3\xa9"),
    "a fragment": lambda p: _with(p, b":path", b"/a#b"),
    "an empty path": lambda p: _with(p, b":path", b""),
    "a path without its slash": lambda p: _with(p, b":path", b"a/b"),
    "a URL for a path": lambda p: _with(p, b":path", b"http://other.e2e.test/"),
    "an asterisk for GET": lambda p: _with(p, b":path", b"*"),
    "CR LF in the method": lambda p: _with(p, b":method", b"GET /smuggled HTTP/1.1\r\nA: b\r\n\r\nGET"),
    "a space in the method": lambda p: _with(p, b":method", b"GET /smuggled"),
    "a LF in the method": lambda p: _with(p, b":method", b"GET\n"),
    "an empty method": lambda p: _with(p, b":method", b""),
    "CR LF in the authority": lambda p: _with(p, b":authority", p[2][1] + b"\r\nA: b"),
    "a space in the authority": lambda p: _with(p, b":authority", p[2][1] + b" x"),
    "a path in the authority": lambda p: _with(p, b":authority", p[2][1] + b"/x"),
    "a NUL in the authority": lambda p: _with(p, b":authority", p[2][1] + b"\x00"),
    "user information": lambda p: _with(p, b":authority", b"user@" + p[2][1]),
    "an empty authority": lambda p: _with(p, b":authority", b""),
    "CR LF in the scheme": lambda p: _with(p, b":scheme", b"https\r\nA: b"),
    "an empty scheme": lambda p: _with(p, b":scheme", b""),
    "no method": lambda p: _without(p, b":method"),
    "no path": lambda p: _without(p, b":path"),
    "no scheme": lambda p: _without(p, b":scheme"),
    "neither authority nor Host": lambda p: _without(p, b":authority"),
    "two methods": lambda p: [(b":method", b"GET"), *p],
    "two paths": lambda p: [(b":path", b"/smuggled"), *p],
    "two schemes": lambda p: [(b":scheme", b"https"), *p],
    "two authorities": lambda p: [(b":authority", b"x"), *p],
    "an unknown pseudo-header": lambda p: [(b":x", b"y"), *p],
    "a status in a request": lambda p: [(b":status", b"200"), *p],
    "a pseudo-header behind a field": lambda p: [*p[:3], (b"a", b"b"), *p[3:]],
    "Connection": lambda p: [*p, (b"connection", b"keep-alive")],
    "Connection: close": lambda p: [*p, (b"connection", b"close")],
    "Keep-Alive": lambda p: [*p, (b"keep-alive", b"timeout=5")],
    "Proxy-Connection": lambda p: [*p, (b"proxy-connection", b"keep-alive")],
    "Upgrade": lambda p: [*p, (b"upgrade", b"websocket")],
    "Transfer-Encoding: chunked": lambda p: [*p, (b"transfer-encoding", b"chunked")],
    "Transfer-Encoding: identity": lambda p: [*p, (b"transfer-encoding", b"identity")],
    "TE other than trailers": lambda p: [*p, (b"te", b"gzip")],
    "Host that does not agree": lambda p: [*p, (b"host", b"other.e2e.test")],
    "two Hosts": lambda p: [*_without(p, b":authority"), (b"host", p[2][1]), (b"host", p[2][1])],
    "two Content-Lengths": lambda p: [*p, (b"content-length", b"0"), (b"content-length", b"1")],
    "a Content-Length with a sign": lambda p: [*p, (b"content-length", b"+0")],
    "a negative Content-Length": lambda p: [*p, (b"content-length", b"-1")],
    "an empty Content-Length": lambda p: [*p, (b"content-length", b"")],
    "a list for Content-Length": lambda p: [*p, (b"content-length", b"0, 0")],
    "a Content-Length without DATA": lambda p: [*p, (b"content-length", b"5")],
}


def _is_refused(outcome: Outcome) -> bool:
    """400 or a stream error, which is what RFC 9113, 8.1.1 asks for; the connection goes on."""
    return outcome.goaway is None and (outcome.status == 400 or outcome.reset == PROTOCOL_ERROR)


def _still_serves(client: Http2Client, service: str) -> None:
    assert client.ask(fields_of(service, b"/same")).body == b"GET /same "


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_ends_its_own_stream_only(
    name: str, connect: Connect, backend: RecordingBackend, service: str
) -> None:
    with connect() as client:
        outcome = client.ask(MALFORMED[name](fields_of(service, b"/bad")))
        assert _is_refused(outcome), outcome
        _still_serves(client, service)
    assert [request.path for request in backend.requests] == [b"/same"]
    assert backend.received == backend.requests[0].raw


@pytest.mark.parametrize(
    ("length", "pieces"),
    [
        (b"5", [b"hell"]),
        (b"5", [b"hello!"]),
        (b"5", [b"hello", HIDDEN]),
        (b"0", [b"x"]),
        (b"0", [HIDDEN]),
        (b"5", [b""]),
    ],
)
def test_content_length_has_to_agree_with_the_data(
    length: bytes, pieces: list[bytes], connect: Connect, backend: RecordingBackend, service: str
) -> None:
    with connect() as client:
        stream = client.new_stream()
        fields = fields_of(service, b"/bad", (b"content-length", length), method=b"POST")
        data = frame(HEADERS, END_HEADERS, stream, client.block(fields))
        for i, piece in enumerate(pieces):
            data += frame(DATA, END_STREAM if i == len(pieces) - 1 else 0, stream, piece)
        client.send(data)
        assert _is_refused(client.outcome(stream))
        _still_serves(client, service)
    assert [request.path for request in backend.requests] == [b"/same"]
    assert HIDDEN not in backend.received
    for peer in backend.peers:
        assert peer.requests or not peer.received or peer.closed.wait(10)


GOOD: dict[str, tuple[Callable[[Pairs], Pairs], bytes | None, bytes]] = {
    "a GET": (lambda p: p, None, b"GET / "),
    "a POST": (lambda p: _with(p, b":method", b"POST"), b"hello", b"POST / hello"),
    "a body that looks like a request": (
        lambda p: _with(p, b":method", b"POST"),
        HIDDEN,
        b"POST / " + HIDDEN,
    ),
    "an agreeing Content-Length": (
        lambda p: [*_with(p, b":method", b"PUT"), (b"content-length", b"5")],
        b"hello",
        b"PUT / hello",
    ),
    "Host without an authority": (
        lambda p: [*_without(p, b":authority"), (b"host", p[2][1])],
        None,
        b"GET / ",
    ),
    "Host beside the same authority": (lambda p: [*p, (b"host", p[2][1])], None, b"GET / "),
    "TE: trailers": (lambda p: [*p, (b"te", b"trailers")], None, b"GET / "),
    "OPTIONS *": (
        lambda p: _with(_with(p, b":method", b"OPTIONS"), b":path", b"*"),
        None,
        b"OPTIONS * ",
    ),
    "an empty body": (lambda p: _with(p, b":method", b"POST"), b"", b"POST / "),
    "a value with obsolete bytes": (lambda p: [*p, (b"a", b"\xe9\xff")], None, b"GET / "),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_request_reaches_the_backend_exactly_once(
    name: str, connect: Connect, backend: RecordingBackend, service: str
) -> None:
    change, body, answer = GOOD[name]
    with connect() as client:
        outcome = client.ask(change(fields_of(service)), body)
        assert (outcome.status, outcome.body, outcome.reset) == (200, answer, None)
        _still_serves(client, service)
    (first, _) = backend.requests
    assert backend.received == b"".join(request.raw for request in backend.requests)
    assert first.values(b"host") == [service.encode()]
    assert first.values(b"x-forwarded-proto") == [b"https"]
    # TE is a field of one hop: in HTTP/1.1 Connection has to name it (RFC 9110, 10.1.4).
    assert first.values(b"connection") == ([b"TE"] if first.values(b"te") else [])


def test_crumbs_of_cookies_are_joined(connect: Connect, backend: RecordingBackend, service: str) -> None:
    with connect() as client:
        client.ask(fields_of(service, b"/", (b"cookie", b"a=1"), (b"x", b"y"), (b"cookie", b"b=2")))
    assert backend.requests[0].values(b"cookie") == [b"a=1; b=2"]


def test_trailers_are_never_merged(connect: Connect, backend: RecordingBackend, service: str) -> None:
    with connect() as client:
        stream = client.new_stream()
        head = client.block(fields_of(service, method=b"POST"))
        trailers = client.block([(b"x-sum", b"1"), (b"host", b"x"), (b"content-length", b"99")])
        client.send(
            frame(HEADERS, END_HEADERS, stream, head)
            + frame(DATA, 0, stream, b"hello")
            + frame(HEADERS, END_HEADERS | END_STREAM, stream, trailers)
        )
        outcome = client.outcome(stream)
        assert _is_refused(outcome) or outcome.body == b"POST / hello"
        _still_serves(client, service)
    for request in backend.requests:
        assert not request.values(b"x-sum")
        assert request.values(b"host") == [service.encode()]
        assert all(name == b"x-sum" for name, _ in request.trailers)


@pytest.mark.parametrize(
    "trailers",
    [
        [(b":path", b"/x")],
        [(b":status", b"200")],
        [(b"A", b"b")],
        [(b"a", b"b\r\nc: d")],
        [(b"connection", b"x")],
    ],
    ids=["a pseudo-header", "a status", "capitals", "CR LF", "Connection"],
)
def test_malformed_trailers_never_complete_a_request(
    trailers: Pairs, connect: Connect, backend: RecordingBackend, service: str
) -> None:
    with connect() as client:
        stream = client.new_stream()
        head = client.block(fields_of(service, b"/bad", method=b"POST"))
        client.send(
            frame(HEADERS, END_HEADERS, stream, head)
            + frame(DATA, 0, stream, b"hello")
            + frame(HEADERS, END_HEADERS | END_STREAM, stream, client.block(trailers))
        )
        assert _is_refused(client.outcome(stream))
        _still_serves(client, service)
    assert [request.path for request in backend.requests] == [b"/same"]


def test_trailers_without_end_stream_never_complete_a_request(
    connect: Connect, backend: RecordingBackend, service: str
) -> None:
    with connect() as client:
        stream = client.new_stream()
        client.send(
            frame(HEADERS, END_HEADERS, stream, client.block(fields_of(service, b"/bad", method=b"POST")))
            + frame(HEADERS, END_HEADERS, stream, client.block([(b"a", b"b")]))
        )
        outcome = client.outcome(stream)
        assert _is_refused(outcome) or outcome.goaway == PROTOCOL_ERROR
    assert not backend.requests


#: Name -> the bytes that break the connection, and the codes of GOAWAY that fit.
BROKEN: dict[str, tuple[bytes, set[int]]] = {
    "DATA on stream 0": (frame(DATA, 0, 0, b"x"), {PROTOCOL_ERROR}),
    "HEADERS on stream 0": (frame(HEADERS, END_HEADERS | END_STREAM, 0, b"\x82"), {PROTOCOL_ERROR}),
    "HEADERS on an even stream": (frame(HEADERS, END_HEADERS | END_STREAM, 2, b"\x82"), {PROTOCOL_ERROR}),
    "DATA on an idle stream": (frame(DATA, 0, 1, b"x"), {PROTOCOL_ERROR, STREAM_CLOSED}),
    "RST_STREAM on an idle stream": (rst_stream(1), {PROTOCOL_ERROR}),
    "RST_STREAM on stream 0": (rst_stream(0), {PROTOCOL_ERROR}),
    "RST_STREAM of three bytes": (frame(RST_STREAM, 0, 1, b"abc"), {FRAME_SIZE_ERROR, PROTOCOL_ERROR}),
    "WINDOW_UPDATE on an idle stream": (window_update(1, 1), {PROTOCOL_ERROR}),
    "WINDOW_UPDATE of zero": (window_update(0, 0), {PROTOCOL_ERROR}),
    "WINDOW_UPDATE of three bytes": (frame(WINDOW_UPDATE, 0, 0, b"abc"), {FRAME_SIZE_ERROR}),
    "a window over 2^31-1": (window_update(0, 2**31 - 1), {FLOW_CONTROL_ERROR}),
    "PING of seven bytes": (frame(PING, 0, 0, b"1234567"), {FRAME_SIZE_ERROR}),
    "PING on a stream": (frame(PING, 0, 1, b"12345678"), {PROTOCOL_ERROR}),
    "SETTINGS of five bytes": (frame(SETTINGS, 0, 0, b"12345"), {FRAME_SIZE_ERROR}),
    "SETTINGS on a stream": (frame(SETTINGS, 0, 1, b""), {PROTOCOL_ERROR}),
    "SETTINGS ACK with a payload": (frame(SETTINGS, ACK, 0, b"123456"), {FRAME_SIZE_ERROR}),
    "ENABLE_PUSH of 2": (frame(SETTINGS, 0, 0, struct.pack(">HI", 2, 2)), {PROTOCOL_ERROR}),
    "INITIAL_WINDOW_SIZE of 2^31": (
        frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 2**31)),
        {FLOW_CONTROL_ERROR},
    ),
    "MAX_FRAME_SIZE of 1": (frame(SETTINGS, 0, 0, struct.pack(">HI", 5, 1)), {PROTOCOL_ERROR}),
    "a frame over 16 KiB": (frame(DATA, 0, 1, b"x" * 16385), {FRAME_SIZE_ERROR}),
    "PUSH_PROMISE": (frame(PUSH_PROMISE, END_HEADERS, 1, b"\x00\x00\x00\x02\x82"), {PROTOCOL_ERROR}),
    "CONTINUATION out of nowhere": (frame(CONTINUATION, END_HEADERS, 1, b"\x82"), {PROTOCOL_ERROR}),
    "another frame inside a header block": (
        frame(HEADERS, END_STREAM, 1, b"\x82") + frame(PING, 0, 0, b"12345678"),
        {PROTOCOL_ERROR},
    ),
    "an unknown frame inside a header block": (
        frame(HEADERS, END_STREAM, 1, b"\x82") + frame(0x42, 0, 1, b""),
        {PROTOCOL_ERROR},
    ),
    "CONTINUATION of another stream": (
        frame(HEADERS, END_STREAM, 1, b"\x82") + frame(CONTINUATION, END_HEADERS, 3, b"\x84"),
        {PROTOCOL_ERROR},
    ),
    "HPACK with an index that is not there": (
        frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\xff\xff\xff\x0f"),
        {COMPRESSION_ERROR},
    ),
    "HPACK that ends too early": (
        frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\x40\x7f"),
        {COMPRESSION_ERROR},
    ),
    "HPACK with a table over its limit": (
        frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\x3f\xff\xff\x7f\x82"),
        {COMPRESSION_ERROR},
    ),
    "more padding than payload": (
        frame(HEADERS, END_HEADERS | END_STREAM | PADDED, 1, b"\x09\x82"),
        {PROTOCOL_ERROR},
    ),
    "an empty padded frame": (
        frame(HEADERS, END_HEADERS | END_STREAM | PADDED, 1, b""),
        {FRAME_SIZE_ERROR, PROTOCOL_ERROR},
    ),
    "HTTP/1.1 instead of frames": (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 700,
        {FRAME_SIZE_ERROR, PROTOCOL_ERROR},
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_connection_ends_with_the_right_goaway(
    name: str, connect: Connect, backend: RecordingBackend, service: str
) -> None:
    data, codes = BROKEN[name]
    with connect() as client:
        client.send(data)
        assert client.read_until_goaway() in codes
        client.read_until_closed()
    with connect() as client:
        _still_serves(client, service)
    assert [request.path for request in backend.requests] == [b"/same"]


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n",
        PREFACE + frame(PING, 0, 0, b"12345678"),
    ],
    ids=["HTTP/1.1", "a wrong preface", "no SETTINGS behind the preface"],
)
def test_a_preface_that_is_none_ends_the_connection(
    data: bytes, tls_proxy: ProxyProcess, h2_tls: ssl.SSLContext, service: str
) -> None:
    with Http2Client(("127.0.0.1", tls_proxy.port), h2_tls, service, begins=False) as client:
        client.send(data + b"\x00" * 64)
        assert client.read_until_goaway() in (PROTOCOL_ERROR, None)
        client.read_until_closed()
        assert not client.answers or set(client.answers) == {0}


def test_a_closed_stream_takes_no_second_request(
    connect: Connect, backend: RecordingBackend, service: str
) -> None:
    with connect() as client:
        stream = client.request(fields_of(service, b"/first"))
        assert client.outcome(stream).status == 200
        block = client.block(fields_of(service, b"/smuggled"))
        client.send(frame(HEADERS, END_HEADERS | END_STREAM, stream, block))
        assert client.read_until_goaway() in (STREAM_CLOSED, PROTOCOL_ERROR)
    assert [request.path for request in backend.requests] == [b"/first"]


def test_data_behind_the_end_of_a_request_is_never_forwarded(
    connect: Connect, backend: RecordingBackend, service: str
) -> None:
    with connect() as client:
        stream = client.request(fields_of(service, b"/first", method=b"POST"), b"hello")
        client.send(frame(DATA, END_STREAM, stream, HIDDEN))
        client.outcome(stream)
    with connect() as client:
        _still_serves(client, service)
    assert b"/smuggled" not in backend.received
    assert all(request.path in (b"/first", b"/same") for request in backend.requests)


def test_a_connection_that_only_ignorable_frames_visit_goes_on(
    connect: Connect, backend: RecordingBackend, service: str
) -> None:
    with connect() as client:
        client.send(
            frame(PRIORITY, 0, 1, struct.pack(">IB", 3, 15))
            + frame(0x42, 0xFF, 0, b"whatever")
            + frame(SETTINGS, 0, 0, struct.pack(">HI", 0x4242, 7))
            + frame(PING, 0, 0, b"12345678")
        )
        _still_serves(client, service)
        assert client.pongs == [b"12345678"]


def test_padding_priority_and_continuation_change_nothing(
    connect: Connect, backend: RecordingBackend, service: str
) -> None:
    with connect() as client:
        stream = client.new_stream()
        block = client.block(fields_of(service, b"/odd", (b"a", b"b" * 100), method=b"POST"))
        first = b"\x03" + struct.pack(">IB", 0, 15) + block[:10] + b"\x00" * 3
        client.send(
            frame(HEADERS, PADDED | PRIORITIZED, stream, first)
            + frame(CONTINUATION, 0, stream, block[10:20])
            + frame(CONTINUATION, 0, stream, b"")
            + frame(CONTINUATION, END_HEADERS, stream, block[20:])
            + frame(DATA, PADDED, stream, b"\x02hel\x00\x00")
            + frame(DATA, PADDED | END_STREAM, stream, b"\x00lo")
        )
        assert client.outcome(stream).body == b"POST /odd hello"
    assert backend.received == backend.requests[0].raw


def test_a_request_is_the_same_when_every_byte_comes_alone(
    connect: Connect, backend: RecordingBackend, service: str
) -> None:
    with connect() as client:
        stream = client.new_stream()
        data = frame(
            HEADERS, END_HEADERS, stream, client.block(fields_of(service, b"/slow", method=b"POST"))
        ) + frame(DATA, END_STREAM, stream, b"hello")
        for i in range(len(data)):
            client.send(data[i : i + 1])
        assert client.outcome(stream).body == b"POST /slow hello"


def test_a_header_list_over_the_limit_is_a_431_and_the_connection_goes_on(
    connect: Connect, backend: RecordingBackend, service: str
) -> None:
    with connect() as client:
        stream = client.new_stream()
        block = client.block(fields_of(service, b"/", *((b"a%d" % i, b"b" * 500) for i in range(80))))
        data = frame(HEADERS, END_STREAM, stream, block[:16000])
        for start in range(16000, len(block), 16000):
            data += frame(CONTINUATION, 0, stream, block[start : start + 16000])
        client.send(data + frame(CONTINUATION, END_HEADERS, stream, b""))
        outcome = client.outcome(stream)
        assert outcome.status == 431 or outcome.reset is not None
        _still_serves(client, service)
    assert [request.path for request in backend.requests] == [b"/same"]


def test_connect_is_refused(connect: Connect, backend: RecordingBackend, service: str) -> None:
    with connect() as client:
        outcome = client.ask([(b":method", b"CONNECT"), (b":authority", service.encode() + b":443")])
        assert outcome.status in (400, 405, 501) or outcome.reset is not None
        _still_serves(client, service)
    assert [request.path for request in backend.requests] == [b"/same"]


def test_more_streams_than_the_limit_are_refused_and_the_others_go_on(
    connect: Connect, backend: RecordingBackend, service: str
) -> None:
    with connect() as client:
        streams = []
        for _ in range(128):  # open, and without their end
            stream = client.new_stream()
            head = client.block(fields_of(service, b"/%d" % stream, method=b"POST"))
            client.send(frame(HEADERS, END_HEADERS, stream, head))
            streams.append(stream)
        over = client.request(fields_of(service, b"/over"))
        outcome = client.outcome(over)
        assert outcome.reset == 7, outcome  # REFUSED_STREAM
        client.send(b"".join(frame(DATA, END_STREAM, stream, b"x") for stream in streams))
        for stream in streams:
            assert client.outcome(stream).body == b"POST /%d x" % stream
    assert b"/over" not in {request.path for request in backend.requests}
