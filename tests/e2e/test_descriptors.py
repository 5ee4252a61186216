"""When descriptors are short: strangers at one door cost the others nothing, and clients wait in turn."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.backends import Peer
from tests.e2e.conftest import StartBackend
from tests.e2e.http1_client import get
from tests.e2e.http2_client import Http2Client, fields_of
from tests.e2e.proxy_process import ProxyProcess, free_port
from tests.e2e.waiting import eventually

FILES = 256
STRANGERS = 400


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def connected(opened: ExitStack, port: int) -> socket.socket:
    return opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))


def start(proxy: ProxyProcess) -> ProxyProcess:
    return proxy.start(("prlimit", f"--nofile={FILES}:{FILES}"))


def status(proxy: ProxyProcess) -> int:
    with proxy.connect() as client:
        return client.ask(get("app.example")).status


@pytest.mark.parametrize("workers", [1, 2])
def test_silent_strangers_at_the_api_and_at_port_80_cost_the_traffic_nothing(
    tmp_path: Path, start_backend: StartBackend, opened: ExitStack, workers: int
) -> None:
    http_port = free_port()
    proxy = start(
        ProxyProcess(tmp_path, flags=["--workers", str(workers), "--http-addr", f"127.0.0.1:{http_port}"])
    )
    proxy.serve("app.example", start_backend())
    for port in (proxy.register_port, http_port):
        for number in range(STRANGERS):
            connection = connected(opened, port)
            if number % 2:
                connection.sendall(b"POST /register HTTP/1.1\r\nHost:")
    for _ in range(20):
        assert status(proxy) == 200
    # Who has something to say is heard.
    proxy.serve("other.example", start_backend())
    assert proxy.call("GET", "/readyz").status == 200
    assert proxy.open_files() < FILES
    proxy.stop()


@pytest.mark.parametrize(("tls", "workers"), [(False, 1), (True, 1), (True, 2)])
def test_more_clients_than_descriptors_wait_and_all_are_served(
    tmp_path: Path,
    start_backend: StartBackend,
    certificate_folder: Path,
    client_tls: ssl.SSLContext,
    tls: bool,
    workers: int,
) -> None:
    certificates = certificate_folder if tls else None
    flags = ["--workers", str(workers)]
    proxy = start(ProxyProcess(tmp_path / "proxy", certificates=certificates, flags=flags))
    proxy.serve("one.other.test", start_backend())
    most: list[int] = []

    secured: dict[str, Any] = {"ssl": client_tls, "server_hostname": "one.other.test"} if tls else {}

    async def client(everybody: asyncio.Event) -> bytes:
        """Ask once, and keep the connection until all have been served or the proxy ends it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port, **secured)
        writer.write(get("one.other.test"))
        head = await reader.readuntil(b"\r\n\r\n")
        most.append(proxy.open_files())
        if len(most) == STRANGERS:
            everybody.set()
        await everybody.wait()
        writer.transport.abort()
        return head.split()[1]

    async def all_of_them() -> list[bytes]:
        everybody = asyncio.Event()
        async with asyncio.timeout(100), asyncio.TaskGroup() as group:
            clients = [group.create_task(client(everybody)) for _ in range(STRANGERS)]
        return [each.result() for each in clients]

    assert asyncio.run(all_of_them()) == [b"200"] * STRANGERS
    assert max(most) < FILES
    assert "others wait" in proxy.operator_log()
    eventually(lambda: proxy.metric("portero_connections_open") == 0, "all have gone")
    proxy.stop()


def test_streams_that_take_all_descriptors_make_new_clients_wait_and_all_are_served(
    tmp_path: Path, start_backend: StartBackend, opened: ExitStack
) -> None:
    gate = threading.Event()

    def hold(peer: Peer) -> None:
        request = peer.read_request()
        if request.path == b"/held":
            gate.wait(60)
        peer.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok")

    backend = start_backend(hold)
    proxy = start(ProxyProcess(tmp_path / "proxy"))
    proxy.serve("app.example", backend)
    address = ("127.0.0.1", proxy.port)
    many = [opened.enter_context(Http2Client(address, None, "")) for _ in range(3)]
    streams = [(each, each.request(fields_of("app.example", b"/held"))) for each in many for _ in range(45)]
    eventually(lambda: len(backend.peers) == len(streams), "each stream has a connection")
    clients = [connected(opened, proxy.port) for _ in range(200)]
    for client in clients:
        client.sendall(get("app.example"))
    eventually(lambda: proxy.metric("portero_refused_total", reason="descriptors") >= 1, "they wait")
    assert proxy.open_files() < FILES
    gate.set()
    assert [each.outcome(stream).status for each, stream in streams] == [200] * len(streams)
    for each in many:
        each.close()
    for waiting in clients:
        assert waiting.recv(65536).startswith(b"HTTP/1.1 200")
        waiting.close()
    proxy.stop()
