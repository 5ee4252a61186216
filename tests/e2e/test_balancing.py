"""Each balancing policy, and stickiness, with real processes: which backend answers whom."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections import Counter

import pytest

from tests.e2e.backends import Peer, RecordingBackend
from tests.e2e.conftest import StartBackend, StartProxy
from tests.e2e.http1_client import Http1Client, get
from tests.e2e.messages import Response
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.waiting import PATIENCE, eventually

both = pytest.mark.parametrize("workers", ["1", "2"])

TIMES = "[timeouts]\ndrain = 2\nshutdown = 2\n"


class Named:
    """A script that answers with its name, sets the application's cookie when asked to, and may hold on."""

    def __init__(self, name: str) -> None:
        self.name = name.encode()
        self.held = 0
        self.go_on = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, peer: Peer) -> None:
        while True:
            request = peer.read_request()
            fields = b""
            if request.path == b"/hold":
                with self._lock:
                    self.held += 1
                assert self.go_on.wait(PATIENCE)
            elif request.path == b"/login":
                fields = b"Set-Cookie: SID=session-of-%b; HttpOnly\r\n" % self.name
            cookies = [value for name, value in request.fields if name.lower() == b"cookie"]
            body = b"%b %b" % (self.name, b"; ".join(cookies))
            peer.send(b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (fields, len(body), body))


class Fleet:
    """Backends of one service, and a proxy that serves it by a policy."""

    def __init__(self, proxy: ProxyProcess, service: str, start: StartBackend, names: str) -> None:
        self.proxy = proxy
        self.service = service
        self.scripts = {name: Named(name) for name in names}
        self.backends: dict[str, RecordingBackend] = {}
        for name, script in self.scripts.items():
            self.backends[name] = backend = start(script)
            proxy.register(service, backend.host, backend.port, instance_id=name)
        self.until_known()

    def until_known(self) -> None:
        """Wait until each worker knows all backends: some requests in a row find them all."""

        def find() -> bool:
            found = [self.who("/", f"X-User: {number}", "Cookie: none=1") for number in range(40)]
            return set(found) == set(self.backends)

        # By source they all go to one; that service is known when it has an answer.
        eventually(lambda: self.ask("/").status == 200 and (self.is_by_source or find()), "all are known")

    is_by_source = False

    def connect(self) -> Http1Client:
        return self.proxy.connect()

    def ask(self, path: str, *lines: str) -> Response:
        """A request on a connection of its own, hence to any worker."""
        with self.connect() as client:
            return client.ask(get(self.service, path, *lines))

    def who(self, path: str, *lines: str) -> str:
        """Who answered it."""
        return self.ask(path, *lines).body.split(b" ")[0].decode()


class FleetBySource(Fleet):
    is_by_source = True


def policy(service: str, lines: str) -> str:
    return f'{TIMES}[[service]]\nname = "{service}"\n{lines}\n'


@pytest.mark.parametrize("balance", ["least-requests", "random-two"])
def test_who_is_busy_gets_nothing_while_another_is_idle(
    start_proxy: StartProxy, start_backend: StartBackend, service: str, balance: str
) -> None:
    # One worker: each goes by its own claims.
    fleet = Fleet(start_proxy(toml=policy(service, f'balance = "{balance}"')), service, start_backend, "AB")
    scripts = fleet.scripts
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(fleet.connect()) for _ in range(16)]
        for client in clients:
            client.send(get(service, "/hold"))
        eventually(lambda: sum(each.held for each in scripts.values()) == 16, "all are held")
        assert {name: each.held for name, each in scripts.items()} == {"A": 8, "B": 8}
        scripts["A"].go_on.set()
        eventually(lambda: fleet.proxy.metric("portero_requests_in_flight") == 8, "A is idle")
        assert {fleet.who("/") for _ in range(20)} == {"A"}
        scripts["B"].go_on.set()
        assert {client.read_response().status for client in clients} == {200}


