"""Floods over HTTP/2: each ends in the right error with bounded memory, and others are served throughout.

The client reads while it writes as fast as it can, which an attacker would not have to: so a GOAWAY can be
seen before the connection is reset.
"""

from __future__ import annotations

import ssl
import struct
import threading
from collections.abc import Callable

import pytest

from tests.e2e.backends import Peer, RecordingBackend, echo_each
from tests.e2e.certificates import Authority, client_context
from tests.e2e.conftest import StartBackend
from tests.e2e.http2_client import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    HEADERS,
    PING,
    PRIORITY,
    PROTOCOL_ERROR,
    SETTINGS,
    Http2Client,
    fields_of,
    frame,
    rst_stream,
    window_update,
)
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.waiting import eventually, settled

MEGABYTE = 1 << 20


@pytest.fixture
def h2_tls(authority: Authority) -> ssl.SSLContext:
    """A client that offers h2 only."""
    return client_context(authority.pem, "h2")


@pytest.fixture
def backend(tls_proxy: ProxyProcess, start_backend: StartBackend, service: str) -> RecordingBackend:
    """A backend that serves the test's service."""
    started = start_backend()
    tls_proxy.serve(service, started)
    return started


def _resets(client: Http2Client, service: str) -> Callable[[int], bytes]:
    first = frame(HEADERS, END_HEADERS | END_STREAM, 1, client.block(fields_of(service, b"/reset")))
    again = client.block(fields_of(service, b"/reset"))  # all of it is in the table now

    def piece(i: int) -> bytes:
        parts = [] if i else [first, rst_stream(1)]
        for stream in range(3 + 200 * i, 3 + 200 * (i + 1), 2):
            parts.append(frame(HEADERS, END_HEADERS | END_STREAM, stream, again))
            parts.append(rst_stream(stream))
        return b"".join(parts)

    return piece


def _first_block(client: Http2Client, service: str) -> bytes:
    return client.block(fields_of(service, b"/open", method=b"POST"))


def _made_resets(client: Http2Client, service: str) -> Callable[[int], bytes]:
    """MadeYouReset: each stream is opened, then spoilt so that the server has to reset it."""
    first = _first_block(client, service)
    again = client.block(fields_of(service, b"/open", method=b"POST"))

    def piece(i: int) -> bytes:
        parts = []
        for n in range(100):
            stream = 1 + 2 * (100 * i + n)
            parts.append(frame(HEADERS, END_HEADERS, stream, again if i or n else first))
            parts.append(window_update(stream, 0))
        return b"".join(parts)

    return piece


def _on_one_stream(client: Http2Client, service: str, data: bytes) -> Callable[[int], bytes]:
    """Open stream 1, then `data` for ever."""
    first = frame(HEADERS, END_HEADERS, 1, _first_block(client, service))
    return lambda i: (data if i else first + data) * 100


Flood = Callable[[Http2Client, str], Callable[[int], bytes]]

FLOODS: dict[str, Flood] = {
    "rapid reset": _resets,
    "MadeYouReset": _made_resets,
    "PING": lambda c, s: lambda i: frame(PING, 0, 0, b"12345678") * 100,
    "SETTINGS": lambda c, s: lambda i: frame(SETTINGS, 0, 0, b"") * 100,
    "SETTINGS with values": lambda c, s: lambda i: frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65535)) * 100,
    "empty DATA": lambda c, s: _on_one_stream(c, s, frame(DATA, 0, 1, b"")),
    "WINDOW_UPDATE of the connection": lambda c, s: lambda i: window_update(0, 1) * 100,
    "PRIORITY": lambda c, s: lambda i: frame(PRIORITY, 0, 1, struct.pack(">IB", 3, 15)) * 100,
    "unknown frames": lambda c, s: lambda i: frame(0x42, 0, 0, b"") * 100,
    "empty CONTINUATION": lambda c, s: (
        lambda i: (
            (frame(HEADERS, END_STREAM, 1, b"") if i == 0 else b"") + frame(CONTINUATION, 0, 1, b"") * 100
        )
    ),
    "CONTINUATION": lambda c, s: (
        lambda i: (
            (frame(HEADERS, END_STREAM, 1, b"\x82") if i == 0 else b"")
            + frame(CONTINUATION, 0, 1, b"\x00\x01a\x7f\x80\x7e" + b"b" * 253) * 100
        )
    ),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_ends_in_enhance_your_calm_and_others_are_served(
    name: str, tls_proxy: ProxyProcess, h2_tls: ssl.SSLContext, backend: RecordingBackend, service: str
) -> None:
    address = ("127.0.0.1", tls_proxy.port)
    with Http2Client(address, h2_tls, service) as other:
        assert other.ask(fields_of(service, b"/before")).status == 200
        before = tls_proxy.memory()
        with Http2Client(address, h2_tls, service) as client:
            pieces = FLOODS[name](client, service)
            client.flood(pieces(i) for i in range(20_000))
            assert client.goaway == ENHANCE_YOUR_CALM
        assert other.ask(fields_of(service, b"/after")).body == b"GET /after "
        assert tls_proxy.memory() - before < 24 * MEGABYTE
    tls_proxy.wait_until_idle()


def test_pings_of_a_client_that_never_reads_are_bounded(
    tls_proxy: ProxyProcess, h2_tls: ssl.SSLContext, backend: RecordingBackend, service: str
) -> None:
    before = tls_proxy.memory()
    with Http2Client(("127.0.0.1", tls_proxy.port), h2_tls, service) as client:
        client.flood((frame(PING, 0, 0, b"12345678") * 100 for _ in range(2000)), reads=False)
        client.read_until_closed()
    assert tls_proxy.memory() - before < 24 * MEGABYTE
    with Http2Client(("127.0.0.1", tls_proxy.port), h2_tls, service) as client:
        assert client.ask(fields_of(service)).status == 200


