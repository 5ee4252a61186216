"""Several workers: one table, one count, one set of TLS tickets; and what happens when processes die."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.e2e.backends import Peer, Script, ok
from tests.e2e.certificates import Authority, client_context
from tests.e2e.conftest import SHORT_GOODBYE, StartBackend, StartProxy
from tests.e2e.http1_client import Http1Client, get
from tests.e2e.messages import Closed, Truncated
from tests.e2e.proxy_process import (
    KEY,
    PROXY,
    SECRET,
    ProxyProcess,
    clean_environment,
    free_port,
    registration,
)
from tests.e2e.waiting import eventually

TWO = ("--workers", "2")
PATIENT = "[timeouts]\ndrain = 20\nshutdown = 5\n"


def who_serves(peer: Peer) -> None:
    """Answer with the beginning of the request id, which every worker has of its own."""
    while True:
        request = peer.read_request()
        [identity] = request.values(b"x-request-id")
        peer.send(ok(identity.partition(b"-")[0], request))


def processes(proxy: ProxyProcess) -> dict[str, int]:
    """The children of its supervisor: `control`, `work0`, `work1` -> pid."""
    supervisor = proxy.generation
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    found = {}
    for child in children:
        name = Path(f"/proc/{child}/comm").read_text().strip()
        found[name.removeprefix("portero-")] = int(child)
    return found


def replaced(proxy: ProxyProcess, name: str, pid: int) -> bool:
    """Whether another process has that name now."""
    try:
        return processes(proxy).get(name, pid) != pid
    except OSError:
        return False  # it ended while we looked


def serving_worker(client: Http1Client, service: str) -> bytes:
    """Ask, and say which worker answered."""
    response = client.ask(get(service))
    assert response.status == 200, response
    return response.body


@contextmanager
def connections_to_both(
    service: str, connect: Callable[[], Http1Client], each: int = 1
) -> Iterator[dict[bytes, list[Http1Client]]]:
    """Live connections, by the worker that serves them."""
    with ExitStack() as stack:
        found: dict[bytes, list[Http1Client]] = {}
        # One by one, one worker may always be the first to wake up; of several at once both get some.
        for burst in [1] * 20 + [8] * 60:
            for client in [stack.enter_context(connect()) for _ in range(burst)]:
                found.setdefault(serving_worker(client, service), []).append(client)
            if len(found) == 2 and min(map(len, found.values())) >= each:
                break
        assert len(found) == 2, {worker: len(clients) for worker, clients in found.items()}
        yield found


class Load:
    """Threads that ask on keep-alive connections, and write down what broke."""

    def __init__(self, proxy: ProxyProcess, service: str, threads: int = 6) -> None:
        self.served: dict[bytes, int] = {}
        self.broken: list[bytes] = []  # the worker of each connection that broke
        self.wrong: list[str] = []
        self._proxy, self._service = proxy, service
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        eventually(lambda: sum(self.served.values()) > 50, "the load runs")
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(60)

    def goes_on(self) -> None:
        """Wait for many more answers."""
        before = sum(self.served.values())
        eventually(lambda: sum(self.served.values()) > before + 200 or self.wrong, "the load goes on")

    def _ask(self) -> None:
        while not self._done.is_set():
            worker = b""
            try:
                with self._proxy.connect() as client:
                    while not self._done.is_set():
                        response = client.ask(get(self._service))
                        if response.status != 200:
                            self.wrong.append(f"{response.status} {response.body!r}")
                            return
                        worker = response.body
                        self.served[worker] = self.served.get(worker, 0) + 1
            except (Closed, Truncated, ConnectionResetError):
                self.broken.append(worker)
            except OSError as error:
                self.wrong.append(repr(error))
                return


# One table


def test_a_backend_is_in_every_workers_table_when_its_post_is_answered(
    start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    proxy, backend = start_proxy(flags=TWO), start_backend(who_serves)
    workers = set()
    for turn in range(10):
        name = f"s{turn}.workers.test"
        proxy.serve(name, backend)
        for _ in range(10):
            with proxy.connect() as client:
                workers.add(serving_worker(client, name))
        proxy.deregister(name, host=backend.host, port=backend.port)
        for _ in range(10):
            with proxy.connect() as client:
                assert client.ask(get(name)).status == 503
    assert len(workers) == 2


def test_readyz_waits_for_all_workers(start_proxy: StartProxy) -> None:
    proxy = start_proxy(flags=("--workers", "3"))
    assert set(processes(proxy)) == {"control", "work0", "work1", "work2"}
    assert proxy.call("GET", "/readyz").status == 200


def test_a_changed_configuration_reaches_every_worker(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy, backend = start_proxy(flags=TWO), start_backend(who_serves)
    proxy.serve(service, backend)
    (proxy.folder / "portero.toml").write_text(f"{SHORT_GOODBYE}[limits]\nrequest_line = 300\n")
    proxy.signal(signal.SIGHUP)

    def refused_by_all() -> bool:
        with connections_to_both(service, proxy.connect) as clients:
            long = get(service, f"/{'x' * 290}")
            return all(client.ask(long).status == 414 for [client, *_] in clients.values())

    eventually(refused_by_all, "the new limit in both workers")


# Processes that die


def test_a_worker_that_is_killed_takes_only_its_own_connections_along(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy, backend = start_proxy(flags=TWO), start_backend(who_serves)
    proxy.serve(service, backend)
    with Load(proxy, service) as load, connections_to_both(service, proxy.connect) as clients:
        victim = processes(proxy)["work0"]
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: replaced(proxy, "work0", victim), "another worker in its place")
        load.goes_on()
        survivors = 0
        for worker, mine in clients.items():
            for client in mine:
                try:
                    survivors += serving_worker(client, service) == worker
                except (Closed, Truncated, ConnectionResetError):
                    load.broken.append(worker)
        assert survivors
        # The one that came later serves, with the table.
        eventually(lambda: len(_workers_that_serve(proxy, service) - set(clients)) == 1, "it serves")
    assert load.wrong == []
    assert len(set(load.broken) - {b""}) == 1, "all that broke were one worker's"
    assert proxy.metric("portero_worker_restarts_total", worker="0") == 1
    assert proxy.metric("portero_worker_restarts_total", worker="1") == 0


def _workers_that_serve(proxy: ProxyProcess, service: str) -> set[bytes]:
    with connections_to_both(service, proxy.connect) as clients:
        return set(clients)


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced_and_holds_up_no_registration_for_long(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy, backend = start_proxy(flags=TWO), start_backend(who_serves)
    proxy.serve(service, backend)
    victim = processes(proxy)["work1"]
    os.kill(victim, signal.SIGSTOP)
    begun = time.monotonic()
    for number in range(3):
        proxy.serve(f"s{number}.hang.test", backend)
    assert time.monotonic() - begun < 6
    with proxy.connect() as client:
        serving_worker(client, "s2.hang.test")
    eventually(lambda: replaced(proxy, "work1", victim), "another worker in its place", 30)
    with connections_to_both("s2.hang.test", proxy.connect):
        pass
    assert "worker 1 (pid" in proxy.operator_log()


def test_control_may_die_under_load_and_no_lease_and_no_request_is_lost(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy, backend = start_proxy(flags=TWO), start_backend(who_serves)
    proxy.serve(service, backend)
    granted = [service]
    pauses: list[float] = []
    done = threading.Event()

    def register_all_the_time() -> None:
        number = 0
        while not done.is_set():
            name = f"s{number}.control.test"
            begun = time.monotonic()
            while not done.is_set():
                try:
                    body = registration(name, backend.host, backend.port)
                    if proxy.call("POST", "/register", body).status == 200:
                        granted.append(name)
                        pauses.append(time.monotonic() - begun)
                        break
                except OSError:
                    time.sleep(0.01)  # that one died with the process; the port is open all the time
            number += 1

    registering = threading.Thread(target=register_all_the_time, daemon=True)
    with Load(proxy, service, threads=4) as load:
        registering.start()
        try:
            for _ in range(3):
                known = len(granted)
                eventually(lambda known=known: len(granted) > known + 20, "registrations")  # type: ignore[misc]
                victim = processes(proxy)["control"]
                os.kill(victim, signal.SIGKILL)
                eventually(lambda victim=victim: replaced(proxy, "control", victim), "another control")  # type: ignore[misc]
            known = len(granted)
            eventually(lambda: len(granted) > known + 20, "registrations")
        finally:
            done.set()
            registering.join(60)
        load.goes_on()
    assert load.wrong == []
    assert load.broken == []
    answer = proxy.call("GET", "/backends").json
    listed = {each["service_name"] for each in answer["services"] if each["backends"]}
    assert set(granted) <= listed
    for name in granted[-40:]:
        with proxy.connect() as client:
            serving_worker(client, name)
    # Whoever registers waits while another control loads its modules: 0.3 s of CPU time, on a busy machine.
    assert max(pauses) < 10, sorted(pauses)[-5:]
    assert proxy.metric("portero_worker_restarts_total", worker="control") == 3
    assert proxy.call("GET", "/readyz").status == 200


def test_a_lease_that_outlived_its_control_ends_when_it_would_have_ended(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy, backend = start_proxy(flags=TWO), start_backend(who_serves)
    begun = time.monotonic()
    proxy.register(service, backend.host, backend.port, ttl_seconds=100, instance_id="one", weight=3)
    time.sleep(1.2)
    _replace_control(proxy)
    [found] = proxy.call("GET", "/backends").json["services"]
    [lease] = found["backends"]
    assert (lease["instance_id"], lease["weight"]) == ("one", 3)
    assert 100 - (time.monotonic() - begun) - 1 < lease["expires_in"] < 99
    proxy.register(service, backend.host, backend.port, ttl_seconds=1, instance_id="one")
    _replace_control(proxy)
    with proxy.connect() as client:
        eventually(lambda: client.ask(get(service)).status == 503, "it has ended")


def _replace_control(proxy: ProxyProcess) -> None:
    victim = processes(proxy)["control"]
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: replaced(proxy, "control", victim), "another control")
    eventually(lambda: _answers(proxy), "it is ready")


def _answers(proxy: ProxyProcess) -> bool:
    try:
        return proxy.call("GET", "/readyz").status == 200
    except OSError:
        return False


def test_counters_add_up_over_workers_and_never_fall(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy, backend = start_proxy(flags=TWO), start_backend(who_serves)
    proxy.serve(service, backend)
    asked = 0

    def count() -> float:
        return proxy.metric("portero_requests_total", service=service)

    def ask_both() -> None:
        nonlocal asked
        with connections_to_both(service, proxy.connect) as clients:
            asked += sum(map(len, clients.values()))

    ask_both()
    eventually(lambda: count() == asked, "every request is counted")
    for name in ("work0", "control", "work1"):
        victim = processes(proxy)[name]
        os.kill(victim, signal.SIGKILL)
        eventually(lambda name=name, victim=victim: replaced(proxy, name, victim), "another one")  # type: ignore[misc]
        eventually(lambda: _answers(proxy), "it is ready")
        assert count() == asked
        ask_both()
        eventually(lambda: count() == asked, "every request is counted")
    eventually(lambda: proxy.metric("portero_connections_open") == 0, "what died holds nothing open")


def test_control_dies_and_later_a_worker_dies_and_backends_register_as_before(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy, backend = start_proxy(flags=TWO), start_backend(who_serves)
    proxy.serve(service, backend)
    _replace_control(proxy)
    for name in ("work0", "work1"):
        victim = processes(proxy)[name]
        os.kill(victim, signal.SIGKILL)
        eventually(lambda name=name, victim=victim: replaced(proxy, name, victim), "another worker")  # type: ignore[misc]
        proxy.serve(f"{name}.later.test", backend)
    eventually(lambda: len(_workers_that_serve(proxy, service)) == 2, "both serve")
    for name in (service, "work0.later.test", "work1.later.test"):
        with connections_to_both(name, proxy.connect):
            pass
    proxy.deregister("work0.later.test", host=backend.host, port=backend.port)
    assert proxy.call("GET", "/readyz").status == 200
    assert proxy.metric("portero_faults_total") == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_readyz_and_the_metrics_show_a_task_that_fails_until_it_works_again(
    workers: str, tmp_path: Path, certificate_folder: Path
) -> None:
    proxy = ProxyProcess(
        tmp_path / "faulty", certificates=certificate_folder, toml=SHORT_GOODBYE, flags=("--workers", workers)
    )
    broken = tmp_path / "broken"
    try:
        proxy.start([*PROXY[:2], "-c", _WITH_A_TASK_THAT_FAILS, str(broken)])
        broken.touch()
        eventually(lambda: proxy.call("GET", "/readyz").body == b"fault: certificates", "it says so")
        assert proxy.call("GET", "/readyz").status == 503
        assert proxy.call("GET", "/livez").status == 200
        assert proxy.metric("portero_faults_total", where="certificates") >= 1
        broken.unlink()
        eventually(lambda: proxy.call("GET", "/readyz").status == 200, "it is over")
    finally:
        proxy.kill()


#: Becomes the proxy that argv goes on with; following the certificates fails while the file argv[1] is there.
_WITH_A_TASK_THAT_FAILS = """
import asyncio, pathlib, runpy, sys
from portero_py.control import tasks
from portero_py.control.certificates import store
tasks.FIRST_PAUSE = tasks.MAX_PAUSE = 0.05
tasks.STEADY_SECONDS = 0.5
broken = pathlib.Path(sys.argv[1])
async def run(self):
    while not broken.exists():
        await asyncio.sleep(0.02)
    raise RuntimeError("a fault of the test's")
