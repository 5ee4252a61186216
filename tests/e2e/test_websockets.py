"""WebSockets through the proxy: the `websockets` package, and Chromium over h2."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from pathlib import Path

import pytest
import websockets.sync.client
import websockets.sync.server
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from tests.e2e.backends import Peer, answer_with, echo_each
from tests.e2e.certificates import Authority, client_context, threaded_client_context
from tests.e2e.conftest import Curl, Need, StartBackend
from tests.e2e.http1_client import get
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.waiting import PATIENCE, eventually

# WebSockets


def test_websockets_pass_both_ways(
    chat_backend: int, tls_proxy: ProxyProcess, authority: Authority, service: str
) -> None:
    tls_proxy.register(service, "127.0.0.1", chat_backend)
    raw = socket.create_connection(("127.0.0.1", tls_proxy.port), timeout=20)
    with websockets.sync.client.connect(
        f"wss://{service}:{tls_proxy.port}/chat",
        sock=raw,
        ssl=threaded_client_context(authority.pem),
        open_timeout=PATIENCE,
        max_size=1 << 24,
    ) as client:
        for message in ("hello", "", b"\x00\xff", "x" * 1_000_000, b"y" * 5_000_000):
            client.send(message)
            assert client.recv(timeout=PATIENCE) == message
        for i in range(200):
            client.send(str(i))
        assert [client.recv(timeout=PATIENCE) for _ in range(200)] == [str(i) for i in range(200)]
        client.ping().wait(20)
    (entry,) = eventually(lambda: tls_proxy.access_log(host=f"{service}:{tls_proxy.port}"), "the log line")
    assert (entry["status"], entry["path"]) == (101, "/chat")
    tls_proxy.wait_until_idle()


def test_a_refused_upgrade_is_an_ordinary_answer(
    tls_proxy: ProxyProcess, start_backend: StartBackend, authority: Authority, service: str
) -> None:
    backend = start_backend(echo_each)
    tls_proxy.serve(service, backend)
    raw = socket.create_connection(("127.0.0.1", tls_proxy.port), timeout=PATIENCE)
    with raw, pytest.raises(websockets.exceptions.InvalidStatus) as refused:
        websockets.sync.client.connect(
            f"wss://{service}:{tls_proxy.port}/",
            sock=raw,
            ssl=threaded_client_context(authority.pem),
            open_timeout=PATIENCE,
        )
    assert refused.value.response.status_code == 200
    assert backend.requests[0].values(b"upgrade") == [b"websocket"]


# Tunnels that end one side at a time


UPGRADE = ("Connection: Upgrade", "Upgrade: echo")
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"


def test_a_backend_that_ends_its_side_of_a_tunnel_still_hears_the_client(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    heard = bytearray()

    def speak_first(peer: Peer) -> None:
        peer.read_head()
        peer.send(SWITCH + b"all I had to say")
        peer.shut()
        heard.extend(peer.read_rest())

    plain_proxy.serve(service, start_backend(speak_first))
    said = b"a long answer " * 100_000
    with plain_proxy.connect() as client:
        client.send(get(service, "/", *UPGRADE))
        assert client.read_response().status == 101
        assert client.read_all() == b"all I had to say"
        client.send(said)
        client.shut()
        eventually(lambda: len(heard) == len(said), "the backend heard all of it")
    assert bytes(heard) == said
    plain_proxy.wait_until_idle()


def test_a_client_that_ends_its_side_of_a_tunnel_still_hears_the_backend(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    def answer_at_the_end(peer: Peer) -> None:
        peer.read_head()
        peer.send(SWITCH)
        said = peer.read_rest()
        peer.send(b"%d bytes " % len(said) + b"x" * 1_000_000)

    plain_proxy.serve(service, start_backend(answer_at_the_end))
    with plain_proxy.connect() as client:
        client.send(get(service, "/", *UPGRADE))
        assert client.read_response().status == 101
        client.send(b"a question")
        client.shut()
        assert client.read_all() == b"10 bytes " + b"x" * 1_000_000
    plain_proxy.wait_until_idle()


def test_under_tls_a_tunnel_ends_with_its_backend_and_says_so(
    tls_proxy: ProxyProcess, start_backend: StartBackend, authority: Authority, service: str
) -> None:
    def speak_and_end(peer: Peer) -> None:
        peer.read_head()
        peer.send(SWITCH + b"x" * 1_000_000)
        peer.shut()
        peer.wait_closed()

    tls_proxy.serve(service, start_backend(speak_and_end))
    tls = client_context(authority.pem, "http/1.1")
    with (
        socket.create_connection(("127.0.0.1", tls_proxy.port), timeout=PATIENCE) as raw,
        tls.wrap_socket(raw, server_hostname=service, suppress_ragged_eofs=False) as secure,
    ):
        secure.sendall(get(service, "/", *UPGRADE))
        got = b""
        while data := secure.recv(65536):
            got += data
    assert got.endswith(b"\r\n\r\n" + b"x" * 1_000_000)
    tls_proxy.wait_until_idle()


def test_a_426_says_what_to_upgrade_to_over_http1_only(
    curl: Curl, tls_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    fields = b"Connection: Upgrade\r\nUpgrade: echo/2\r\nContent-Length: 0\r\n\r\n"
    tls_proxy.serve(service, start_backend(answer_with(b"HTTP/1.1 426 Upgrade Required\r\n" + fields)))
    answer = curl("/", "-i", "--http1.1").stdout
    assert answer.startswith(b"HTTP/1.1 426 Upgrade Required\r\n")
    assert b"\r\nConnection: upgrade\r\nUpgrade: echo/2\r\n" in answer
    answer = curl("/", "-i", "--http2").stdout.lower()
    assert answer.startswith(b"http/2 426 ")
    assert b"upgrade" not in answer
    assert b"connection" not in answer


# Chromium


_PAGE = """<!doctype html><title>portero</title><script>
const seen = {protocol: performance.getEntriesByType("navigation")[0].nextHopProtocol};
const socket = new WebSocket("wss://" + location.host + "/socket");
socket.onopen = () => socket.send("hello");
socket.onmessage = (event) => {
  if (seen.echo) return;
  seen.echo = event.data;
  socket.send(JSON.stringify(seen));
};
</script>"""


_CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--ignore-certificate-errors",
    "--remote-debugging-port=0",
)


@pytest.mark.slow
def test_chromium_loads_a_page_over_h2_and_opens_a_websocket(
    need: Need, tls_proxy: ProxyProcess, service: str, tmp_path: Path
) -> None:
    program = need("chromium")
    seen: list[dict[str, str]] = []

    def page(connection: websockets.sync.server.ServerConnection, request: Request) -> Response | None:
        if request.path == "/socket":
            return None
        fields = Headers({"Content-Type": "text/html", "Content-Length": str(len(_PAGE))})
        return Response(200 if request.path == "/" else 404, "", fields, _PAGE.encode())

    def echo(connection: websockets.sync.server.ServerConnection) -> None:
        for message in connection:
            connection.send(message)
            if isinstance(message, str) and message.startswith("{"):
                seen.append(json.loads(message))

    with websockets.sync.server.serve(echo, "127.0.0.1", 0, process_request=page) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        tls_proxy.register(service, *server.socket.getsockname()[:2])
        command = [program, *_CHROMIUM_FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
        command += [f"--host-resolver-rules=MAP {service} 127.0.0.1"]
        command.append(f"https://{service}:{tls_proxy.port}/")
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            (found, *_) = eventually(lambda: seen, "the page has reported", 60)
        finally:
            browser.terminate()
            browser.wait(20)
            server.shutdown()
            thread.join(60)
    assert found == {"protocol": "h2", "echo": "hello"}