def test_a_header_bomb_is_refused_with_little_memory(
    tls_proxy: ProxyProcess, h2_tls: ssl.SSLContext, backend: RecordingBackend, service: str
) -> None:
    """4 kB in the dynamic table, named 10,000 times by one byte each: 40 MB if it were unpacked."""
    before = tls_proxy.memory()
    with Http2Client(("127.0.0.1", tls_proxy.port), h2_tls, service) as client:
        value = b"b" * 4000
        bomb = b"\x40\x01a" + b"\x7f" + _varint(len(value) - 127) + value + b"\xbe" * 10_000
        stream = client.new_stream()
        block = client.block(fields_of(service)) + bomb
        client.send(frame(HEADERS, END_HEADERS | END_STREAM, stream, block))
        outcome = client.outcome(stream)
        assert outcome.status == 431 or outcome.reset is not None or outcome.goaway is not None
    assert tls_proxy.memory() - before < 24 * MEGABYTE
    assert b"a: bbbb" not in backend.received


def test_stalled_windows_hold_little_memory(
    tls_proxy: ProxyProcess,
    h2_tls: ssl.SSLContext,
    start_backend: StartBackend,
    service: str,
) -> None:
    """A hundred streams ask for 10 MB each and never open a window: the backend has to be held back."""

    def send_much(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000\r\n\r\n")
        for _ in range(1000):
            peer.send(b"x" * 10_000)

    backend = start_backend(send_much)
    tls_proxy.serve(service, backend)
    before = tls_proxy.memory()
    with Http2Client(
        ("127.0.0.1", tls_proxy.port), h2_tls, service, settings=[(4, 0)], opens_windows=False
    ) as client:
        for i in range(100):
            client.request(fields_of(service, b"/%d" % i))
        backend.wait_for_peers(100)
        settled(lambda: sum(peer.sent for peer in backend.peers))
        assert tls_proxy.memory() - before < 150 * MEGABYTE
    for peer in backend.peers:
        assert peer.closed.wait(20), "the client is gone, its backend connections are not"
    tls_proxy.wait_until_idle()


def test_an_upload_never_overruns_the_windows_that_were_given(
    tls_proxy: ProxyProcess, h2_tls: ssl.SSLContext, start_backend: StartBackend, service: str
) -> None:
    """A backend that does not read: the proxy stops giving window instead of keeping the body."""
    go_on = threading.Event()

    def read_late(peer: Peer) -> None:
        go_on.wait(60)
        echo_each(peer)

    backend = start_backend(read_late)
    tls_proxy.serve(service, backend)
    before = tls_proxy.memory()
    with Http2Client(("127.0.0.1", tls_proxy.port), h2_tls, service) as client:
        stream = client.new_stream()
        client.send(frame(HEADERS, END_HEADERS, stream, client.block(fields_of(service, method=b"POST"))))
        for _ in range(3000):  # 48 MB, whatever the window says
            client.send(frame(DATA, 0, stream, b"x" * 16_384))
            if client.closed:
                break
        outcome = client.outcome(stream)
        assert outcome.reset == 3 or outcome.goaway == 3, outcome  # FLOW_CONTROL_ERROR
        assert tls_proxy.memory() - before < 24 * MEGABYTE
    go_on.set()


def test_a_browser_that_cancels_a_page_is_no_flood(
    tls_proxy: ProxyProcess, h2_tls: ssl.SSLContext, backend: RecordingBackend, service: str
) -> None:
    with Http2Client(("127.0.0.1", tls_proxy.port), h2_tls, service) as client:
        for _ in range(3):
            streams = [client.request(fields_of(service, b"/image")) for _ in range(100)]
            client.send(b"".join(rst_stream(stream) for stream in streams))
        assert client.ask(fields_of(service, b"/page")).body == b"GET /page "


# Private


def _varint(value: int) -> bytes:
    """The rest of an HPACK integer (RFC 7541, 5.1)."""
    out = bytearray()
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    out.append(value)
    return bytes(out)


def test_thousands_of_requests_in_one_read_are_all_answered(
    tls_proxy: ProxyProcess, h2_tls: ssl.SSLContext, service: str
) -> None:
    """Nobody serves the name: every answer is there at once, and the proxy takes them in turns."""
    with Http2Client(("127.0.0.1", tls_proxy.port), h2_tls, service) as client:
        assert client.ask(fields_of(service)).status == 404
        client.send(window_update(0, 1 << 24))
        block = client.block(fields_of(service))
        streams = [client.new_stream() for _ in range(3000)]
        client.send(b"".join([frame(HEADERS, END_HEADERS | END_STREAM, stream, block) for stream in streams]))
        assert {client.outcome(stream).status for stream in streams} == {404}
        assert client.goaway is None


def test_the_access_log_says_that_the_fault_was_one_of_http2(
    tls_proxy: ProxyProcess, h2_tls: ssl.SSLContext, service: str
) -> None:
    with Http2Client(("127.0.0.1", tls_proxy.port), h2_tls, service) as client:
        client.send(frame(PING, 0, 1, bytes(8)))
        assert client.read_until_goaway() == PROTOCOL_ERROR
    with Http2Client(("127.0.0.1", tls_proxy.port), h2_tls, service, begins=False) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.read_until_goaway() == PROTOCOL_ERROR
    eventually(lambda: len(tls_proxy.access_log(sni=service)) == 2, "both are in the log")
    for line in tls_proxy.access_log(sni=service):
        assert (line["protocol"], line["reason"]) == ("HTTP/2", "http2_connection")
