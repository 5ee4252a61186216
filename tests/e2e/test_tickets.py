"""TLS sessions over changes of the ticket keys, in real processes whose clock the test holds."""

from __future__ import annotations

import os
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from portero_py.proxy.downstream.ticket_keys import PERIOD
from tests.e2e.certificates import Authority, client_context
from tests.e2e.conftest import SHORT_GOODBYE, StartBackend
from tests.e2e.http1_client import get
from tests.e2e.proxy_process import PROXY, ProxyProcess
from tests.e2e.test_workers import processes, replaced, who_serves
from tests.e2e.waiting import eventually

NAME = "a.own.test"

#: The program, with ticket keys whose clock is the file argv[1].
_WITH_CLOCK = """
import sys
from functools import partial
from pathlib import Path
clock = Path(sys.argv[1])
sys.argv = ["portero-py", *sys.argv[sys.argv.index("portero_py") + 1:]]
from portero_py.cli.start import start
from portero_py.proxy.downstream import sni
sni.TicketKeys = partial(sni.TicketKeys, clock=lambda: float(clock.read_text()))
start()
"""


class Site:
    """A proxy, the clock of its ticket keys, and a client."""

    def __init__(self, proxy: ProxyProcess, clock: Path, tls: ssl.SSLContext) -> None:
        self.proxy = proxy
        self._clock = clock
        self._periods = 0
        self._tls = tls
        self.pass_on()

    def pass_on(self, periods: int = 0) -> None:
        """Let time pass."""
        self._periods += periods
        part = self._clock.with_suffix(".part")
        part.write_text(str(100 + self._periods * PERIOD))
        part.rename(self._clock)

    def ask(self, session: ssl.SSLSession | None = None) -> tuple[bool, bytes, ssl.SSLSession]:
        """One request: whether the session was resumed, which worker answered, and the session."""
        raw = socket.create_connection(("127.0.0.1", self.proxy.port), timeout=60)
        with self._tls.wrap_socket(raw, server_hostname=NAME, session=session) as secure:
            reused = bool(secure.session_reused)
            secure.sendall(get(NAME, "/", "Connection: close"))
            answer = b""
            while data := secure.recv(9999):
                answer += data
            found = secure.session
        assert answer.startswith(b"HTTP/1.1 200")
        assert found is not None
        return reused, answer.rpartition(b"\r\n\r\n")[2], found

    def resumed(self, session: ssl.SSLSession, workers: int) -> set[bool]:
        """What became of it at every worker."""
        outcomes: dict[bytes, set[bool]] = {}

        def all_seen() -> bool:
            reused, worker, _ = self.ask(session)
            outcomes.setdefault(worker, set()).add(reused)
            return len(outcomes) == workers

        eventually(all_seen, "every worker has answered")
        return set().union(*outcomes.values())


@pytest.fixture(params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def version(request: pytest.FixtureRequest) -> ssl.TLSVersion:
    found: ssl.TLSVersion = request.param
    return found


@pytest.fixture(params=[1, 2])
def workers(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


@pytest.fixture
def site(
    tmp_path: Path, authority: Authority, start_backend: StartBackend, version: ssl.TLSVersion, workers: int
) -> Iterator[Site]:
    authority.issue(NAME).write(tmp_path / "certs" / NAME)
    proxy = ProxyProcess(
        tmp_path / "proxy",
        certificates=tmp_path / "certs",
        toml=SHORT_GOODBYE,
        flags=("--workers", str(workers)),
    )
    tls = client_context(authority.pem, "http/1.1")
    tls.minimum_version = tls.maximum_version = version
    site = Site(proxy, tmp_path / "clock", tls)
    proxy.start((PROXY[0], "-P", "-c", _WITH_CLOCK, str(tmp_path / "clock")))
    try:
        proxy.serve(NAME, start_backend(who_serves))
        yield site
        proxy.stop()
    finally:
        proxy.kill()


def test_a_session_is_resumed_by_every_worker_for_its_time_and_then_no_more(site: Site, workers: int) -> None:
    _, _, session = site.ask()
    assert site.resumed(session, workers) == {True}
    site.pass_on(1)
    assert site.resumed(session, workers) == {True}
    _, _, fresh = site.ask()
    site.pass_on(1)
    assert site.resumed(session, workers) == {False}
    assert site.resumed(fresh, workers) == {True}
    site.pass_on(5)
    assert site.resumed(fresh, workers) == {False}
    _, _, fresh = site.ask()
    assert site.resumed(fresh, workers) == {True}


@pytest.mark.parametrize(("workers", "version"), [(2, ssl.TLSVersion.TLSv1_3)])
def test_a_worker_that_is_replaced_has_the_keys_of_the_others(site: Site, workers: int) -> None:
    site.pass_on(3)
    _, _, session = site.ask()
    assert site.resumed(session, workers) == {True}
    pid = processes(site.proxy)["work0"]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: replaced(site.proxy, "work0", pid), "there is another worker")
    assert site.resumed(session, workers) == {True}
    site.pass_on(1)
    assert site.resumed(session, workers) == {True}
