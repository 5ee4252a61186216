"""Services and routes of the configuration file, and the file that changes while portero runs."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import websockets.sync.client
import websockets.sync.server
from websockets.exceptions import ConnectionClosed

from tests.e2e.backends import Peer, RecordingBackend, Script, ok
from tests.e2e.conftest import SHORT_GOODBYE, StartBackend, StartProxy
from tests.e2e.http1_client import get
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.waiting import eventually

WORKERS = pytest.mark.parametrize("workers", ["1", "2"])
INCLUDE = 'include = "services.d/*.toml"\n'


def says(word: bytes) -> Script:
    """A backend that says who it is, and what it was asked for."""

    def script(peer: Peer) -> None:
        while True:
            request = peer.read_request()
            peer.send(ok(word + b" " + request.path, request))

    return script


def service(name: str, *backends: RecordingBackend | str, more: str = "") -> str:
    """One `[[service]]`."""
    listed = ", ".join(
        f'"{each if isinstance(each, str) else f"{each.host}:{each.port}"}"' for each in backends
    )
    return f'[[service]]\nname = "{name}"\nbackends = [{listed}]\n{more}\n'


def asked(proxy: ProxyProcess, host: str, path: str = "/") -> str:
    """What a client gets there: the body of a 200, or the status."""
    with proxy.connect() as client:
        response = client.ask(get(host, path, "Connection: close"))
    return response.body.decode() if response.status == 200 else str(response.status)


def write(path: Path, content: str) -> None:
    """As a careful program writes a file."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(content)
    temporary.rename(path)


def rewrite(proxy: ProxyProcess, content: str) -> None:
    write(proxy.folder / "portero.toml", SHORT_GOODBYE + content)


def top(content: str) -> str:
    """What stands before all sections."""
    return content + SHORT_GOODBYE


@WORKERS
def test_fixed_and_registered_backends_are_one_set(
    start_proxy: StartProxy, start_backend: StartBackend, workers: str
) -> None:
    one, two, three = (start_backend(says(word)) for word in (b"one", b"two", b"three"))
    proxy = start_proxy(toml=SHORT_GOODBYE + service("app.e2e.test", one, two), flags=("--workers", workers))
    assert asked(proxy, "app.e2e.test") in ("one /", "two /")  # with the first request after the start
    proxy.serve("app.e2e.test", three)
    proxy.serve("app.e2e.test", two)  # which is in the file too: no second turn
    found: Counter[str] = Counter()
    with proxy.connect() as client:
        for _ in range(30):
            found[client.ask(get("app.e2e.test")).body.decode()] += 1
    assert found == {"one /": 10, "two /": 10, "three /": 10}
    sources = Counter(
        each["source"]
        for known in proxy.call("GET", "/backends").json["services"]
        for each in known["backends"]
    )
    assert sources == {"static": 2, "api": 1}


