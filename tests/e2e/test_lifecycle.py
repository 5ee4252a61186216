"""SIGTERM drains, systemd is told, and its sockets are served."""

from __future__ import annotations

import signal
import socket
import struct
import sys
import threading
from pathlib import Path

import hpack
import pytest

from tests.e2e.backends import Peer, Script, answer_with, ok
from tests.e2e.certificates import Authority, client_context
from tests.e2e.conftest import StartBackend, StartProxy
from tests.e2e.http1_client import Http1Client, get
from tests.e2e.http2_client import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    NO_ERROR,
    PREFACE,
    SETTINGS,
    Answer,
    Http2Client,
    fields_of,
    frame,
    window_update,
)
from tests.e2e.messages import Closed, Truncated
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.waiting import eventually
from tests.proxy.downstream.tls_wire import NOTIFIED, Wire
from tests.wire.http2.dialogue import split_frames

GENEROUS = "[timeouts]\ndrain = 20\nshutdown = 5\n"


def _wait_for(gate: threading.Event) -> Script:
    """Answer each request when the gate is open."""

    def script(peer: Peer) -> None:
        while True:
            request = peer.read_request()
            gate.wait(60)
            peer.send(ok(b"%b done" % request.path, request))

    return script


# SIGTERM


def _refuses(proxy: ProxyProcess) -> bool:
    try:
        with proxy.connect():
            return False
    except (ConnectionRefusedError, ConnectionResetError):  # reset: it was in the queue of a closed listener
        return True


def test_sigterm_lets_the_exchanges_in_flight_finish(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    gate = threading.Event()
    proxy, backend = start_proxy(toml=GENEROUS), start_backend(_wait_for(gate))
    proxy.serve(service, backend)
    with proxy.connect() as busy, proxy.connect() as idle:
        busy.send(get(service, "/busy"))
        eventually(lambda: backend.requests, "the request is at the backend")
        proxy.signal(signal.SIGTERM)
        assert idle.read_all() == b"", "an idle connection is closed without a word"
        eventually(lambda: _refuses(proxy), "new connections are refused")
        assert proxy.is_running
        gate.set()
        response = busy.read_response()
        assert response.body == b"/busy done"
        assert response.values(b"connection") == [b"close"]
        assert busy.read_all() == b""
    assert proxy.wait() == 0


def test_sigterm_says_goaway_and_lets_the_streams_finish(
    start_proxy: StartProxy, start_backend: StartBackend, authority: Authority, service: str
) -> None:
    gate = threading.Event()
    proxy, backend = start_proxy(tls=True, toml=GENEROUS), start_backend(_wait_for(gate))
    proxy.serve(service, backend)
    tls = client_context(authority.pem, "h2")
    with Http2Client(("127.0.0.1", proxy.port), tls, service) as client:
        stream = client.request(fields_of(service, b"/busy"))
        eventually(lambda: backend.requests, "the request is at the backend")
        proxy.signal(signal.SIGTERM)
        while client.goaway is None:
            client.read()
        assert client.goaway == NO_ERROR
        assert client.last_stream >= stream
        gate.set()
        answer = client.answers.setdefault(stream, Answer())
        while not answer.ended and not client.closed:
            client.read()
        assert (answer.status, bytes(answer.body), answer.reset) == (200, b"/busy done", None)
        client.read_until_closed()
    assert proxy.wait() == 0


@pytest.mark.slow
@pytest.mark.parametrize("alpn", ["http/1.1", "h2"])
def test_a_drain_waits_for_a_client_that_is_slow_to_read(
    alpn: str, start_proxy: StartProxy, start_backend: StartBackend, authority: Authority, service: str
) -> None:
    """The whole response is with the kernel and the proxy; the client needs twelve seconds for it."""
    body = bytes(range(256)) * 8192  # 2 MiB
    proxy = start_proxy(tls=True, toml=GENEROUS)
    backend = start_backend(answer_with(ok(body)))
    proxy.serve(service, backend)
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        raw.settimeout(20)
        raw.connect(("127.0.0.1", proxy.port))
        with client_context(authority.pem, alpn).wrap_socket(raw, server_hostname=service) as client:
            pause = threading.Event()
            got = bytearray()
            if alpn == "h2":
                settings = frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 1 << 24)) + window_update(0, 1 << 24)
                block = bytes(hpack.Encoder().encode(fields_of(service)))
                client.sendall(PREFACE + settings + frame(HEADERS, END_HEADERS | END_STREAM, 1, block))
            else:
                client.sendall(get(service))
            eventually(lambda: backend.requests, "the request is at the backend")
            got += client.recv(1024)
            proxy.signal(signal.SIGTERM)
            while data := client.recv(16_384):
                got += data
                pause.wait(0.08)
                if alpn == "h2":
                    client.sendall(window_update(0, 1))  # what comes late must not become a reset
    if alpn == "h2":
        frames = split_frames(bytes(got))
        got = bytearray().join([one.payload for one in frames if one.kind == DATA])
    assert bytes(got).endswith(body)
    assert proxy.wait() == 0


