"""Peers that die, vanish, stall or dawdle: nothing leaks, nothing is kept in memory, nobody else notices."""

from __future__ import annotations

import hashlib
import socket
import ssl
import threading
from collections.abc import Callable

import pytest

from tests.e2e.backends import Peer, RecordingBackend, Script, echo_each, in_turn, ok
from tests.e2e.certificates import Authority, client_context
from tests.e2e.conftest import StartBackend, StartProxy
from tests.e2e.http1_client import Http1Client, get
from tests.e2e.http2_client import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    Http2Client,
    fields_of,
    frame,
    rst_stream,
)
from tests.e2e.messages import Truncated
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.waiting import eventually, settled

MEGABYTE = 1 << 20
PIECE = bytes(range(256)) * 4096  # one MiB
PIECES = 100

ConnectTls = Callable[[str], Http1Client]


def _join(proxy: ProxyProcess, backend: RecordingBackend, service: str) -> None:
    proxy.register(service, backend.host, backend.port)


def _nothing_in_flight(proxy: ProxyProcess) -> None:
    eventually(lambda: proxy.metric("portero_requests_in_flight") == 0, "no exchange in flight")


def _send_much(peer: Peer) -> None:
    """Answer the first request with 100 MiB."""
    peer.read_request()
    peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (PIECES * len(PIECE)))
    for _ in range(PIECES):
        peer.send(PIECE)
    echo_each(peer)


def _read_much(gate: threading.Event, digest: list[str]) -> Script:
    """Wait for the gate, then read a request and note its body's SHA-256."""

    def script(peer: Peer) -> None:
        gate.wait(60)
        request = peer.read_request()
        digest.append(hashlib.sha256(request.body).hexdigest())
        peer.send(ok(b"read"))
        peer.wait_closed()

    return script


def _digest_of_all() -> str:
    hashed = hashlib.sha256()
    for _ in range(PIECES):
        hashed.update(PIECE)
    return hashed.hexdigest()


# Backends that die


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_backend_that_dies_in_its_body_cuts_the_response_off(
    how: str, framing: str, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    streamed = threading.Event()

    def die(peer: Peer) -> None:
        peer.read_request()
        if framing == "length":
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 500)
        else:
            peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1f4\r\n" + b"x" * 500 + b"\r\n")
        streamed.wait(20)
        if how == "reset":
            peer.reset()

    backend = start_backend(in_turn(die, echo_each))
    _join(plain_proxy, backend, service)
    with plain_proxy.connect() as client:
        client.send(get(service))
        got = b""
        while got.count(b"x") < 500:
            data = client.read_some()
            assert data, got
            got += data
        streamed.set()
        rest = client.read_all()
        assert b"0\r\n\r\n" not in rest
        assert b"HTTP/" not in rest
    with plain_proxy.connect() as client:
        assert client.ask(get(service, "/next")).body == b"GET /next "
    _nothing_in_flight(plain_proxy)


