"""Limits of backends, queues and pauses, with real processes: what the backend sees is what counts."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import orjson
import pytest

from portero_py.core.model import Backend, Halt, Lease
from tests.e2e.backends import Peer, RecordingBackend, ok
from tests.e2e.conftest import SHORT_GOODBYE, StartBackend, StartProxy
from tests.e2e.http1_client import Http1Client, get, post
from tests.e2e.http2_client import Http2Client, fields_of, rst_stream
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.test_workers import processes, replaced
from tests.e2e.waiting import eventually

APP = "app.example"
WAITING = SHORT_GOODBYE + "[limits]\nqueue_seconds = 50\n"


class Crowd:
    """What a backend sees at a time; nobody is answered while the gate is shut."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.now = 0
        self.most = 0
        self.seconds = 0.0  # that each takes
        self._lock = threading.Lock()

    def serve(self, peer: Peer) -> None:
        """The backend's script."""
        while True:
            peer.read_request(lambda _: self._came())
            request = peer.requests[-1]
            self.gate.wait()
            time.sleep(self.seconds)
            with self._lock:
                self.now -= 1  # before the answer: behind it, the next one may be here already
            peer.send(ok(request.body or b"ok", request))

    # Private

    def _came(self) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)


@pytest.fixture
def crowd(start_backend: StartBackend) -> Iterator[tuple[Crowd, RecordingBackend]]:
    """A shut crowd, and its backend; the gate opens at the end, so that the backend can end."""
    crowd = Crowd()
    backend = start_backend(crowd.serve)
    yield crowd, backend
    crowd.gate.set()


def ask(proxy: ProxyProcess, stack: ExitStack, count: int, *lines: str) -> list[Http1Client]:
    """So many clients that have asked, each on a connection of its own."""
    clients = [stack.enter_context(proxy.connect()) for _ in range(count)]
    for client in clients:
        client.send(get(APP, "/", *lines))
    return clients


def queued(proxy: ProxyProcess) -> int:
    return int(proxy.metric("portero_queued", service=APP))


def one_and_those_behind(
    proxy: ProxyProcess, stack: ExitStack, busy: Crowd, count: int
) -> tuple[Http1Client, list[Http1Client]]:
    """The client that a backend for one at a time is busy with, and so many that wait."""
    [first] = ask(proxy, stack, 1)
    eventually(lambda: busy.now == 1, "the first one is there")
    waiting = ask(proxy, stack, count)
    eventually(lambda: queued(proxy) == count, "they wait")
    return first, waiting


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_backend_never_sees_more_than_its_limit_and_everybody_is_answered(
    start_proxy: StartProxy, crowd: tuple[Crowd, RecordingBackend], workers: str
) -> None:
    busy, backend = crowd
    proxy = start_proxy(toml=WAITING, flags=("--workers", workers))
    proxy.register(APP, backend.host, backend.port, max_in_flight=7)
    busy.seconds = 0.004
    with ExitStack() as stack:
        clients = ask(proxy, stack, 500)
        eventually(lambda: queued(proxy) == 493 and busy.now == 7, "all but seven wait")
        busy.gate.set()
        assert [client.read_response().status for client in clients] == [200] * 500
    assert busy.most == 7
    eventually(lambda: proxy.metric("portero_queue_seconds_count", service=APP) >= 493, "they are counted")
    assert queued(proxy) == 0
    assert proxy.metric("portero_queue_refused_total") == 0
    proxy.wait_until_idle()


def test_streams_of_one_connection_wait_too_and_a_reset_one_leaves(
    start_proxy: StartProxy, crowd: tuple[Crowd, RecordingBackend]
) -> None:
    busy, backend = crowd
    proxy = start_proxy(toml=WAITING)
    proxy.register(APP, backend.host, backend.port, max_in_flight=3)
    with Http2Client(("127.0.0.1", proxy.port), None, APP) as client:
        streams = [client.request(fields_of(APP, b"/%d" % number)) for number in range(100)]
        eventually(lambda: queued(proxy) == 97, "all but three wait")
        for stream in streams[50:]:
            client.send(rst_stream(stream))
        eventually(lambda: queued(proxy) == 47, "half of them have left")
        busy.gate.set()
        assert {client.outcome(stream).status for stream in streams[:50]} == {200}
    assert busy.most == 3
    asked = [int(request.path[1:]) for request in backend.requests]
    assert sorted(asked) == list(range(50))
    eventually(lambda: proxy.metric("portero_errors_total", reason="client_gone") == 50, "they are counted")


