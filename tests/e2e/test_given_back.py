"""What a burst of slow clients took is given back when they are gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from portero_py.run import slack
from tests.e2e.big_bodies import MEGABYTE, send_much
from tests.e2e.certificates import Authority, client_context
from tests.e2e.conftest import SHORT_GOODBYE, StartBackend
from tests.e2e.http1_client import Http1Client, get
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.test_workers import processes
from tests.e2e.waiting import eventually, settled

NAME = "a.own.test"
CLIENTS = 150


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_what_slow_readers_took_is_given_back_when_they_are_gone(
    tmp_path: Path, authority: Authority, start_backend: StartBackend, workers: int
) -> None:
    if slack.glibc() is None:
        pytest.skip("not glibc 2.33 or later")
    authority.issue(NAME).write(tmp_path / "certs" / NAME)
    flags = ("--workers", str(workers))
    proxy = ProxyProcess(tmp_path / "proxy", certificates=tmp_path / "certs", toml=SHORT_GOODBYE, flags=flags)
    proxy.start()
    tls = client_context(authority.pem, "http/1.1")
    clients: list[Http1Client] = []

    def held() -> int:
        return sum(_resident(pid) for pid in [proxy.generation, *processes(proxy).values()])

    try:
        proxy.serve(NAME, start_backend(send_much))
        for _ in range(CLIENTS):
            clients.append(Http1Client(("127.0.0.1", proxy.port), tls=tls, sni=NAME))
            clients[-1].send(get(NAME, "/"))
        most = settled(held)
        while clients:
            clients.pop().reset()
        eventually(lambda: most - held() > 12 * MEGABYTE, "the memory is given back")
        proxy.stop()
    finally:
        for client in clients:
            client.close()
        proxy.kill()


def _resident(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