def test_a_backend_that_dies_in_its_body_resets_the_stream_over_http2(
    tls_proxy: ProxyProcess, start_backend: StartBackend, authority: Authority, service: str
) -> None:
    def die(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhello")

    _join(tls_proxy, start_backend(in_turn(die, echo_each)), service)
    tls = client_context(authority.pem, "h2")
    with Http2Client(("127.0.0.1", tls_proxy.port), tls, service) as client:
        outcome = client.ask(fields_of(service))
        assert outcome.reset is not None or outcome.status == 502
        assert client.ask(fields_of(service, b"/next")).body == b"GET /next "


def test_a_backend_that_dies_during_an_upload_is_a_502(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    def die(peer: Peer) -> None:
        peer.read_head()
        peer.reset()

    backend = start_backend(in_turn(die, echo_each))
    _join(plain_proxy, backend, service)
    with plain_proxy.connect() as client:
        client.send(get(service, "/", "Content-Length: 1000000", method="POST") + b"x" * 1000)
        assert client.read_response().status == 502
    assert len(backend.peers) == 1, "an upload was sent again"
    _nothing_in_flight(plain_proxy)


# Clients that vanish


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_vanishes_during_its_upload_ends_the_backends_connection(
    how: str, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    _join(plain_proxy, backend, service)
    client = plain_proxy.connect()
    client.send(get(service, "/", "Content-Length: 1000000", method="POST") + b"x" * 1000)
    eventually(lambda: b"xxx" in backend.received, "the upload is streamed")
    (client.close if how == "close" else client.reset)()
    assert backend.peers[0].closed.wait(10)
    assert not backend.requests
    _nothing_in_flight(plain_proxy)


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_vanishes_during_its_download_ends_the_backends_connection(
    how: str, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend(_send_much)
    _join(plain_proxy, backend, service)
    client = plain_proxy.connect()
    client.send(get(service))
    assert client.read_some()
    (client.close if how == "close" else client.reset)()
    assert backend.peers[0].closed.wait(10)
    assert backend.peers[0].sent < PIECES * len(PIECE)
    _nothing_in_flight(plain_proxy)


def test_a_client_that_vanishes_while_it_waits_ends_the_backends_connection(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend(lambda peer: peer.wait_closed())
    _join(plain_proxy, backend, service)
    client = plain_proxy.connect()
    client.send(get(service))
    eventually(lambda: backend.received, "the request is at the backend")
    client.reset()
    assert backend.peers[0].closed.wait(10)
    _nothing_in_flight(plain_proxy)


def test_a_stream_that_is_cancelled_ends_the_backends_connection(
    tls_proxy: ProxyProcess, start_backend: StartBackend, authority: Authority, service: str
) -> None:
    backend = start_backend(in_turn(lambda peer: peer.wait_closed(), echo_each))
    _join(tls_proxy, backend, service)
    tls = client_context(authority.pem, "h2")
    with Http2Client(("127.0.0.1", tls_proxy.port), tls, service) as client:
        stream = client.request(fields_of(service, b"/cancelled"))
        eventually(lambda: backend.received, "the request is at the backend")
        client.send(rst_stream(stream))
        assert backend.peers[0].closed.wait(10)
        assert client.ask(fields_of(service, b"/next")).body == b"GET /next "
    _nothing_in_flight(tls_proxy)


def test_a_tls_client_that_vanishes_without_a_word_leaves_nothing(
    tls_proxy: ProxyProcess, start_backend: StartBackend, connect_tls: ConnectTls, service: str
) -> None:
    backend = start_backend(in_turn(*[lambda peer: peer.wait_closed()] * 10, echo_each))
    _join(tls_proxy, backend, service)
    for i in range(10):
        client = connect_tls(service)
        client.send(get(service, f"/{i}"))
        eventually(lambda count=i: len(backend.peers) > count, "the request is at the backend")  # type: ignore[misc]
        if i % 2:
            client.reset()
        else:
            client.socket.close()
    for peer in backend.peers:
        assert peer.closed.wait(10)
    _nothing_in_flight(tls_proxy)


@pytest.mark.parametrize(
    "sent", [b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello"]
)
def test_clients_that_break_off_the_handshake_leave_nothing(
    sent: bytes, tls_proxy: ProxyProcess, start_backend: StartBackend, connect_tls: ConnectTls, service: str
) -> None:
    _join(tls_proxy, start_backend(), service)
    before = tls_proxy.open_files()
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", tls_proxy.port)) as raw:
            raw.sendall(sent)
    with connect_tls(service) as client:
        assert client.ask(get(service)).status == 200
    eventually(lambda: tls_proxy.open_files() <= before + 4, "the descriptors are given back")


def test_a_client_that_closes_its_writing_side_still_gets_its_answer(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    """`printf ... | nc -N`: half-closed behind a complete request."""
    go_on = threading.Event()

    def answer_late(peer: Peer) -> None:
        request = peer.read_request()
        go_on.wait(10)
        peer.send(ok(b"late", request))
        peer.wait_closed()

    backend = start_backend(answer_late)
    _join(plain_proxy, backend, service)
    with plain_proxy.connect() as client:
        client.send(get(service))
        client.shut()
        eventually(lambda: backend.requests, "the request is at the backend")
        go_on.set()
        assert client.read_response().body == b"late"
        assert client.read_all() == b""


def test_pipelined_requests_of_a_half_closed_client_are_all_answered(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    _join(plain_proxy, start_backend(), service)
    with plain_proxy.connect() as client:
        client.send(get(service, "/1") + get(service, "/2") + get(service, "/3"))
        client.shut()
        assert [client.read_response().body for _ in range(3)] == [b"GET /1 ", b"GET /2 ", b"GET /3 "]
        assert client.read_all() == b""


def test_a_backend_that_closes_its_writing_side_early_still_ends_in_order(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    def half_close(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
        peer.shut()
        peer.wait_closed()

    backend = start_backend(half_close)
    _join(plain_proxy, backend, service)
    with plain_proxy.connect() as client:
        for _ in range(3):
            assert client.ask(get(service)).body == b"hello"


# Slow ones


def test_memory_stays_flat_while_a_client_does_not_read(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend(_send_much)
    _join(plain_proxy, backend, service)
    before = plain_proxy.memory()
    with plain_proxy.connect() as client:
        client.send(get(service))
        backend.wait_for_peers()
        sent = settled(lambda: backend.peers[0].sent)
        assert sent < PIECES * len(PIECE), "nothing held the backend back"
        assert plain_proxy.memory() - before < 16 * MEGABYTE
        response = client.read_response()
        assert hashlib.sha256(response.body).hexdigest() == _digest_of_all()
        assert client.ask(get(service, "/same")).body == b"GET /same "
    assert plain_proxy.memory() - before < 32 * MEGABYTE


def test_memory_stays_flat_while_a_tls_client_does_not_read(
    tls_proxy: ProxyProcess, start_backend: StartBackend, connect_tls: ConnectTls, service: str
) -> None:
    backend = start_backend(_send_much)
    _join(tls_proxy, backend, service)
    before = tls_proxy.memory()
    with connect_tls(service) as client:
        client.send(get(service))
        backend.wait_for_peers()
        assert settled(lambda: backend.peers[0].sent) < PIECES * len(PIECE)
        assert tls_proxy.memory() - before < 16 * MEGABYTE
        assert hashlib.sha256(client.read_response().body).hexdigest() == _digest_of_all()


def test_memory_stays_flat_while_an_http2_client_gives_no_window(
    tls_proxy: ProxyProcess, start_backend: StartBackend, authority: Authority, service: str
) -> None:
    backend = start_backend(in_turn(_send_much, echo_each))
    _join(tls_proxy, backend, service)
    before = tls_proxy.memory()
    tls = client_context(authority.pem, "h2")
    with Http2Client(("127.0.0.1", tls_proxy.port), tls, service) as client:
        stream = client.request(fields_of(service))
        backend.wait_for_peers()
        assert settled(lambda: backend.peers[0].sent) < PIECES * len(PIECE)
        assert tls_proxy.memory() - before < 16 * MEGABYTE
        assert client.ask(fields_of(service, b"/other")).body == b"GET /other ", "others wait behind it"
        body = client.outcome(stream).body
        assert hashlib.sha256(body).hexdigest() == _digest_of_all()


@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_memory_stays_flat_while_a_backend_does_not_read(
    framing: str, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    gate, digest = threading.Event(), list[str]()
    backend = start_backend(_read_much(gate, digest))
    _join(plain_proxy, backend, service)
    before = plain_proxy.memory()
    sent = [0]
    with plain_proxy.connect() as client:
        client.socket.settimeout(60)
        if framing == "length":
            client.send(get(service, "/", f"Content-Length: {PIECES * len(PIECE)}", method="POST"))
        else:
            client.send(get(service, "/", "Transfer-Encoding: chunked", method="POST"))

        def upload() -> None:
            for _ in range(PIECES):
                if framing == "length":
                    client.send(PIECE)
                else:
                    client.send(b"%x\r\n%b\r\n" % (len(PIECE), PIECE))
                sent[0] += 1
            if framing == "chunks":
                client.send(b"0\r\n\r\n")

        thread = threading.Thread(target=upload, daemon=True)
        thread.start()
        try:
            backend.wait_for_peers()
            assert settled(lambda: sent[0]) < PIECES, "nothing held the client back"
            assert plain_proxy.memory() - before < 16 * MEGABYTE
        finally:
            gate.set()
        assert client.read_response().status == 200
        thread.join(60)
    assert digest == [_digest_of_all()]
    assert plain_proxy.memory() - before < 32 * MEGABYTE


def test_an_http2_upload_waits_for_a_slow_backend_within_its_window(
    tls_proxy: ProxyProcess, start_backend: StartBackend, authority: Authority, service: str
) -> None:
    gate = threading.Event()

    def read_late(peer: Peer) -> None:
        gate.wait(60)
        echo_each(peer)

    backend = start_backend(in_turn(read_late, echo_each))
    _join(tls_proxy, backend, service)
    tls = client_context(authority.pem, "h2")
    with Http2Client(("127.0.0.1", tls_proxy.port), tls, service) as client:
        stream = client.new_stream()
        client.send(frame(HEADERS, END_HEADERS, stream, client.block(fields_of(service, method=b"POST"))))
        for _ in range(3):  # 48 kB: inside the smallest window that RFC 9113 starts with
            client.send(frame(DATA, 0, stream, b"x" * 16_000))
        assert client.ask(fields_of(service, b"/other")).body == b"GET /other ", "others wait behind it"
        gate.set()
        client.send(frame(DATA, END_STREAM, stream, b"end"))
        assert client.outcome(stream).body == b"POST / " + b"x" * 48_000 + b"end"


def test_slow_heads_are_given_up(start_proxy: StartProxy, start_backend: StartBackend, service: str) -> None:
    """slowloris: a byte now and then does not buy time."""
    proxy = start_proxy(toml="[timeouts]\nhead = 1.5\ndrain = 1\nshutdown = 1\n")
    _join(proxy, start_backend(), service)
    clients = [proxy.connect() for _ in range(50)]
    try:
        for client in clients:
            client.send(get(service)[:-2])
        for client in clients:
            client.send(b"X")
        with proxy.connect() as other:
            assert other.ask(get(service)).status == 200
        for client in clients:
            assert client.read_response().status == 408
            assert client.read_all() == b""
    finally:
        for client in clients:
            client.close()
    eventually(lambda: proxy.metric("portero_connections_open") == 0, "no connection is open")


def test_slow_bodies_are_given_up_and_steady_ones_are_not(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy(toml="[timeouts]\nbody_idle = 1.2\ndrain = 1\nshutdown = 1\n")
    backend = start_backend()
    _join(proxy, backend, service)
    with proxy.connect() as client:
        client.send(get(service, "/", "Content-Length: 10", method="POST") + b"hello")
        assert client.read_response().status == 408
        assert client.read_all() == b""
    assert backend.peers[0].closed.wait(10)
    with proxy.connect() as client:
        client.send(get(service, "/", "Content-Length: 8", method="POST"))
        waiting = threading.Event()
        for _ in range(8):  # four seconds in all, half a second a byte
            client.send(b"y")
            waiting.wait(0.5)
        assert client.read_response().body == b"POST / yyyyyyyy"


def test_idle_connections_are_closed_without_a_word(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy(toml="[timeouts]\nkeep_alive = 0.5\ndrain = 1\nshutdown = 1\n")
    _join(proxy, start_backend(), service)
    with proxy.connect() as client:
        assert client.ask(get(service)).status == 200
        assert client.read_all() == b""
    with proxy.connect() as client:
        assert client.read_all()[:12] in (b"", b"HTTP/1.1 408"), "a connection that never says a word"


def test_a_handshake_that_never_ends_is_given_up(start_proxy: StartProxy) -> None:
    proxy = start_proxy(tls=True, toml="[timeouts]\nhandshake = 0.5\ndrain = 1\nshutdown = 1\n")
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as raw:
        raw.sendall(b"\x16\x03\x01\x02\x00")
        try:
            while raw.recv(4096):
                pass
        except ConnectionResetError:
            return


def test_a_client_that_stops_reading_is_given_up(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy(toml="[timeouts]\nbody_idle = 1\ndrain = 1\nshutdown = 1\n")
    backend = start_backend(_send_much)
    _join(proxy, backend, service)
    with proxy.connect() as client:
        client.send(get(service))
        backend.wait_for_peers()
        assert backend.peers[0].closed.wait(20), "a stalled download holds its backend for ever"
        with pytest.raises(Truncated):
            client.read_response()
    _nothing_in_flight(proxy)


def test_an_http2_client_that_gives_no_window_is_given_up(
    start_proxy: StartProxy, start_backend: StartBackend, authority: Authority, service: str
) -> None:
    proxy = start_proxy(tls=True, toml="[timeouts]\nbody_idle = 1\ndrain = 1\nshutdown = 1\n")
    backend = start_backend(_send_much)
    _join(proxy, backend, service)
    tls: ssl.SSLContext = client_context(authority.pem, "h2")
    with Http2Client(("127.0.0.1", proxy.port), tls, service, opens_windows=False) as client:
        stream = client.request(fields_of(service))
        outcome = client.outcome(stream)
        assert outcome.reset is not None or outcome.goaway is not None or outcome.closed
    assert backend.peers[0].closed.wait(20), "a stalled stream holds its backend for ever"
    _nothing_in_flight(proxy)
