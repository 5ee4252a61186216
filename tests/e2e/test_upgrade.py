"""SIGUSR2: the new version beside the running one, under load, and what happens when it does not come up."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from tests.e2e.backends import Peer, RecordingBackend, ok
from tests.e2e.certificates import Authority, client_context
from tests.e2e.conftest import StartBackend
from tests.e2e.http1_client import Http1Client, get
from tests.e2e.proxy_process import PROXY, ProxyProcess, free_port
from tests.e2e.steady_load import SteadyLoad, answers
from tests.e2e.waiting import eventually

#: Long enough for the slow downloads of the load.
DRAIN = "[timeouts]\ndrain = 6\nshutdown = 3\n"


class Upgraded:
    """A TLS proxy that is upgraded, and the load on it."""

    def __init__(self, proxy: ProxyProcess) -> None:
        self.proxy = proxy

    @classmethod
    def with_workers(cls, workers: str, folder: Path, certificates: Path) -> Upgraded:
        """One that is not started yet."""
        flags = ("--workers", workers)
        return cls(ProxyProcess(folder, certificates=certificates, toml=DRAIN, flags=flags))

    def upgrade(self) -> None:
        """SIGUSR2, and wait until the new version serves and the main process is the new one too."""
        done = self.times("upgraded: the new version serves")
        self.proxy.signal(signal.SIGUSR2)
        eventually(lambda: self.times("upgraded: the new version serves") > done, "it is upgraded")

    def times(self, said: str) -> int:
        """How often the log says that."""
        return self.proxy.operator_log().count(said)

    def descendants(self) -> list[int]:
        """The pids of all processes below the main one."""
        return _descendants(self.proxy.pid)

    def is_alone(self) -> bool:
        """Whether all former generations have ended."""
        return len(_children(self.proxy.pid)) == 1


def _children(pid: int) -> list[int]:
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _descendants(pid: int) -> list[int]:
    found = []
    for child in _children(pid):
        found += [child, *_descendants(child)]
    return found


@pytest.fixture(params=["1", "2"])
def upgraded(request: pytest.FixtureRequest, tmp_path: Path, certificate_folder: Path) -> Iterator[Upgraded]:
    one = Upgraded.with_workers(request.param, tmp_path / "upgraded", certificate_folder)
    one.proxy.start()
    yield one
    one.proxy.kill()


def _load(
    upgraded: Upgraded, authority: Authority, backend: RecordingBackend, service: str, chat: int
) -> SteadyLoad:
    upgraded.proxy.serve(service, backend)
    upgraded.proxy.register(f"chat-{service}", "127.0.0.1", chat)
    return SteadyLoad(upgraded.proxy, service, authority, f"chat-{service}")


@pytest.mark.parametrize("times", [2, pytest.param(10, marks=pytest.mark.minutes)])
def test_upgrades_under_load_lose_no_request_and_no_registration(
    times: int,
    upgraded: Upgraded,
    authority: Authority,
    start_backend: StartBackend,
    service: str,
    chat_backend: int,
) -> None:
    proxy, pid = upgraded.proxy, upgraded.proxy.pid
    with _load(upgraded, authority, start_backend(answers), service, chat_backend) as load:
        first = upgraded.descendants()
        for _ in range(times):
            upgraded.upgrade()
            load.goes_on()
        eventually(lambda: not set(first) & set(upgraded.descendants()), "the first version has ended")
        load.goes_on()
    assert load.lost == []
    found = {each["service_name"] for each in proxy.call("GET", "/backends").json["services"]}
    assert found >= {service, *load.registered}
    eventually(upgraded.is_alone, "the former generations have ended")
    assert proxy.pid == pid
    print(f"{load.sent} requests of all kinds: {dict(load.answered)}")  # shown by pytest -rP
    assert proxy.metric("portero_requests_in_flight") == 0
    proxy.stop()


def test_the_leases_counters_and_sessions_go_on(
    upgraded: Upgraded, authority: Authority, start_backend: StartBackend, service: str
) -> None:
    proxy, backend = upgraded.proxy, start_backend(answers)
    proxy.serve(service, backend)
    tls = client_context(authority.pem, "http/1.1")
    address = ("127.0.0.1", proxy.port)
    for _ in range(5):
        with Http1Client(address, tls=tls, sni=service) as client:
            assert client.ask(get(service)).status == 200
            client.socket.settimeout(0.2)  # the ticket comes with the answer
            session = cast("ssl.SSLSocket", client.socket).session
    before = proxy.metric("portero_requests_total", service=service)
    upgraded.upgrade()
    assert proxy.metric("portero_requests_total", service=service) >= before == 5
    with socket.create_connection(address) as raw:
        resumed = tls.wrap_socket(raw, server_hostname=service, session=session)
        assert resumed.session_reused
        resumed.close()
    [found] = proxy.call("GET", "/backends").json["services"]
    assert found["service_name"] == service
    eventually(upgraded.is_alone, "the former generation has ended")
    assert proxy.metric("portero_requests_total", service=service) == 5
    upgraded.proxy.stop()


def test_an_old_worker_that_drains_still_counts_and_routes_by_new_leases(
    upgraded: Upgraded, authority: Authority, start_backend: StartBackend, service: str
) -> None:
    gate = threading.Event()

    def waits(peer: Peer) -> None:
        request = peer.read_request()
        gate.wait(20)
        peer.send(ok(b"done", request))

    proxy, backend = upgraded.proxy, start_backend(waits)
    proxy.serve(service, backend)
    tls = client_context(authority.pem, "http/1.1")
    with Http1Client(("127.0.0.1", proxy.port), tls=tls, sni=service) as client:
        client.send(get(service))
        eventually(lambda: backend.requests, "the request is at the backend")
        upgraded.upgrade()
        eventually(lambda: proxy.metric("portero_requests_in_flight") == 1, "what the old one has counts")
        gate.set()
        response = client.read_response()
        assert (response.status, response.body) == (200, b"done")
    eventually(upgraded.is_alone, "the former generation has ended")
    assert proxy.metric("portero_requests_total", service=service) == 1
    assert proxy.metric("portero_requests_in_flight") == 0
    upgraded.proxy.stop()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_good_pair_outlives_an_upgrade_when_its_files_are_spoilt(
    workers: str, tmp_path: Path, authority: Authority, start_backend: StartBackend
) -> None:
    name, folder = "spoilt.upgrade.test", tmp_path / "certs"
    authority.issue(name).write(folder / name)
    authority.issue("good.upgrade.test").write(folder / "good.upgrade.test")
    one = Upgraded.with_workers(workers, tmp_path / "upgraded", folder)
    one.proxy.start()
    try:
        one.proxy.serve(name, start_backend(answers))
        (folder / name / "fullchain.pem").write_bytes(b"-----BEGIN CERTIFICATE-----\n")
        eventually(lambda: one.times("the one loaded before stays") > 0, "the spoilt file was seen")
        one.upgrade()
        eventually(one.is_alone, "the former generation has ended")
        tls = client_context(authority.pem, "http/1.1")
        for _ in range(2):  # and the one after it
            with Http1Client(("127.0.0.1", one.proxy.port), tls=tls, sni=name) as client:
                assert client.ask(get(name)).status == 200
            one.upgrade()
            eventually(one.is_alone, "the former generation has ended")
        one.proxy.stop()
    finally:
        one.proxy.kill()


def test_with_a_state_directory_the_new_version_writes_it_also_with_another_number_of_workers(
    tmp_path: Path, authority: Authority, certificate_folder: Path, start_backend: StartBackend, service: str
) -> None:
    state = f'state_dir = "{tmp_path / "state"}"\n'
    proxy = ProxyProcess(tmp_path / "changing", certificates=certificate_folder, toml=f"{state}{DRAIN}")
    one, backend = Upgraded(proxy), start_backend(answers)
    proxy.start()
    try:
        proxy.serve(service, backend)
        for workers in (2, 1):
            (proxy.folder / "portero.toml").write_text(f"workers = {workers}\n{state}{DRAIN}")
            one.upgrade()
            _serves(one, authority, service)
            proxy.register(f"w{workers}-{service}", "127.0.0.1", 9)
        eventually(one.is_alone, "the former generations have ended")
        proxy.stop()
        proxy.start()
        found = {each["service_name"] for each in proxy.call("GET", "/backends").json["services"]}
        assert found == {service, f"more-{service}", f"w1-{service}", f"w2-{service}"}
        assert [each.name for each in (tmp_path / "state").glob("*.json")] == ["leases.json"]
        proxy.stop()
    finally:
        proxy.kill()


# What does not come up


def _stays(upgraded: Upgraded, authority: Authority, service: str, why: str) -> None:
    """The upgrade fails, says why in one line, and what ran serves on and takes registrations."""
    proxy, before = upgraded.proxy, upgraded.proxy.generation
    failed = upgraded.times("the upgrade failed")
    proxy.signal(signal.SIGUSR2)
    eventually(lambda: upgraded.times("the upgrade failed") > failed, "the upgrade has failed")
    [*_, line] = [line for line in proxy.operator_log().splitlines() if "the upgrade failed" in line]
    assert re.search(why, line), line
    eventually(upgraded.is_alone, "the failed one is gone")
    assert proxy.generation == before
    _serves(upgraded, authority, service)


def _serves(upgraded: Upgraded, authority: Authority, service: str) -> None:
    proxy, tls = upgraded.proxy, client_context(authority.pem, "http/1.1")
    with Http1Client(("127.0.0.1", proxy.port), tls=tls, sni=service) as client:
        assert client.ask(get(service)).status == 200
    proxy.register(f"more-{service}", "127.0.0.1", 9)
    found = {each["service_name"] for each in proxy.call("GET", "/backends").json["services"]}
    assert found >= {service, f"more-{service}"}


def _upgrades_once(upgraded: Upgraded, authority: Authority, service: str) -> None:
    """The new version takes over, is alone in the end, serves, and stops when it is told to."""
    eventually(lambda: upgraded.times("upgraded: the new version serves") == 1, "it is upgraded")
    eventually(upgraded.is_alone, "the former generation has ended")
    _serves(upgraded, authority, service)
    upgraded.proxy.stop()


def test_a_configuration_that_cannot_work_changes_nothing(
    upgraded: Upgraded, authority: Authority, start_backend: StartBackend, service: str
) -> None:
    upgraded.proxy.serve(service, start_backend(answers))
    file = upgraded.proxy.folder / "portero.toml"
    good = file.read_text()
    file.write_text("[timeouts]\ndrain = -1\n")
    _stays(upgraded, authority, service, "it ended with status 2")
    assert upgraded.proxy.operator_log().count("\nportero-py: ") == 1
    file.write_text(good)
    upgraded.upgrade()
    _serves(upgraded, authority, service)
    upgraded.proxy.stop()


def test_a_port_that_is_new_and_taken_changes_nothing_and_one_that_is_free_is_opened(
    tmp_path: Path, authority: Authority, certificate_folder: Path, start_backend: StartBackend, service: str
) -> None:
    one = Upgraded.with_workers("2", tmp_path / "ports", certificate_folder)
    file, port = one.proxy.folder / "portero.toml", free_port()
    one.proxy.start()
    try:
        one.proxy.serve(service, start_backend(answers))
        with socket.create_server(("127.0.0.1", port)):
            file.write_text(f'{DRAIN}[plain_http]\nlisten = "127.0.0.1:{port}"\n')
            _stays(one, authority, service, "it ended with status 2")
        one.upgrade()
        with Http1Client(("127.0.0.1", port)) as client:
            assert client.ask(get(service)).status == 301
        file.write_text(DRAIN)
        one.upgrade()
        eventually(lambda: _refuses(port), "what is not wanted any more is closed")
        one.proxy.stop()
    finally:
        one.proxy.kill()


#: What a broken release does.
BROKEN = {
    "it cannot be imported": ("raise ImportError('of a broken release')", "it ended with status 1"),
    "it crashes": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "it was ended by SIGKILL"),
    "it hangs": ("import time; time.sleep(60)", "it is not ready after 1 s"),
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_broken_release_changes_nothing(
    how: str,
    workers: str,
    tmp_path: Path,
    authority: Authority,
    certificate_folder: Path,
    start_backend: StartBackend,
    service: str,
) -> None:
    code, why = BROKEN[how]
    site = tmp_path / "site"
    site.mkdir()
    one = Upgraded.with_workers(workers, tmp_path / "broken", certificate_folder)
    seconds = "1" if how == "it hangs" else "60"
    one.proxy.start([*PROXY[:2], "-c", _WITH_A_RELEASE_TO_COME, str(site), seconds])
    try:
        one.proxy.serve(service, start_backend(answers))
        (site / "release.py").write_text(code)
        _stays(one, authority, service, why)
        if how != "it hangs":
            (site / "release.py").write_text("")
            one.upgrade()
            _serves(one, authority, service)
        one.proxy.signal(signal.SIGTERM)
        assert one.proxy.wait() == 0
    finally:
        one.proxy.kill()


#: Becomes the proxy that argv goes on with. What is started later runs `release.py` in the folder argv[1].
_WITH_A_RELEASE_TO_COME = """
import os, pathlib, runpy, sys
from portero_py.run import main_process