def test_a_name_with_two_addresses_is_two_backends(
    start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    """`localhost` is 127.0.0.1 and ::1 wherever both are up."""
    found = {str(place[0]) for *_, place in socket.getaddrinfo("localhost", None, type=socket.SOCK_STREAM)}
    backend = start_backend(says(b"name"))
    proxy = start_proxy(toml=SHORT_GOODBYE + service("app.e2e.test", f"localhost:{backend.port}"))

    def addresses() -> set[str]:
        [known] = proxy.call("GET", "/backends").json["services"]
        return {each["host"] for each in known["backends"]}

    eventually(lambda: addresses() == found, "the name is looked up")
    assert asked(proxy, "app.e2e.test") == "name /"


@WORKERS
@pytest.mark.parametrize("how", ["signal", "file"])
def test_another_file_is_in_force_soon(
    start_proxy: StartProxy, start_backend: StartBackend, workers: str, how: str
) -> None:
    one, two = start_backend(says(b"one")), start_backend(says(b"two"))
    proxy = start_proxy(toml=SHORT_GOODBYE + service("app.e2e.test", one), flags=("--workers", workers))
    assert asked(proxy, "app.e2e.test") == "one /"
    assert asked(proxy, "new.e2e.test") == "404"
    changed = (
        service("app.e2e.test", two)
        + service("new.e2e.test", one)
        + '[[route]]\nhost = "app.e2e.test"\npath = "/api"\nservice = "new.e2e.test"\nstrip_path = true\n'
    )
    rewrite(proxy, changed)
    if how == "signal":
        proxy.signal(signal.SIGHUP)
    eventually(lambda: asked(proxy, "app.e2e.test") == "two /", "the new backend serves")
    eventually(lambda: asked(proxy, "new.e2e.test") == "one /", "the new service is served")
    eventually(lambda: asked(proxy, "app.e2e.test", "/api/x") == "one /x", "the new route is in force")
    assert proxy.metric("portero_config_reloads_total", result="ok") >= 1
    assert proxy.metric("portero_config_reloads_total", result="error") == 0
    assert "waiting for a restart" not in proxy.operator_log()


@WORKERS
def test_the_log_s_level_and_the_default_service_change_with_the_file(
    start_proxy: StartProxy, start_backend: StartBackend, workers: str
) -> None:
    one = start_backend(says(b"one"))
    named = service("a.e2e.test", one)
    proxy = start_proxy(toml=SHORT_GOODBYE + named, flags=("--workers", workers))
    assert asked(proxy, "unknown.e2e.test") == "404"
    rewrite(proxy, '[proxy]\ndefault_service = "a.e2e.test"\n[log]\nlevel = "debug"\n' + named)
    eventually(lambda: asked(proxy, "unknown.e2e.test") == "one /", "the default service is in force")
    proxy.register("b.e2e.test", one.host, one.port)
    proxy.register("b.e2e.test", one.host, one.port)
    eventually(lambda: "renewed: b.e2e.test" in proxy.operator_log(), "control logs what it did not before")


@WORKERS
def test_a_folder_of_services_is_followed(
    start_proxy: StartProxy, start_backend: StartBackend, tmp_path: Path, workers: str
) -> None:
    one, two = start_backend(says(b"one")), start_backend(says(b"two"))
    folder = tmp_path / "proxy-0" / "services.d"
    folder.mkdir(parents=True)
    (folder / "a.toml").write_text(service("a.e2e.test", one))
    proxy = start_proxy(toml=top(INCLUDE), flags=("--workers", workers))
    assert asked(proxy, "a.e2e.test") == "one /"
    (folder / "b.toml").write_text(service("b.e2e.test", two))
    eventually(lambda: asked(proxy, "b.e2e.test") == "two /", "the new file is read")
    (folder / "a.toml").unlink()
    eventually(lambda: asked(proxy, "a.e2e.test") == "503", "what is gone has no backend any more")
    write(folder / "b.toml", service("b.e2e.test", one))
    eventually(lambda: asked(proxy, "b.e2e.test") == "one /", "the replaced file is read")


@WORKERS
def test_a_faulty_file_changes_nothing_and_says_why(
    start_proxy: StartProxy, start_backend: StartBackend, tmp_path: Path, workers: str
) -> None:
    one, two = start_backend(says(b"one")), start_backend(says(b"two"))
    folder = tmp_path / "proxy-0" / "services.d"
    folder.mkdir(parents=True)
    (folder / "app.toml").write_text(service("app.e2e.test", one))
    proxy = start_proxy(toml=top(INCLUDE), flags=("--workers", workers))
    good_at = proxy.metric("portero_config_last_success_timestamp_seconds")
    assert time.time() - 600 < good_at <= time.time()
    faulty = service("new.e2e.test", two) + service("app.e2e.test", two, more="rate_limit = { requests = 0 }")
    write(folder / "app.toml", faulty)
    said = (
        f'{folder}/app.toml:8: service "app.e2e.test": rate_limit.requests: '
        "must be a whole number from 1 to 1073741824, not 0"
    )
    eventually(lambda: said in proxy.operator_log(), "the fault is named")
    assert asked(proxy, "app.e2e.test") == "one /"
    assert asked(proxy, "new.e2e.test") == "404"
    assert proxy.call("GET", "/readyz").status == 200
    errors = "portero_config_reloads_total"
    eventually(lambda: proxy.metric(errors, result="error") == 1, "the error is counted")
    assert proxy.metric("portero_config_last_success_timestamp_seconds") == good_at
    assert proxy.operator_log().count(said) == 1
    write(folder / "app.toml", service("app.e2e.test", two))
    eventually(lambda: asked(proxy, "app.e2e.test") == "two /", "what is mended is in force")
    assert proxy.metric("portero_config_last_success_timestamp_seconds") > good_at
    assert proxy.metric(errors, result="error") == 1


@pytest.fixture
def chat() -> Iterator[int]:
    """The port of a server of WebSockets that echoes."""

    def echo(connection: websockets.sync.server.ServerConnection) -> None:
        try:
            for message in connection:
                connection.send(message)
        except ConnectionClosed:
            return

    with websockets.sync.server.serve(echo, "127.0.0.1", 0, server_header=None) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.socket.getsockname()[1]
        server.shutdown()
        thread.join(60)


@WORKERS
def test_what_is_open_stays_open_over_reloads(
    start_proxy: StartProxy, start_backend: StartBackend, chat: int, workers: str
) -> None:
    """A WebSocket and a download, of backends that stay and of one that leaves the file."""
    go_on = threading.Event()

    def slowly(peer: Peer) -> None:
        while True:
            peer.read_request()
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nfirst")
            assert go_on.wait(120)
            peer.send(b"other")

    slow, stays = start_backend(slowly), start_backend(says(b"stays"))
    steady = service("chat.e2e.test", f"127.0.0.1:{chat}") + service("stays.e2e.test", stays)
    proxy = start_proxy(
        toml=SHORT_GOODBYE + steady + service("slow.e2e.test", slow), flags=("--workers", workers)
    )
    raw = socket.create_connection(("127.0.0.1", proxy.port), timeout=60)
    with (
        websockets.sync.client.connect(f"ws://chat.e2e.test:{proxy.port}/", sock=raw) as client,
        proxy.connect() as download,
        proxy.connect() as kept,
    ):
        download.send(get("slow.e2e.test"))
        slow.wait_for_peers()
        assert kept.ask(get("stays.e2e.test")).status == 200
        for number in range(10):
            rewrite(proxy, steady + service(f"n{number}.e2e.test", stays))
            eventually(
                lambda: asked(proxy, f"n{number}.e2e.test") == "stays /",  # noqa: B023
                "the reload is in force",
            )
            client.send(f"still {number}")
            assert client.recv(60) == f"still {number}"
            assert kept.ask(get("stays.e2e.test")).status == 200
        go_on.set()
        assert download.read_response().body == b"firstother"
    assert asked(proxy, "slow.e2e.test") in ("404", "503")


@WORKERS
def test_what_is_known_of_unchanged_backends_is_kept(
    start_proxy: StartProxy, start_backend: StartBackend, workers: str
) -> None:
    good, gone, other = (start_backend(says(word)) for word in (b"good", b"gone", b"other"))
    names = service("app.e2e.test", good, gone)
    proxy = start_proxy(toml=SHORT_GOODBYE + names, flags=("--workers", workers))
    drained = proxy.call(
        "POST", "/backends/drain", {"service_name": "app.e2e.test", "host": gone.host, "port": gone.port}
    )
    assert drained.status == 200

    def said() -> list[dict[str, object]]:
        listing = proxy.call("GET", "/backends").json["services"]
        found: list[dict[str, object]] = next(
            each["backends"] for each in listing if each["service_name"] == "app.e2e.test"
        )
        return found

    before = said()
    assert asked(proxy, "app.e2e.test") == "good /"
    for number in range(3):
        rewrite(proxy, names + service(f"n{number}.e2e.test", other))
        eventually(lambda: asked(proxy, f"n{number}.e2e.test") == "other /", "it is in force")  # noqa: B023
    assert said() == before
    assert [each["state"] for each in said()] == ["ready", "draining"]
    assert asked(proxy, "app.e2e.test") == "good /"
    assert len(good.peers) <= int(workers)  # the idle connections of each worker go on


def test_a_new_control_process_has_the_policies_and_routes_of_the_last_reload(
    start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    one = start_backend(says(b"one"))
    proxy = start_proxy(toml=SHORT_GOODBYE + service("a.e2e.test", one), flags=("--workers", "2"))
    rewrite(
        proxy,
        service("b.e2e.test", one, more="max_in_flight = 7")
        + '[[route]]\nhost = "www.e2e.test"\nservice = "b.e2e.test"\n',
    )
    eventually(lambda: asked(proxy, "www.e2e.test") == "one /", "the reload is in force")

    def limit() -> int:
        listing = proxy.call("GET", "/backends").json["services"]
        return next(
            int(each["max_in_flight"])
            for known in listing
            if known["service_name"] == "b.e2e.test"
            for each in known["backends"]
        )

    assert limit() == 7
    restarts = proxy.metric("portero_worker_restarts_total", worker="control")
    _kill_control(proxy)
    eventually(lambda: _restarted(proxy, restarts), "control runs again")
    assert limit() == 7
    assert asked(proxy, "www.e2e.test") == "one /"
    rewrite(proxy, service("c.e2e.test", one))
    eventually(lambda: asked(proxy, "c.e2e.test") == "one /", "the new one follows the file too")


@WORKERS
def test_an_upgrade_reads_the_file_of_then(
    start_proxy: StartProxy, start_backend: StartBackend, workers: str
) -> None:
    one, two = start_backend(says(b"one")), start_backend(says(b"two"))
    proxy = start_proxy(toml=SHORT_GOODBYE + service("a.e2e.test", one), flags=("--workers", workers))
    rewrite(proxy, service("a.e2e.test", two))
    eventually(lambda: asked(proxy, "a.e2e.test") == "two /", "the reload is in force")
    generation = proxy.generation
    proxy.signal(signal.SIGUSR2)
    eventually(lambda: _is_upgraded(proxy, generation), "the new version serves alone")
    assert asked(proxy, "a.e2e.test") == "two /"
    rewrite(proxy, service("a.e2e.test", one))
    eventually(lambda: asked(proxy, "a.e2e.test") == "one /", "the new version follows the file")


def test_check_tells_what_would_change(start_proxy: StartProxy, start_backend: StartBackend) -> None:
    one = start_backend(says(b"one"))
    proxy = start_proxy(toml=SHORT_GOODBYE + service("a.e2e.test", one))
    ended = proxy.check()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "services: 1 with 1 backend(s), 0 route(s)\n" in ended.stdout
    assert "running: 0 change(s) to services and routes\n" in ended.stdout
    candidate = proxy.folder / "candidate.toml"
    candidate.write_text(
        service("a.e2e.test", "127.0.0.1:9", more="max_in_flight = 3")
        + '[[route]]\nhost = "www.e2e.test"\nservice = "b.e2e.test"\n'
    )
    ended = proxy.check(candidate)
    assert ended.returncode == 0
    said = ended.stdout
    assert said[said.index("warning: route") :] == (
        "warning: route www.e2e.test leads to b.e2e.test, which is no service of this file: "
        "it is one as soon as a backend registers for it\n"
        "running: 4 change(s) to services and routes\n"
        "  service a.e2e.test: max_in_flight: default -> 3\n"
        "  service a.e2e.test: backend 127.0.0.1:9 comes (http, weight 1, at most 3 at a time)\n"
        f"  service a.e2e.test: backend 127.0.0.1:{one.port} goes\n"
        "  route www.e2e.test comes: service b.e2e.test\n"
        "all is well\n"
    )
    candidate.write_text(service("a.e2e.test", "127.0.0.1"))
    ended = proxy.check(candidate)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert 'candidate.toml:3: service "a.e2e.test": backends[0]: "127.0.0.1" has no port' in ended.stderr
    assert asked(proxy, "a.e2e.test") == "one /"  # nothing has changed


# Private


def _children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _kill_control(proxy: ProxyProcess) -> None:
    [control] = [
        pid
        for pid in _children(proxy.generation)
        if Path(f"/proc/{pid}/comm").read_text().strip() == "portero-control"
    ]
    os.kill(control, signal.SIGKILL)


def _restarted(proxy: ProxyProcess, before: float) -> bool:
    try:
        return proxy.metric("portero_worker_restarts_total", worker="control") > before
    except OSError:
        return False


def _is_upgraded(proxy: ProxyProcess, generation: int) -> bool:
    children = _children(proxy.pid)
    return len(children) == 1 and children[0] != generation and _answers(proxy)


def _answers(proxy: ProxyProcess) -> bool:
    try:
        return proxy.call("GET", "/readyz").status == 200
    except OSError:
        return False
