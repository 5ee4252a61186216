"""What an operator bounds in the file, once each, with real processes and real peers."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import ExitStack
from functools import partial

import pytest

from tests.e2e.backends import Peer, answer_with, ok
from tests.e2e.conftest import SHORT_GOODBYE, StartBackend, StartProxy
from tests.e2e.health_backend import Patient, until_state
from tests.e2e.http1_client import Http1Client, get, post
from tests.e2e.http2_client import Http2Client, fields_of
from tests.e2e.messages import Closed, Response
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.test_queue import Crowd
from tests.e2e.test_workers import processes, replaced
from tests.e2e.waiting import eventually

APP = "app.example"
both = pytest.mark.parametrize("workers", ["1", "2"])


def service(lines: str, more: str = "") -> str:
    """A configuration with one service."""
    return f'{SHORT_GOODBYE}{more}\n[[service]]\nname = "{APP}"\n{lines}\n'


def worker_of(response: Response) -> bytes:
    """Which process made an answer of portero's own."""
    return response.value(b"x-request-id").partition(b"-")[0]


def limited(proxy: ProxyProcess) -> int:
    return int(proxy.metric("portero_rate_limited_total", service=APP))


# Rate limits


@both
def test_a_limit_is_exact_over_all_connections_and_all_workers(
    start_proxy: StartProxy, start_backend: StartBackend, workers: str
) -> None:
    toml = service("rate_limit = { requests = 100, seconds = 36000 }")
    proxy = start_proxy(toml=toml, flags=("--workers", workers))
    proxy.serve(APP, start_backend())
    found: list[int] = []
    makers: set[bytes] = set()
    with ExitStack() as stack:
        clients = [stack.enter_context(proxy.connect()) for _ in range(30)]
        for turn in range(150):  # one at a time: nobody is admitted twice in the same microsecond
            response = clients[turn % 30].ask(get(APP))
            found.append(response.status)
            if response.status == 429:
                makers.add(worker_of(response))
                assert 300 < int(response.value(b"retry-after")) <= 360
    assert found == [200] * 100 + [429] * 50
    assert limited(proxy) == 50

    def all_refuse() -> bool:
        with ExitStack() as stack:  # at once: one by one, one worker may always be the first to wake up
            for client in [stack.enter_context(proxy.connect()) for _ in range(20)]:
                makers.add(worker_of(client.ask(get(APP))))
        return len(makers) == int(workers)

    eventually(all_refuse, "every worker knows that the limit is used up")
    assert proxy.operator_log().count("a request over a rate_limit of its service was refused") >= 1


