"""The abuse of tests/e2e/test_abuse.py in the numbers in which it comes: the others are served meanwhile."""

from __future__ import annotations

import resource
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.certificates import Authority, client_context
from tests.e2e.endless import EndlessBackend
from tests.e2e.http1_client import get
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.strangers import BAD, Strangers, honest, lines, refused
from tests.e2e.waiting import eventually

SERVICE = "one.other.test"
HARD_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
#: Twenty thousand, where that many files may be open: a client counts double in the proxy (`tuning.shares`).
MANY = 20_000 if HARD_LIMIT == resource.RLIM_INFINITY else min(20_000, HARD_LIMIT // 2000 * 1000 - 2000)
#: What each process may take beside its budget: glibc keeps 64 MiB that are free (`tuning.tune_malloc`).
BESIDE = 96 << 20
EACH_COUNT = pytest.mark.parametrize("workers", [1, 2])


@pytest.fixture(autouse=True)
def _many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if MANY < 2000:
        pytest.skip(f"only {hard} files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (MANY + 1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def proxies() -> Iterator[list[ProxyProcess]]:
    """What a test has started: none of them outlives it."""
    made: list[ProxyProcess] = []
    yield made
    for proxy in made:
        proxy.kill()


@pytest.fixture
def backend() -> Iterator[EndlessBackend]:
    with EndlessBackend() as made:
        yield made


def started(
    proxies: list[ProxyProcess],
    folder: Path,
    backend: EndlessBackend,
    workers: int,
    limits: str,
    certificates: Path | None = None,
) -> ProxyProcess:
    toml = f"[timeouts]\ndrain = 2\nshutdown = 2\nkeep_alive = 600\nhead = 600\n[limits]\n{limits}\n"
    proxy = ProxyProcess(
        folder / "proxy", certificates=certificates, toml=toml, flags=["--workers", str(workers)]
    ).start()
    proxies.append(proxy)
    proxy.register(SERVICE, backend.host, backend.port)
    return proxy


def children(proxy: ProxyProcess) -> list[Path]:
    """All processes of the proxy, in /proc."""
    found = [Path(f"/proc/{proxy.pid}")]
    for process in found:  # and those of those
        for task in (process / "task").iterdir():
            found += [Path(f"/proc/{pid}") for pid in (task / "children").read_text().split()]
    return found


def memory(proxy: ProxyProcess) -> int:
    """Bytes that all its processes hold for themselves."""
    total = 0
    for process in children(proxy):
        fields = dict(line.split(":", 1) for line in (process / "smaps_rollup").read_text().splitlines()[1:])
        total += 1024 * int(fields["Pss"].split()[0])
    return total


def files(proxy: ProxyProcess) -> int:
    return sum(len(list((process / "fd").iterdir())) for process in children(proxy))


@EACH_COUNT
def test_twenty_thousand_idle_connections(
    tmp_path: Path, backend: EndlessBackend, proxies: list[ProxyProcess], workers: int
) -> None:
    proxy = started(proxies, tmp_path, backend, workers, f"connections_per_client = {MANY}")
    honest(proxy, SERVICE, 20)
    open_before, before = files(proxy), memory(proxy)
    with Strangers(proxy.port) as strangers:
        for _ in range(20):
            strangers.come(MANY // 20)
            honest(proxy, SERVICE, 20)
        eventually(lambda: proxy.metric("portero_connections_open") >= MANY, "all of them are there")
        each = (memory(proxy) - before) / MANY
        strangers.come(100)
        eventually(lambda: refused(proxy, "client_connections") == 100, "and no more")
        honest(proxy, SERVICE, 200)
        strangers.leave()
    assert each < 8192, f"{each:.0f} bytes an idle connection"
    eventually(lambda: proxy.metric("portero_connections_open") == 0, "they are gone")
    eventually(lambda: files(proxy) <= open_before + 4, "all descriptors are given back")
    with Strangers(proxy.port) as strangers:
        strangers.come(1000)
        eventually(lambda: proxy.metric("portero_connections_open") >= 1000, "its places are free again")
    assert refused(proxy, "client_connections") == 100
    proxy.stop()


@EACH_COUNT
def test_two_thousand_clients_that_read_nothing(
    tmp_path: Path, backend: EndlessBackend, proxies: list[ProxyProcess], workers: int
) -> None:
    budget = 64 << 20  # twice what is set
    proxy = started(proxies, tmp_path, backend, workers, f"buffered_bytes = {budget // 2 // workers}")
    honest(proxy, SERVICE, 20)
    before = memory(proxy)
    with Strangers(proxy.port, receive_buffer=4096) as strangers:
        for _ in range(20):
            strangers.come(100, get(SERVICE, "/endless"))
            honest(proxy, SERVICE, 20)
            assert proxy.metric("portero_buffered_bytes") <= budget
            assert memory(proxy) - before < budget + workers * BESIDE
        assert refused(proxy, "buffered_bytes") > 1000
        strangers.leave()
    eventually(lambda: proxy.metric("portero_buffered_bytes") == 0, "nothing is held any more")
    proxy.wait_until_idle()
    proxy.stop()


@EACH_COUNT
def test_floods_of_handshakes_begun_and_whole(
    tmp_path: Path, backend: EndlessBackend, proxies: list[ProxyProcess], workers: int
) -> None:
    authority = Authority()
    authority.issue(SERVICE).write(tmp_path / "certs" / SERVICE)
    proxy = started(
        proxies,
        tmp_path,
        backend,
        workers,
        "handshakes_per_client = 100\nconnections_per_client = 1000",
        tmp_path / "certs",
    )
    tls = client_context(authority.pem, "http/1.1")
    honest(proxy, SERVICE, 20, tls=tls)
    before = memory(proxy)
    stop = threading.Event()
    done = [0]

    def whole() -> None:
        """As many handshakes as one thread can do."""
        while not stop.is_set():
            try:
                with (
                    socket.create_connection(("127.0.0.1", proxy.port), 60, (BAD, 0)) as raw,
                    tls.wrap_socket(raw, server_hostname=SERVICE),
                ):
                    done[0] += 1
            except (OSError, ssl.SSLError):
                continue  # turned away

    threads = [threading.Thread(target=whole) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        with Strangers(proxy.port) as strangers:
            for _ in range(25):
                strangers.come(200, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
                honest(proxy, SERVICE, 4, tls=tls)  # 140 in all: the limit of a client is theirs too
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert done[0] > 0
    turned_away = refused(proxy, "handshakes") + refused(proxy, "client_connections")
    assert turned_away > 2000
    assert memory(proxy) - before < 128 << 20
    assert len(lines(proxy, "handshakes")) <= 200 * workers, "a line a second"
    eventually(lambda: proxy.metric("portero_connections_open") == 0, "they are gone")
    time.sleep(1)  # in which what is left of the honest client's own limit comes back
    honest(proxy, SERVICE, 20, tls=tls)
    proxy.stop()
