"""SIGTERM and another start, as `systemctl restart` does it: on a kept socket, and on ports of our own."""

from __future__ import annotations

import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import websockets.sync.client
from websockets.exceptions import ConnectionClosed

from tests.e2e.backends import Peer, ok
from tests.e2e.certificates import Authority, client_context, threaded_client_context
from tests.e2e.conftest import StartBackend, StartProxy
from tests.e2e.http1_client import Http1Client, get
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.steady_load import SteadyLoad, answers
from tests.e2e.waiting import PATIENCE, eventually

#: Longer than what is in flight in these tests.
DRAIN = "[timeouts]\ndrain = 8\nshutdown = 3\n"

#: Becomes the program in argv[2:], with the descriptor argv[1] as systemd would pass it.
_PASS_SOCKET = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="https")
os.execv(sys.argv[2], sys.argv[2:])
"""


class Kept:
    """A TLS proxy on a socket that somebody else holds too."""

    def __init__(self, folder: Path, certificates: Path, workers: str) -> None:
        flags = ("--workers", workers, "--state-dir", str(folder / "state"))
        self.proxy = ProxyProcess(folder / "proxy", certificates=certificates, toml=DRAIN, flags=flags)
        self.listening = socket.create_server(("127.0.0.1", self.proxy.port), backlog=4096)

    def start(self) -> None:
        number = self.listening.fileno()
        self.proxy.start([sys.executable, "-c", _PASS_SOCKET, str(number)], pass_fds=[number])

    def restart(self) -> None:
        """As systemd does it: the next one starts when this one has ended."""
        self.proxy.stop()
        self.start()


@pytest.fixture(params=["1", "2"])
def kept(request: pytest.FixtureRequest, tmp_path: Path, certificate_folder: Path) -> Iterator[Kept]:
    one = Kept(tmp_path, certificate_folder, request.param)
    with one.listening:
        one.start()
        yield one
        one.proxy.kill()


def test_a_restart_on_a_kept_socket_loses_no_request(
    kept: Kept, authority: Authority, start_backend: StartBackend, service: str, chat_backend: int
) -> None:
    kept.proxy.serve(service, start_backend(answers))
    kept.proxy.register(f"chat-{service}", "127.0.0.1", chat_backend)
    with SteadyLoad(kept.proxy, service, authority, f"chat-{service}", registers=False) as load:
        for _ in range(2):
            kept.restart()
            load.goes_on()
    assert load.lost == []
    kept.proxy.stop()


def test_clients_are_accepted_on_a_kept_socket_as_long_as_something_is_in_flight(
    kept: Kept, authority: Authority, start_backend: StartBackend, service: str
) -> None:
    gate = threading.Event()

    def script(peer: Peer) -> None:
        while True:
            request = peer.read_request()
            if request.path == b"/long":
                gate.wait(60)
            peer.send(ok(b"done", request))

    backend = start_backend(script)
    kept.proxy.serve(service, backend)
    tls, address = client_context(authority.pem, "http/1.1"), ("127.0.0.1", kept.proxy.port)
    with Http1Client(address, tls=tls, sni=service) as long:
        long.send(get(service, "/long"))
        eventually(lambda: backend.requests, "the request is at the backend")
        kept.proxy.signal(signal.SIGTERM)
        eventually(lambda: kept.proxy.call("GET", "/readyz").status == 503, "it drains")
        for _ in range(20):
            with Http1Client(address, tls=tls, sni=service) as client:
                response = client.ask(get(service))
                assert (response.status, response.values(b"connection")) == (200, [b"close"])
        gate.set()
        assert long.read_response().body == b"done"
    assert kept.proxy.wait() == 0


@pytest.mark.parametrize("when", ["before its handshake", "before its request", "within its request"])
def test_who_has_just_come_at_a_stop_is_served(
    when: str, start_proxy: StartProxy, start_backend: StartBackend, authority: Authority, service: str
) -> None:
    proxy = start_proxy(tls=True, toml=DRAIN)
    proxy.serve(service, start_backend(answers))
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=60) as raw:
        tls = client_context(authority.pem, "http/1.1")
        if when != "before its handshake":
            raw = tls.wrap_socket(raw, server_hostname=service)
        if when == "within its request":
            raw.sendall(get(service)[:10])
        # It is accepted: the next one is served.
        with Http1Client(("127.0.0.1", proxy.port), tls=tls, sni=service) as other:
            assert other.ask(get(service, "/", "Connection: close")).status == 200
        proxy.signal(signal.SIGTERM)
        eventually(lambda: "stopping: " in proxy.operator_log(), "it drains")
        if when == "before its handshake":
            raw = tls.wrap_socket(raw, server_hostname=service)
        raw.sendall(get(service)[10 if when == "within its request" else 0 :])
        answer = b"".join(iter(lambda: raw.recv(65_536), b""))
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"\r\nConnection: close\r\n" in answer
        raw.close()
    assert proxy.wait() == 0


def test_websockets_hear_of_a_stop_and_what_remains_is_counted_in_one_line(
    start_proxy: StartProxy,
    start_backend: StartBackend,
    authority: Authority,
    service: str,
    chat_backend: int,
) -> None:
    gate = threading.Event()

    def hangs(peer: Peer) -> None:
        peer.read_request()
        gate.wait(PATIENCE)

    proxy, backend = start_proxy(tls=True, toml="[timeouts]\ndrain = 5\nshutdown = 2\n"), start_backend(hangs)
    proxy.serve(service, backend)
    proxy.register(f"chat-{service}", "127.0.0.1", chat_backend)
    tls, address = threaded_client_context(authority.pem, "http/1.1"), ("127.0.0.1", proxy.port)
    with (
        socket.create_connection(address, timeout=PATIENCE) as raw,
        websockets.sync.client.connect(
            f"wss://chat-{service}/", sock=raw, ssl=tls, open_timeout=PATIENCE
        ) as chat,
        Http1Client(address, tls=tls, sni=service) as stuck,
    ):
        chat.send("hello")
        assert chat.recv(PATIENCE) == "hello"
        stuck.send(get(service))
        eventually(lambda: backend.requests, "the request is at the backend")
        proxy.signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed) as closed:
            chat.recv(PATIENCE)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd_then_sent) == (1001, True)
        assert proxy.wait() == 0
    gate.set()
    cut_off = "cut off at the end of the drain: 1 connections, 0 of them tunnels, with 1 exchanges"
    assert proxy.operator_log().count(cut_off) == 1


def test_an_idle_client_is_closed_a_moment_after_a_stop_and_served_until_then(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy(toml=DRAIN)
    proxy.serve(service, start_backend(answers))
    with proxy.connect() as idle, proxy.connect() as late:
        for client in (idle, late):
            assert client.ask(get(service)).status == 200
        proxy.signal(signal.SIGTERM)
        # One request after the other: a pause between them may be the moment in which it is closed.
        while not (response := late.ask(get(service))).values(b"connection"):
            assert response.status == 200
        assert (response.status, response.values(b"connection")) == (200, [b"close"])
        assert idle.read_all() == b""
        assert late.read_all() == b""
    assert proxy.wait() == 0