main_process._SECONDS = {**main_process._SECONDS, main_process.Stage.PREPARING: float(sys.argv[2])}
release = pathlib.Path(sys.argv[1], "release.py")
if "PORTERO_GENERATION" in os.environ and release.exists():
    exec(release.read_text())
sys.argv = sys.argv[sys.argv.index("portero_py"):]
runpy.run_module("portero_py", run_name="__main__")
"""


@pytest.mark.parametrize("moment", ["it prepares", "it waits", "it takes over"])
def test_the_new_version_may_die_at_any_moment(
    moment: str, upgraded: Upgraded, authority: Authority, start_backend: StartBackend, service: str
) -> None:
    """It is killed as soon as it is there, later, and while it takes over."""
    proxy = upgraded.proxy
    proxy.serve(service, start_backend(answers))
    before = proxy.generation
    proxy.signal(signal.SIGUSR2)
    eventually(lambda: len(_children(proxy.pid)) == 2, "the new one is there")
    [new] = [pid for pid in _children(proxy.pid) if pid != before]
    if moment == "it takes over":
        eventually(lambda: _refuses_api(upgraded), "the old one has closed its control plane")
    elif moment == "it waits":
        time.sleep(0.3)
    with contextlib.suppress(ProcessLookupError):
        os.kill(new, signal.SIGKILL)
    eventually(upgraded.is_alone, "there is one again")
    _serves(upgraded, authority, service)
    upgraded.upgrade()
    _serves(upgraded, authority, service)
    proxy.assert_no_fault()
    proxy.stop()


def test_the_old_version_may_die_in_the_middle(
    upgraded: Upgraded, authority: Authority, start_backend: StartBackend, service: str
) -> None:
    proxy = upgraded.proxy
    proxy.serve(service, start_backend(answers))
    old = proxy.generation
    proxy.signal(signal.SIGUSR2)
    eventually(lambda: len(_children(proxy.pid)) == 2, "the new one is there")
    os.kill(old, signal.SIGKILL)
    eventually(lambda: upgraded.is_alone() and proxy.generation != old, "the new one alone")
    eventually(lambda: _is_ready(upgraded), "it serves")
    _serves(upgraded, authority, service)
    proxy.stop()


def test_what_dies_without_an_upgrade_is_started_again_and_no_lease_is_lost(
    upgraded: Upgraded, authority: Authority, start_backend: StartBackend, service: str
) -> None:
    proxy = upgraded.proxy
    proxy.serve(service, start_backend(answers))
    names = [f"s{number}.{service}" for number in range(20)]
    for name in names:
        proxy.register(name, "127.0.0.1", 9)
    old = proxy.generation
    os.kill(old, signal.SIGKILL)
    with Http1Client(  # waits in the kernel's queue
        ("127.0.0.1", proxy.port), tls=client_context(authority.pem, "http/1.1"), sni=service
    ) as client:
        assert client.ask(get(service)).status == 200
    assert proxy.generation != old
    eventually(lambda: _is_ready(upgraded), "it serves")
    found = {each["service_name"] for each in proxy.call("GET", "/backends").json["services"]}
    assert found >= {service, *names}
    upgraded.upgrade()
    proxy.stop()


# Signals in the middle


def test_a_second_sigusr2_in_the_middle_is_ignored(
    upgraded: Upgraded, authority: Authority, start_backend: StartBackend, service: str
) -> None:
    proxy = upgraded.proxy
    proxy.serve(service, start_backend(answers))
    proxy.signal(signal.SIGUSR2)
    eventually(lambda: len(_children(proxy.pid)) == 2, "the new one is there")
    proxy.signal(signal.SIGUSR2)
    proxy.signal(signal.SIGHUP)
    _upgrades_once(upgraded, authority, service)
    assert upgraded.times("told to upgrade") == 1


def test_a_sigusr2_that_comes_within_the_start_waits_for_its_end(
    upgraded: Upgraded, authority: Authority, start_backend: StartBackend, service: str
) -> None:
    proxy = upgraded.proxy
    proxy.serve(service, start_backend(answers))
    eventually(lambda: upgraded.times("; registration on ") == 1, "it has started")
    os.kill(proxy.generation, signal.SIGKILL)
    eventually(lambda: upgraded.times("it is started again") == 1, "another start")
    proxy.signal(signal.SIGUSR2)
    _upgrades_once(upgraded, authority, service)
    assert upgraded.times("told to upgrade, which waits") == 1


@pytest.mark.parametrize("wait", [0.0, 0.4, 0.8])
def test_a_stop_in_the_middle_ends_both(
    wait: float, upgraded: Upgraded, start_backend: StartBackend, service: str
) -> None:
    proxy = upgraded.proxy
    proxy.serve(service, start_backend(answers))
    proxy.signal(signal.SIGUSR2)
    time.sleep(wait)
    everybody = upgraded.descendants()
    proxy.signal(signal.SIGTERM)
    assert proxy.wait(30) == 0
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in everybody), "all have ended")
    proxy.assert_no_fault()


def test_ten_upgrades_leave_nothing_behind(
    upgraded: Upgraded, authority: Authority, start_backend: StartBackend, service: str
) -> None:
    proxy = upgraded.proxy
    proxy.serve(service, start_backend(answers))
    counts = []
    for _ in range(10):
        upgraded.upgrade()
        eventually(upgraded.is_alone, "the former generation has ended")
        counts.append((len(os.listdir(f"/proc/{proxy.pid}/fd")), len(upgraded.descendants())))  # noqa: PTH208
    assert len(set(counts)) == 1, counts
    _serves(upgraded, authority, service)
    proxy.stop()


def _refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except (ConnectionRefusedError, ConnectionResetError):  # reset: it was in the queue of a closed listener
        return True
    return False


def _is_ready(upgraded: Upgraded) -> bool:
    try:
        return upgraded.proxy.call("GET", "/readyz").status == 200
    except OSError:
        return False


def _refuses_api(upgraded: Upgraded) -> bool:
    """Whether nobody answers the API just now."""
    try:
        with socket.create_connection(("127.0.0.1", upgraded.proxy.register_port), 0.005) as client:
            client.settimeout(0.005)
            client.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            return not client.recv(1)
    except TimeoutError:
        return True
