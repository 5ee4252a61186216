"""Peers that stall or dawdle: memory stays flat, and what takes too long is given up."""

from __future__ import annotations

import hashlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable

import hpack
import pytest

from tests.e2e.backends import Peer, echo_each, in_turn
from tests.e2e.big_bodies import DIGEST, MEGABYTE, PIECE, PIECES, SIZE, read_much, send_much
from tests.e2e.certificates import Authority, client_context
from tests.e2e.conftest import StartBackend, StartProxy
from tests.e2e.http1_client import Http1Client, get
from tests.e2e.http2_client import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PREFACE,
    SETTINGS,
    Answer,
    Http2Client,
    fields_of,
    frame,
    rst_stream,
    window_update,
)
from tests.e2e.messages import Truncated
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.waiting import eventually, settled

ConnectTls = Callable[[str], Http1Client]


def test_memory_stays_flat_while_a_client_does_not_read(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend(send_much)
    plain_proxy.serve(service, backend)
    before = plain_proxy.memory()
    with plain_proxy.connect() as client:
        client.send(get(service))
        backend.wait_for_peers()
        sent = settled(lambda: backend.peers[0].sent)
        assert sent < SIZE, "nothing held the backend back"
        assert plain_proxy.memory() - before < 16 * MEGABYTE
        response = client.read_response()
        assert hashlib.sha256(response.body).hexdigest() == DIGEST
        assert client.ask(get(service, "/same")).body == b"GET /same "
    assert plain_proxy.memory() - before < 32 * MEGABYTE


def test_memory_stays_flat_while_a_tls_client_does_not_read(
    tls_proxy: ProxyProcess, start_backend: StartBackend, connect_tls: ConnectTls, service: str
) -> None:
    backend = start_backend(send_much)
    tls_proxy.serve(service, backend)
    before = tls_proxy.memory()
    with connect_tls(service) as client:
        client.send(get(service))
        backend.wait_for_peers()
        assert settled(lambda: backend.peers[0].sent) < SIZE
        assert tls_proxy.memory() - before < 16 * MEGABYTE
        assert hashlib.sha256(client.read_response().body).hexdigest() == DIGEST


def test_memory_stays_flat_while_an_http2_client_gives_no_window(
    tls_proxy: ProxyProcess, start_backend: StartBackend, authority: Authority, service: str
) -> None:
    backend = start_backend(in_turn(send_much, echo_each))
    tls_proxy.serve(service, backend)
    before = tls_proxy.memory()
    tls = client_context(authority.pem, "h2")
    with Http2Client(("127.0.0.1", tls_proxy.port), tls, service) as client:
        stream = client.request(fields_of(service))
        backend.wait_for_peers()
        assert settled(lambda: backend.peers[0].sent) < SIZE
        assert tls_proxy.memory() - before < 16 * MEGABYTE
        assert client.ask(fields_of(service, b"/other")).body == b"GET /other ", "others wait behind it"
        body = client.outcome(stream).body
        assert hashlib.sha256(body).hexdigest() == DIGEST


@pytest.mark.slow
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_memory_stays_flat_while_a_backend_does_not_read(
    framing: str, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    gate, digest = threading.Event(), list[str]()
    backend = start_backend(read_much(gate, digest))
    plain_proxy.serve(service, backend)
    before = plain_proxy.memory()
    sent = [0]
    with plain_proxy.connect() as client:
        client.socket.settimeout(60)
        if framing == "length":
            client.send(get(service, "/", f"Content-Length: {SIZE}", method="POST"))
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
    assert digest == [DIGEST]
    assert plain_proxy.memory() - before < 32 * MEGABYTE


def test_an_http2_upload_waits_for_a_slow_backend_within_its_window(
    tls_proxy: ProxyProcess, start_backend: StartBackend, authority: Authority, service: str
) -> None:
    gate = threading.Event()

    def read_late(peer: Peer) -> None:
        gate.wait(60)
        echo_each(peer)

    backend = start_backend(in_turn(read_late, echo_each))
    tls_proxy.serve(service, backend)
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


def test_uploads_that_no_backend_reads_leave_the_others_on_their_connection_alone(
    tls_proxy: ProxyProcess, start_backend: StartBackend, authority: Authority, service: str
) -> None:
    gate = threading.Event()
    uploads = 100

    def stand_still(peer: Peer) -> None:
        if peer.number < uploads:
            gate.wait(60)
        else:
            echo_each(peer)

    backend = start_backend(stand_still)
    tls_proxy.serve(service, backend)
    before = tls_proxy.memory()
    with Http2Client(("127.0.0.1", tls_proxy.port), client_context(authority.pem, "h2"), service) as client:
        client.ask(fields_of("nobody.e2e.test"))  # its settings have come
        settings = dict(struct.iter_unpack(">HI", client.settings_seen[0]))
        for _ in range(uploads):
            stream = client.new_stream()
            client.send(frame(HEADERS, END_HEADERS, stream, client.block(fields_of(service, method=b"POST"))))
            for size in _pieces(settings[4]):
                client.send(frame(DATA, 0, stream, b"x" * size))
        backend.wait_for_peers(uploads)
        stream = client.new_stream()
        client.send(frame(HEADERS, END_HEADERS, stream, client.block(fields_of(service, method=b"POST"))))
        for size in _pieces(settings[4]):
            client.send(frame(DATA, 0, stream, b"y" * size))
        client.send(frame(DATA, END_STREAM, stream, b""))
        answer = client.outcome(stream)
        assert (answer.status, answer.goaway) == (200, None)
        assert len(answer.body) == settings[4] + len(b"POST / ")
        assert tls_proxy.memory() - before < 32 * MEGABYTE
        assert client.windows_seen[0] >= uploads * settings[4] - MEGABYTE, (
            "the connection's window is used up"
        )
        gate.set()


def _pieces(size: int) -> list[int]:
    """The sizes of DATA frames that make up `size` bytes."""
    return [16_384] * (size // 16_384) + [size % 16_384] * (size % 16_384 > 0)


def test_slow_heads_are_given_up(start_proxy: StartProxy, start_backend: StartBackend, service: str) -> None:
    """slowloris: a byte now and then does not buy time."""
    proxy = start_proxy(toml="[timeouts]\nhead = 1.5\ndrain = 1\nshutdown = 1\n")
    proxy.serve(service, start_backend())
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


@pytest.mark.slow
def test_slow_bodies_are_given_up_and_steady_ones_are_not(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy(toml="[timeouts]\nbody_idle = 1.2\ndrain = 1\nshutdown = 1\n")
    backend = start_backend()
    proxy.serve(service, backend)
    with proxy.connect() as client:
        client.send(get(service, "/", "Content-Length: 10", method="POST") + b"hello")
        assert client.read_response().status == 408
        assert client.read_all() == b""
    assert backend.peers[0].closed.wait(30)
    with proxy.connect() as client:
        client.send(get(service, "/", "Content-Length: 8", method="POST"))
        waiting = threading.Event()
        for _ in range(8):  # four seconds in all, half a second a byte
            client.send(b"y")
            waiting.wait(0.5)
        assert client.read_response().body == b"POST / yyyyyyyy"


@pytest.mark.slow
def test_idle_connections_are_closed_without_a_word(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy(toml="[timeouts]\nkeep_alive = 0.5\ndrain = 1\nshutdown = 1\n")
    proxy.serve(service, start_backend())
    with proxy.connect() as client:
        assert client.ask(get(service)).status == 200
        assert client.read_all() == b""
    with proxy.connect() as client:
        assert client.read_all()[:12] in (b"", b"HTTP/1.1 408"), "a connection that never says a word"


def test_a_handshake_that_never_ends_is_given_up(start_proxy: StartProxy) -> None:
    proxy = start_proxy(tls=True, toml="[timeouts]\nhandshake = 0.5\ndrain = 1\nshutdown = 1\n")
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=60) as raw:
        raw.sendall(b"\x16\x03\x01\x02\x00")
        try:
            while raw.recv(4096):
                pass
        except ConnectionResetError:
            return


@pytest.mark.slow
def test_a_client_that_stops_reading_is_given_up(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy(toml="[timeouts]\nbody_idle = 1\ndrain = 1\nshutdown = 1\n")
    backend = start_backend(send_much)
    proxy.serve(service, backend)
    with proxy.connect() as client:
        client.send(get(service))
        backend.wait_for_peers()
        assert backend.peers[0].closed.wait(20), "a stalled download holds its backend for ever"
        with pytest.raises(Truncated):
            client.read_response()
    proxy.wait_until_idle()


@pytest.mark.slow
@pytest.mark.parametrize("version", ["http1", "http2"])
def test_a_client_that_takes_little_at_a_time_is_not_idle(
    start_proxy: StartProxy, start_backend: StartBackend, service: str, version: str
) -> None:
    """The socket stays full for longer than the time-out, but never without progress."""
    proxy = start_proxy(toml="[timeouts]\nbody_idle = 1.5\ndrain = 1\nshutdown = 1\n")
    proxy.serve(service, start_backend(send_much))
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
        raw.settimeout(20)
        raw.connect(("127.0.0.1", proxy.port))
        if version == "http1":
            raw.sendall(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % service.encode())
        else:
            settings = frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 1 << 30)) + window_update(0, 1 << 30)
            block = bytes(hpack.Encoder().encode(fields_of(service)))
            raw.sendall(PREFACE + settings + frame(HEADERS, END_HEADERS | END_STREAM, 1, block))
        pause = threading.Event()
        for _ in range(100):  # ten seconds at 50 KB/s
            assert raw.recv(5000)
            pause.wait(0.1)
        got = 0
        while got < 10 * MEGABYTE:
            data = raw.recv(262_144)
            assert data
            got += len(data)
    proxy.wait_until_idle()


@pytest.mark.slow
def test_an_http2_stream_waits_for_its_client_while_others_move(
    start_proxy: StartProxy, start_backend: StartBackend, authority: Authority, service: str
) -> None:
    proxy = start_proxy(tls=True, toml="[timeouts]\nbody_idle = 1\ndrain = 1\nshutdown = 1\n")
    backend = start_backend(send_much)
    proxy.serve(service, backend)
    tls = client_context(authority.pem, "h2")
    with Http2Client(("127.0.0.1", proxy.port), tls, service, opens_windows=False) as client:
        moving, waiting = client.request(fields_of(service)), client.request(fields_of(service))
        backend.wait_for_peers(2)
        client.send(window_update(0, 1 << 24))
        pause = threading.Event()
        for _ in range(16):  # eight seconds, in which the sweep comes several times
            client.send(window_update(moving, 1))
            pause.wait(0.5)
        client.send(window_update(waiting, 1_000_000))
        answer = client.answers.setdefault(waiting, Answer())
        while len(answer.body) < 1_000_000 and answer.reset is None and not client.closed:
            client.read()
        assert answer.reset is None
        client.send(rst_stream(moving) + rst_stream(waiting))
    proxy.wait_until_idle()


@pytest.mark.slow
def test_an_http2_client_that_gives_no_window_is_given_up(
    start_proxy: StartProxy, start_backend: StartBackend, authority: Authority, service: str
) -> None:
    proxy = start_proxy(tls=True, toml="[timeouts]\nbody_idle = 1\ndrain = 1\nshutdown = 1\n")
    backend = start_backend(send_much)
    proxy.serve(service, backend)
    tls: ssl.SSLContext = client_context(authority.pem, "h2")
    with Http2Client(("127.0.0.1", proxy.port), tls, service, opens_windows=False) as client:
        stream = client.request(fields_of(service))
        outcome = client.outcome(stream)
        assert outcome.reset is not None or outcome.goaway is not None or outcome.closed
    assert backend.peers[0].closed.wait(20), "a stalled stream holds its backend for ever"
    proxy.wait_until_idle()
