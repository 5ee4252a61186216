"""SIGUSR2: the new version beside the running one, under load, and what happens when it does not come up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import websockets.sync.server
from websockets.exceptions import ConnectionClosed

from tests.e2e.backends import RecordingBackend
from tests.e2e.certificates import Authority, client_context
from tests.e2e.conftest import StartBackend
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.steady_load import SteadyLoad, answers
from tests.e2e.waiting import eventually

#: Long enough for the slow downloads of the load.
DRAIN = "[timeouts]\ndrain = 6\nshutdown = 3\n"


@pytest.fixture
def chat_backend() -> Iterator[int]:
    """The port of a WebSocket server that echoes."""

    def echo(connection: websockets.sync.server.ServerConnection) -> None:
        try:
            for message in connection:
                connection.send(message)
        except ConnectionClosed:
            return

    with websockets.sync.server.serve(echo, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.socket.getsockname()[1]
        server.shutdown()
        thread.join(20)


class Upgraded:
    """A TLS proxy that is upgraded, and the load on it."""

    def __init__(
        self, folder: Path, certificates: Path, workers: str, *flags: str, toml: str = DRAIN
    ) -> None:
        self.proxy = ProxyProcess(
            folder, certificates=certificates, toml=toml, flags=("--workers", workers, *flags)
        )

    def upgrade(self) -> None:
        """SIGUSR2, and wait until the new version serves and the main process is the new one too."""
        done = self.times("upgraded: the new version serves")
        self.proxy.signal(signal.SIGUSR2)
        eventually(lambda: self.times("upgraded: the new version serves") > done, "it is upgraded")

    def times(self, said: str) -> int:
        """How often the log says that."""
        return self.proxy.operator_log().count(said)

    def descendants(self) -> list[int]:
        """The pids of all processes below the main one."""
        return _descendants(self.proxy.pid)

    def is_alone(self) -> bool:
        """Whether all former generations have ended."""
        return len(_children(self.proxy.pid)) == 1


def _children(pid: int) -> list[int]:
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _descendants(pid: int) -> list[int]:
    found = []
    for child in _children(pid):
        found += [child, *_descendants(child)]
    return found


@pytest.fixture(params=["1", "2"])
def upgraded(request: pytest.FixtureRequest, tmp_path: Path, certificate_folder: Path) -> Iterator[Upgraded]:
    one = Upgraded(tmp_path / "upgraded", certificate_folder, request.param)
    one.proxy.start()
    yield one
    one.proxy.kill()


def _load(
    upgraded: Upgraded, authority: Authority, backend: RecordingBackend, service: str, chat: int
) -> SteadyLoad:
    upgraded.proxy.serve(service, backend)
    upgraded.proxy.register(f"chat-{service}", "127.0.0.1", chat)
    clients = client_context(authority.pem, "http/1.1")
    return SteadyLoad(
        upgraded.proxy, service, clients, client_context(authority.pem, "h2"), f"chat-{service}"
    )


def test_upgrades_under_load_lose_no_request_and_no_registration(
    upgraded: Upgraded, authority: Authority, start_backend: StartBackend, service: str, chat_backend: int
) -> None:
    proxy, pid = upgraded.proxy, upgraded.proxy.pid
    with _load(upgraded, authority, start_backend(answers), service, chat_backend) as load:
        first = upgraded.descendants()
        for _ in range(2):
            upgraded.upgrade()
            load.goes_on()
        eventually(lambda: not set(first) & set(upgraded.descendants()), "the first version has ended")
        load.goes_on()
    assert load.lost == []
    found = {each["service_name"] for each in proxy.call("GET", "/backends").json["services"]}
    assert found >= {service, *load.registered}
    eventually(upgraded.is_alone, "the former generations have ended")
    assert proxy.pid == pid
    assert proxy.metric("portero_requests_in_flight") == 0
    proxy.stop()
