"""Each process loads what it needs and no more: asked of the processes of a proxy that has served."""

from __future__ import annotations

import os
import signal
import ssl
from pathlib import Path

import pytest

from tests.e2e.certificates import Authority, client_context
from tests.e2e.conftest import SHORT_GOODBYE, StartBackend
from tests.e2e.http1_client import Http1Client, get
from tests.e2e.proxy_process import PROXY, ProxyProcess
from tests.e2e.test_workers import processes, who_serves
from tests.e2e.waiting import eventually

NAME = "a.own.test"

#: The program; each of its processes writes the names of its modules to the folder argv[1] on SIGWINCH, which
#: nobody else heeds.
TELLING = """
import os, signal, sys
def tell(*_):
    place = os.path.join(sys.argv[1], str(os.getpid()))
    with open(place + ".part", "w") as file:
        file.write("\\n".join(sorted(sys.modules)))
    os.rename(place + ".part", place)
signal.signal(signal.SIGWINCH, tell)
from portero_py.cli import start
arguments = sys.argv[sys.argv.index("portero_py") + 1:]
sys.exit(start.run(arguments))
"""

#: What a person's commands need, and what serves features that are not in use here.
NOBODY = {
    *(
        "aiohttp.client",
        "watchfiles.run",
        "typer",
        "click",
        "rich",
        "pydantic",
        "acme",
        "dns",
        "josepy",
        "requests",
        "OpenSSL",
    ),
    *("portero_py.cli.main", "portero_py.cli.backends", "portero_py.cli.certs", "portero_py.demo"),
    *("portero_py.client", "portero_py.run.debugging", "portero_py.control.acme.renewals"),
    *("portero_py.control.acme.dns01", "portero_py.cli.challenges"),
}
#: What only the control plane needs; with several workers they share it with their supervisor, unused.
CONTROL_ALONE = {
    *("aiohttp", "cryptography", "jwt", "watchfiles", "email"),
    "prometheus_client",  # with the first scrape
    *("portero_py.core.certificate_pairs", "portero_py.core.auth", "portero_py.run.control_plane"),
    *("portero_py.control.leases", "portero_py.control.certificates", "portero_py.control.api.application"),
}


def modules(pid: int, folder: Path) -> set[str]:
    """What a process has loaded."""
    os.kill(pid, signal.SIGWINCH)
    told = folder / str(pid)
    eventually(told.exists, f"process {pid} has told its modules")
    found = set(told.read_text().splitlines())
    told.unlink()
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_no_process_holds_what_another_one_needs(
    tmp_path: Path, authority: Authority, start_backend: StartBackend, workers: int
) -> None:
    told = tmp_path / "told"
    told.mkdir()
    authority.issue(NAME).write(tmp_path / "certs" / NAME)
    proxy = ProxyProcess(
        tmp_path / "proxy",
        certificates=tmp_path / "certs",
        toml=SHORT_GOODBYE,
        flags=("--workers", str(workers)),
    )
    proxy.start((PROXY[0], "-P", "-c", TELLING, str(told)))
    try:
        proxy.serve(NAME, start_backend(who_serves))
        _ask_everybody(proxy, client_context(authority.pem, "http/1.1"), workers)
        pids = {"first": proxy.generation, **processes(proxy)}
        assert not [name for name, pid in pids.items() if "prometheus_client" in modules(pid, told)]
        proxy.call("GET", "/metrics")
        found = {name: modules(pid, told) for name, pid in pids.items()}
        assert {name: sorted(loaded & NOBODY) for name, loaded in found.items() if loaded & NOBODY} == {}
        control = "control" if workers > 1 else "first"
        assert found[control] >= CONTROL_ALONE
        proxy.stop()
    finally:
        proxy.kill()


# Private


def _ask_everybody(proxy: ProxyProcess, tls: ssl.SSLContext, workers: int) -> None:
    """Served, unknown and malformed requests, until each worker has had some."""
    served: set[bytes] = set()

    def ask(request: bytes, status: int) -> bytes:
        with Http1Client(("127.0.0.1", proxy.port), tls=tls, sni=NAME) as client:
            answer = client.ask(request)
        assert answer.status == status
        return answer.body

    def all_have_served() -> bool:
        ask(get("nobody.test", "/", "Accept: application/json"), 404)
        ask(b"GET / HTTP/1.1\r\n\r\n", 400)
        served.add(ask(get(NAME, "/"), 200))
        return len(served) == workers

    eventually(all_have_served, "every worker has served")