store.CertificateStore.run = run
sys.argv = sys.argv[sys.argv.index("portero_py"):]
runpy.run_module("portero_py", run_name="__main__")
"""


# The supervisor


def test_a_system_that_refuses_to_fork_ends_nobody_and_is_asked_again(
    tmp_path: Path, start_backend: StartBackend, service: str
) -> None:
    backend, refuse = start_backend(who_serves), tmp_path / "refuse"
    proxy = ProxyProcess(tmp_path / "refused", toml=SHORT_GOODBYE, flags=TWO)
    try:
        proxy.start([*PROXY[:2], "-c", _WITH_FORKS_THAT_FAIL, str(refuse)])
        proxy.serve(service, backend)
        refuse.touch()
        before = processes(proxy)
        os.kill(before["work0"], signal.SIGKILL)
        said = "worker 0 cannot be started: Resource temporarily unavailable"
        eventually(lambda: proxy.operator_log().count(said) >= 2, "it has tried more than once")
        with proxy.connect() as client:
            serving_worker(client, service)
        assert processes(proxy) == {name: pid for name, pid in before.items() if name != "work0"}
        refuse.unlink()
        eventually(lambda: "work0" in processes(proxy), "another worker")
        with connections_to_both(service, proxy.connect):
            pass
        proxy.stop()
    finally:
        proxy.kill()


#: Becomes the proxy that argv goes on with; no process can be forked while the file argv[1] is there.
_WITH_FORKS_THAT_FAIL = """
import errno, os, pathlib, runpy, sys
refuse, fork = pathlib.Path(sys.argv[1]), os.fork
def fork_perhaps():
    if refuse.exists():
        raise OSError(errno.EAGAIN, "no")
    return fork()
