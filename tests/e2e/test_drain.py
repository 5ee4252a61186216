"""Backends leave and drain: the answer comes when the last exchange has ended, and none is cut."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from tests.e2e.backends import Peer, RecordingBackend, ok
from tests.e2e.conftest import SHORT_GOODBYE, StartBackend, StartProxy
from tests.e2e.http1_client import Http1Client, get, post
from tests.e2e.messages import Closed, Truncated
from tests.e2e.proxy_process import KEY, PROXY, SECRET, ProxyProcess, clean_environment, token
from tests.e2e.test_workers import connections_to_both, processes, replaced
from tests.e2e.waiting import PATIENCE, eventually

WORKERS = pytest.mark.parametrize("workers", ["1", "2"])
UPGRADE = ("Connection: Upgrade", "Upgrade: echo")
#: Longer than the longest pause between two looks.
A_FEW_LOOKS = 0.6


class Backend:
    """Its downloads stop in the middle until `gate` opens; it echoes in tunnels, and tells its port else."""

    def __init__(self, start: StartBackend) -> None:
        self.gate = threading.Event()
        self.held = 0
        self._backend: RecordingBackend = start(self._play)
        self.port = self._backend.port

    @property
    def which(self) -> dict[str, object]:
        """Names it."""
        return {"host": "127.0.0.1", "port": self.port}

    def _play(self, peer: Peer) -> None:
        while True:
            request = peer.read_request()
            if request.path == b"/download":
                peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n0123456789")
                self.held += 1
                self.gate.wait(PATIENCE)
                peer.send(b"0123456789")
            elif request.path == b"/tunnel":
                peer.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
                while data := peer.receive():
                    peer.send(data)
                return
            elif request.method == b"POST":
                peer.send(ok(request.body))
            else:
                [identity] = request.values(b"x-request-id")  # its beginning is the worker's own
                peer.send(ok(b"%d" % self.port if request.path == b"/" else identity.partition(b"-")[0]))


class Asked:
    """A call that waits, in a thread: when its head came, and what it said in the end."""

    def __init__(self, proxy: ProxyProcess, method: str, path: str, body: Mapping[str, object]) -> None:
        self.head = threading.Event()
        self.status = 0
        self.json: Any = None
        self.error: BaseException | None = None
        self._proxy, self._method, self._path, self._body = proxy, method, path, body
        self._connection = http.client.HTTPConnection("127.0.0.1", proxy.register_port, timeout=PATIENCE)
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    @property
    def is_waiting(self) -> bool:
        """Whether its answer is still to come."""
        return self._thread.is_alive()

    def answer(self) -> Any:
        """What it said."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "no answer"
        if self.error is not None:
            raise self.error
        assert self.status == 200, self.json
        return self.json

    def _ask(self) -> None:
        fields = {
            "Content-Type": "application/json",
            "X-Register-Secret": SECRET,
            "Authorization": f"Bearer {token(str(self._body['service_name']))}",
        }
        try:
            self._connection.request(self._method, self._path, json.dumps(self._body), fields)
            response = self._connection.getresponse()
            self.status = response.status
            self.head.set()
            self.json = json.loads(response.read())
        except (OSError, http.client.HTTPException) as error:
            self.error = error
        finally:
            self._connection.close()


def deregistered(proxy: ProxyProcess, service: str, backend: Backend, wait_seconds: float = 60) -> Asked:
    body = {"service_name": service, **backend.which, "wait_seconds": wait_seconds}
    return Asked(proxy, "DELETE", "/register", body)


def drained(proxy: ProxyProcess, service: str, backend: Backend, wait_seconds: float = 60) -> Asked:
    body = {"service_name": service, **backend.which, "wait_seconds": wait_seconds}
    return Asked(proxy, "POST", "/backends/drain", body)


def ready(proxy: ProxyProcess, service: str, backend: Backend) -> Any:
    answer = proxy.call("POST", "/backends/ready", {"service_name": service, **backend.which})
    assert answer.status == 200, answer.body
    return answer.json


def served_by(proxy: ProxyProcess, service: str, requests: int = 12) -> set[int]:
    """The ports of those who answer, each request on a connection of its own."""
    found = set()
    for _ in range(requests):
        with proxy.connect() as client:
            response = client.ask(get(service))
            assert response.status == 200, response
            found.add(int(response.body))
    return found


