"""Fixtures of the end-to-end suite: proxies that are shared, backends and service names of one's own.

One plain and one TLS proxy serve a whole session (one each per xdist worker); a test takes a service name
of its own and cannot see the others. After each test the shared proxy must still run, and its log must show
no fault.
Tests that need flags, times or signals of their own start a proxy with `start_proxy`.
"""

from __future__ import annotations

import itertools
import re
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest
import websockets.sync.server
from websockets.exceptions import ConnectionClosed

from tests.e2e.backend_process import BackendProcess
from tests.e2e.backends import RecordingBackend, Script, echo_each
from tests.e2e.certificates import Authority, client_context
from tests.e2e.http1_client import Http1Client
from tests.e2e.proxy_process import ProxyProcess

#: Times short enough for tests that leave connections behind at the end.
SHORT_GOODBYE = "[timeouts]\ndrain = 2\nshutdown = 2\n"

#: Finds a peer's program, or skips the test.
Need = Callable[[str], str]
#: Runs curl for a path, with flags.
Curl = Callable[..., subprocess.CompletedProcess[bytes]]

_numbers = itertools.count(1)


class StartBackend(Protocol):
    """Start a backend that ends with the test."""

    def __call__(
        self, script: Script = echo_each, *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
    ) -> RecordingBackend: ...