def test_a_client_on_one_connection_has_all_of_its_limit_with_two_workers(
    start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    toml = service("rate_limit = [{ requests = 40, seconds = 36000 }, { requests = 9999, key = 'service' }]")
    proxy = start_proxy(toml=toml, flags=("--workers", "2"))
    proxy.serve(APP, start_backend())
    with proxy.connect() as client:
        assert [client.ask(get(APP)).status for _ in range(45)] == [200] * 40 + [429] * 5


def test_a_flood_over_two_workers_gets_what_the_limit_allows(
    start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    toml = service("rate_limit = { requests = 200, seconds = 36000, key = 'header:X-User' }")
    proxy = start_proxy(toml=toml, flags=("--workers", "2"))
    proxy.serve(APP, start_backend())
    passed: list[int] = []
    makers: set[bytes] = set()

    def flood(client: Http1Client) -> None:
        responses = [client.ask(get(APP, "/", "X-User: one")) for _ in range(100)]
        passed.append(sum(response.status == 200 for response in responses))
        makers.update(worker_of(response) for response in responses if response.status == 429)

    with ExitStack() as stack:
        clients = [stack.enter_context(proxy.connect()) for _ in range(8)]
        threads = [threading.Thread(target=flood, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # Each of the 600 that were refused might have raced with one that was not; hardly ever does one.
    assert 200 <= sum(passed) <= 210
    with proxy.connect() as client:
        assert client.ask(get(APP, "/", "X-User: two")).status == 200


def test_a_limit_survives_the_worker_that_counted(
    start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    toml = service("rate_limit = { requests = 3, seconds = 36000 }")
    proxy = start_proxy(toml=toml, flags=("--workers", "2"))
    proxy.serve(APP, start_backend())
    with proxy.connect() as client:
        assert [client.ask(get(APP)).status for _ in range(4)] == [200, 200, 200, 429]
    for name in ("work0", "work1"):
        pid = processes(proxy)[name]
        os.kill(pid, signal.SIGKILL)
        eventually(partial(replaced, proxy, name, pid), "another worker has taken its place")

    def outcome() -> int:
        try:
            with proxy.connect() as client:
                return client.ask(get(APP)).status
        except (OSError, Closed):  # the new worker does not serve yet
            return 0

    assert eventually(outcome, "somebody serves") == 429


# Addresses


def test_a_service_is_for_its_addresses_behind_a_trusted_proxy_too(
    start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    toml = service(
        'allow = ["198.51.100.0/24", "127.0.0.2"]\ndeny = ["198.51.100.66"]',
        '[proxy]\ntrusted_proxies = ["127.0.0.1"]\n',
    )
    proxy = start_proxy(toml=toml)
    backend = start_backend()
    proxy.serve(APP, backend)
    with proxy.connect() as client:
        for chain, expected in (
            ("198.51.100.7", 200),
            ("198.51.100.66", 403),
            ("198.51.100.7, 203.0.113.5", 403),
            ("203.0.113.5, 198.51.100.7", 200),
        ):
            assert client.ask(get(APP, "/", f"X-Forwarded-For: {chain}")).status == expected
        assert client.ask(get(APP)).status == 403
    assert len(backend.requests) == 2
    assert proxy.metric("portero_errors_total", reason="address_refused") == 3


# Times, bodies, retries, rooms, probes


def test_a_backend_that_says_nothing_has_the_time_of_its_service(
    start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    proxy = start_proxy(toml=service("timeouts = { upstream_head = 1 }"))

    def silent(peer: Peer) -> None:
        peer.read_request()
        peer.wait_closed()

    proxy.serve(APP, start_backend(silent))
    with proxy.connect() as client:
        assert client.ask(get(APP)).status == 504  # 60 s otherwise, which is longer than the client waits


def test_a_body_is_as_large_as_its_service_takes(
    start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    proxy = start_proxy(toml=service("body_bytes = 1000", "[limits]\nbody_bytes = 10\n"))
    proxy.serve(APP, start_backend())
    with proxy.connect() as client:
        assert client.ask(post(APP, b"x" * 1000)).status == 200
        assert client.ask(post(APP, b"x" * 1001)).status == 413
    with Http2Client(("127.0.0.1", proxy.port), None, APP) as h2:
        fields = fields_of(APP, b"/", method=b"POST")
        assert h2.ask(fields, b"x" * 1000).status == 200
        assert h2.ask(fields, b"x" * 1001).status == 413


def test_a_request_is_not_sent_again_where_its_service_says_so(
    start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    def broken(peer: Peer) -> None:
        peer.read_request()
        peer.reset()

    for lines, tries in (("retries = 0", 1), ("retries = 1", 2)):
        proxy = start_proxy(toml=service(lines))
        backends = [start_backend(broken) for _ in range(4)]
        for backend in backends:
            proxy.serve(APP, backend)
        with proxy.connect() as client:
            assert client.ask(get(APP)).status == 502
        assert sum(len(backend.requests) for backend in backends) == tries


@both
def test_backends_that_name_no_limit_have_that_of_their_service_and_its_queue(
    start_proxy: StartProxy, start_backend: StartBackend, workers: str
) -> None:
    toml = service("max_in_flight = 3\nqueue_seconds = 50\nqueue_length = 200")
    proxy = start_proxy(toml=toml, flags=("--workers", workers))
    crowd = Crowd()
    proxy.serve(APP, start_backend(crowd.serve))
    try:
        with ExitStack() as stack:
            clients = [stack.enter_context(proxy.connect()) for _ in range(60)]
            for client in clients:
                client.send(get(APP))
            eventually(lambda: proxy.metric("portero_queued", service=APP) == 57, "all but three wait")
            crowd.gate.set()
            assert [client.read_response().status for client in clients] == [200] * 60
    finally:
        crowd.gate.set()
    assert crowd.most == 3


@both
def test_backends_that_name_no_health_path_are_probed_at_that_of_their_service(
    start_proxy: StartProxy, start_backend: StartBackend, workers: str
) -> None:
    toml = service('health_path = "/up"\nhealth = { interval = 0.2, timeout = 20, fall = 1 }')
    proxy = start_proxy(toml=toml, flags=("--workers", workers))
    health = Patient()
    backend = start_backend(health)
    proxy.serve(APP, backend)
    until_state(proxy, APP, backend.port, "ready")
    health.status = 503
    until_state(proxy, APP, backend.port, "down")
    health.status = 200
    until_state(proxy, APP, backend.port, "ready")


def test_an_answer_counts_as_a_failure_where_the_service_says_so(
    start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    proxy = start_proxy(toml=service("health = { fall = 2, statuses = [500] }"))
    broken = start_backend(answer_with(b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n"))
    for backend in (broken, start_backend(lambda peer: peer.send(ok(b"ok", peer.read_request())))):
        proxy.serve(APP, backend)
    with proxy.connect() as client:
        for _ in range(8):
            client.ask(get(APP))
    assert proxy.metric("portero_ejections_total", reason="status_500") == 1
