"""Backends that fail in front of real clients: who pays for it, how often, and when they are back.

Control may say of a backend that it is DOWN while a worker has it ejected, or the other way round: what is
asserted here holds with and without its probes.
"""

from __future__ import annotations

import re
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.e2e.backend_process import BackendProcess
from tests.e2e.backends import Peer, RecordingBackend, ok
from tests.e2e.conftest import SHORT_GOODBYE, StartBackend, StartProcess, StartProxy
from tests.e2e.http1_client import get
from tests.e2e.proxy_process import ProxyProcess, free_port
from tests.e2e.waiting import eventually

#: Nobody waits for long, and a pause after a time-out is longer than a test.
IMPATIENT = f"{SHORT_GOODBYE}connect = 2\nupstream_head = 2\n[health]\ntimeout = 60\n"
FALL = 3


@pytest.fixture(params=["1", "2"], ids=["one-worker", "two-workers"])
def workers(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def ask(proxy: ProxyProcess, service: str, path: str = "/", *, method: str = "GET") -> tuple[int, bytes]:
    """Status and body, over a connection of its own: any worker may have it."""
    fields = ("Content-Length: 0",) if method == "POST" else ()
    with proxy.connect() as client:
        response = client.ask(get(service, path, *fields, method=method), method.encode())
        return response.status, response.body


def named(name: bytes) -> Callable[[Peer], None]:
    def script(peer: Peer) -> None:
        while True:
            peer.send(ok(name, peer.read_request()))

    return script


def failing(status: int) -> Callable[[Peer], None]:
    def script(peer: Peer) -> None:
        while True:
            peer.read_request()
            peer.send(b"HTTP/1.1 %d Oops\r\nContent-Length: 3\r\n\r\nbad" % status)

    return script


def serve_two(proxy: ProxyProcess, service: str, one: tuple[str, int], other: RecordingBackend) -> None:
    proxy.register(service, *one)
    proxy.serve(service, other)


def test_a_frozen_backend_of_two_costs_three_requests_a_worker_a_time_out(
    workers: int,
    start_proxy: StartProxy,
    start_process: StartProcess,
    start_backend: StartBackend,
    service: str,
) -> None:
    proxy = start_proxy(toml=IMPATIENT, flags=("--workers", str(workers)))
    frozen = start_process("frozen")
    serve_two(proxy, service, (frozen.host, frozen.port), start_backend(named(b"well")))
    eventually(lambda: ask(proxy, service) == (200, b"frozen"), "it serves")
    frozen.signal(signal.SIGSTOP)
    found = Counter(ask(proxy, service) for _ in range(80))
    late = sum(count for (status, _), count in found.items() if status == 504)
    assert found[200, b"well"] == 80 - late
    assert FALL <= late <= FALL * workers
    assert 1 <= proxy.metric("portero_ejections_total", reason="upstream_timeout") <= workers
    assert re.search(
        rf"backend 127\.0\.0\.1:{frozen.port} of {service}: passed over for", proxy.operator_log()
    )
    frozen.signal(signal.SIGCONT)


def test_a_black_hole_costs_nobody_an_error_and_few_a_while(
    workers: int, start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy(toml=IMPATIENT, flags=("--workers", str(workers)))
    with socket.socket() as hole, ExitStack() as stack:
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        for _ in range(4):  # its backlog is full now: the kernel answers no SYN any more
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(hole.getsockname())
        serve_two(proxy, service, hole.getsockname(), start_backend(named(b"well")))
        assert Counter(ask(proxy, service) for _ in range(80)) == {(200, b"well"): 80}
        retries = proxy.metric("portero_retries_total", service=service, reason="connect_failed")
        assert 1 <= retries <= FALL * workers
        assert 1 <= proxy.metric("portero_ejections_total", reason="connect_failed") <= workers


def test_who_refuses_is_left_alone_and_is_back_soon_after_it_listens_again(
    workers: int, start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy(flags=("--workers", str(workers)))
    port = free_port()
    serve_two(proxy, service, ("127.0.0.1", port), start_backend(named(b"well")))
    assert Counter(ask(proxy, service) for _ in range(80)) == {(200, b"well"): 80}
    ejections = proxy.metric("portero_ejections_total", reason="connect_failed")
    assert ejections >= 1
    retries = proxy.metric("portero_retries_total", service=service, reason="connect_failed")
    assert retries <= FALL * workers + ejections  # and one more for each trial
    with socket.create_server(("127.0.0.1", port)) as listening:
        back = threading.Thread(target=serve_once, args=(listening, b"back"))
        back.start()
        eventually(lambda: ask(proxy, service) == (200, b"back"), "it is tried again")
        back.join(60)


def serve_once(listening: socket.socket, name: bytes) -> None:
    """Take connections until a request came over one of them: probes may only knock."""
    while True:
        peer, _ = listening.accept()
        with peer:
            if peer.recv(65536):
                peer.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 4\r\n\r\n" + name)
                return


@pytest.mark.parametrize("status", [500, 503])
def test_bad_answers_count_only_when_they_are_named(
    status: int, start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    lenient = start_proxy()
    strict = start_proxy(toml=f"{SHORT_GOODBYE}[health]\nstatuses = [{status}]\n")
    bad, well = start_backend(failing(status)), start_backend(named(b"well"))
    for proxy in (lenient, strict):
        serve_two(proxy, service, (bad.host, bad.port), well)
    assert Counter(ask(lenient, service)[0] for _ in range(40)) == {200: 20, status: 20}
    assert lenient.metric("portero_ejections_total") == 0
    found = Counter(ask(strict, service)[0] for _ in range(40))
    ejections = int(strict.metric("portero_ejections_total", reason=f"status_{status}"))
    assert ejections >= 1
    assert found[status] <= FALL + ejections - 1, "more than the trials"
    assert found[200] == 40 - found[status]


def test_a_killed_backend_loses_no_idempotent_request_and_a_post_gets_an_honest_502(
    start_proxy: StartProxy, start_process: StartProcess, service: str
) -> None:
    proxy = start_proxy()
    doomed, heir = start_process("doomed"), start_process("heir")
    for backend in (doomed, heir):
        proxy.register(service, backend.host, backend.port)
    found: list[tuple[str, int, bytes]] = []

    def wait(method: str) -> None:
        found.append((method, *ask(proxy, service, "/wait", method=method)))

    waiting = [threading.Thread(target=wait, args=(method,)) for method in ["GET"] * 100 + ["POST"] * 20]
    for thread in waiting:
        thread.start()
    eventually(lambda: proxy.metric("portero_requests_in_flight") == 120, "all are in flight")

    def there(backend: BackendProcess) -> int:
        with socket.create_connection((backend.host, backend.port)) as direct:
            direct.sendall(b"GET /waiting HTTP/1.1\r\n\r\n")
            return int(direct.recv(65536).rpartition(b"\r\n\r\n")[2])

    eventually(lambda: there(doomed) + there(heir) == 120, "all are at a backend")
    with proxy.connect() as client:
        for _ in range(600):  # what the budget is a fifth of, of the last seconds
            assert client.ask(get(service)).status == 200
    doomed.signal(signal.SIGKILL)
    eventually(lambda: there(heir) == 120 - len(found) < 120, "the heir has all but the answered posts")
    assert {(method, status) for method, status, _ in found} == {("POST", 502)}
    lost = len(found)
    with socket.create_connection((heir.host, heir.port)) as direct:
        direct.sendall(b"GET /go HTTP/1.1\r\n\r\n")
        assert direct.recv(65536)
    for thread in waiting:
        thread.join(60)
    served = Counter(answer for answer in found if answer[1] != 502)
    assert served["GET", 200, b"heir"] == 100
    assert served.total() == 120 - lost
    assert proxy.metric("portero_retries_total", service=service, reason="upstream_closed") > 30
    assert proxy.metric("portero_retries_refused_total") == 0
