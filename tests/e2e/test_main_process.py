"""What the main process keeps, whom it ends, and who serves when something dies beside an upgrade."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.backends import Peer, RecordingBackend, ok
from tests.e2e.conftest import StartBackend, StartProxy
from tests.e2e.http1_client import get
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.waiting import PATIENCE, eventually

WORKERS = pytest.mark.parametrize("workers", ["1", "2"])
#: Each takes 20 seconds: two workers have their turn in `make test-slow`.
ONE_NOW_BOTH_LATER = pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.minutes)])
DRAIN = "[timeouts]\ndrain = 20\nshutdown = 2\n"


class Gate:
    """A backend that answers when it may."""

    def __init__(self, start: StartBackend) -> None:
        self.opens = threading.Event()
        self.backend: RecordingBackend = start(self._play)

    def _play(self, peer: Peer) -> None:
        while True:
            request = peer.read_request()
            if request.path == b"/waits":
                self.opens.wait(2 * PATIENCE)
            peer.send(ok(b"done", request))


@pytest.fixture
def gate(start_backend: StartBackend) -> Gate:
    return Gate(start_backend)


def children(pid: int) -> list[int]:
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def upgrade(proxy: ProxyProcess) -> None:
    said = "upgraded: the new version serves"
    done = proxy.operator_log().count(said)
    proxy.signal(signal.SIGUSR2)
    eventually(lambda: proxy.operator_log().count(said) > done, "it is upgraded")


def says(proxy: ProxyProcess, line: str) -> Callable[[], bool]:
    return lambda: line in proxy.operator_log()


@ONE_NOW_BOTH_LATER
def test_a_stop_ends_a_new_version_that_hangs(workers: str, start_proxy: StartProxy) -> None:
    proxy = start_proxy(flags=("--workers", workers))
    old = proxy.generation
    proxy.signal(signal.SIGUSR2)
    eventually(lambda: len(children(proxy.pid)) == 2, "the new one is there")
    [new] = [pid for pid in children(proxy.pid) if pid != old]
    os.kill(new, signal.SIGSTOP)
    proxy.signal(signal.SIGTERM)
    assert proxy.wait(20) == 0


@WORKERS
def test_what_is_in_flight_ends_well_when_the_main_process_dies_during_a_stop(
    workers: str, tmp_path: Path, gate: Gate, service: str
) -> None:
    proxy = ProxyProcess(tmp_path / "proxy", toml=DRAIN, flags=("--workers", workers)).start()
    proxy.serve(service, gate.backend)
    with proxy.connect() as client:
        client.send(get(service, "/waits"))
        eventually(lambda: gate.backend.requests, "it is in flight")
        generation = proxy.generation
        proxy.signal(signal.SIGTERM)
        eventually(says(proxy, "stopping: "), "it stops")
        proxy.kill()
        eventually(says(proxy, "the main process is gone"), "it has heard that")
        gate.opens.set()
        assert client.read_response().body == b"done"
    eventually(lambda: not Path(f"/proc/{generation}").exists(), "it has ended")
    assert "ending at once" not in proxy.operator_log()


def test_a_registration_after_the_death_of_a_supervisor_is_the_next_one_s(
    start_proxy: StartProxy, gate: Gate, service: str
) -> None:
    """Though workers of the dead one drain for long."""
    proxy = start_proxy(toml=DRAIN, flags=("--workers", "2"))
    proxy.serve(service, gate.backend)
    with proxy.connect() as client:
        client.send(get(service, "/waits"))
        eventually(lambda: gate.backend.requests, "it is in flight")
        os.kill(proxy.generation, signal.SIGKILL)
        eventually(lambda: proxy.operator_log().count("; 2 workers\n") == 2, "the next one serves")
        eventually(lambda: is_ready(proxy), "it is ready")
        names = [f"s{number}.{service}" for number in range(30)]
        for name in names:
            proxy.register(name, "127.0.0.1", 9)
        for _ in names:  # whoever answers
            found = {each["service_name"] for each in proxy.call("GET", "/backends").json["services"]}
            assert found >= {service, *names}
        gate.opens.set()
        assert client.read_response().body == b"done"
    proxy.stop()


def is_ready(proxy: ProxyProcess) -> bool:
    try:
        return proxy.call("GET", "/readyz").status == 200
    except OSError:
        return False


@WORKERS
def test_what_an_old_worker_has_in_flight_counts_after_two_upgrades(
    workers: str, start_proxy: StartProxy, gate: Gate, service: str
) -> None:
    """Who waits for the end of his last exchange must not be told that there is none."""
    proxy = start_proxy(toml=DRAIN, flags=("--workers", workers))
    proxy.serve(service, gate.backend)
    with proxy.connect() as client:
        client.send(get(service, "/waits"))
        eventually(lambda: gate.backend.requests, "it is in flight")
        for _ in range(2):
            upgrade(proxy)
        where = {"service_name": service, "host": gate.backend.host, "port": gate.backend.port}
        answer = proxy.call("DELETE", "/register", {**where, "wait_seconds": 0.5})
        assert answer.json["in_flight"] == 1
        gate.opens.set()
        assert client.read_response().body == b"done"
    eventually(lambda: len(children(proxy.pid)) == 1, "the former ones have ended")
    proxy.stop()


@pytest.mark.slow
@ONE_NOW_BOTH_LATER
def test_a_drain_that_was_made_longer_while_it_ran_is_as_long_after_an_upgrade(
    workers: str, start_proxy: StartProxy, gate: Gate, service: str
) -> None:
    proxy = start_proxy(toml="[timeouts]\ndrain = 0.5\nshutdown = 0.5\n", flags=("--workers", workers))
    proxy.serve(service, gate.backend)
    (proxy.folder / "portero.toml").write_text("[timeouts]\ndrain = 60\nshutdown = 0.5\n")
    proxy.signal(signal.SIGHUP)
    eventually(says(proxy, "configuration read again"), "it was read")
    with proxy.connect() as client:
        client.send(get(service, "/waits"))
        eventually(lambda: gate.backend.requests, "it is in flight")
        upgrade(proxy)
        assert not threading.Event().wait(18)
        gate.opens.set()
        assert client.read_response().body == b"done"
    proxy.stop()


def test_a_sigusr2_to_all_processes_upgrades_and_kills_no_worker(
    start_proxy: StartProxy, gate: Gate, service: str
) -> None:
    proxy = start_proxy(toml=DRAIN, flags=("--workers", "2"))
    proxy.serve(service, gate.backend)
    with proxy.connect() as client:
        client.send(get(service, "/waits"))
        eventually(lambda: gate.backend.requests, "it is in flight")
        supervisor = proxy.generation
        for pid in (*children(supervisor), supervisor, proxy.pid):
            os.kill(pid, signal.SIGUSR2)
        eventually(says(proxy, "upgraded: the new version serves"), "it is upgraded")
        gate.opens.set()
        assert client.read_response().body == b"done"
    proxy.stop()


def test_a_sighup_that_comes_while_workers_start_is_heeded(tmp_path: Path) -> None:
    proxy = ProxyProcess(tmp_path / "proxy", toml=DRAIN, flags=("--workers", "2"))
    starting = threading.Thread(target=proxy.start)
    starting.start()
    try:
        eventually(lambda: proxy.is_running and children(proxy.pid), "the supervisor is there")
        [supervisor] = children(proxy.pid)
        eventually(lambda: children(supervisor), "it forks: it has read the configuration")
        proxy.signal(signal.SIGHUP)
        starting.join()
        eventually(says(proxy, "configuration read again"), "it was read")
        proxy.stop()
    finally:
        starting.join()
        proxy.kill()


def test_nobody_waits_for_a_portero_that_stops(start_proxy: StartProxy, gate: Gate, service: str) -> None:
    """Also not in the queue of a copy of its sockets."""
    proxy = start_proxy(toml=DRAIN)
    proxy.serve(service, gate.backend)
    upgrade(proxy)
    with proxy.connect() as client:
        client.send(get(service, "/waits"))
        eventually(lambda: gate.backend.requests, "it is in flight")
        proxy.signal(signal.SIGTERM)
        eventually(says(proxy, "stopping: "), "it stops")

        def is_refused() -> bool:
            try:
                socket.create_connection(("127.0.0.1", proxy.port), 1).close()
            except (
                ConnectionRefusedError,
                ConnectionResetError,
            ):  # reset: it was in the queue of a closed listener
                return True
            return False

        eventually(is_refused, "connections are refused")
        gate.opens.set()
        assert client.read_response().body == b"done"
    assert proxy.wait(20) == 0