@pytest.mark.parametrize("alpn", ["http/1.1", "h2"])
def test_a_handshake_that_ends_during_the_drain_is_served_or_ended_cleanly(
    alpn: str, start_proxy: StartProxy, start_backend: StartBackend, authority: Authority, service: str
) -> None:
    gate = threading.Event()
    proxy, backend = start_proxy(tls=True, toml=GENEROUS), start_backend(_wait_for(gate))
    proxy.serve(service, backend)
    tls = client_context(authority.pem, alpn)
    with (
        Wire(proxy.port, tls, name=service) as talking,
        Wire(proxy.port, tls, name=service) as silent,
        Http1Client(("127.0.0.1", proxy.port), tls=client_context(authority.pem), sni=service) as busy,
    ):
        busy.send(get(service, "/busy"))
        eventually(lambda: backend.requests, "the request is at the backend")
        proxy.signal(signal.SIGTERM)
        eventually(lambda: proxy.call("GET", "/readyz").status == 503, "it says that it is not ready")
        silent.shake()
        last = talking.shake_but_last()
        first = get(service, "/late") if alpn == "http/1.1" else PREFACE + frame(SETTINGS, 0, 0, b"")
        talking.socket.sendall(last + talking.seal(first))
        if alpn == "http/1.1":
            eventually(lambda: len(backend.requests) == 2, "the late request is at the backend")
        gate.set()
        assert busy.read_response().body == b"/busy done"
        assert silent.read_all()[1] == NOTIFIED
        data, end = talking.read_all()
        assert end == NOTIFIED
        if alpn == "http/1.1":
            assert data.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"\r\nConnection: close\r\n" in data
            assert data.endswith(b"/late done")
    assert proxy.wait() == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["http/1.1", "h2", "silent"])
def test_idle_clients_do_not_hold_up_the_end(
    kind: str, start_proxy: StartProxy, start_backend: StartBackend, authority: Authority, service: str
) -> None:
    """Not even those that take no notice of GOAWAY or of the end of TLS."""
    proxy = start_proxy(tls=True, toml="[timeouts]\ndrain = 60\nshutdown = 5\n")
    backend = start_backend()
    proxy.serve(service, backend)
    address = ("127.0.0.1", proxy.port)
    if kind == "h2":
        with Http2Client(address, client_context(authority.pem, "h2"), service) as second:
            assert second.ask(fields_of(service)).status == 200
            proxy.signal(signal.SIGTERM)
            assert proxy.wait(40) == 0
        return
    with Http1Client(address, tls=client_context(authority.pem, "http/1.1"), sni=service) as first:
        if kind != "silent":
            assert first.ask(get(service)).status == 200
        proxy.signal(signal.SIGTERM)
        assert proxy.wait(40) == 0


