"""Malformed, ambiguous and odd HTTP/1.1 requests: nothing is ever forwarded twice, split or joined.

The backend records the exact bytes it received and reads them with a strict reader of its own. After every
case a good request on a new connection is the barrier: when it is answered, whatever the case made the proxy
send has arrived, and nothing else may be there.
"""

from __future__ import annotations

import pytest

from tests.e2e.backends import Peer, RecordingBackend, echo_each, ok
from tests.e2e.conftest import StartBackend
from tests.e2e.http1_cases import CUT, REFUSED, Cut, Refused
from tests.e2e.http1_client import get, post
from tests.e2e.http1_good_cases import PASSED, Passed
from tests.e2e.messages import Closed, Request, Response, Truncated
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.waiting import eventually

#: What portero adds to every request.
ADDED = {b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"x-request-id", b"host"}

_BAD: list[Refused | Cut] = [*REFUSED, *CUT]
SHORT_AND_BAD = [case for case in _BAD if len(case.raw) < 1500]


def _fill(raw: bytes, service: str) -> bytes:
    return raw.replace(b"{host}", service.encode()).replace(b"{HOST}", service.upper().encode())


def _ask_again(proxy: ProxyProcess, service: str) -> None:
    """A good request on a new connection gets its own answer."""
    with proxy.connect() as client:
        response = client.ask(get(service, "/again"))
    assert (response.status, response.body) == (200, b"GET /again ")


