"""Backends that answer nonsense, too much, too little, too late or not at all.

What goes wrong before the response's head was passed on is a 502 or 504; afterwards the response is cut off
so that the client notices. A connection that misbehaved is never used again, and no byte of it reaches
another client.
"""

from __future__ import annotations

import socket
import threading

import pytest

from tests.e2e.backends import Peer, Script, answer_with, echo_each, in_turn, ok
from tests.e2e.conftest import Curl, StartBackend, StartProxy
from tests.e2e.http1_answers import BAD_BODIES, BAD_HEADS, GOOD_ANSWERS, OK
from tests.e2e.http1_client import Http1Client, get, post
from tests.e2e.messages import Response, Truncated
from tests.e2e.proxy_process import ProxyProcess, free_port
from tests.e2e.waiting import eventually


def _misbehave_once(raw: bytes) -> Script:
    """The first connection answers its first request with `raw` and closes; all others are good."""
    return in_turn(answer_with(raw, then_close=True), echo_each)


def _ask_for_broken(client: Http1Client, request: bytes) -> Response | None:
    """The 502, or what came of a response that was cut off; a complete 200 fails."""
    try:
        response = client.ask(request)
    except Truncated as cut:
        return cut.response
    assert response.status == 502
    return response


@pytest.mark.parametrize("name", BAD_HEADS)
def test_an_answer_without_a_good_head_is_a_502(
    name: str, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    # A POST with a body: it may not be sent a second time, so the 502 has to be seen.
    backend = start_backend(_misbehave_once(BAD_HEADS[name]))
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        response = client.ask(post(service, b"once", "/once"))
        assert response.status == 502
        assert b"ok" not in response.body.split()
        assert client.ask(get(service, "/same")).body == b"GET /same "
    assert [request.path for request in backend.requests] == [b"/once", b"/same"]


@pytest.mark.parametrize("name", GOOD_ANSWERS)
def test_an_odd_but_good_answer_is_passed_in_our_own_spelling(
    name: str, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend(answer_with(GOOD_ANSWERS[name]))
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        for _ in range(3):  # the later ones are remembered
            response = client.ask(get(service))
            assert (response.status, response.body) == (int(GOOD_ANSWERS[name][9:12]), b"ok")
            assert (response.version, response.values(b"content-length")) == (b"1.1", [b"2"])
    assert len(backend.peers) == 1


@pytest.mark.parametrize("flag", ["--http1.1", "--http2"])
@pytest.mark.parametrize("status", [600, 999])
def test_a_status_beyond_599_is_passed_counted_and_logged(
    status: int, flag: str, tls_proxy: ProxyProcess, start_backend: StartBackend, service: str, curl: Curl
) -> None:
    backend = start_backend(answer_with(b"HTTP/1.1 %d Own\r\nContent-Length: 2\r\n\r\nok" % status))
    tls_proxy.serve(service, backend)
    for _ in range(4):  # over HTTP/2 the third block comes from memory
        done = curl("/", flag)
        assert done.stdout.splitlines()[:2] == [b"ok", b"%d %b" % (status, flag[6:].encode())]
    assert tls_proxy.metric("portero_requests_total", service=service, status=str(status)) == 4
    eventually(
        lambda: len(tls_proxy.access_log(service=service, status=status)) == 4, "four lines in the log"
    )


@pytest.mark.parametrize("name", BAD_BODIES)
def test_an_answer_that_breaks_in_its_body_never_looks_complete(
    name: str, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend(_misbehave_once(BAD_BODIES[name]))
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        got = _ask_for_broken(client, post(service, b"once", "/once"))
        assert got is None or got.status == 502 or b"hello".startswith(got.body)
    with plain_proxy.connect() as client:
        assert client.ask(get(service, "/next")).body == b"GET /next "
    assert [request.path for request in backend.requests] == [b"/once", b"/next"]


@pytest.mark.parametrize("name", ["a body that is too short", "no last chunk"])
def test_a_cut_off_answer_is_noticed_by_clients_of_http_1_0_too(
    name: str, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend(_misbehave_once(BAD_BODIES[name]))
    plain_proxy.serve(service, backend)
    with socket.create_connection(("127.0.0.1", plain_proxy.port), timeout=60) as client:
        client.sendall(get(service, "/", "Content-Length: 4", version="1.0", method="POST") + b"once")
        got = b""
        noticed = False
        try:
            while data := client.recv(65536):
                got += data
        except ConnectionResetError:
            noticed = True
    assert noticed or b" 502 " in got or b"Content-Length: 10\r\n" in got


@pytest.mark.parametrize(
    "first",
    [
        OK + b"Content-Length: 2\r\n\r\nok" + OK + b"Content-Length: 6\r\n\r\npoison",
        OK + b"Content-Length: 2\r\n\r\nokpoison",
        OK
        + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
        + OK
        + b"Content-Length: 6\r\n\r\npoison",
        OK + b"Content-Length: 2\r\n\r\nok\r\n",
    ],
    ids=["a second response", "a body that is too long", "a second response behind chunks", "an empty line"],
)
def test_bytes_behind_a_response_never_reach_the_next_client(
    first: bytes, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    def misbehave(peer: Peer) -> None:
        peer.read_request()
        peer.send(first)
        peer.wait_closed()

    backend = start_backend(in_turn(misbehave, echo_each))
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        assert client.ask(get(service, "/first")).body == b"ok"
        assert client.ask(get(service, "/second")).body == b"GET /second "
    with plain_proxy.connect() as client:
        assert client.ask(get(service, "/third")).body == b"GET /third "
    assert backend.peers[0].closed.wait(30), "the connection with too many bytes was kept"


def test_bytes_on_an_idle_connection_never_reach_the_next_client(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    go_on = threading.Event()

    def misbehave(peer: Peer) -> None:
        peer.read_request()
        peer.send(ok(b"ok"))
        go_on.wait(60)
        peer.send(ok(b"poison"))
        peer.wait_closed()

    backend = start_backend(in_turn(misbehave, echo_each))
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        assert client.ask(get(service, "/first")).body == b"ok"
        go_on.set()
        assert backend.peers[0].closed.wait(30), "an idle connection with unasked-for bytes was kept"
        assert client.ask(get(service, "/second")).body == b"GET /second "


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("HEAD", OK + b"Content-Length: 6\r\n\r\npoison"),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\npoison"),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 6\r\n\r\npoison"),
    ],
)
def test_a_body_where_none_may_be_reaches_nobody(
    method: str, answer: bytes, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    def misbehave(peer: Peer) -> None:
        peer.read_request()
        peer.send(answer)
        peer.wait_closed()

    backend = start_backend(in_turn(misbehave, echo_each))
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        response = client.ask(get(service, "/first", method=method), method.encode())
        assert response.body == b""
        assert response.status in (200, 204, 304)
        assert client.ask(get(service, "/second")).body == b"GET /second "


@pytest.mark.parametrize(
    ("method", "answer", "length"),
    [
        ("HEAD", OK + b"Content-Length: 1000\r\n\r\n", b"1000"),
        ("HEAD", OK + b"Transfer-Encoding: chunked\r\n\r\n", None),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 1000\r\n\r\n", b"1000"),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n", None),
    ],
)
def test_responses_without_a_body_leave_both_connections_usable(
    method: str,
    answer: bytes,
    length: bytes | None,
    plain_proxy: ProxyProcess,
    start_backend: StartBackend,
    service: str,
) -> None:
    backend = start_backend(answer_with(answer))
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        for _ in range(3):
            response = client.ask(get(service, method=method), method.encode())
            assert (response.status, response.body) == (int(answer[9:12]), b"")
            if length is not None:
                assert response.values(b"content-length") == [length]
    assert len(backend.peers) == 1


def test_a_status_without_a_reason_is_passed(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend(answer_with(b"HTTP/1.1 299 \r\nContent-Length: 0\r\n\r\n"))
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        assert client.ask(get(service)).status == 299


@pytest.mark.parametrize("status", [102, 103])
def test_informational_responses_are_passed_before_the_final_one(
    status: int, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    interim = b"HTTP/1.1 %d Interim\r\nLink: </style.css>\r\n\r\n" % status
    backend = start_backend(answer_with(interim + interim + ok(b"done")))
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        response = client.ask(get(service))
        assert (response.status, response.body) == (200, b"done")
        assert response.informational == [status, status]
        old = client.ask(get(service, version="1.0"))
        assert (old.status, old.informational) == (200, []), "HTTP/1.0 does not know 1xx"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_body_that_the_end_of_the_connection_ends_is_complete(
    version: str, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    body = b"until the end " * 10_000
    backend = start_backend(answer_with(b"HTTP/1.0 200 OK\r\n\r\n" + body, then_close=True))
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        for _ in range(2 if version == "1.1" else 1):
            assert client.ask(get(service, version=version)).body == body


def test_connections_of_http_1_0_backends_are_not_used_again(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend(answer_with(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok"))
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        for _ in range(3):
            assert client.ask(get(service)).body == b"ok"
    assert len(backend.peers) == 3


def test_connections_that_the_backend_wants_closed_are_not_used_again(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend(answer_with(OK + b"Content-Length: 2\r\nConnection: close\r\n\r\nok"))
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        for _ in range(3):
            response = client.ask(get(service))
            assert response.body == b"ok"
            assert response.values(b"connection") == [], "the backend's Connection is none of the client's"
    assert len(backend.peers) == 3


def test_hop_by_hop_fields_of_the_response_end_at_the_proxy(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    answer = (
        OK + b"Content-Length: 2\r\nConnection: X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=1\r\n"
        b"Upgrade: h2c\r\nProxy-Authenticate: x\r\nX-End: 2\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n\r\nok"
    )
    backend = start_backend(answer_with(answer))
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        response = client.ask(get(service))
    names = {name for name, _ in response.fields}
    assert not names & {b"x-hop", b"keep-alive", b"upgrade", b"proxy-authenticate"}
    assert response.values(b"x-end") == [b"2"]
    assert response.values(b"set-cookie") == [b"a", b"b"]


def test_trailers_of_a_response_are_never_merged_into_its_head(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    answer = (
        OK + b"Transfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 1\r\n"
        b"Content-Length: 50\r\nSet-Cookie: a\r\nTransfer-Encoding: gzip\r\n\r\n"
    )
    backend = start_backend(answer_with(answer))
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        for lines in ((), ("TE: trailers", "Connection: TE")):
            response = client.ask(get(service, "/", *lines))
            assert response.body == b"ok"
            assert not response.values(b"x-sum")
            assert not response.values(b"set-cookie")
            assert response.trailers in ([], [(b"x-sum", b"1")])
    assert len(backend.peers) == 1


@pytest.mark.slow
def test_a_backend_that_never_answers_is_a_504(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy(toml="[timeouts]\nupstream_head = 0.5\ndrain = 1\nshutdown = 1\n")
    backend = start_backend(lambda peer: peer.wait_closed())
    proxy.serve(service, backend)
    with proxy.connect() as client:
        assert client.ask(get(service)).status == 504
        assert client.ask(post(service, b"x")).status == 504
    assert len(backend.peers) == 2, "a request that may still be at work was sent again"
    for peer in backend.peers:
        assert peer.closed.wait(30)


@pytest.mark.slow
def test_a_backend_that_falls_silent_in_its_body_is_cut_off(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    def fall_silent(peer: Peer) -> None:
        peer.read_request()
        peer.send(OK + b"Content-Length: 10\r\n\r\nhello")
        peer.wait_closed()

    proxy = start_proxy(toml="[timeouts]\nupstream_idle = 0.5\ndrain = 1\nshutdown = 1\n")
    proxy.serve(service, start_backend(fall_silent))
    with proxy.connect() as client, pytest.raises(Truncated) as cut:
        client.ask(get(service))
    assert cut.value.response is not None
    assert cut.value.response.body == b"hello"


def test_a_connect_that_nobody_answers_is_a_502_or_504_in_time(start_proxy: StartProxy, service: str) -> None:
    proxy = start_proxy(toml="[timeouts]\nconnect = 0.5\ndrain = 1\nshutdown = 1\n")
    with socket.socket() as full:
        # A listener whose backlog is full drops further SYNs: the connect hangs.
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = []
        try:
            for _ in range(4):
                one = socket.socket()
                one.setblocking(False)
                one.connect_ex(full.getsockname())
                waiting.append(one)
            proxy.register(service, *full.getsockname())
            with proxy.connect() as client:
                assert client.ask(get(service)).status in (502, 504)
        finally:
            for one in waiting:
                one.close()


def _answer_once_then_close_at_the_worst_moment(peer: Peer) -> None:
    request = peer.read_request()
    peer.send(ok(b"%b %b " % (request.method, request.path)))
    peer.read_head()
    peer.reset()


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE"])
def test_an_idle_connection_that_closes_as_it_is_used_costs_an_idempotent_request_nothing(
    method: str, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend(in_turn(_answer_once_then_close_at_the_worst_moment, echo_each))
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        assert client.ask(get(service, "/first")).status == 200
        response = client.ask(get(service, "/second", method=method), method.encode())
        assert response.status == 200
    assert backend.received.count(b" /second ") == 2, "the first try went out on the idle connection"


def test_a_request_with_a_body_is_never_sent_twice(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend(in_turn(_answer_once_then_close_at_the_worst_moment, echo_each))
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        assert client.ask(get(service, "/first")).status == 200
        status = client.ask(post(service, b"once", "/second")).status
    assert status in (200, 502)
    assert backend.received.count(b" /second ") == 1


def test_a_post_without_a_body_is_never_sent_twice(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend(in_turn(_answer_once_then_close_at_the_worst_moment, echo_each))
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        assert client.ask(get(service, "/first")).status == 200
        assert client.ask(post(service, b"", "/second")).status in (200, 502)
    assert backend.received.count(b" /second ") == 1


def test_connections_that_close_while_idle_are_never_noticed_by_clients(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    def close_after_one(peer: Peer) -> None:
        request = peer.read_request()
        peer.send(ok(b"%b" % request.path))

    backend = start_backend(close_after_one)
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        for i in range(50):
            response = client.ask(get(service, f"/{i}"))
            assert (response.status, response.body) == (200, b"/%d" % i)


def test_a_backend_that_refuses_is_a_502(plain_proxy: ProxyProcess, service: str) -> None:
    plain_proxy.register(service, "127.0.0.1", free_port())
    with plain_proxy.connect() as client:
        for _ in range(3):
            assert client.ask(get(service)).status == 502


def test_a_backend_that_refuses_costs_nothing_while_another_one_serves(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend(host="::1")
    plain_proxy.register(service, "127.0.0.1", free_port())
    plain_proxy.register(service, "::1", free_port())
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        for i in range(12):
            assert client.ask(post(service, b"x", f"/{i}")).body == b"POST /%d x" % i
    assert [request.path for request in backend.requests] == [b"/%d" % i for i in range(12)]


def test_a_backend_that_resets_every_connection_is_a_502(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend(lambda peer: peer.reset())
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        assert client.ask(get(service)).status == 502
        assert client.ask(post(service, b"x")).status == 502
    assert len(backend.peers) <= 8, "it was tried again and again"


def test_a_response_before_the_body_is_complete_is_passed_at_once(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    def refuse_early(peer: Peer) -> None:
        peer.read_head()
        peer.send(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")

    backend = start_backend(in_turn(refuse_early, echo_each))
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        client.send(get(service, "/", "Content-Length: 1000000", method="POST") + b"x" * 1000)
        response: Response = client.read_response()
        assert (response.status, response.body) == (413, b"big")
    with plain_proxy.connect() as client:
        assert client.ask(get(service, "/next")).body == b"GET /next "


def test_what_a_response_streams_arrives_before_its_end(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    """Server-sent events: each piece must pass at once."""
    more = threading.Semaphore(0)

    def stream(peer: Peer) -> None:
        peer.read_request()
        peer.send(OK + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for i in range(5):
            more.acquire(timeout=60)
            peer.send(b"9\r\ndata: %d\n\n\r\n" % i)
        peer.send(b"0\r\n\r\n")
        peer.wait_closed()

    backend = start_backend(stream)
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        client.send(get(service))
        got = b""
        while b"\r\n\r\n" not in got:
            got += client.read_some()
        for i in range(5):
            more.release()
            while b"data: %d\n\n" % i not in got:
                data = client.read_some()
                assert data
                got += data
        assert got.endswith(b"\r\n") or client.read_some()


def test_backends_on_ipv6_are_reached(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend(host="::1")
    plain_proxy.serve(service, backend)
    with plain_proxy.connect("::1") as client:
        assert client.ask(get(service)).body == b"GET / "
    assert backend.requests[0].values(b"x-forwarded-for") == [b"::1"]


def test_nothing_is_left_behind_by_hostile_backends(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend(answer_with(b"garbage\r\n\r\n", then_close=True))
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        for _ in range(20):
            assert client.ask(get(service)).status == 502
    plain_proxy.wait_until_idle()
