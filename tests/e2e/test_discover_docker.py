"""`portero-py discover docker` between a Docker API on a unix socket and a real proxy that serves requests.

The containers are backends of the tests, on loopback addresses; tests/slow has a real dockerd.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.client.discovery.fake_docker import FakeDocker
from tests.e2e.asking import Asking
from tests.e2e.backends import Peer, RecordingBackend, ok
from tests.e2e.conftest import StartProxy
from tests.e2e.discover_process import DiscoverProcess
from tests.e2e.http1_client import get
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.waiting import PATIENCE, eventually

T = TypeVar("T")

SERVICE = "app.e2e.test"


class DockerThread:
    """A Docker in a thread of its own, and backends that are its containers."""

    def __init__(self, path: Path) -> None:
        self.backends: dict[str, RecordingBackend] = {}
        self.answering: dict[str, set[Peer]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._docker = FakeDocker(path)
        asyncio.run_coroutine_threadsafe(self._docker.open(), self._loop).result(PATIENCE)

    @property
    def host(self) -> str:
        return self._docker.host

    def do(self, work: Callable[[FakeDocker], T]) -> T:
        """Work on it in its own thread."""

        async def done() -> T:
            return work(self._docker)

        return asyncio.run_coroutine_threadsafe(done(), self._loop).result(PATIENCE)

    def run(self, name: str, **more: Any) -> None:
        """A container that answers with its name."""

        self.answering[name] = set()

        def answer(peer: Peer) -> None:
            while True:
                request = peer.read_request(lambda head: self.answering[name].add(peer))
                time.sleep(0.2 if request.path == b"/slow" else 0)
                peer.send(ok(name.encode(), request))
                self.answering[name].discard(peer)

        backend = self.backends[name] = RecordingBackend(answer)
        labels = {"portero.service": SERVICE, "portero.port": str(backend.port)}
        self.do(lambda docker: docker.start(name, labels, networks={"bridge": "127.0.0.1"}, **more))

    def remove(self, name: str, proxy: ProxyProcess) -> None:
        """`docker stop` and `docker rm` of one that ends when what it was asked is answered."""
        self.do(lambda docker: docker.signal(name, 15))
        # Its grace: it serves on until its last answer is out.
        backend = self.backends.pop(name)
        eventually(lambda: backend.port not in ports(proxy), f"{name} takes nothing new")
        eventually(lambda: not self.answering[name], f"{name} has answered")
        backend.close()
        self.do(lambda docker: docker.end(name, remove=True))

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._docker.close(), self._loop).result(PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()
        for backend in self.backends.values():
            backend.close()


def ports(proxy: ProxyProcess) -> set[int]:
    """The ports of the backends that may be asked."""
    listing = proxy.call("GET", "/backends").json
    return {each["port"] for service in listing["services"] for each in service["backends"]}


@pytest.fixture
def docker(tmp_path: Path) -> Iterator[DockerThread]:
    found = DockerThread(tmp_path / "docker.sock")
    yield found
    found.close()


@pytest.fixture
def proxy(start_proxy: StartProxy) -> ProxyProcess:
    return start_proxy(environment={"PORTERO_ACCESS_LOG": "off"})


def test_replicas_come_and_go_and_no_request_is_lost(
    tmp_path: Path, docker: DockerThread, proxy: ProxyProcess
) -> None:
    docker.run("one")
    docker.run("two")
    with DiscoverProcess(tmp_path, proxy, docker.host):
        eventually(lambda: len(ports(proxy)) == 2, "two replicas")
        with Asking(proxy, SERVICE) as asking, Asking(proxy, SERVICE, "/slow") as slow:
            asking.goes_to(b"one", b"two")
            for name in ("three", "four"):
                docker.run(name)
            asking.goes_to(b"one", b"two", b"three", b"four")
            for former, name in (("one", "five"), ("two", "six"), ("three", "seven")):
                docker.remove(former, proxy)
                docker.run(name, health="starting")
                docker.do(lambda docker, name=name: docker.health(name, "healthy"))  # type: ignore[misc]
                asking.goes_to(name.encode())
            docker.remove("four", proxy)
            docker.remove("five", proxy)
            asking.goes_to(b"six", b"seven")
            slow.goes_on(10)
    assert asking.lost + slow.lost == []


def test_one_that_dies_without_a_word_costs_what_was_with_it_at_most(
    tmp_path: Path, docker: DockerThread, proxy: ProxyProcess
) -> None:
    docker.run("one")
    docker.run("two")
    with DiscoverProcess(tmp_path, proxy, docker.host):
        eventually(lambda: len(ports(proxy)) == 2, "two replicas")
        with Asking(proxy, SERVICE) as asking:
            asking.goes_to(b"one", b"two")
            docker.backends.pop("one").close()
            docker.do(lambda docker: docker.end("one"))
            eventually(lambda: len(ports(proxy)) == 1, "the other one alone")
            asking.goes_on()
    # These are GETs: what was with it is asked for again at the other one.
    assert asking.lost == []


@pytest.mark.slow
def test_it_is_restarted_and_killed_and_docker_too_and_no_request_is_lost(
    tmp_path: Path, docker: DockerThread, proxy: ProxyProcess
) -> None:
    docker.run("one")
    docker.run("two")
    discover = DiscoverProcess(tmp_path, proxy, docker.host).start()
    eventually(lambda: len(ports(proxy)) == 2, "two replicas")
    with Asking(proxy, SERVICE) as asking:
        asking.goes_to(b"one", b"two")
        discover.stop()
        asking.goes_to(b"one", b"two")
        discover.start()
        discover.crash()
        asking.goes_to(b"one", b"two")
        discover.start()
        docker.do(lambda docker: docker.break_streams())
        docker.run("three")
        asking.goes_to(b"one", b"two", b"three")
        discover.stop()
    assert asking.lost == []


def test_leases_end_by_themselves_when_it_is_dead(
    tmp_path: Path, docker: DockerThread, proxy: ProxyProcess
) -> None:
    docker.run("one")
    discover = DiscoverProcess(tmp_path, proxy, docker.host, ("--ttl", "5")).start()
    eventually(lambda: len(ports(proxy)) == 1, "it is registered")
    discover.crash()
    eventually(lambda: not ports(proxy), "its lease has ended")


def test_the_proxy_is_restarted_without_its_state_and_everything_comes_back(
    tmp_path: Path, docker: DockerThread, proxy: ProxyProcess
) -> None:
    docker.run("one")
    docker.run("two")
    with DiscoverProcess(tmp_path, proxy, docker.host) as discover:
        eventually(lambda: len(ports(proxy)) == 2, "both are registered")
        proxy.stop()
        eventually(lambda: "does not answer" in discover.log(), "the proxy is missed")
        proxy.start()
        eventually(lambda: len(ports(proxy)) == 2, "both are registered again")
        with proxy.connect() as client:
            assert client.ask(get(SERVICE)).status == 200
