"""Independent clients: curl, h2load, openssl and the h2 package."""

from __future__ import annotations

import hashlib
import re
import socket
import ssl
import subprocess
from pathlib import Path

import h2.connection
import h2.events
import pytest

from tests.e2e.backends import Peer, RecordingBackend, ok
from tests.e2e.certificates import Authority, client_context
from tests.e2e.conftest import Curl, Need, StartBackend
from tests.e2e.messages import Request as Received
from tests.e2e.proxy_process import ProxyProcess


@pytest.fixture
def backend(tls_proxy: ProxyProcess, start_backend: StartBackend, service: str) -> RecordingBackend:
    """A backend that serves the test's service."""
    started = start_backend()
    tls_proxy.serve(service, started)
    return started


# curl


VERSIONS = pytest.mark.parametrize(
    ("flag", "version"), [("--http1.1", b"1.1"), ("--http2", b"2"), ("--http1.0", b"1.0")]
)


@VERSIONS
def test_curl_gets(flag: str, version: bytes, curl: Curl, backend: RecordingBackend) -> None:
    # curl shows 1.1 for an answer to HTTP/1.0, because that is the version of the answer.
    body, status = curl("/x?y=z", flag).stdout.rsplit(b"\n", 1)
    assert body == b"GET /x?y=z "
    assert status in (b"200 " + version, b"200 1.1")


def test_curl_reaches_the_proxy_over_ipv6(curl: Curl, backend: RecordingBackend) -> None:
    assert curl("/", to="[::1]").stdout.startswith(b"GET / ")
    assert backend.requests[0].values(b"x-forwarded-for") == [b"::1"]


@pytest.mark.parametrize("flag", ["--http1.1", "--http2"])
def test_curl_posts_with_and_without_a_length(flag: str, curl: Curl, backend: RecordingBackend) -> None:
    assert curl("/", flag, "-d", "hello").stdout.startswith(b"POST / hello\n200")
    chunked = ("-H", "Transfer-Encoding: chunked") if flag == "--http1.1" else ()
    assert curl("/", flag, "-d", "hello", *chunked).stdout.startswith(b"POST / hello\n200")
    assert curl("/", flag, "-X", "DELETE").stdout.startswith(b"DELETE / \n200")


@pytest.mark.parametrize("flag", ["--http1.1", "--http2"])
def test_curl_asks_for_the_head(flag: str, curl: Curl, backend: RecordingBackend) -> None:
    output = curl("/", flag, "-I").stdout
    assert output.startswith(b"HTTP/" + flag.removeprefix("--http").encode() + b" 200")
    assert b"content-length: 7" in output.lower()


def _consent(peer: Peer) -> None:
    def on_head(head: Received) -> None:
        if head.values(b"expect"):
            peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    request = peer.read_request(on_head)
    peer.send(ok(request.body))
    peer.wait_closed()


@pytest.mark.parametrize("flag", ["--http1.1", "--http2"])
def test_curl_waits_for_a_100(
    flag: str, curl: Curl, start_backend: StartBackend, tls_proxy: ProxyProcess, service: str
) -> None:
    backend = start_backend(_consent)
    tls_proxy.serve(service, backend)
    # Without its 100 curl would wait for 30 s here, and the test with it.
    done = curl(
        "/", flag, "-d", "hello", "-H", "Expect: 100-continue", "--expect100-timeout", "30", "-m", "20"
    )
    assert done.stdout.startswith(b"hello\n200")


@pytest.mark.parametrize("flag", ["--http1.1", "--http2"])
def test_curl_uploads_and_downloads_much(
    flag: str, curl: Curl, backend: RecordingBackend, tmp_path: Path
) -> None:
    data = bytes(range(256)) * 40_000  # 10 MB
    (tmp_path / "data").write_bytes(data)
    done = curl("/data", flag, "-T", str(tmp_path / "data"))
    body = done.stdout.rsplit(b"\n", 1)[0]
    assert hashlib.sha256(body).hexdigest() == hashlib.sha256(
        b"PUT /data " + data
    ).hexdigest() or body.endswith(data)
    assert backend.requests[0].body == data