def goes_on_waiting(asked: Asked) -> None:
    assert asked.head.wait(PATIENCE), asked.error
    time.sleep(A_FEW_LOOKS)  # the time in which it would have been answered wrongly
    assert asked.is_waiting, asked.json or asked.error


@WORKERS
@pytest.mark.parametrize("leave", [deregistered, drained])
def test_the_answer_comes_when_the_last_exchange_has_ended_and_none_is_cut(
    workers: str,
    leave: Callable[[ProxyProcess, str, Backend], Asked],
    start_proxy: StartProxy,
    start_backend: StartBackend,
    service: str,
) -> None:
    proxy = start_proxy(flags=("--workers", workers))
    old, new = Backend(start_backend), Backend(start_backend)
    proxy.register(service, "127.0.0.1", old.port)
    with contextlib.ExitStack() as stack:
        downloads = [stack.enter_context(proxy.connect()) for _ in range(4)]
        tunnel, upload = stack.enter_context(proxy.connect()), stack.enter_context(proxy.connect())
        for client in downloads:
            client.send(get(service, "/download"))
        eventually(lambda: old.held == 4, "all downloads have begun")
        tunnel.send(get(service, "/tunnel", *UPGRADE))
        tunnel.send(b"first")
        body = b"x" * 100_000
        request = post(service, body)
        upload.send(request[:-1])
        eventually(lambda: proxy.metric("portero_requests_in_flight") == 6, "all are in flight")
        proxy.register(service, "127.0.0.1", new.port)

        asked = leave(proxy, service, old)
        assert asked.head.wait(PATIENCE), "its head comes at once"
        assert served_by(proxy, service) == {new.port}, "nothing new goes there"
        goes_on_waiting(asked)

        old.gate.set()
        for client in downloads:
            assert client.read_response().body == b"01234567890123456789"
        goes_on_waiting(asked)

        upload.send(request[-1:])
        assert upload.read_response(b"POST").body == body
        goes_on_waiting(asked)

        tunnel.send(b" and last")
        received = b""
        while not received.endswith(b"first and last"):
            received += tunnel.read_some()
        tunnel.close()
        assert asked.answer()["in_flight"] == 0
    assert served_by(proxy, service) == {new.port}


@WORKERS
def test_when_the_time_is_up_the_answer_says_how_many_are_in_flight(
    workers: str, start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy, backend = start_proxy(flags=("--workers", workers)), Backend(start_backend)
    proxy.register(service, "127.0.0.1", backend.port)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(proxy.connect()) for _ in range(6)]
        for client in clients:
            client.send(get(service, "/download"))
        eventually(lambda: backend.held == 6, "they are in flight")
        assert drained(proxy, service, backend, 0).answer()["in_flight"] == 6
        answer = deregistered(proxy, service, backend, 0.3).answer()
        assert (answer["status"], answer["in_flight"]) == ("deregistered", 6)
        backend.gate.set()
        for client in clients:
            assert client.read_response().body == b"01234567890123456789"