def test_a_hanging_exchange_is_cut_off_when_its_time_is_over(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    gate = threading.Event()
    proxy = start_proxy(toml="[timeouts]\ndrain = 0.5\nshutdown = 1\n")
    backend = start_backend(_wait_for(gate))
    proxy.serve(service, backend)
    with proxy.connect() as client:
        client.send(get(service))
        eventually(lambda: backend.requests, "the request is at the backend")
        proxy.signal(signal.SIGTERM)
        assert proxy.wait(30) == 0
        with pytest.raises((Closed, Truncated)):
            client.read_response()
    gate.set()


def test_an_open_tunnel_does_not_hold_up_the_end_for_ever(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    def switch(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\nhello")
        peer.wait_closed()

    proxy = start_proxy(toml="[timeouts]\ndrain = 0.5\nshutdown = 1\n")
    backend = start_backend(switch)
    proxy.serve(service, backend)
    with proxy.connect() as client:
        assert client.ask(get(service, "/", "Connection: Upgrade", "Upgrade: chat")).status == 101
        assert client.read_some() == b"hello"
        proxy.signal(signal.SIGTERM)
        assert proxy.wait(30) == 0
        assert client.read_all() == b""


def test_backends_may_register_and_renew_until_the_end(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    gate = threading.Event()
    proxy, backend = start_proxy(toml=GENEROUS), start_backend(_wait_for(gate))
    proxy.serve(service, backend)
    with proxy.connect() as client:
        client.send(get(service))
        eventually(lambda: backend.requests, "the request is at the backend")
        proxy.signal(signal.SIGTERM)
        eventually(lambda: proxy.call("GET", "/readyz").status == 503, "it says that it is not ready")
        assert proxy.call("GET", "/livez").status == 200
        proxy.serve(service, backend)
        gate.set()
        assert client.read_response().status == 200
    assert proxy.wait() == 0


# SIGHUP


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reload_of_what_cannot_be_used_changes_nothing(
    start_proxy: StartProxy, start_backend: StartBackend, service: str, workers: int
) -> None:
    backend = start_backend()
    proxy = start_proxy(toml="[timeouts]\ndrain = 1\n", flags=("--workers", str(workers)))
    proxy.serve(service, backend)
    file = proxy.folder / "portero.toml"
    for number, content in enumerate(
        (
            b'[acme]\ndirectory = "https://[x"\n',
            b"x = " + b"[" * 5000,
            b"[limits]\nbody_bytes = 0x" + b"f" * 9000,
            b"[limits]\nbody_bytes = " + b"9" * 5000,
            b"\xff",
        ),
        start=1,
    ):
        file.write_bytes(content)
        proxy.signal(signal.SIGHUP)
        eventually(
            lambda number=number: proxy.log().count("the configuration stays as it was") == number,  # type: ignore[misc]
            "the log says why",
        )
        with proxy.connect() as client:
            assert client.ask(get(service, "/")).status == 200
    file.write_text("[timeouts]\ndrain = 2\n")
    proxy.signal(signal.SIGHUP)
    eventually(lambda: "configuration read again" in proxy.log(), "the good one is taken")


# systemd


def test_systemd_hears_ready_reloading_and_stopping(start_proxy: StartProxy, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        path = tmp_path / "notify"
        notify.bind(str(path))
        notify.settimeout(20)
        proxy = start_proxy(tls=True, environment={"NOTIFY_SOCKET": str(path)})
        assert b"READY=1" in notify.recv(4096).split(b"\n")
        proxy.signal(signal.SIGHUP)
        reloading = notify.recv(4096).split(b"\n")
        assert b"RELOADING=1" in reloading
        assert any(line.startswith(b"MONOTONIC_USEC=") for line in reloading)
        assert b"READY=1" in notify.recv(4096).split(b"\n")
        proxy.signal(signal.SIGTERM)
        assert b"STOPPING=1" in notify.recv(4096).split(b"\n")
        assert proxy.wait() == 0


#: Becomes the program in argv[2:], with the descriptor argv[1] as systemd would pass it.
_PASS_SOCKET = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="https")
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_a_socket_that_systemd_opened_is_served(
    tmp_path: Path, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    proxy = ProxyProcess(tmp_path / "activated", toml="[timeouts]\ndrain = 1\n")
    with socket.create_server(("127.0.0.1", proxy.port)) as listening:
        number = listening.fileno()
        try:
            proxy.start([sys.executable, "-c", _PASS_SOCKET, str(number)], pass_fds=[number])
            proxy.serve(service, backend)
            with proxy.connect() as client:
                assert client.ask(get(service)).status == 200
            proxy.stop()
        finally:
            proxy.kill()


def _open_gate() -> threading.Event:
    gate = threading.Event()
    gate.set()
    return gate