os.fork = fork_perhaps
sys.argv = sys.argv[sys.argv.index("portero_py"):]
runpy.run_module("portero_py", run_name="__main__")
"""


def test_a_supervisor_that_is_stopped_stops_nobody(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy, backend = start_proxy(flags=TWO), start_backend(who_serves)
    before, parents = processes(proxy), (proxy.pid, proxy.generation)
    for parent in parents:
        os.kill(parent, signal.SIGSTOP)
    try:
        proxy.serve(service, backend)
        with connections_to_both(service, proxy.connect):
            pass
        time.sleep(1.2)  # its time to look at them passes while it is away
    finally:
        for parent in parents:
            os.kill(parent, signal.SIGCONT)
    assert processes(proxy) == before
    assert "configuration read again" not in proxy.log()  # it took no signal for one that nobody sent


def test_when_the_supervisor_dies_the_others_finish_their_exchanges_and_end(
    tmp_path: Path, start_backend: StartBackend, service: str
) -> None:
    gate = threading.Event()

    def script(peer: Peer) -> None:
        while True:
            request = peer.read_request()
            gate.wait(60)
            peer.send(ok(b"done", request))

    backend = start_backend(script)
    proxy = ProxyProcess(tmp_path / "orphans", toml=PATIENT, flags=TWO).start()
    try:
        proxy.serve(service, backend)
        children = processes(proxy).values()
        with proxy.connect() as client:
            client.send(get(service))
            backend.wait_for_peers()
            eventually(lambda: backend.received, "the request is at the backend")
            proxy.kill()
            eventually(lambda: _refuses(proxy), "nothing new is taken")
            gate.set()
            assert client.read_response().body == b"done"
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "they have ended")
        proxy.assert_no_fault()
    finally:
        gate.set()
        proxy.kill()


def _refuses(proxy: ProxyProcess) -> bool:
    try:
        proxy.connect().close()
    except (ConnectionRefusedError, ConnectionResetError):  # reset: it was in the queue of a closed listener
        return True
    return False


def _slow_behind(gate: threading.Event) -> Script:
    """As `who_serves`, but /slow waits for the gate."""

    def script(peer: Peer) -> None:
        while True:
            request = peer.read_request()
            if request.path == b"/slow":
                gate.wait(60)
            [identity] = request.values(b"x-request-id")
            peer.send(ok(identity.partition(b"-")[0], request))

    return script


def test_sigterm_drains_every_worker_and_control_stays_to_the_end(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    gate = threading.Event()
    proxy, backend = start_proxy(toml=PATIENT, flags=TWO), start_backend(_slow_behind(gate))
    proxy.serve(service, backend)
    with connections_to_both(service, proxy.connect) as clients:
        for [client, *_] in clients.values():
            client.send(get(service, "/slow"))
        eventually(lambda: backend.received.count(b"GET /slow") == 2, "the requests are at the backend")
        proxy.signal(signal.SIGTERM)
        eventually(lambda: _refuses(proxy), "new connections are refused")
        eventually(lambda: proxy.call("GET", "/readyz").status == 503, "control was told too")
        proxy.serve(service, backend)
        gate.set()
        for worker, [client, *_] in clients.items():
            response = client.read_response()
            assert (response.body, response.values(b"connection")) == (worker, [b"close"])
    assert proxy.wait() == 0


def test_a_second_signal_ends_everything_at_once(
    tmp_path: Path, start_backend: StartBackend, service: str
) -> None:
    gate = threading.Event()

    def script(peer: Peer) -> None:
        peer.read_request()
        gate.wait(60)

    backend = start_backend(script)
    proxy = ProxyProcess(tmp_path / "hurry", toml=PATIENT.replace("20", "60"), flags=TWO).start()
    try:
        proxy.serve(service, backend)
        children = processes(proxy).values()
        with proxy.connect() as client:
            client.send(get(service))
            eventually(lambda: backend.received, "the request is at the backend")
            proxy.signal(signal.SIGTERM)
            eventually(lambda: _refuses(proxy), "new connections are refused")
            proxy.signal(signal.SIGTERM)
            assert proxy.wait(30) == 1
        assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    finally:
        gate.set()
        proxy.kill()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_stop_overtakes_any_number_of_reloads_and_abandons_the_one_that_hangs(
    workers: str, tmp_path: Path
) -> None:
    proxy = ProxyProcess(tmp_path / "flooded", toml=SHORT_GOODBYE, flags=("--workers", workers)).start()
    file = proxy.folder / "portero.toml"
    try:
        text = file.read_text()
        file.unlink()
        os.mkfifo(file)
        proxy.signal(signal.SIGHUP)
        # The first who reads it gets it all. Whoever comes next waits for ever.
        if workers == "2":
            eventually(lambda: _written(file, text) or "stays as it was" in proxy.log(), "it reads the file")
        for _ in range(200):
            proxy.signal(signal.SIGHUP)
        proxy.signal(signal.SIGTERM)
        proxy.stop()
    finally:
        proxy.kill()


def _written(fifo: Path, text: str) -> bool:
    try:
        descriptor = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return False  # nobody reads it
    os.write(descriptor, text.encode())
    os.close(descriptor)
    return True


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_ca_that_hangs_holds_up_no_exit(workers: str, tmp_path: Path, certificate_folder: Path) -> None:
    (tmp_path / "state").mkdir()
    shutil.copytree(certificate_folder, tmp_path / "certs")
    with socket.create_server(("127.0.0.1", 0)) as ca:
        proxy = ProxyProcess(
            tmp_path / "patient",
            certificates=tmp_path / "certs",
            toml=SHORT_GOODBYE,
            flags=(
                *("--workers", workers, "--state-dir", str(tmp_path / "state")),
                *("--acme-domain", "new.test", "--acme-agree-tos"),
                *("--acme-directory", f"https://127.0.0.1:{ca.getsockname()[1]}/dir"),
            ),
        ).start([*PROXY[:2], "-c", _WITH_ENDLESS_PATIENCE])
        ends = threading.Event()
        try:
            ca.settimeout(60)
            connection, _ = ca.accept()
            dripping = threading.Thread(target=_drip, args=(connection, ends))
            dripping.start()
            proxy.stop()
        finally:
            ends.set()
            proxy.kill()
            dripping.join(60)


#: Becomes the proxy that argv goes on with, but never gives up a CA by itself.
_WITH_ENDLESS_PATIENCE = """
import runpy, sys
from portero_py.control.acme import network
network.CONNECT_TIMEOUT += 1000.0
sys.argv = sys.argv[sys.argv.index("portero_py"):]
runpy.run_module("portero_py", run_name="__main__")
"""


def _drip(connection: socket.socket, ends: threading.Event) -> None:
    """The longest TLS record of a handshake, a byte at a time: no time-out of silence ends that."""
    with connection, contextlib.suppress(OSError):
        connection.sendall(b"\x16\x03\x03\x3f\xff")
        while not ends.wait(0.1):
            connection.sendall(b"\x02")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_container_that_is_stopped_while_it_starts_ends_in_good_order(
    workers: str, tmp_path: Path, need: Callable[[str], str]
) -> None:
    unshare = [need("unshare"), "--pid", "--fork", "--kill-child"]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no right to make a PID namespace")
    flags = ["--no-tls", "--workers", workers, "--listen-addr", f"127.0.0.1:{free_port()}"]
    outer = subprocess.Popen(
        [*unshare, *PROXY, *flags, "--register-addr", f"127.0.0.1:{free_port()}"],
        env=clean_environment({"PORTERO_REGISTER_SECRET": SECRET, "PORTERO_JWT_HMAC_KEY": KEY}),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        first = int(eventually(lambda: _children(outer.pid), "process number 1")[0])
        # Not SIGTERM, which unshare itself holds back for a moment.
        eventually(lambda: _holds_back(first, signal.SIGHUP), "it holds signals back")
        os.kill(first, signal.SIGTERM)
        assert outer.wait(60) == 0
        assert outer.stderr is not None
        assert outer.stderr.read().endswith(" stopped\n")
    finally:
        outer.kill()
        outer.communicate()


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _holds_back(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    [blocked] = [line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:")]
    return bool(int(blocked, 16) & 1 << (number - 1))


# TLS


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_sessions_are_resumed_by_every_worker_and_after_a_certificate_reload(
    version: ssl.TLSVersion,
    tmp_path: Path,
    authority: Authority,
    start_backend: StartBackend,
) -> None:
    name = "a.own.test"
    authority.issue(name).write(tmp_path / "certs" / name)
    backend = start_backend(who_serves)
    proxy = ProxyProcess(
        tmp_path / "proxy", certificates=tmp_path / "certs", toml=SHORT_GOODBYE, flags=TWO
    ).start()
    tls = client_context(authority.pem, "http/1.1")
    tls.minimum_version = tls.maximum_version = version
    address = ("127.0.0.1", proxy.port)

    def resume(session: ssl.SSLSession) -> bytes:
        """The worker that resumed it."""
        raw = socket.create_connection(address, timeout=60)
        with tls.wrap_socket(raw, server_hostname=name, session=session) as secure:
            assert secure.session_reused
            secure.sendall(get(name, "/", "Connection: close"))
            answer = b""
            while data := secure.recv(9999):
                answer += data
            return answer.rpartition(b"\r\n\r\n")[2]

    try:
        proxy.serve(name, backend)
        with Http1Client(address, tls=tls, sni=name) as client:
            serving_worker(client, name)
            assert isinstance(client.socket, ssl.SSLSocket)
            session = client.socket.session
            assert session is not None
        assert len({resume(session) for _ in range(60)}) == 2
        pair = authority.issue(name)
        pair.write(tmp_path / "certs" / name)
        proxy.signal(signal.SIGHUP)
        serials = {pair.serial: 0}

        def new_certificate_everywhere() -> bool:
            found = []
            for _ in range(20):
                with Http1Client(address, tls=tls, sni=name) as client:
                    assert isinstance(client.socket, ssl.SSLSocket)
                    presented = client.socket.getpeercert()
                    assert presented is not None
                    found.append((serving_worker(client, name), int(str(presented["serialNumber"]), 16)))
            return {serial for _, serial in found} == set(serials) and len(set(found)) == 2

        eventually(new_certificate_everywhere, "every worker presents the new certificate")
        assert len({resume(session) for _ in range(60)}) == 2
        proxy.stop()
    finally:
        proxy.kill()


# The log

#: Becomes the program in argv[2:], its stdout a pipe that a child copies to the file argv[1].
_LOG_TO_PIPE = """
import os, shutil, sys
reading, writing = os.pipe()
if os.fork() == 0:
    os.close(writing)
    with open(reading, "rb", buffering=0) as log, open(sys.argv[1], "wb") as file:
        shutil.copyfileobj(log, file)
    os._exit(0)