class StartProxy(Protocol):
    """Start a proxy that ends with the test."""

    def __call__(
        self,
        *,
        tls: bool = False,
        toml: str = SHORT_GOODBYE,
        flags: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> ProxyProcess: ...


#: Start a backend as a process, which ends with the test.
StartProcess = Callable[[str], BackendProcess]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is end to end."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def authority() -> Authority:
    """Signs every certificate of the session."""
    return Authority()


@pytest.fixture(scope="session")
def certificate_folder(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`*.e2e.test` (the default certificate), and two names with certificates of their own."""
    folder = tmp_path_factory.mktemp("certs")
    authority.issue("*.e2e.test", "e2e.test").write(folder / "_wildcard.e2e.test")
    authority.issue("one.other.test").write(folder / "one.other.test")
    authority.issue("two.other.test").write(folder / "two.other.test")
    return folder


@pytest.fixture(scope="session")
def shared_plain_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxyProcess]:
    """The session's proxy without TLS."""
    proxy = ProxyProcess(tmp_path_factory.mktemp("plain"), toml=SHORT_GOODBYE)
    yield from _run(proxy)


@pytest.fixture(scope="session")
def shared_tls_proxy(
    tmp_path_factory: pytest.TempPathFactory, certificate_folder: Path
) -> Iterator[ProxyProcess]:
    """The session's proxy with TLS."""
    proxy = ProxyProcess(tmp_path_factory.mktemp("tls"), certificates=certificate_folder, toml=SHORT_GOODBYE)
    yield from _run(proxy)


@pytest.fixture
def plain_proxy(shared_plain_proxy: ProxyProcess) -> Iterator[ProxyProcess]:
    """The shared proxy without TLS, judged after the test."""
    yield from _judged(shared_plain_proxy)


@pytest.fixture
def tls_proxy(shared_tls_proxy: ProxyProcess) -> Iterator[ProxyProcess]:
    """The shared proxy with TLS, judged after the test."""
    yield from _judged(shared_tls_proxy)


@pytest.fixture
def start_process() -> Iterator[StartProcess]:
    """Start backends as processes; each is killed after the test."""
    with ExitStack() as stack:

        def start(name: str) -> BackendProcess:
            backend = BackendProcess(name)
            stack.callback(backend.close)
            return backend

        yield start


@pytest.fixture
def start_proxy(tmp_path: Path, certificate_folder: Path) -> Iterator[StartProxy]:
    """Start proxies of one's own; each is stopped and judged after the test."""
    proxies: list[ProxyProcess] = []

    def start(
        *,
        tls: bool = False,
        toml: str = SHORT_GOODBYE,
        flags: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> ProxyProcess:
        proxy = ProxyProcess(
            tmp_path / f"proxy-{len(proxies)}",
            certificates=certificate_folder if tls else None,
            toml=toml,
            flags=flags,
            environment=environment,
        )
        proxies.append(proxy)
        return proxy.start()

    yield start
    _stop_all(proxies)


@pytest.fixture
def start_backend() -> Iterator[StartBackend]:
    """Start backends; each is closed after the test, and what its script found wrong is raised."""
    backends: list[RecordingBackend] = []

    def start(
        script: Script = echo_each, *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
    ) -> RecordingBackend:
        backend = RecordingBackend(script, host=host, tls=tls)
        backends.append(backend)
        return backend

    yield start
    for backend in backends:
        backend.close()


@pytest.fixture
def service(request: pytest.FixtureRequest) -> str:
    """A service name that no other test uses, covered by the wildcard certificate."""
    words = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")
    return f"{words[:40].strip('-')}-{next(_numbers)}.e2e.test"


@pytest.fixture
def client_tls(authority: Authority) -> ssl.SSLContext:
    """A verifying HTTP/1.1 client."""
    return client_context(authority.pem, "http/1.1")


@pytest.fixture
def connect_tls(tls_proxy: ProxyProcess, client_tls: ssl.SSLContext) -> Callable[[str], Http1Client]:
    """Open HTTP/1.1 connections to the TLS proxy for a name."""

    def connect(name: str) -> Http1Client:
        return Http1Client(("127.0.0.1", tls_proxy.port), tls=client_tls, sni=name)

    return connect


@pytest.fixture
def need() -> Need:
    """The path of a peer's program; the test is skipped where it is not installed."""

    def find(program: str) -> str:
        path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")
        if path is None:
            pytest.skip(f"{program} is not installed")
        return path

    return find


@pytest.fixture
def ca_file(authority: Authority, tmp_path: Path) -> Path:
    """The authority's certificate, for programs."""
    path = tmp_path / "ca.pem"
    path.write_bytes(authority.pem)
    return path


@pytest.fixture
def curl(need: Need, tls_proxy: ProxyProcess, ca_file: Path, service: str) -> Curl:
    """Run curl for a path of the test's service; its output is the body, then status and version."""
    program = need("curl")

    def run(path: str, *flags: str, to: str = "127.0.0.1") -> subprocess.CompletedProcess[bytes]:
        url = f"https://{service}:{tls_proxy.port}{path}"
        resolve = f"{service}:{tls_proxy.port}:{to}"
        command = [program, "-sS", "--cacert", str(ca_file), "--resolve", resolve, "--noproxy", "*"]
        command += ["-w", "\n%{http_code} %{http_version}", "-m", "60", *flags, url]
        done = subprocess.run(command, capture_output=True, timeout=90, check=False)
        assert done.returncode == 0, done.stderr
        return done

    return run


# Private


def _run(proxy: ProxyProcess) -> Iterator[ProxyProcess]:
    proxy.start()
    try:
        yield proxy
        proxy.stop()
    finally:
        if proxy.is_running:
            proxy.kill()


def _judged(proxy: ProxyProcess) -> Iterator[ProxyProcess]:
    assert proxy.is_running, "an earlier test ended the shared proxy"
    yield proxy
    assert proxy.is_running, f"the proxy died:\n{proxy.log()[-4000:]}"
    proxy.assert_no_fault()


def _stop_all(proxies: list[ProxyProcess]) -> None:
    try:
        for proxy in proxies:
            proxy.stop()
    finally:
        for proxy in proxies:
            if proxy.is_running:
                proxy.kill()


@pytest.fixture
def chat_backend() -> Iterator[int]:
    """The port of a WebSocket server that echoes."""

    def echo(connection: websockets.sync.server.ServerConnection) -> None:
        try:
            for message in connection:
                connection.send(message)
        except ConnectionClosed:
            return

    with websockets.sync.server.serve(echo, "127.0.0.1", 0, max_size=1 << 24, server_header=None) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.socket.getsockname()[1]
        server.shutdown()
        thread.join(60)
