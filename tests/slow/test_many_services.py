"""Configuration files with thousands of services: read again and again under load, and in force soon."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.backends import Peer, RecordingBackend, ok
from tests.e2e.conftest import SHORT_GOODBYE
from tests.e2e.http1_client import Http1Client, get
from tests.e2e.messages import Closed, Truncated
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.waiting import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]

RELOADS = int(os.environ.get("PORTERO_RELOADS", "200"))
SERVICES = 2_000
#: Bytes by which the memory may grow from the first third of the reloads to the last.
SLACK = 24 << 20


def answers(peer: Peer) -> None:
    while True:
        peer.send(ok(b"here", peer.read_request()))


def file_of(count: int, port: int, turn: int) -> str:
    """As many services, of which some are others at each turn: terms, backends, policies, routes."""
    said = [SHORT_GOODBYE]
    for number in range(count):
        other = f', "127.0.0.1:{1 + turn % 1000}"' if number % 10 == turn % 10 and number else ""
        said.append(
            f'[[service]]\nname = "s{number}.e2e.test"\nbackends = ["127.0.0.1:{port}"{other}]\n'
            f"max_in_flight = {1000 + (turn if number % 7 == 0 else 0)}\n"
        )
    said.append(f'[[route]]\nhost = "www.e2e.test"\npath = "/{turn % 3}"\nservice = "s0.e2e.test"\n')
    said.append(f'[[service]]\nname = "turn{turn}.e2e.test"\nbackends = ["127.0.0.1:{port}"]\n')
    return "\n".join(said)


@contextlib.contextmanager
def running(folder: Path, *flags: str) -> Iterator[tuple[ProxyProcess, RecordingBackend]]:
    """A proxy with a file of some services, and a backend of them all."""
    backend = RecordingBackend(answers)
    proxy = ProxyProcess(folder, toml=file_of(SERVICES, backend.port, 0), flags=flags).start()
    try:
        yield proxy, backend
        proxy.stop()
    finally:
        proxy.kill()
        backend.close()


class Load:
    """Clients that ask without a pause worth the name; what got no 200 is lost."""

    def __init__(self, proxy: ProxyProcess) -> None:
        self.answered, self.lost = 0, list[str]()
        self._proxy, self._done = proxy, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(kept,)) for kept in (True, True, False)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self, kept: bool) -> None:
        while not self._done.is_set():
            try:
                with Http1Client(("127.0.0.1", self._proxy.port)) as client:
                    for _ in range(50 if kept else 1):
                        response = client.ask(get("s0.e2e.test"))
                        assert (response.status, response.body) == (200, b"here"), response
                        self.answered += 1
                        time.sleep(0.01)
            except (Closed, Truncated, OSError, AssertionError) as error:
                self.lost.append(f"{time.time():.3f} {error!r}")


def _write(path: Path, content: str) -> None:
    path.with_suffix(".new").write_text(content)
    path.with_suffix(".new").rename(path)


def _status(proxy: ProxyProcess, host: str) -> int:
    with proxy.connect() as client:
        return client.ask(get(host, "/", "Connection: close")).status


def _memory(proxy: ProxyProcess) -> int:
    """Of all of its processes together."""
    found, total = [proxy.generation], 0
    for pid in found:
        found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return total


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_storm_of_reloads_loses_no_request_and_keeps_no_memory(tmp_path: Path, workers: str) -> None:
    with running(tmp_path, "--workers", workers, "--access-log", "off") as (proxy, backend):
        memory, begun = [], time.monotonic()
        with Load(proxy) as load:
            for turn in range(1, RELOADS + 1):
                _write(proxy.folder / "portero.toml", file_of(SERVICES, backend.port, turn))
                name = f"turn{turn}.e2e.test"
                eventually(lambda: _status(proxy, name) == 200, name, 300)  # noqa: B023
                memory.append(_memory(proxy))
        third = max(1, len(memory) // 3)
        print(
            f"{workers} worker(s): {RELOADS} reloads of {SERVICES} services in "
            f"{time.monotonic() - begun:.0f} s, {load.answered} requests, {len(load.lost)} lost, "
            f"memory {max(memory[:third]) >> 20} MiB at first, {max(memory[-third:]) >> 20} MiB at last"
        )
        assert load.lost == []
        assert load.answered > RELOADS
        assert proxy.metric("portero_config_reloads_total", result="ok") == RELOADS
        assert proxy.metric("portero_config_reloads_total", result="error") == 0
        assert max(memory[-third:]) < max(memory[:third]) + SLACK


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ten_thousand_services_are_in_force(tmp_path: Path, workers: str) -> None:
    with running(tmp_path, "--workers", workers) as (proxy, backend):
        begun = time.monotonic()
        _write(proxy.folder / "portero.toml", file_of(10_000, backend.port, 1))
        eventually(lambda: _status(proxy, "s9999.e2e.test") == 200, "the last service is served", 300)
        print(f"{workers} worker(s): 10,000 services in force after {time.monotonic() - begun:.2f} s")
        for number in (0, 5000):
            assert _status(proxy, f"s{number}.e2e.test") == 200