os.dup2(writing, 1)
os.close(reading)
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_lines_of_the_access_log_are_whole_whoever_writes_them(
    tmp_path: Path, start_backend: StartBackend, service: str
) -> None:
    file = tmp_path / "access.log"
    backend = start_backend(who_serves)
    proxy = ProxyProcess(tmp_path / "piped", toml=SHORT_GOODBYE, flags=TWO)
    try:
        proxy.start([sys.executable, "-c", _LOG_TO_PIPE, str(file)])
        proxy.serve(service, backend)

        def ask(number: int) -> None:
            with proxy.connect() as client:
                for turn in range(100):
                    # Longer than what a pipe takes in one piece.
                    assert client.ask(get(service, f"/{number}/{turn}/{'x' * 7000}")).status == 200

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        proxy.stop()
    finally:
        proxy.kill()
    eventually(lambda: file.read_bytes().count(b"\n") == 600, "every line is there")
    paths = set()
    for line in file.read_bytes().splitlines():
        assert line.startswith(b'{"time":')
        assert line.endswith(b'"error":""}')
        assert line.count(b'{"time":') == 1
        paths.add(line)
    assert len(paths) == 600


# The state directory


@pytest.mark.parametrize("workers", ["1", "2"])
def test_leases_survive_a_restart(
    workers: str, tmp_path: Path, start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    (tmp_path / "state").mkdir()
    flags, backend = ("--workers", workers, "--state-dir", str(tmp_path / "state")), start_backend(who_serves)
    first = start_proxy(flags=flags)
    first.serve(service, backend)
    first.register("short.test", backend.host, backend.port, ttl_seconds=1)
    first.stop()
    time.sleep(1.0)
    second = start_proxy(flags=flags)
    with second.connect() as client:
        serving_worker(client, service)
        assert client.ask(get("short.test")).status == 404


@pytest.mark.parametrize("workers", ["1", "2"])
def test_no_granted_lease_is_lost_when_the_supervisor_is_killed(
    workers: str, tmp_path: Path, start_backend: StartBackend
) -> None:
    state, backend = tmp_path / "var" / "state", start_backend(who_serves)
    flags = ("--workers", workers, "--state-dir", str(state))
    proxy = ProxyProcess(tmp_path / "killed", toml=SHORT_GOODBYE, flags=flags).start()
    names = [f"s{number}.killed.test" for number in range(50)]
    try:
        assert state.stat().st_mode & 0o777 == 0o700
        for name in names:
            proxy.serve(name, backend)
        if workers == "1":  # nobody is left who could write
            eventually(lambda: (state / "leases.json").read_text().count(".killed.test") >= 50, "on disk")
            children = [proxy.generation]
        else:
            children = [proxy.generation, *processes(proxy).values()]
        proxy.kill()
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "all have ended")
        proxy.start()
        for name in names:
            with proxy.connect() as client:
                serving_worker(client, name)
        proxy.stop()
    finally:
        proxy.kill()


