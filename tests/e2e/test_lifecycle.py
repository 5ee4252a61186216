"""The life of the process: start-up errors, signals, drain, systemd, certificates that change, churn."""

from __future__ import annotations

import random
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.backends import Peer, RecordingBackend, Script, in_turn, ok
from tests.e2e.certificates import Authority, client_context
from tests.e2e.conftest import StartBackend, StartProxy
from tests.e2e.http1_client import Http1Client, get
from tests.e2e.http2_client import NO_ERROR, Answer, Http2Client, fields_of
from tests.e2e.messages import Closed, Truncated
from tests.e2e.proxy_process import KEY, SECRET, ProxyProcess, clean_environment, free_port, registration
from tests.e2e.waiting import eventually

GENEROUS = "[timeouts]\ndrain = 20\nshutdown = 5\n"


def _wait_for(gate: threading.Event) -> Script:
    """Answer each request when the gate is open."""

    def script(peer: Peer) -> None:
        while True:
            request = peer.read_request()
            gate.wait(20)
            peer.send(ok(b"%b done" % request.path, request))

    return script


# SIGTERM


def _refuses(proxy: ProxyProcess) -> bool:
    try:
        with proxy.connect():
            return False
    except ConnectionRefusedError:
        return True


def test_sigterm_lets_the_exchanges_in_flight_finish(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    gate = threading.Event()
    proxy, backend = start_proxy(toml=GENEROUS), start_backend(_wait_for(gate))
    proxy.register(service, backend.host, backend.port)
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
    assert proxy.wait(10) == 0


def test_sigterm_says_goaway_and_lets_the_streams_finish(
    start_proxy: StartProxy, start_backend: StartBackend, authority: Authority, service: str
) -> None:
    gate = threading.Event()
    proxy, backend = start_proxy(tls=True, toml=GENEROUS), start_backend(_wait_for(gate))
    proxy.register(service, backend.host, backend.port)
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
    assert proxy.wait(10) == 0


@pytest.mark.parametrize("kind", ["http/1.1", "h2", "silent"])
def test_idle_clients_do_not_hold_up_the_end(
    kind: str, start_proxy: StartProxy, start_backend: StartBackend, authority: Authority, service: str
) -> None:
    """Not even those that take no notice of GOAWAY or of the end of TLS."""
    proxy, backend = start_proxy(tls=True, toml=GENEROUS), start_backend()
    proxy.register(service, backend.host, backend.port)
    address = ("127.0.0.1", proxy.port)
    if kind == "h2":
        with Http2Client(address, client_context(authority.pem, "h2"), service) as second:
            assert second.ask(fields_of(service)).status == 200
            proxy.signal(signal.SIGTERM)
            assert proxy.wait(16) == 0
        return
    with Http1Client(address, tls=client_context(authority.pem, "http/1.1"), sni=service) as first:
        if kind != "silent":
            assert first.ask(get(service)).status == 200
        proxy.signal(signal.SIGTERM)
        assert proxy.wait(16) == 0


def test_a_hanging_exchange_is_cut_off_when_its_time_is_over(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    gate = threading.Event()
    proxy = start_proxy(toml="[timeouts]\ndrain = 0.5\nshutdown = 1\n")
    backend = start_backend(_wait_for(gate))
    proxy.register(service, backend.host, backend.port)
    with proxy.connect() as client:
        client.send(get(service))
        eventually(lambda: backend.requests, "the request is at the backend")
        proxy.signal(signal.SIGTERM)
        assert proxy.wait(8) == 0
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
    proxy.register(service, backend.host, backend.port)
    with proxy.connect() as client:
        assert client.ask(get(service, "/", "Connection: Upgrade", "Upgrade: chat")).status == 101
        assert client.read_some() == b"hello"
        proxy.signal(signal.SIGTERM)
        assert proxy.wait(8) == 0
        assert client.read_all() == b""


def test_backends_may_register_and_renew_until_the_end(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    gate = threading.Event()
    proxy, backend = start_proxy(toml=GENEROUS), start_backend(_wait_for(gate))
    proxy.register(service, backend.host, backend.port)
    with proxy.connect() as client:
        client.send(get(service))
        eventually(lambda: backend.requests, "the request is at the backend")
        proxy.signal(signal.SIGTERM)
        eventually(lambda: proxy.call("GET", "/readyz").status == 503, "it says that it is not ready")
        assert proxy.call("GET", "/livez").status == 200
        proxy.register(service, backend.host, backend.port)
        gate.set()
        assert client.read_response().status == 200
    assert proxy.wait(10) == 0


# Start-up errors


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which somebody else listens."""
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        yield taken.getsockname()[1]


def _start_up(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    secrets = {"PORTERO_REGISTER_SECRET": SECRET, "PORTERO_JWT_HMAC_KEY": KEY, **environment}
    return subprocess.run(
        [sys.executable, "-m", "portero_py", *flags],
        env=clean_environment({name: value for name, value in secrets.items() if value}),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def _says(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit status 2 and one line that says what is wrong."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if " WARNING " not in line and " INFO " not in line]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def _plain(*flags: str, port: int | None = None, register: str = "") -> list[str]:
    listen, register = f"127.0.0.1:{port or free_port()}", register or f"127.0.0.1:{free_port()}"
    return ["--no-tls", "--listen-addr", listen, "--register-addr", register, *flags]


def test_a_bad_address_is_one_line(tmp_path: Path) -> None:
    _says(_start_up("--no-tls", "--listen-addr", "nonsense"), "listen-addr", "nonsense")
    _says(_start_up("--no-tls", "--listen-addr", "127.0.0.1:99999"), "listen-addr", "99999")
    _says(_start_up("--no-tls", "--register-addr", "[::1:80"), "register-addr")


def test_a_taken_port_is_one_line(taken_port: int) -> None:
    _says(_start_up(*_plain(port=taken_port)), "listen-addr", str(taken_port))
    flags = (
        "--no-tls",
        "--listen-addr",
        f"127.0.0.1:{free_port()}",
        "--register-addr",
        f"127.0.0.1:{taken_port}",
    )
    _says(_start_up(*flags), "register-addr", str(taken_port))


def test_a_missing_secret_is_one_line() -> None:
    _says(_start_up(*_plain(), PORTERO_REGISTER_SECRET=""), "register-secret")
    _says(_start_up(*_plain(), PORTERO_JWT_HMAC_KEY=""), "jwt-hmac-key")


def test_the_example_secret_is_refused_outside_loopback() -> None:
    flags = (
        "--no-tls",
        "--listen-addr",
        f"127.0.0.1:{free_port()}",
        "--register-addr",
        f"0.0.0.0:{free_port()}",
    )
    _says(_start_up(*flags, PORTERO_REGISTER_SECRET="changeme"), "changeme")
    _says(_start_up(*flags, PORTERO_JWT_HMAC_KEY="changeme"), "changeme")


def test_a_certificate_directory_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    flags = ("--listen-addr", f"127.0.0.1:{free_port()}", "--register-addr", f"127.0.0.1:{free_port()}")
    (tmp_path / "file").write_text("no directory")
    for path in (tmp_path / "file", tmp_path / "missing"):
        _says(_start_up(*flags, "--tls-cert-dir", str(path)), str(path))


def test_an_unknown_key_names_the_nearest_known_one(tmp_path: Path) -> None:
    file = tmp_path / "portero.toml"
    file.write_text("[timeouts]\nkeepalive = 5\n")
    _says(_start_up(*_plain("--config", str(file))), str(file), "keepalive", "keep_alive")
    file.write_text("[timeouts\n")
    _says(_start_up(*_plain("--config", str(file))), str(file))
    file.write_text('[timeouts]\nhead = "soon"\n')
    _says(_start_up(*_plain("--config", str(file))), "head")
    _says(_start_up(*_plain("--config", str(tmp_path / "missing.toml"))), "missing.toml")


def test_a_bad_flag_ends_with_status_2() -> None:
    for flags in (
        ("--no-such-flag",),
        ("--workers", "0"),
        ("--workers", "many"),
        ("--tls-min-version", "1.0"),
    ):
        done = _start_up(*_plain(*flags))
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert flags[0].lstrip("-") in done.stderr


def test_a_secret_file_that_is_missing_is_one_line(tmp_path: Path) -> None:
    file = str(tmp_path / "secret")
    _says(_start_up(*_plain(), PORTERO_REGISTER_SECRET="", PORTERO_REGISTER_SECRET_FILE=file), file)


def test_check_says_what_it_found_and_starts_nothing(certificate_folder: Path, tmp_path: Path) -> None:
    flags = ("--check", "--listen-addr", f"127.0.0.1:{free_port()}")
    done = _start_up(*flags, "--tls-cert-dir", str(certificate_folder))
    assert done.returncode == 0, done.stderr
    for name in ("*.e2e.test", "one.other.test", "two.other.test"):
        assert name in done.stdout
    (tmp_path / "broken.test").mkdir()
    (tmp_path / "broken.test" / "fullchain.pem").write_text("no certificate")
    done = _start_up(*flags, "--tls-cert-dir", str(tmp_path))
    assert done.returncode == 2
    assert "broken.test" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


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
            proxy.register(service, backend.host, backend.port)
            with proxy.connect() as client:
                assert client.ask(get(service)).status == 200
            proxy.stop()
        finally:
            proxy.kill()


# Certificates that change


def _serial(proxy: ProxyProcess, authority: Authority, name: str) -> int:
    tls = client_context(authority.pem, "http/1.1")
    with Http1Client(("127.0.0.1", proxy.port), tls=tls, sni=name) as client:
        assert isinstance(client.socket, ssl.SSLSocket)
        found = client.socket.getpeercert()
        assert found is not None
        return int(str(found["serialNumber"]), 16)


@pytest.fixture
def own_certificates(tmp_path: Path, authority: Authority) -> Path:
    """A certificate directory that the test may change."""
    folder = tmp_path / "own-certificates"
    authority.issue("a.own.test").write(folder / "a.own.test")
    return folder


@pytest.fixture
def own_proxy(tmp_path: Path, own_certificates: Path) -> Iterator[ProxyProcess]:
    """A TLS proxy on it."""
    proxy = ProxyProcess(
        tmp_path / "own-proxy", certificates=own_certificates, toml="[timeouts]\ndrain = 1\nshutdown = 1\n"
    )
    proxy.start()
    try:
        yield proxy
        proxy.stop()
    finally:
        proxy.kill()


@pytest.mark.parametrize("told", [True, False], ids=["after SIGHUP", "by itself"])
def test_a_changed_certificate_is_served_and_live_connections_go_on(
    told: bool,
    own_proxy: ProxyProcess,
    own_certificates: Path,
    authority: Authority,
    start_backend: StartBackend,
) -> None:
    backend = start_backend()
    own_proxy.register("a.own.test", backend.host, backend.port)
    tls = client_context(authority.pem, "http/1.1")
    with Http1Client(("127.0.0.1", own_proxy.port), tls=tls, sni="a.own.test") as live:
        assert live.ask(get("a.own.test", "/1")).status == 200
        pair = authority.issue("a.own.test")
        pair.write(own_certificates / "a.own.test")
        authority.issue("b.own.test").write(own_certificates / "b.own.test")
        if told:
            own_proxy.signal(signal.SIGHUP)
        eventually(lambda: _serial(own_proxy, authority, "a.own.test") == pair.serial, "the new certificate")
        eventually(lambda: _covers(own_proxy, authority, "b.own.test"), "the added certificate")
        assert live.ask(get("a.own.test", "/2")).status == 200


def _covers(proxy: ProxyProcess, authority: Authority, name: str) -> bool:
    try:
        return _serial(proxy, authority, name) > 0
    except ssl.SSLCertVerificationError:
        return False


def test_a_bad_pair_never_replaces_a_good_one(
    own_proxy: ProxyProcess, own_certificates: Path, authority: Authority
) -> None:
    before = _serial(own_proxy, authority, "a.own.test")
    folder = own_certificates / "a.own.test"
    (folder / "privkey.pem").write_bytes(authority.issue("a.own.test").key)  # of another certificate
    authority.issue("b.own.test").write(own_certificates / "b.own.test")
    own_proxy.signal(signal.SIGHUP)
    eventually(lambda: _covers(own_proxy, authority, "b.own.test"), "the others are loaded all the same")
    assert _serial(own_proxy, authority, "a.own.test") == before
    (folder / "fullchain.pem").write_bytes(b"-----BEGIN CERTIFICATE-----\nhalf")
    own_proxy.signal(signal.SIGHUP)
    eventually(lambda: _errors_about(own_proxy, "a.own.test"), "the log says why")
    assert _serial(own_proxy, authority, "a.own.test") == before


@pytest.mark.slow
def test_no_handshake_fails_while_certificates_change_under_load(
    own_proxy: ProxyProcess, own_certificates: Path, authority: Authority, start_backend: StartBackend
) -> None:
    backend = start_backend()
    own_proxy.register("a.own.test", backend.host, backend.port)
    pairs = [authority.issue("a.own.test") for _ in range(10)]
    failures: list[BaseException] = []
    done = threading.Event()
    served = [0]

    def load() -> None:
        tls = client_context(authority.pem, "http/1.1")
        while not done.is_set():
            try:
                with Http1Client(("127.0.0.1", own_proxy.port), tls=tls, sni="a.own.test") as client:
                    assert client.ask(get("a.own.test")).status == 200
                served[0] += 1
            except (AssertionError, Closed, Truncated, OSError) as failure:
                failures.append(failure)
                return

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    try:
        for pair in pairs:
            pair.write(own_certificates / "a.own.test")
            own_proxy.signal(signal.SIGHUP)
            eventually(
                lambda wanted=pair.serial: _serial(own_proxy, authority, "a.own.test") == wanted,  # type: ignore[misc]
                "the new certificate",
            )
    finally:
        done.set()
        thread.join(20)
    assert not failures
    assert served[0] > 10


# Churn


@pytest.mark.slow
def test_no_request_fails_while_a_hundred_backends_renew_a_thousand_leases(
    start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    proxy = start_proxy(environment={"PORTERO_ACCESS_LOG": "off"})
    # One listener on every loopback address plays a hundred backends of ten services each.
    backend: RecordingBackend = start_backend(host="0.0.0.0")
    leases = [(f"s{i}.churn.test", f"127.0.0.{1 + i % 100}") for i in range(1000)]
    for name, host in leases:
        proxy.register(name, host, backend.port, ttl_seconds=60)
    assert proxy.metric("portero_registry_services") == 1000
    failures: list[str] = []
    renewed, served = [0], [0]
    done = threading.Event()
    source = random.Random(7)  # the same order in every run

    def load(number: int) -> None:
        names = [name for name, _ in leases]
        source.shuffle(names)
        with proxy.connect() as client:
            while not done.is_set():
                name = names[served[0] % 1000]
                response = client.ask(get(name, f"/{number}"))
                served[0] += 1
                if (response.status, response.body) != (200, b"GET /%d " % number):
                    failures.append(f"{name}: {response.status} {response.body!r}")
                    return

    threads = [threading.Thread(target=load, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    try:
        for name, host in leases:
            body = registration(name, host, backend.port, ttl_seconds=60)
            assert proxy.call("POST", "/register", body).status == 200
            renewed[0] += 1
    finally:
        done.set()
        for thread in threads:
            thread.join(20)
    assert failures == []
    assert renewed[0] == 1000
    assert served[0] > 500
    assert proxy.metric("portero_registry_services") == 1000


def test_a_restart_of_a_backend_costs_no_request_while_another_one_serves(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    """Deregister, close, start anew, register: as a rolling update does."""
    proxy = start_proxy()
    steady = start_backend()
    proxy.register(service, steady.host, steady.port)
    with proxy.connect() as client:
        for turn in range(5):
            backend = RecordingBackend(in_turn(_wait_for(_open_gate())))
            proxy.register(service, backend.host, backend.port, instance_id="rolling")
            for i in range(10):
                assert client.ask(get(service, f"/{turn}/{i}")).status == 200
            proxy.deregister(service, instance_id="rolling")
            backend.close()
            for i in range(10):
                assert client.ask(get(service, f"/{turn}/after/{i}")).status == 200


# Private


def _errors_about(proxy: ProxyProcess, name: str) -> list[str]:
    return [line for line in proxy.operator_log().splitlines() if " ERROR " in line and name in line]


def _open_gate() -> threading.Event:
    gate = threading.Event()
    gate.set()
    return gate
