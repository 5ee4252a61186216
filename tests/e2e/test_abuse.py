"""Clients that take more than their part: the others are served meanwhile, and nothing stays behind."""

from __future__ import annotations

import signal
import socket
import ssl
import subprocess
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.e2e.backends import Peer
from tests.e2e.certificates import Authority, client_context
from tests.e2e.conftest import SHORT_GOODBYE, StartBackend, StartProxy
from tests.e2e.endless import EndlessBackend
from tests.e2e.http1_client import get
from tests.e2e.http2_client import Http2Client, fields_of
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.strangers import BAD, GOOD, Strangers, honest, lines, refused
from tests.e2e.waiting import eventually

SERVICE = "one.other.test"
#: A proxy that has served a request, and how many files it had open then.
Serving = tuple[ProxyProcess, int]
EACH_COUNT = pytest.mark.parametrize("workers", [1, 2])


def limited(limits: str, timeouts: str = "") -> str:
    return f"{SHORT_GOODBYE}{timeouts}\n[limits]\n{limits}\n"


def tls_client(authority: Authority) -> ssl.SSLContext:
    return client_context(authority.pem, "http/1.1")


def client_hello() -> bytes:
    """The first bytes of a TLS client, which will never say more."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname=SERVICE)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def once(peer: Peer) -> None:
    """A backend that keeps no connection: what is open in the proxy is its clients'."""
    peer.read_request()
    peer.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok")


@pytest.fixture
def serving(start_proxy: StartProxy, start_backend: StartBackend) -> Callable[[str, int], Serving]:
    """Start a proxy with this configuration and so many workers (0: as it is by itself) before `once`."""

    def start(toml: str, workers: int) -> Serving:
        proxy = start_proxy(toml=toml, flags=("--workers", str(workers)) if workers else ())
        proxy.serve(SERVICE, start_backend(once))
        honest(proxy, SERVICE, 1)
        return proxy, proxy.open_files()

    return start


def settles(proxy: ProxyProcess, files: int) -> None:
    """Every client has gone, and nothing of them is left."""
    eventually(lambda: proxy.metric("portero_connections_open") == 0, "no connection is open")
    eventually(lambda: proxy.open_files() <= files, "all descriptors are given back")


@EACH_COUNT
def test_over_its_own_limit_a_client_is_turned_away_and_the_others_are_served(
    workers: int, serving: Callable[[str, int], Serving]
) -> None:
    proxy, files = serving(limited("connections_per_client = 20"), workers)
    with Strangers(proxy.port) as strangers:
        strangers.come(200).ends(20)
        honest(proxy, SERVICE, 50)
        assert refused(proxy, "client_connections") == 180
        strangers.leave()
        settles(proxy, files)
        strangers.come(20)  # its places are free again
        honest(proxy, SERVICE, 1)
        assert strangers.there() == 20
    found = lines(proxy, "client_connections") + lines(proxy, "connections_per_client")
    assert 1 <= len(found) <= 2 + 60 * workers, "one line a second"
    assert BAD in "".join(found)


@EACH_COUNT
def test_a_client_is_turned_away_before_its_handshake(
    workers: int, start_proxy: StartProxy, start_backend: StartBackend, authority: Authority
) -> None:
    proxy = start_proxy(
        tls=True, toml=limited("connections_per_client = 10"), flags=("--workers", str(workers))
    )
    proxy.serve(SERVICE, start_backend(once))
    hello = client_hello()
    honest(proxy, SERVICE, 1, tls=tls_client(authority))
    with Strangers(proxy.port) as strangers:
        strangers.come(100, hello)
        eventually(lambda: refused(proxy, "client_connections") == 90, "90 were turned away")
        honest(proxy, SERVICE, 20, tls=tls_client(authority))
    # Whoever left in the middle of the handshake has given its place back.
    eventually(lambda: proxy.metric("portero_tls_handshakes_total", result="gone") == 10, "all have gone")
    with Strangers(proxy.port) as strangers:
        strangers.come(10, hello)
        honest(proxy, SERVICE, 1, tls=tls_client(authority))
        assert refused(proxy, "client_connections") == 90


@EACH_COUNT
def test_a_flood_of_handshakes_is_cut_to_its_rate(
    workers: int, start_proxy: StartProxy, start_backend: StartBackend, authority: Authority
) -> None:
    proxy = start_proxy(
        tls=True, toml=limited("handshakes_per_client = 5"), flags=("--workers", str(workers))
    )
    proxy.serve(SERVICE, start_backend(once))
    tls = tls_client(authority)
    raw = socket.create_connection(("127.0.0.1", proxy.port), 60, (GOOD, 0))
    hello = client_hello()
    with tls.wrap_socket(raw, server_hostname=SERVICE) as served, Strangers(proxy.port) as strangers:
        for number in range(20):  # a connection that is there may ask as often as it likes
            strangers.come(20, hello)
            served.sendall(get(SERVICE, f"/{number}"))
            assert served.recv(65536).startswith(b"HTTP/1.1 200")
        # How many were let in depends on how long it took: 5 at once, and 5 a second.
        assert 200 <= refused(proxy, "handshakes") <= 400 - 5
    assert lines(proxy, "handshakes_per_client")


