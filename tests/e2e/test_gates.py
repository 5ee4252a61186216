"""Passwords and the server that is asked, over HTTP/1 and HTTP/2, with real clients."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import bcrypt
import pytest
import websockets.sync.client

from tests.e2e.backends import Peer, RecordingBackend, echo_each
from tests.e2e.certificates import Authority, client_context, threaded_client_context
from tests.e2e.conftest import SHORT_GOODBYE, Need, StartBackend, StartProxy
from tests.e2e.curl_answers import ask_by_curl
from tests.e2e.http1_client import Http1Client, get, post
from tests.e2e.http2_client import Http2Client, fields_of, rst_stream
from tests.e2e.messages import Request
from tests.e2e.proxy_process import ProxyProcess, free_port
from tests.e2e.waiting import PATIENCE, eventually

PASSWORD = "the-password-of-ann"
COOKIE = "a-cookie-that-is-nobodys-business"

#: Runs curl with flags for a URL's host and path.
Ask = Callable[..., str]


def hashed(password: str) -> str:
    """A hash that is quickly compared."""
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()


def toml(asked: int) -> str:
    """Services with gates; the server that is asked listens on `asked`."""
    return f"""{SHORT_GOODBYE}
[[service]]
name = "closed.e2e.test"
basic_auth = {{ realm = "lab", users = ["ann:{hashed(PASSWORD)}", "bob:{hashed("b")}"] }}

[[service]]
name = "asked.e2e.test"
forward_auth = {{ url = "http://127.0.0.1:{asked}/verify", response_headers = ["Remote-User"], timeout = 20 }}

