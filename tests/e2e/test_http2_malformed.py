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
from tests.e2e.http2_cases import BROKEN, GOOD, HIDDEN, MALFORMED, Pairs
from tests.e2e.http2_client import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITIZED,
    PRIORITY,
    PROTOCOL_ERROR,
    SETTINGS,
    STREAM_CLOSED,
    Http2Client,
    Outcome,
    fields_of,
    frame,
)
from tests.e2e.proxy_process import ProxyProcess

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
    tls_proxy.serve(service, started)
    return started


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
        assert peer.requests or not peer.received or peer.closed.wait(30)


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