def _raw_is_exactly(backend: RecordingBackend) -> None:
    """Every byte that the backend received belongs to one of the requests it read."""
    assert backend.received == b"".join(request.raw for request in backend.requests)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_a_refused_request_is_answered_once_and_nothing_of_it_is_forwarded(
    case: Refused, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        client.send(_fill(case.raw, service))
        assert client.read_response().status in case.statuses
        if b"CONNECT" not in case.raw:
            assert client.read_all() == b""
    _ask_again(plain_proxy, service)
    if b"CONNECT" not in case.raw:
        assert [request.path for request in backend.requests] == [b"/again"]
    assert b"CONNECT" not in backend.received
    _raw_is_exactly(backend)


def test_another_major_version_is_refused_with_a_reason_of_its_own(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.serve(service, backend)
    before = plain_proxy.metric("portero_errors_total", reason="version_refused")
    with plain_proxy.connect() as client:
        client.send(get(service, "/1") + get(service, "/2", version="3.0") + get(service, "/smuggled"))
        assert client.read_response().body == b"GET /1 "
        refused = client.read_response()
        assert (refused.status, refused.phrase) == (505, b"HTTP Version Not Supported")
        assert client.read_all() == b""
    assert [request.path for request in backend.requests] == [b"/1"]
    assert plain_proxy.metric("portero_errors_total", reason="version_refused") == before + 1
    (request_id,) = refused.values(b"x-request-id")
    (logged,) = eventually(
        lambda: plain_proxy.access_log(request_id=request_id.decode()), "the refusal is in the log"
    )
    assert (logged["status"], logged["reason"]) == (505, "version_refused")


@pytest.mark.parametrize("case", CUT, ids=lambda case: case.name)
def test_a_request_that_breaks_in_its_body_never_becomes_a_complete_one(
    case: Cut, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        client.send(_fill(case.raw, service))
        assert client.read_response().status in case.statuses
        assert client.read_all() == b""
    _ask_again(plain_proxy, service)
    assert [request.path for request in backend.requests] == [b"/again"]
    assert b"/smuggled" not in backend.received
    for peer in backend.peers:
        if peer.received and not peer.requests:  # the head of the broken request went out on it
            assert peer.closed.wait(30), "the connection of a broken request stayed open"


@pytest.mark.parametrize("case", PASSED, ids=lambda case: case.name)
def test_an_odd_but_good_request_reaches_the_backend_exactly_once(
    case: Passed, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        client.send(_fill(case.raw, service))
        response = client.read_response()
        assert response.status == 200
        assert response.body == b"%b %b %b" % (case.method, case.path, case.body)
        for path in case.also:
            assert client.read_response().body == b"GET %b " % path
        if case.keeps:
            assert client.ask(get(service, "/same")).body == b"GET /same "
        else:
            assert client.read_all() == b""
    _ask_again(plain_proxy, service)
    paths = [case.path, *case.also, *([b"/same"] if case.keeps else []), b"/again"]
    assert [request.path for request in backend.requests] == paths
    _raw_is_exactly(backend)
    _is_as_told(backend.requests[0], case, service)


def _is_as_told(request: Request, case: Passed, service: str) -> None:
    assert (request.method, request.path, request.body) == (case.method, case.path, case.body)
    wanted = [(name, _fill(value, service)) for name, value in case.present]
    order = [pair for pair in request.fields if pair in wanted]
    assert sorted(order) == sorted(wanted)
    if not any(name in ADDED for name, _ in wanted):
        assert order == wanted, "the order of fields has changed"
    for name in case.absent:
        assert not request.values(name), name
    for name in ADDED:
        assert len(request.values(name)) == 1, name
    assert not any(b"_" in name for name, _ in request.fields)


@pytest.mark.parametrize(
    "case", [case for case in PASSED if len(case.raw) < 1500], ids=lambda case: case.name
)
def test_a_good_request_is_the_same_when_every_byte_comes_alone(
    case: Passed, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        client.send_slowly(_fill(case.raw, service))
        assert client.read_response().body == b"%b %b %b" % (case.method, case.path, case.body)
        for path in case.also:
            assert client.read_response().body == b"GET %b " % path
    assert [request.path for request in backend.requests] == [case.path, *case.also]


@pytest.mark.parametrize("case", SHORT_AND_BAD, ids=lambda case: case.name)
def test_a_bad_request_is_refused_too_when_every_byte_comes_alone(
    case: Refused | Cut, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        client.send_slowly(_fill(case.raw, service))
        assert client.read_response().status in case.statuses
    _ask_again(plain_proxy, service)
    if b"CONNECT" not in case.raw:
        assert [request.path for request in backend.requests] == [b"/again"]


@pytest.mark.parametrize("count", [50, 1000])
def test_pipelined_requests_are_answered_in_order(
    count: int, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    """Fifty fit into one segment."""
    backend = start_backend()
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        client.send(b"".join(get(service, f"/{i}") for i in range(count)))
        client.shut()
        bodies = [client.read_response().body for _ in range(count)]
        assert client.read_all() == b""
    assert bodies == [b"GET /%d " % i for i in range(count)]
    assert [request.path for request in backend.requests] == [b"/%d" % i for i in range(count)]
    _raw_is_exactly(backend)


def test_pipelined_requests_that_the_proxy_answers_itself_are_answered_in_order(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        client.send(b"".join(get(service if i % 2 else "nobody.e2e.test", f"/{i}") for i in range(300)))
        statuses = [client.read_response().status for _ in range(300)]
    assert statuses == [404, 200] * 150


def test_pipelined_requests_with_bodies_keep_their_bodies(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.serve(service, backend)
    requests = []
    for i in range(20):
        body = b"GET /smuggled/%d HTTP/1.1\r\n\r\n" % i
        requests.append(post(service, body, f"/{i}"))
        requests.append(
            get(service, f"/chunked/{i}", "Transfer-Encoding: chunked", method="PUT")
            + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        )
    with plain_proxy.connect() as client:
        client.send(b"".join(requests))
        for i in range(20):
            body = b"GET /smuggled/%d HTTP/1.1\r\n\r\n" % i
            assert client.read_response().body == b"POST /%d %b" % (i, body)
            assert client.read_response().body == b"PUT /chunked/%d %b" % (i, body)
    assert len(backend.requests) == 40
    _raw_is_exactly(backend)


def test_the_requests_before_a_malformed_one_are_answered_and_those_behind_it_are_not(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.serve(service, backend)
    bad = get(service, "/bad", "Content-Length: 1", "Content-Length: 2")
    with plain_proxy.connect() as client:
        client.send(get(service, "/1") + get(service, "/2") + bad + get(service, "/smuggled"))
        assert [client.read_response().body for _ in range(2)] == [b"GET /1 ", b"GET /2 "]
        assert client.read_response().status == 400
        assert client.read_all() == b""
    _ask_again(plain_proxy, service)
    assert [request.path for request in backend.requests] == [b"/1", b"/2", b"/again"]


def test_pipelined_heads_get_no_bodies(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        client.send(get(service, "/h", method="HEAD") + get(service, "/g"))
        head = client.read_response(b"HEAD")
        assert (head.status, head.value(b"content-length")) == (200, b"8")
        assert client.read_response().body == b"GET /g "


def test_nothing_behind_connection_close_is_forwarded(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        client.send(get(service, "/last", "Connection: close") + get(service, "/smuggled"))
        assert client.read_response().body == b"GET /last "
        assert client.read_all() == b""
    _ask_again(plain_proxy, service)
    assert [request.path for request in backend.requests] == [b"/last", b"/again"]


def test_the_rest_of_a_body_after_an_early_response_never_becomes_a_request(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    def answer_early(peer: Peer) -> None:
        while True:
            peer.read_request(lambda request: peer.send(ok(b"early")) if request.method == b"POST" else None)
            if peer.requests[-1].method != b"POST":
                peer.send(ok(b"GET /again "))

    backend = start_backend(answer_early)
    plain_proxy.serve(service, backend)
    hidden = get(service, "/smuggled")
    with plain_proxy.connect() as client:
        client.send(get(service, "/", f"Content-Length: {10 + len(hidden)}", method="POST") + b"0123456789")
        response = client.read_response()
        assert (response.status, response.body) == (200, b"early")
        client.send(hidden)
        client.send(get(service, "/again"))
        try:
            later: Response | None = client.read_response()
        except (Closed, Truncated):
            later = None
    assert later is None or later.body == b"GET /again "
    _ask_again(plain_proxy, service)
    assert b"/smuggled" not in {request.path for request in backend.requests}
    assert all(request.body in (b"", b"0123456789" + hidden) for request in backend.requests)


@pytest.mark.parametrize("interim", [100, 103])
def test_an_expectation_is_passed_end_to_end(
    interim: int, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    """The client's body waits for the backend's own 100: the proxy must not make one up."""

    def consent(peer: Peer) -> None:
        request = peer.read_request(
            lambda head: peer.send(
                (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" if interim == 103 else b"")
                + b"HTTP/1.1 100 Continue\r\n\r\n"
            )
        )
        peer.send(ok(request.body, request))
        echo_each(peer)

    backend = start_backend(consent)
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        client.send(get(service, "/", "Content-Length: 5", "Expect: 100-continue", method="POST"))
        first = client.read_some()
        while b"HTTP/1.1 100 " not in first:
            first += client.read_some()
        assert (b"HTTP/1.1 103 " in first) == (interim == 103)
        client.send(b"hello")
        assert client.read_response().body == b"hello"
        assert client.ask(get(service, "/same")).body == b"GET /same "
    assert backend.requests[0].values(b"expect") == [b"100-continue"]


def test_a_refused_expectation_leaves_the_body_unread(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    def refuse(peer: Peer) -> None:
        peer.read_head()
        peer.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno")

    backend = start_backend(refuse)
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        client.send(get(service, "/", "Content-Length: 5", "Expect: 100-continue", method="POST"))
        response = client.read_response()
        assert (response.status, response.body, response.informational) == (403, b"no", [])
        assert client.read_all() == b"", "the proxy cannot know whether the body follows: it has to close"
    assert b"hello" not in backend.received


def test_a_chunked_body_without_its_last_chunk_never_becomes_a_complete_request(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        client.send(get(service, "/", "Transfer-Encoding: chunked", method="POST") + b"5\r\nhello\r\n")
        eventually(lambda: b"hello" in backend.received, "the body is streamed")
        client.shut()
        assert client.read_all()[9:12] in (b"", b"400", b"408")
    assert backend.peers[0].closed.wait(30)
    assert not backend.requests


def test_a_short_body_never_becomes_a_complete_request(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        client.send(get(service, "/", "Content-Length: 10", method="POST") + b"hello")
        eventually(lambda: b"hello" in backend.received, "the body is streamed")
        client.shut()
        assert client.read_all()[9:12] in (b"", b"400", b"408")
    assert backend.peers[0].closed.wait(30)
    assert not backend.requests


def test_a_truncated_head_is_never_forwarded(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        client.send(get(service, "/cut")[:-2])
        client.shut()
        assert client.read_all()[9:12] in (b"", b"400")
    _ask_again(plain_proxy, service)
    assert [request.path for request in backend.requests] == [b"/again"]


def test_a_request_without_a_host_in_http_1_0_reaches_no_service(plain_proxy: ProxyProcess) -> None:
    with plain_proxy.connect() as client:
        assert client.ask(b"GET / HTTP/1.0\r\n\r\n").status in (400, 404)


def test_requests_of_many_clients_never_share_a_response(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.serve(service, backend)
    clients = [plain_proxy.connect() for _ in range(30)]
    try:
        for turn in range(5):
            for number, client in enumerate(clients):
                client.send(get(service, f"/{number}/{turn}"))
            for number, client in enumerate(clients):
                assert client.read_response().body == b"GET /%d/%d " % (number, turn)
    finally:
        for client in clients:
            client.close()
    _raw_is_exactly(backend)