@both
def test_the_same_key_goes_to_the_same_backend_in_every_worker_and_after_a_restart(
    start_proxy: StartProxy, start_backend: StartBackend, service: str, workers: str
) -> None:
    toml = policy(service, 'balance = "hash"\nhash_on = "header:X-User"')
    fleet = Fleet(start_proxy(toml=toml, flags=("--workers", workers)), service, start_backend, "ABCD")

    def homes() -> dict[int, str]:
        found = {user: {fleet.who(f"/{n}", f"x-user: {user}") for n in range(4)} for user in range(12)}
        assert all(len(each) == 1 for each in found.values())
        return {user: each.pop() for user, each in found.items()}

    first = homes()
    assert len(set(first.values())) > 1
    other = start_proxy(toml=toml, flags=("--workers", "1"))
    for name, backend in fleet.backends.items():
        other.register(service, backend.host, backend.port, instance_id=name)
    fleet.proxy = other
    fleet.until_known()
    assert homes() == first
    gone = first[0]
    other.deregister(service, instance_id=gone)
    eventually(lambda: fleet.who("/", "X-User: 0") != gone, "it has left")
    after = homes()
    assert {user: home for user, home in first.items() if home != gone} == {
        user: after[user] for user, home in first.items() if home != gone
    }


@both
def test_a_client_stays_with_a_backend_by_its_address(
    start_proxy: StartProxy, start_backend: StartBackend, service: str, workers: str
) -> None:
    toml = policy(service, 'balance = "source"') + '[proxy]\ntrusted_proxies = ["127.0.0.0/8"]\n'
    fleet = FleetBySource(
        start_proxy(toml=toml, flags=("--workers", workers)), service, start_backend, "ABCD"
    )
    homes = {}
    for number in range(12):
        lines = f"X-Forwarded-For: 198.51.100.{number}"
        found = Counter(fleet.who("/", lines) for _ in range(4))
        assert len(found) == 1, found
        homes[number] = next(iter(found))
    assert len(set(homes.values())) > 1


@both
def test_a_client_stays_by_our_cookie_which_no_backend_sees(
    start_proxy: StartProxy,
    start_backend: StartBackend,
    service: str,
    workers: str,
    client_tls: ssl.SSLContext,
) -> None:
    toml = policy(service, 'sticky = { cookie = "srv" }')
    proxy = start_proxy(tls=True, toml=toml, flags=("--workers", workers))

    class OverTls(Fleet):
        def connect(self) -> Http1Client:
            return Http1Client(("127.0.0.1", proxy.port), tls=client_tls, sni=self.service)

    fleet = OverTls(proxy, service, start_backend, "ABC")
    first = fleet.ask("/")
    [cookie] = first.values(b"set-cookie")
    home = first.body.split(b" ")[0].decode()
    value, *attributes = cookie.decode().split("; ")
    assert attributes == ["Path=/", "HttpOnly", "SameSite=Lax", "Secure"]
    assert first.values(b"cache-control") == [b"private"]
    for _ in range(10):
        again = fleet.ask("/", f"Cookie: a=1; {value}")
        assert again.body == f"{home} a=1".encode()
        assert again.values(b"set-cookie") == []
    proxy.deregister(service, instance_id=home)
    eventually(lambda: fleet.who("/", f"Cookie: {value}") != home, "it has left")
    moved = fleet.ask("/", f"Cookie: {value}")
    [other] = moved.values(b"set-cookie")
    assert not other.startswith(value.encode())
    backend = fleet.backends[home]
    proxy.register(service, backend.host, backend.port, instance_id=home)
    eventually(lambda: fleet.who("/", f"Cookie: {value}") == home, "it is back, and so are its clients")
    assert value not in proxy.log()
    assert all(b"srv=" not in each.received for each in fleet.backends.values())


@both
def test_a_client_stays_by_the_applications_cookie_which_that_sees_as_it_set_it(
    start_proxy: StartProxy, start_backend: StartBackend, service: str, workers: str
) -> None:
    toml = policy(service, 'sticky = { cookie = "SID", mode = "prefix" }')
    fleet = Fleet(start_proxy(toml=toml, flags=("--workers", workers)), service, start_backend, "ABC")
    login = fleet.ask("/login")
    home = login.body.split(b" ")[0].decode()
    [cookie] = login.values(b"set-cookie")
    value = cookie.decode().partition(";")[0]
    assert value.endswith(f"~session-of-{home}")
    for _ in range(10):
        assert fleet.ask("/", f"Cookie: {value}").body == f"{home} SID=session-of-{home}".encode()
    assert len({fleet.who("/", "Cookie: SID=session") for _ in range(12)}) > 1