def _refuse_at_once(peer: Peer) -> None:
    peer.read_head()
    peer.send(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 8\r\n\r\nno more\n")
    peer.wait_closed()


def test_curl_gets_an_answer_that_comes_before_the_end_of_its_upload(
    curl: Curl, start_backend: StartBackend, tls_proxy: ProxyProcess, service: str, tmp_path: Path
) -> None:
    """curl 7.88 forgets an answer that it reads together with its RST_STREAM."""
    tls_proxy.serve(service, start_backend(_refuse_at_once))
    with (tmp_path / "data").open("wb") as file:
        file.truncate(100_000_000)
    for _ in range(5):
        done = curl("/", "--http2", "-X", "POST", "-T", str(tmp_path / "data"))
        assert done.stdout == b"no more\n\n413 2"


def test_curl_speaks_http2_without_tls(
    need: Need, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    plain_proxy.serve(service, start_backend())
    command = [need("curl"), "-sS", "--noproxy", "*", "--http2-prior-knowledge", "-H", f"Host: {service}"]
    command += ["-w", "%{http_version}", "-m", "60", "-d", "hello", f"http://127.0.0.1:{plain_proxy.port}/"]
    done = subprocess.run(command, capture_output=True, timeout=90, check=False)
    assert done.stdout == b"POST / hello2", done.stderr


# h2load


@pytest.mark.parametrize(
    "flags", [("-c", "8", "-m", "32"), ("-c", "1", "-m", "100"), ("--h1", "-c", "8")], ids=["h2", "one", "h1"]
)
def test_h2load_sees_no_failure(
    flags: tuple[str, ...], need: Need, tls_proxy: ProxyProcess, backend: RecordingBackend, service: str
) -> None:
    command = [need("h2load"), "-n", "2000", *flags, f"--connect-to=127.0.0.1:{tls_proxy.port}"]
    command.append(f"https://{service}:{tls_proxy.port}/load")
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert "2000 done, 2000 succeeded, 0 failed, 0 errored, 0 timeout" in done.stdout, done.stdout
    assert "2000 2xx" in done.stdout


# openssl


def _s_client(program: str, proxy: ProxyProcess, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [program, "s_client", "-connect", f"127.0.0.1:{proxy.port}", *flags]
    return subprocess.run(
        command, input="", capture_output=True, text=True, errors="replace", timeout=30, check=False
    )


@pytest.mark.parametrize(
    ("name", "subject"),
    [
        ("one.other.test", "one.other.test"),
        ("TWO.other.test", "two.other.test"),
        ("any.e2e.test", "*.e2e.test"),
        ("a.b.e2e.test", "*.e2e.test"),
        ("unknown.example", "*.e2e.test"),
    ],
)
def test_openssl_sees_the_certificate_of_the_name_or_the_default(
    name: str, subject: str, need: Need, tls_proxy: ProxyProcess, ca_file: Path
) -> None:
    done = _s_client(need("openssl"), tls_proxy, "-servername", name, "-CAfile", str(ca_file), "-showcerts")
    assert re.search(rf"subject=CN ?= ?{re.escape(subject)}\n", done.stdout), done.stdout
    assert "Verify return code: 0 (ok)" in done.stdout
    assert done.stdout.count("BEGIN CERTIFICATE") >= 2, "the chain is incomplete"


def test_openssl_sees_the_default_certificate_without_a_name(need: Need, tls_proxy: ProxyProcess) -> None:
    done = _s_client(need("openssl"), tls_proxy, "-noservername")
    assert re.search(r"subject=CN ?= ?\*\.e2e\.test\n", done.stdout)


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [("h2,http/1.1", "h2"), ("http/1.1,h2", "h2"), ("http/1.1", "http/1.1"), ("h2", "h2")],
)
def test_openssl_agrees_on_a_protocol(offered: str, chosen: str, need: Need, tls_proxy: ProxyProcess) -> None:
    done = _s_client(need("openssl"), tls_proxy, "-servername", "a.e2e.test", "-alpn", offered)
    assert f"ALPN protocol: {chosen}\n" in done.stdout


def test_openssl_is_served_from_tls_1_2_on(need: Need, tls_proxy: ProxyProcess) -> None:
    program = need("openssl")
    for flag, version in (("-tls1_2", "TLSv1.2"), ("-tls1_3", "TLSv1.3")):
        done = _s_client(program, tls_proxy, flag, "-servername", "a.e2e.test")
        assert f"New, {version}" in done.stdout
    for flag in ("-tls1", "-tls1_1"):
        done = _s_client(program, tls_proxy, flag, "-cipher", "ALL:@SECLEVEL=0", "-servername", "a.e2e.test")
        assert "New, (NONE)" in done.stdout
        assert done.returncode != 0


# The h2 package


def test_the_h2_package_sees_no_violation(
    tls_proxy: ProxyProcess, backend: RecordingBackend, authority: Authority, service: str
) -> None:
    """Its state machine raises on everything that RFC 9113 forbids a server."""
    connection = h2.connection.H2Connection()
    bodies: dict[int, bytes] = {}
    ended: set[int] = set()
    upload = b"x" * 200_000
    tls = client_context(authority.pem, "h2")
    with (
        socket.create_connection(("127.0.0.1", tls_proxy.port), timeout=60) as raw,
        tls.wrap_socket(raw, server_hostname=service) as sock,
    ):
        connection.initiate_connection()
        head = [(":method", "GET"), (":scheme", "https"), (":authority", service)]
        for i in range(20):
            connection.send_headers(1 + 2 * i, [*head, (":path", f"/{i}")], end_stream=True)
        connection.send_headers(41, [(":method", "POST"), *head[1:], (":path", "/up")])
        left = upload
        while len(ended) < 21:
            while left and connection.local_flow_control_window(41):
                size = min(connection.local_flow_control_window(41), connection.max_outbound_frame_size)
                connection.send_data(41, left[:size], end_stream=len(left) <= size)
                left = left[size:]
            sock.sendall(connection.data_to_send())
            data = sock.recv(65536)
            assert data, "closed"
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.DataReceived):
                    assert event.data is not None
                    assert event.stream_id is not None
                    bodies[event.stream_id] = bodies.get(event.stream_id, b"") + event.data
                    connection.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id)
                elif isinstance(event, h2.events.StreamEnded):
                    assert event.stream_id is not None
                    ended.add(event.stream_id)
                assert not isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated)
        connection.close_connection()
        sock.sendall(connection.data_to_send())
    assert [bodies[1 + 2 * i] for i in range(20)] == [b"GET /%d " % i for i in range(20)]
    assert bodies[41] == b"POST /up " + upload


def test_tls_sessions_are_resumed(tls_proxy: ProxyProcess, authority: Authority) -> None:
    tls = client_context(authority.pem, "http/1.1")
    tls.maximum_version = ssl.TLSVersion.TLSv1_2  # here the ticket comes with the handshake
    session = None
    for turn in range(2):
        with (
            socket.create_connection(("127.0.0.1", tls_proxy.port), timeout=60) as raw,
            tls.wrap_socket(raw, server_hostname="a.e2e.test", session=session) as sock,
        ):
            session = sock.session
            assert sock.session_reused == bool(turn)