def test_instances_that_share_a_state_directory_keep_their_leases_apart(
    tmp_path: Path, start_backend: StartBackend
) -> None:
    backend, state = start_backend(who_serves), tmp_path / "state"
    state.mkdir()
    proxies = [
        ProxyProcess(
            tmp_path / name, toml=SHORT_GOODBYE, flags=("--workers", workers, "--state-dir", str(state))
        )
        for name, workers in (("one", "1"), ("two", "2"), ("three", "1"))
    ]
    try:
        for proxy in proxies:
            proxy.start().serve(f"{proxy.folder.name}.shared.test", backend)
        _replace_control(proxies[1])
        proxies[1].serve("later.shared.test", backend)
        for proxy in proxies:
            proxy.stop()
        for proxy in reversed(proxies):
            proxy.start()
            found = {each["service_name"] for each in proxy.call("GET", "/backends").json["services"]}
            mine = {f"{proxy.folder.name}.shared.test"}
            assert found == (mine | {"later.shared.test"} if proxy is proxies[1] else mine)
        for proxy in proxies:
            proxy.stop()
    finally:
        for proxy in proxies:
            proxy.kill()


# Start-up errors


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tls-cert-dir", "/nonexistent"], "--tls-cert-dir: cannot read /nonexistent"),
        (["--no-tls", "--upstream-tls-verify", "--upstream-ca-file", "/etc/hostname"], "/etc/hostname"),
        (["--no-tls", "--register-addr", "192.0.2.1:1"], "--register-addr: cannot listen"),
    ],
)
def test_what_keeps_it_from_starting_is_one_line(flags: list[str], says: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "portero_py", *TWO, "--listen-addr", f"127.0.0.1:{free_port()}"),
            *("--register-addr", f"127.0.0.1:{free_port()}", *flags),
        ],
        env=clean_environment({"PORTERO_REGISTER_SECRET": SECRET, "PORTERO_JWT_HMAC_KEY": KEY}),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if " WARNING " not in line]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("portero-py: ")
    assert says in lines[0]