@pytest.mark.parametrize("leave", [Http1Client.close, Http1Client.reset])
def test_clients_that_leave_never_reach_the_backend(
    start_proxy: StartProxy,
    crowd: tuple[Crowd, RecordingBackend],
    leave: Callable[[Http1Client], None],
) -> None:
    busy, backend = crowd
    proxy = start_proxy(toml=WAITING)
    proxy.register(APP, backend.host, backend.port, max_in_flight=1)
    with ExitStack() as stack:
        first, leaving = one_and_those_behind(proxy, stack, busy, 20)
        for client in leaving:
            leave(client)
        eventually(lambda: queued(proxy) == 0, "they have left")
        [last] = ask(proxy, stack, 1)
        busy.gate.set()
        assert [first.read_response().status, last.read_response().status] == [200, 200]
    assert len(backend.requests) == 2
    eventually(lambda: len(proxy.access_log(status=499)) == 20, "each is in the log")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_bodies_of_those_who_wait_arrive_whole(
    start_proxy: StartProxy, crowd: tuple[Crowd, RecordingBackend], workers: str
) -> None:
    busy, backend = crowd
    proxy = start_proxy(toml=WAITING, flags=("--workers", workers))
    proxy.register(APP, backend.host, backend.port, max_in_flight=2)
    bodies = [bytes([number]) * 600_000 for number in range(1, 21)]
    with ExitStack() as stack:
        clients = [stack.enter_context(proxy.connect()) for _ in bodies]
        sending = [
            threading.Thread(target=client.send, args=(post(APP, body),), daemon=True)
            for client, body in zip(clients, bodies, strict=True)
        ]
        for thread in sending:
            thread.start()
        eventually(lambda: queued(proxy) == 18, "all but two wait")
        busy.gate.set()
        assert [client.read_response().body for client in clients] == bodies
        for thread in sending:
            thread.join()
    assert busy.most == 2


def test_what_a_killed_worker_held_is_free_for_the_others(
    start_proxy: StartProxy, crowd: tuple[Crowd, RecordingBackend]
) -> None:
    busy, backend = crowd
    proxy = start_proxy(toml=WAITING, flags=("--workers", "2"))
    proxy.register(APP, backend.host, backend.port, max_in_flight=4)
    with ExitStack() as stack:
        ask(proxy, stack, 40)
        eventually(lambda: busy.now == 4, "four are there, whoever sent them")
        for name, pid in processes(proxy).items():
            if name.startswith("work"):
                signal_to(pid)
                eventually(partial(replaced, proxy, name, pid), f"{name} is replaced")
        # Whatever the two held is free again: as many as ever are served at a time.
        fresh = Crowd()
        backend.script = fresh.serve
        clients = ask(proxy, stack, 10)
        eventually(lambda: fresh.now == 4, "four of the new ones are there")
        fresh.gate.set()
        assert [client.read_response().status for client in clients] == [200] * 10
        assert fresh.most == 4


def test_a_frozen_worker_keeps_what_it_holds_and_no_more(
    start_proxy: StartProxy, crowd: tuple[Crowd, RecordingBackend]
) -> None:
    busy, backend = crowd
    proxy = start_proxy(toml=WAITING, flags=("--workers", "2"))
    proxy.register(APP, backend.host, backend.port, max_in_flight=3)
    workers = [pid for name, pid in processes(proxy).items() if name.startswith("work")]
    with ExitStack() as stack:
        signal_to(workers[0], signal.SIGSTOP)
        try:
            clients = ask(proxy, stack, 30)
            # Those that the frozen one accepted are answered when it wakes up.
            eventually(lambda: busy.now == 3, "the other one has all of it")
            busy.gate.set()
        finally:
            signal_to(workers[0], signal.SIGCONT)
        assert [client.read_response().status for client in clients] == [200] * 30
    assert busy.most == 3