def test_a_trusted_proxy_stands_for_many_clients(
    start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    proxy = start_proxy(toml=limited("connections_per_client = 2"), flags=("--trusted-proxy", BAD))
    proxy.serve(SERVICE, start_backend(once))
    with Strangers(proxy.port) as many, Strangers(proxy.port, GOOD) as few:
        many.come(50)
        few.come(50).ends(2)
        assert many.there() == 50


@EACH_COUNT
@pytest.mark.parametrize("setting", ["connections", "connections_per_listener"])
def test_at_the_limit_of_all_or_of_a_listener_clients_wait_and_all_are_served(
    setting: str, workers: int, start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    proxy = start_proxy(toml=limited(f"{setting} = 16"), flags=("--workers", str(workers)))
    proxy.serve(SERVICE, start_backend(once))
    files = proxy.open_files()
    with Strangers(proxy.port) as clients:
        clients.come(48, get(SERVICE))  # each keeps its connection until the proxy asks for the place
        for raw in clients.sockets:
            assert raw.recv(65536).startswith(b"HTTP/1.1 200")
    reason = "connections" if setting == "connections" else "listener_connections"
    assert refused(proxy, reason) > 0
    assert lines(proxy, "other clients wait")
    settles(proxy, files)


def test_one_listener_that_is_full_does_not_shut_the_other(
    start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    proxy = start_proxy(toml=limited("connections_per_listener = 10"))
    proxy.serve(SERVICE, start_backend(once))
    with Strangers(proxy.port) as strangers:
        strangers.come(10)
        eventually(lambda: refused(proxy, "listener_connections") == 1, "one is full")
        for _ in range(30):
            with proxy.connect("::1") as client:
                assert client.ask(get(SERVICE)).status == 200


def test_the_limits_change_while_it_runs(start_proxy: StartProxy, start_backend: StartBackend) -> None:
    proxy = start_proxy(toml=limited("connections_per_client = 3"))
    proxy.serve(SERVICE, start_backend(once))
    with Strangers(proxy.port) as strangers:
        strangers.come(10).ends(3)
        (proxy.folder / "portero.toml").write_text(limited("connections_per_client = 6"))
        proxy.signal(signal.SIGHUP)
        eventually(lambda: "configuration read again" in proxy.operator_log(), "it was read")
        strangers.come(10)
        eventually(lambda: strangers.there() == 6, "six are allowed")
        (proxy.folder / "portero.toml").write_text(limited(""))
        proxy.signal(signal.SIGHUP)
        eventually(lambda: proxy.operator_log().count("configuration read again") == 2, "it was read")
        strangers.come(10)
        honest(proxy, SERVICE, 1)
        assert strangers.there() == 16
    honest(proxy, SERVICE, 1)


def test_ten_thousand_connections_leave_nothing_behind(
    serving: Callable[[str, int], Serving],
) -> None:
    proxy, files = serving(
        limited("connections_per_client = 50\nconnections_per_listener = 1000\nconnections = 2000"), 0
    )
    with Strangers(proxy.port) as strangers:
        for _ in range(100):
            strangers.come(100)
            strangers.leave()
    settles(proxy, files)
    assert proxy.metric("portero_connections_total") + refused(proxy, "client_connections") >= 10_000
    with Strangers(proxy.port) as strangers:
        strangers.come(51).ends(50)  # no count was lost, and none was kept


# Those who are slow


@EACH_COUNT
def test_heads_that_never_end_cost_the_others_nothing(
    workers: int, serving: Callable[[str, int], Serving]
) -> None:
    proxy, files = serving(limited("", "head = 2"), workers)
    with Strangers(proxy.port) as strangers:
        strangers.come(300, b"GET / HTTP/1.1\r\nHost: one.other.test\r\n")
        for _ in range(5):
            strangers.say(b"X-a: b\r\n")
            honest(proxy, SERVICE, 10)
        strangers.ends(0)  # however much they said meanwhile
    settles(proxy, files)


@pytest.mark.minutes
@EACH_COUNT
def test_bodies_under_the_rate_are_ended_and_those_over_it_are_not(
    workers: int, serving: Callable[[str, int], Serving]
) -> None:
    proxy, files = serving(limited("body_rate = 200"), workers)
    head = b"POST / HTTP/1.1\r\nHost: one.other.test\r\nContent-Length: 1000000\r\n\r\n"
    with Strangers(proxy.port) as slow, Strangers(proxy.port, GOOD) as steady:
        slow.come(50, head)
        steady.come(5, head)

        def ended() -> bool:
            slow.say(b"x")
            steady.say(bytes(1000))
            honest(proxy, SERVICE, 2)
            return slow.there() == 0

        eventually(ended, "the slow ones have been ended")
        assert steady.there() == 5
        assert refused(proxy, "body_rate") == 50
        assert proxy.metric("portero_requests_total", status="408") == 50
    assert 1 <= len(lines(proxy, "body_rate")) <= 40 * workers
    settles(proxy, files)


#: Twice what is set: so much it may be for those that are behind for the first time.
BUDGET = 16 << 20
#: What the connections, the interpreter's heap and the allocator may take beside it in each process.
BESIDE = 48 << 20


def all_memory(proxy: ProxyProcess) -> int:
    """Resident bytes of all its processes."""
    parents = f"{proxy.pid},{proxy.generation}"
    found = subprocess.run(
        ["ps", "-o", "rss=", "--ppid", parents, "--pid", str(proxy.pid)],
        stdout=subprocess.PIPE,
        check=True,
    )
    return 1024 * sum(map(int, found.stdout.split()))


@EACH_COUNT
def test_clients_that_read_nothing_share_a_budget(workers: int, start_proxy: StartProxy) -> None:
    proxy = start_proxy(
        toml=limited(f"buffered_bytes = {BUDGET // 2 // workers}"), flags=("--workers", str(workers))
    )
    with EndlessBackend() as backend, Strangers(proxy.port, receive_buffer=4096) as strangers:
        proxy.register(SERVICE, backend.host, backend.port)
        honest(proxy, SERVICE, 10)
        before = all_memory(proxy)
        for _ in range(4):
            strangers.come(40, get(SERVICE, "/endless"))
            honest(proxy, SERVICE, 10)
            assert proxy.metric("portero_buffered_bytes") <= BUDGET
        assert all_memory(proxy) - before < BUDGET + workers * BESIDE
        eventually(lambda: refused(proxy, "buffered_bytes") > 20, "those that do not move were ended")
        assert 1 <= len(lines(proxy, "buffered_bytes")) <= 120 * workers
        strangers.leave()
        eventually(lambda: proxy.metric("portero_buffered_bytes") == 0, "nothing is held any more")
        proxy.wait_until_idle()
        honest(proxy, SERVICE, 10)


def test_clients_that_read_slowly_are_served_to_the_end_within_the_budget(start_proxy: StartProxy) -> None:
    proxy = start_proxy(toml=limited(f"buffered_bytes = {8 << 20}"))
    size = 1_000_000
    with EndlessBackend() as backend, Strangers(proxy.port, receive_buffer=4096) as readers:
        proxy.register(SERVICE, backend.host, backend.port)
        readers.come(30, get(SERVICE, f"/large?{size}"))
        got = [0] * 30

        def read_a_little() -> bool:
            for number, raw in enumerate(readers.sockets):
                raw.setblocking(False)
                try:
                    for _ in range(8):
                        data = raw.recv(16_384)
                        assert data, f"after {got[number]} bytes"
                        got[number] += len(data)
                except BlockingIOError:
                    pass
            return min(got) > size

        eventually(read_a_little, "everybody has everything")
        assert refused(proxy, "buffered_bytes") == 0
        eventually(lambda: proxy.metric("portero_buffered_bytes") == 0, "nothing is held any more")


@EACH_COUNT
def test_http2_clients_that_open_no_window_share_a_budget(
    workers: int, start_proxy: StartProxy, authority: Authority
) -> None:
    proxy = start_proxy(
        tls=True,
        toml=limited(f"buffered_bytes = {BUDGET // 2 // workers}"),
        flags=("--workers", str(workers)),
    )
    tls, good = client_context(authority.pem, "h2"), tls_client(authority)
    with EndlessBackend() as backend, ExitStack() as opened:
        proxy.register(SERVICE, backend.host, backend.port)
        honest(proxy, SERVICE, 10, tls=good)
        before = all_memory(proxy)
        for _ in range(20):
            client = opened.enter_context(
                Http2Client(("127.0.0.1", proxy.port), tls, SERVICE, settings=[(4, 0)], opens_windows=False)
            )
            for _ in range(40):
                client.request(fields_of(SERVICE, b"/large?200000"))
            honest(proxy, SERVICE, 3, tls=good)
            assert proxy.metric("portero_buffered_bytes") <= BUDGET
        eventually(lambda: refused(proxy, "buffered_bytes") > 3, "those that do not move were ended")
        assert all_memory(proxy) - before < BUDGET + workers * BESIDE
        opened.close()
        eventually(lambda: proxy.metric("portero_buffered_bytes") == 0, "nothing is held any more")
        proxy.wait_until_idle()
        honest(proxy, SERVICE, 10, tls=good)