@WORKERS
def test_ready_brings_a_drained_backend_back_and_renewals_do_not(
    workers: str, start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy(flags=("--workers", workers))
    one, other = Backend(start_backend), Backend(start_backend)
    for backend in (one, other):
        proxy.register(service, "127.0.0.1", backend.port)
    assert served_by(proxy, service) == {one.port, other.port}
    assert drained(proxy, service, one).answer()["state"] == "draining"
    assert served_by(proxy, service) == {other.port}
    proxy.register(service, "127.0.0.1", one.port)
    assert served_by(proxy, service) == {other.port}
    assert ready(proxy, service, one)["state"] == "ready"
    assert served_by(proxy, service) == {one.port, other.port}
    drained(proxy, service, one).answer()
    drained(proxy, service, other).answer()
    with proxy.connect() as client:
        assert client.ask(get(service)).status == 503


def test_a_drain_survives_the_control_process(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy(flags=("--workers", "2"))
    one, other = Backend(start_backend), Backend(start_backend)
    for backend in (one, other):
        proxy.register(service, "127.0.0.1", backend.port)
    with proxy.connect() as client:
        client.send(get(service, "/download"))
        eventually(lambda: one.held + other.held == 1, "it is in flight")
        held, free = (one, other) if one.held else (other, one)
        lost = drained(proxy, service, held)
        assert lost.head.wait(PATIENCE)
        control = processes(proxy)["control"]
        os.kill(control, signal.SIGKILL)
        eventually(lambda: replaced(proxy, "control", control), "another control process")
        eventually(lambda: not lost.is_waiting, "whoever waited hears that it is gone")
        assert lost.error is not None
        eventually(lambda: _is_ready(proxy), "it is ready")
        assert served_by(proxy, service) == {free.port}
        proxy.register(service, "127.0.0.1", held.port)
        assert served_by(proxy, service) == {free.port}
        again = drained(proxy, service, held)
        goes_on_waiting(again)
        held.gate.set()
        assert client.read_response().body == b"01234567890123456789"
        assert again.answer() == {
            "service_name": service,
            "instance_id": f"127.0.0.1:{held.port}",
            "host": "127.0.0.1",
            "port": held.port,
            "state": "draining",
            "in_flight": 0,
        }


def _is_ready(proxy: ProxyProcess) -> bool:
    try:
        return proxy.call("GET", "/readyz").status == 200
    except OSError:
        return False


@contextlib.contextmanager
def _one_in_each(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> Iterator[tuple[ProxyProcess, Backend, list[Http1Client]]]:
    """A proxy with two workers, a backend, and a download in each worker."""
    proxy, backend = start_proxy(flags=("--workers", "2")), Backend(start_backend)
    proxy.register(service, "127.0.0.1", backend.port)
    with connections_to_both(service, lambda: _Identified(proxy)) as found:
        try:
            for clients in found.values():
                clients[0].send(get(service, "/download"))
            eventually(lambda: backend.held == 2, "one download in each worker")
            yield proxy, backend, [clients[0] for clients in found.values()]
        finally:
            backend.gate.set()


class _Identified(Http1Client):
    """Asks for /who where others ask for /."""

    def __init__(self, proxy: ProxyProcess) -> None:
        super().__init__(("127.0.0.1", proxy.port))

    def send(self, data: bytes) -> None:
        super().send(data.replace(b"GET / ", b"GET /who "))


def test_a_worker_that_is_killed_holds_nothing_any_more(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    with _one_in_each(start_proxy, start_backend, service) as (proxy, backend, clients):
        asked = deregistered(proxy, service, backend)
        goes_on_waiting(asked)
        os.kill(processes(proxy)["work0"], signal.SIGKILL)
        goes_on_waiting(asked)
        backend.gate.set()
        whole = 0
        for client in clients:
            try:
                whole += client.read_response().body == b"01234567890123456789"
            except (Closed, Truncated, ConnectionResetError):
                continue
        assert whole == 1
        assert asked.answer()["in_flight"] == 0


def test_a_worker_that_does_not_answer_is_not_known_to_be_empty(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    with _one_in_each(start_proxy, start_backend, service) as (proxy, backend, clients):
        frozen = processes(proxy)["work1"]
        os.kill(frozen, signal.SIGSTOP)
        try:
            assert drained(proxy, service, backend, 0.1).answer()["in_flight"] >= 2
            asked = deregistered(proxy, service, backend)
            goes_on_waiting(asked)
        finally:
            os.kill(frozen, signal.SIGCONT)
        goes_on_waiting(asked)
        backend.gate.set()
        for client in clients:
            assert client.read_response().body == b"01234567890123456789"
        assert asked.answer()["in_flight"] == 0


@WORKERS
def test_whoever_waits_when_portero_ends_gets_an_answer(
    workers: str, start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy(flags=("--workers", workers), toml="[timeouts]\ndrain = 1\nshutdown = 2\n")
    backend = Backend(start_backend)
    proxy.register(service, "127.0.0.1", backend.port)
    with proxy.connect() as client:
        client.send(get(service, "/download"))
        eventually(lambda: backend.held == 1, "it is in flight")
        asked = deregistered(proxy, service, backend, 300)
        goes_on_waiting(asked)
        proxy.signal(signal.SIGTERM)
        assert asked.answer()["status"] == "deregistered"
        assert proxy.wait() == 0
        backend.gate.set()


# The commands


def command(proxy: ProxyProcess, *arguments: str) -> subprocess.Popen[bytes]:
    environment = clean_environment(
        {
            "PORTERO_REGISTER_SECRET": SECRET,
            "PORTERO_JWT_HMAC_KEY": KEY,
            "PORTERO_API": f"http://127.0.0.1:{proxy.register_port}",
        }
    )
    return subprocess.Popen(
        [*PROXY, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out.decode(), err.decode()


def test_the_command_drains_a_whole_service_and_says_whether_it_is_empty(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy()
    backends = [Backend(start_backend) for _ in range(3)]
    for backend in backends:
        proxy.register(service, "127.0.0.1", backend.port)
    with proxy.connect() as client:
        client.send(get(service, "/download"))
        eventually(lambda: sum(backend.held for backend in backends) == 1, "it is in flight")
        status, out, err = ended(command(proxy, "drain", "--service", service, "--wait", "0.2"))
        assert (status, err) == (1, "")
        assert sorted(line.rpartition(": ")[2] for line in out.splitlines()) == [
            "draining, 0 in flight",
            "draining, 0 in flight",
            "draining, 1 in flight",
        ]
        answers = proxy.metric("portero_actions_total", action="drain")
        waits = command(proxy, "drain", "--service", service, "--wait", "60", "--json")
        # It drains each of them before it waits for any.
        eventually(lambda: proxy.metric("portero_actions_total", action="drain") >= answers + 3, "it waits")
        time.sleep(A_FEW_LOOKS)
        assert waits.poll() is None
        for backend in backends:
            backend.gate.set()
        assert client.read_response().body == b"01234567890123456789"
        status, out, err = ended(waits)
        assert (status, err) == (0, "")
        assert [each["in_flight"] for each in json.loads(out)["backends"]] == [0, 0, 0]


def test_the_agent_ends_when_the_last_response_is_out(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy, backend = start_proxy(), Backend(start_backend)
    agent = command(proxy, "agent", "--service", service, "--host=127.0.0.1", f"--port={backend.port}")
    with proxy.connect() as client, proxy.connect() as other:
        eventually(lambda: other.ask(get(service)).status == 200, "it is registered")
        client.send(get(service, "/download"))
        eventually(lambda: backend.held == 1, "it is in flight")
        agent.terminate()
        eventually(lambda: other.ask(get(service)).status == 503, "nothing new goes there")
        time.sleep(4)  # longer than a portero that does not answer is waited for
        assert agent.poll() is None
        backend.gate.set()
        assert client.read_response().body == b"01234567890123456789"
        status, _, err = ended(agent)
    assert status == 0
    assert "in flight" not in err


@pytest.mark.parametrize("flags", [("--drain=0",), ("--drain=0.2",), ()])
def test_the_agent_ends_without_it_when_it_was_told_to(
    flags: tuple[str, ...], start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    """By the flag, or by a second signal."""
    proxy, backend = start_proxy(), Backend(start_backend)
    where = ("--service", service, "--host=127.0.0.1", f"--port={backend.port}")
    agent = command(proxy, "agent", *where, *flags)
    with proxy.connect() as client, proxy.connect() as other:
        eventually(lambda: other.ask(get(service)).status == 200, "it is registered")
        client.send(get(service, "/download"))
        eventually(lambda: backend.held == 1, "it is in flight")
        agent.terminate()
        eventually(lambda: other.ask(get(service)).status == 503, "nothing new goes there")
        if not flags:
            agent.terminate()
        status, _, err = ended(agent)
        assert status == 0
        assert (" in flight\n" in err) == bool(flags), err
        backend.gate.set()
        assert client.read_response().body == b"01234567890123456789"


@pytest.mark.minutes
def test_the_agent_does_not_leave_early_where_nobody_can_say_what_is_in_flight(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    """The control process dies while it waits, the download in the worker goes on."""
    proxy, backend = start_proxy(flags=("--workers", "2")), Backend(start_backend)
    where = ("--service", service, "--host=127.0.0.1", f"--port={backend.port}")
    agent = command(proxy, "agent", *where, "--drain=12")
    with proxy.connect() as client, proxy.connect() as other:
        eventually(lambda: other.ask(get(service)).status == 200, "it is registered")
        client.send(get(service, "/download"))
        eventually(lambda: backend.held == 1, "it is in flight")
        agent.terminate()
        eventually(lambda: other.ask(get(service)).status == 503, "nothing new goes there")
        time.sleep(A_FEW_LOOKS)  # it waits by now
        control = processes(proxy)["control"]
        os.kill(control, signal.SIGKILL)
        eventually(lambda: replaced(proxy, "control", control), "another control process")
        eventually(lambda: _is_ready(proxy), "it is ready")
        assert agent.poll() is None
        backend.gate.set()
        assert client.read_response().body == b"01234567890123456789"
        status, _, err = ended(agent)
    assert status == 0
    assert "what is in flight is unknown: " in err


# Deploys


class Load:
    """Clients that ask all the time, keep WebSockets and long downloads, and write down what went wrong."""

    def __init__(self, proxy: ProxyProcess, service: str) -> None:
        self.asked = 0
        self.wrong: list[str] = []
        self._proxy, self._service = proxy, service
        self._done = threading.Event()
        kinds = [self._gets, self._gets, self._posts, self._downloads, self._downloads, self._tunnels]
        self._threads = [
            threading.Thread(target=self._until_done, args=(kind,), daemon=True) for kind in kinds
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    def _until_done(self, once: Callable[[Http1Client], None]) -> None:
        while not self._done.is_set():
            try:
                with self._proxy.connect() as client:
                    once(client)
            except (Closed, Truncated, OSError) as error:
                self.wrong.append(f"{once.__name__}: {error!r}")

    def _expect(self, is_right: bool, what: object) -> None:
        self.asked += 1
        if not is_right:
            self.wrong.append(repr(what))

    def _gets(self, client: Http1Client) -> None:
        for _ in range(50):
            response = client.ask(get(self._service))
            self._expect(response.body == b"01234567890123456789", response)
            time.sleep(0.005)

    def _posts(self, client: Http1Client) -> None:
        for number in range(50):
            body = b"%d" % number * 100
            response = client.ask(post(self._service, body), b"POST")
            self._expect((response.status, response.body) == (200, body), response)
            time.sleep(0.01)

    def _downloads(self, client: Http1Client) -> None:
        response = client.ask(get(self._service, "/?pause=3"))
        self._expect(response.body == b"01234567890123456789", response)

    def _tunnels(self, client: Http1Client) -> None:
        """A WebSocket that the client closes after a second: it is never cut."""
        key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
        client.send(get(self._service, "/", "Connection: Upgrade", "Upgrade: websocket", key, _VERSION))
        head = client.read_some()
        for turn in range(5):
            client.send(b"\x81\x82\0\0\0\0%02d" % turn)
            self._expect(
                head.startswith(b"HTTP/1.1 101") and client.read_some() == b"\x81\x02%02d" % turn, head
            )
            time.sleep(0.2)


_VERSION = "Sec-WebSocket-Version: 13"


@contextlib.contextmanager
def deployed(proxy: ProxyProcess, service: str) -> Iterator[subprocess.Popen[bytes]]:
    """A new version of the backend, registered."""
    url = f"http://127.0.0.1:{proxy.register_port}"
    command = [sys.executable, "-m", "tests.e2e.rolling_backend", service, url, SECRET, KEY]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"registered\n"
            yield process
        finally:
            process.kill()


@WORKERS
@pytest.mark.minutes
def test_ten_deploys_under_load_lose_nothing(workers: str, start_proxy: StartProxy, service: str) -> None:
    proxy = start_proxy(flags=("--workers", workers), toml=SHORT_GOODBYE)
    with contextlib.ExitStack() as stack:
        former = stack.enter_context(deployed(proxy, service))
        with Load(proxy, service) as load:
            for _ in range(10):
                asked = load.asked
                eventually(lambda asked=asked: load.asked > asked + 50, "the load goes on")  # type: ignore[misc]
                new = stack.enter_context(deployed(proxy, service))
                former.terminate()
                assert former.wait(PATIENCE) == 0
                former = new
    assert load.wrong == []
    assert load.asked > 500