[[service]]
name = "both.e2e.test"
basic_auth = {{ users = ["ann:{hashed(PASSWORD)}"] }}
forward_auth = {{ url = "http://127.0.0.1:{asked}/verify", request_headers = ["Cookie"] }}
"""


class Doorkeeper:
    """The server that is asked: who has the cookie comes in; the others are sent to a login."""

    def __init__(self) -> None:
        self.holds = threading.Event()  # a question is kept waiting
        self.goes_on = threading.Event()

    def __call__(self, peer: Peer) -> None:
        while True:
            request = peer.read_request()
            [uri] = request.values(b"x-forwarded-uri")
            if uri.startswith(b"/slow"):
                self.holds.set()
                self.goes_on.wait(PATIENCE)
            peer.send(self.answer(request))

    def answer(self, request: Request) -> bytes:
        if any(COOKIE.encode() in value for value in request.values(b"cookie")):
            return (
                b"HTTP/1.1 200 OK\r\nRemote-User: ann\r\nTransfer-Encoding: chunked\r\n\r\n"
                b"2\r\nok\r\n0\r\n\r\n"
            )
        return (
            b"HTTP/1.1 302 Found\r\nLocation: https://login.e2e.test/\r\nSet-Cookie: session=1\r\n"
            b"Content-Length: 5\r\n\r\nlogin"
        )


@pytest.fixture
def doorkeeper() -> Iterator[Doorkeeper]:
    """It lets go of whom it holds at the end."""
    keeper = Doorkeeper()
    yield keeper
    keeper.goes_on.set()


@pytest.fixture
def asked(start_backend: StartBackend, doorkeeper: Doorkeeper) -> RecordingBackend:
    """Where it listens."""
    return start_backend(doorkeeper)


@pytest.fixture
def proxy(start_proxy: StartProxy, asked: RecordingBackend) -> Iterator[ProxyProcess]:
    """A proxy with gates, whose log never holds what opens them."""
    proxy = start_proxy(tls=True, toml=toml(asked.port))
    yield proxy
    log = proxy.log()
    for secret in (PASSWORD, COOKIE, "$2b$", base64.b64encode(f"ann:{PASSWORD}".encode()).decode()):
        assert secret not in log


@pytest.fixture
def backend(proxy: ProxyProcess, start_backend: StartBackend) -> RecordingBackend:
    """What is behind the gates."""
    backend = start_backend(echo_each)
    for name in ("closed", "asked", "both"):
        proxy.serve(f"{name}.e2e.test", backend)
    return backend


@pytest.fixture(params=["--http1.1", "--http2"])
def ask(request: pytest.FixtureRequest, need: Need, proxy: ProxyProcess, ca_file: Path) -> Ask:
    """Run curl, in one of two versions."""
    return partial(ask_by_curl, need("curl"), ca_file, proxy.port, request.param)


def status(answer: str) -> int:
    return int(answer.split(" ")[1])


def login(password: str = PASSWORD, name: str = "ann") -> str:
    return base64.b64encode(f"{name}:{password}".encode()).decode()


# Passwords


def test_a_password_opens_the_gate(ask: Ask, backend: RecordingBackend, tmp_path: Path) -> None:
    answer = ask("closed.e2e.test")
    assert status(answer) == 401
    assert '\r\nwww-authenticate: Basic realm="lab", charset="UTF-8"\r\n' in answer
    for wrong in ("ann:wrong", "nobody:" + PASSWORD, "ann:", "ann:" + "x" * 100, "ann:" + PASSWORD + "x"):
        assert status(ask("closed.e2e.test", "/", "-u", wrong)) == 401
    assert backend.requests == []
    for user in (f"ann:{PASSWORD}", "bob:b", f"ann:{PASSWORD}"):
        assert ask("closed.e2e.test", "/x", "-u", user).endswith("\r\n\r\nGET /x ")
    (tmp_path / "body").write_bytes(b"0123456789" * 300_000)
    up = ("-u", f"ann:{PASSWORD}", "--data-binary", f"@{tmp_path / 'body'}")
    assert status(ask("closed.e2e.test", "/up", *up)) == 200
    assert len(backend.requests[-1].body) == 3_000_000
    up = ("-u", "ann:wrong", "--data-binary", f"@{tmp_path / 'body'}")
    assert status(ask("closed.e2e.test", "/up", *up)) == 401
    assert len(backend.requests) == 4


def test_many_streams_with_the_same_password_wait_together_and_one_may_leave(
    proxy: ProxyProcess, backend: RecordingBackend, authority: Authority
) -> None:
    tls = client_context(authority.pem, "h2")
    with Http2Client(("127.0.0.1", proxy.port), tls, "closed.e2e.test") as client:
        field = (b"authorization", f"Basic {login()}".encode())
        streams = [client.request(fields_of("closed.e2e.test", b"/", field)) for _ in range(20)]
        client.send(rst_stream(streams[0]) + rst_stream(streams[7]))
        for stream in (*streams[1:7], *streams[8:]):
            assert client.outcome(stream).status == 200
        assert client.ask(fields_of("closed.e2e.test")).status == 401
    proxy.wait_until_idle()


def test_clients_that_leave_while_it_is_compared_leave_nothing_behind(
    proxy: ProxyProcess, backend: RecordingBackend, authority: Authority
) -> None:
    tls = client_context(authority.pem, "http/1.1")
    for number in range(20):
        client = Http1Client(("127.0.0.1", proxy.port), tls=tls, sni="closed.e2e.test")
        lines = (f"Authorization: Basic {login(f'guess {number}')}", "Content-Length: 100")
        client.send(get("closed.e2e.test", "/", *lines, method="POST") + b"some")
        if number % 2:
            client.reset()
        else:
            client.close()
    proxy.wait_until_idle()
    with Http1Client(("127.0.0.1", proxy.port), tls=tls, sni="closed.e2e.test") as client:
        right = f"Authorization: Basic {login()}"
        # The guesser's own turns come first: the proxy may ask him to come back.
        eventually(
            lambda: client.ask(get("closed.e2e.test", "/", right)).status == 200, "the password is compared"
        )


# Another server


def test_the_server_that_is_asked_lets_in_or_answers(
    ask: Ask, asked: RecordingBackend, backend: RecordingBackend, tmp_path: Path
) -> None:
    answer = ask("asked.e2e.test", "/page?q=1", "-H", "Remote-User: forged")
    assert status(answer) == 302
    assert "\r\nlocation: https://login.e2e.test/\r\n" in answer
    assert "\r\nset-cookie: session=1\r\n" in answer
    assert answer.endswith("\r\n\r\nlogin")
    assert ask("asked.e2e.test", "/", "-I").endswith("\r\n\r\n")
    assert backend.requests == []
    [question, _] = asked.requests
    assert (question.method, question.path) == (b"GET", b"/verify")
    assert question.values(b"x-forwarded-uri") == [b"/page?q=1"]
    assert question.values(b"x-forwarded-proto") == [b"https"]
    (tmp_path / "body").write_bytes(b"0123456789" * 300_000)
    cookie = ("-H", f"Cookie: session={COOKIE}", "-H", "remote_user: forged", "-H", "Remote-User: forged")
    up = ask("asked.e2e.test", "/up", *cookie, "--data-binary", f"@{tmp_path / 'body'}")
    assert status(up) == 200
    [request] = backend.requests
    assert len(request.body) == 3_000_000
    assert request.values(b"remote-user") == [b"ann"]
    assert request.values(b"remote_user") == []
    assert asked.requests[-1].values(b"x-forwarded-method") == [b"POST"]
    assert asked.requests[-1].body == b""
    assert len({peer.number for peer in asked.peers if peer.requests}) == 1  # the connection is kept


def test_both_gates_have_to_open(ask: Ask, asked: RecordingBackend, backend: RecordingBackend) -> None:
    cookie = ("-H", f"Cookie: session={COOKIE}")
    assert status(ask("both.e2e.test", "/", *cookie)) == 401
    assert asked.requests == []
    assert status(ask("both.e2e.test", "/", "-u", f"ann:{PASSWORD}")) == 302
    assert status(ask("both.e2e.test", "/", "-u", f"ann:{PASSWORD}", *cookie)) == 200
    assert asked.requests[-1].values(b"authorization") == []  # it was not named
    assert len(backend.requests) == 1


def test_clients_may_leave_and_end_their_side_while_the_server_is_asked(
    proxy: ProxyProcess, backend: RecordingBackend, doorkeeper: Doorkeeper, authority: Authority
) -> None:
    tls = client_context(authority.pem, "http/1.1")
    cookie = f"Cookie: {COOKIE}"
    gone = Http1Client(("127.0.0.1", proxy.port), tls=tls, sni="asked.e2e.test")
    gone.send(post("asked.e2e.test", b"body", "/slow/gone", cookie))
    eventually(doorkeeper.holds.is_set, "the server is asked")
    gone.reset()
    eventually(lambda: proxy.access_log(path="/slow/gone"), "the client is gone")
    [entry] = proxy.access_log(path="/slow/gone")
    assert entry["status"] == 499
    doorkeeper.goes_on.set()
    h2 = client_context(authority.pem, "h2")
    with Http2Client(("127.0.0.1", proxy.port), h2, "asked.e2e.test") as client:
        fields = fields_of("asked.e2e.test", b"/", (b"cookie", COOKIE.encode()))
        streams = [client.request(fields) for _ in range(10)]
        client.send(rst_stream(streams[3]))
        assert {client.outcome(each).status for each in streams if each != streams[3]} == {200}
    proxy.wait_until_idle()
    assert all(request.path != b"/slow/gone" for request in backend.requests)


def test_a_websocket_goes_through(
    proxy: ProxyProcess, authority: Authority, chat_backend: int, backend: RecordingBackend
) -> None:
    proxy.deregister("asked.e2e.test", host=backend.host, port=backend.port)
    proxy.register("asked.e2e.test", "127.0.0.1", chat_backend)
    raw = socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE)
    with websockets.sync.client.connect(
        f"wss://asked.e2e.test:{proxy.port}/chat",
        sock=raw,
        ssl=threaded_client_context(authority.pem),
        open_timeout=PATIENCE,
        additional_headers={"Cookie": COOKIE},
    ) as client:
        client.send("hello")
        assert client.recv(timeout=PATIENCE) == "hello"


def test_nobody_gets_in_while_the_server_is_down_or_silent(
    start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    silent = start_backend(lambda peer: peer.wait_closed())
    names = {"down": free_port(), "silent": silent.port}
    proxy = start_proxy(
        toml=SHORT_GOODBYE
        + "".join(
            f'[[service]]\nname = "{name}.e2e.test"\n'
            f'forward_auth = {{ url = "http://127.0.0.1:{port}/", timeout = 0.5 }}\n'
            for name, port in names.items()
        )
    )
    backend = start_backend(echo_each)
    for name, expected in (("down", 502), ("silent", 504)):
        proxy.serve(f"{name}.e2e.test", backend)
        with proxy.connect() as client:
            # With a body that comes in the meantime, and the next request behind it.
            client.send(post(f"{name}.e2e.test", b"x" * 50_000) + get(f"{name}.e2e.test"))
            answers = [client.read_response() for _ in range(2)]
        assert [answer.status for answer in answers] == [expected] * 2
    assert backend.requests == []
    assert proxy.operator_log().count("the server of forward_auth") == 2
    eventually(lambda: all(peer.closed.is_set() for peer in silent.peers), "nobody is asked any more")


def test_an_end_of_the_proxy_waits_for_nobody_who_is_asked(
    proxy: ProxyProcess, backend: RecordingBackend, doorkeeper: Doorkeeper, authority: Authority
) -> None:
    tls = client_context(authority.pem, "http/1.1")
    with Http1Client(("127.0.0.1", proxy.port), tls=tls, sni="asked.e2e.test") as client:
        client.send(get("asked.e2e.test", "/slow", f"Cookie: {COOKIE}"))
        eventually(doorkeeper.holds.is_set, "the server is asked")
        proxy.stop()
        assert client.read_all() == b""


def test_a_problem_is_one_for_who_reads_json(ask: Ask, backend: RecordingBackend) -> None:
    answer = ask("closed.e2e.test", "/", "-H", "Accept: application/json")
    problem = json.loads(answer.partition("\r\n\r\n")[2])
    assert (problem["status"], problem["reason"]) == (401, "credentials")