def test_whoever_finds_the_queue_full_or_waits_too_long_is_told_when_to_come_back(
    start_proxy: StartProxy, crowd: tuple[Crowd, RecordingBackend]
) -> None:
    busy, backend = crowd
    proxy = start_proxy(toml=SHORT_GOODBYE + "[limits]\nqueue_seconds = 4\nqueue_length = 2\n")
    proxy.register(APP, backend.host, backend.port, max_in_flight=1)
    with ExitStack() as stack:
        [first] = ask(proxy, stack, 1)
        eventually(lambda: busy.now == 1, "the first one is there")
        clients = ask(proxy, stack, 2, "Accept: application/json")
        eventually(lambda: queued(proxy) == 2, "the queue is full")
        clients += ask(proxy, stack, 3, "Accept: application/json")
        answers = [client.read_response() for client in clients]
        assert [answer.status for answer in answers] == [503] * 5
        assert {value for answer in answers for value in answer.values(b"retry-after")} == {b"2"}
        found = [orjson.loads(answer.body)["reason"] for answer in answers]
        assert found == ["queue_timeout"] * 2 + ["queue_full"] * 3
        busy.gate.set()
        assert first.read_response().status == 200
    assert proxy.metric("portero_queue_refused_total", service=APP, reason="queue_full") == 3
    assert proxy.metric("portero_queue_refused_total", service=APP, reason="queue_timeout") == 2


def test_a_drain_serves_those_who_wait(
    start_proxy: StartProxy, crowd: tuple[Crowd, RecordingBackend]
) -> None:
    busy, backend = crowd
    proxy = start_proxy(toml=WAITING.replace("drain = 2", "drain = 30"))
    proxy.register(APP, backend.host, backend.port, max_in_flight=2)
    with ExitStack() as stack:
        clients = ask(proxy, stack, 30)
        eventually(lambda: queued(proxy) == 28, "they wait")
        proxy.signal(signal.SIGTERM)
        eventually(lambda: "stopping" in proxy.operator_log(), "it drains")
        busy.gate.set()
        assert [client.read_response().status for client in clients] == [200] * 30
    assert proxy.wait() == 0


def test_who_still_waits_when_a_drain_ends_gets_an_answer(
    start_proxy: StartProxy, crowd: tuple[Crowd, RecordingBackend]
) -> None:
    busy, backend = crowd
    proxy = start_proxy(toml=WAITING)
    proxy.register(APP, backend.host, backend.port, max_in_flight=1)
    with ExitStack() as stack:
        _, clients = one_and_those_behind(proxy, stack, busy, 3)
        proxy.signal(signal.SIGTERM)
        assert [client.read_response().status for client in clients] == [503] * 3
        busy.gate.set()  # whether the first one is answered in what is left of the drain or cut off
    assert proxy.wait() == 0


@pytest.fixture
def halted(tmp_path: Path) -> Callable[[Halt, RecordingBackend], tuple[str, ...]]:
    """Flags for a proxy that starts with app.example halted."""

    def flags(halt: Halt, backend: RecordingBackend) -> tuple[str, ...]:
        lease = Lease(APP, "b", Backend(backend.host, backend.port), time.time() + 600, 600)
        lease = replace(lease, since=time.time())
        content = {"format": 1, "leases": [lease], "halts": {APP: halt}}
        (tmp_path / "leases.json").write_bytes(orjson.dumps(content))
        return "--state-dir", str(tmp_path)

    return flags


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_paused_service_holds_its_requests(
    start_proxy: StartProxy,
    start_backend: StartBackend,
    halted: Callable[[Halt, RecordingBackend], tuple[str, ...]],
    workers: str,
) -> None:
    backend = start_backend()
    proxy = start_proxy(flags=(*halted(Halt(5.0, "back at noon"), backend), "--workers", workers))
    with ExitStack() as stack:
        clients = ask(proxy, stack, 20)
        eventually(lambda: queued(proxy) == 20, "they are held")
        answers = [client.read_response() for client in clients]
        assert {(answer.status, answer.body) for answer in answers} == {
            (503, b"503 Service Unavailable: back at noon\n")
        }
    assert proxy.metric("portero_queue_refused_total", service=APP, reason="paused") == 20
    assert backend.peers == []


def test_a_stopped_service_says_why(
    start_proxy: StartProxy,
    start_backend: StartBackend,
    halted: Callable[[Halt, RecordingBackend], tuple[str, ...]],
) -> None:
    backend = start_backend()
    proxy = start_proxy(flags=halted(Halt(None, "Moving <house>"), backend))
    with ExitStack() as stack:
        [browser] = ask(proxy, stack, 1, "Accept: text/html,application/xhtml+xml,*/*;q=0.8")
        answer = browser.read_response()
        assert answer.status == 503
        assert b"<p>Moving &lt;house&gt;</p>" in answer.body
    assert backend.peers == []


def signal_to(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a process of the proxy."""
    os.kill(pid, number)
