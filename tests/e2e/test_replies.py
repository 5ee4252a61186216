"""Every row of the table in docs/operations.md: the answers that the proxy gives by itself."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.e2e.certificates import Authority, client_context
from tests.e2e.conftest import StartBackend, StartProxy
from tests.e2e.http1_client import Http1Client, get, post
from tests.e2e.http2_client import Http2Client, fields_of
from tests.e2e.messages import Response
from tests.e2e.proxy_process import ProxyProcess, free_port
from tests.e2e.waiting import eventually

SHORT = "[timeouts]\ndrain = 1\nshutdown = 1\n"


ConnectTls = Callable[[str], Http1Client]


def _is_text(response: Response, status: int) -> None:
    assert response.status == status
    assert response.value(b"content-type").startswith(b"text/plain")
    assert 0 < len(response.body) < 300
    assert response.body.startswith(b"%d " % status)
    assert response.body.count(b"\n") <= 1


# The statuses


def test_no_such_service_is_a_404(plain_proxy: ProxyProcess) -> None:
    with plain_proxy.connect() as client:
        _is_text(client.ask(get("nobody.e2e.test")), 404)
        _is_text(client.ask(get("nobody.e2e.test", "/again")), 404)
    with plain_proxy.connect() as client:
        _is_text(client.ask(post("nobody.e2e.test", b"x" * 100_000)), 404)


def test_an_answer_to_head_has_no_body(plain_proxy: ProxyProcess) -> None:
    with plain_proxy.connect() as client:
        client.send(get("nobody.e2e.test", method="HEAD") + get("nobody.e2e.test", "/next"))
        head = client.read_response(b"HEAD")
        assert (head.status, head.body) == (404, b"")
        _is_text(client.read_response(), 404)


def test_a_known_service_without_a_backend_is_a_503_with_retry_after(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.register(service, backend.host, backend.port, instance_id="one")
    with plain_proxy.connect() as client:
        assert client.ask(get(service)).status == 200
        plain_proxy.deregister(service, instance_id="one")
        response = client.ask(get(service))
        _is_text(response, 503)
        assert 1 <= int(response.value(b"retry-after")) <= 60


def test_a_lease_that_ran_out_takes_no_request(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.register(service, backend.host, backend.port, ttl_seconds=1)
    with plain_proxy.connect() as client:
        assert client.ask(get(service)).status == 200
        eventually(lambda: client.ask(get(service)).status == 503, "the lease has run out", 5)
        before = len(backend.requests)
        assert client.ask(get(service)).status == 503
        assert len(backend.requests) == before


@pytest.mark.parametrize(
    ("accept", "is_json"),
    [
        ("application/json", True),
        ("application/problem+json", True),
        ("text/html, application/json;q=0.9", True),
        ("text/html", False),
        ("*/*", False),
    ],
)
def test_a_reply_is_json_for_who_asks_for_it(accept: str, is_json: bool, plain_proxy: ProxyProcess) -> None:
    with plain_proxy.connect() as client:
        response = client.ask(get("nobody.e2e.test", "/", f"Accept: {accept}"))
    assert response.status == 404
    if not is_json:
        _is_text(response, 404)
        return
    assert response.value(b"content-type").startswith(b"application/problem+json")
    found = json.loads(response.body)
    assert found["status"] == 404
    assert found["reason"] == "no_such_service"
    assert found["request_id"].encode() == response.value(b"x-request-id")


def test_a_body_over_the_limit_is_a_413(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy(toml=SHORT + "[limits]\nbody_bytes = 1000\n")
    backend = start_backend()
    proxy.serve(service, backend)
    with proxy.connect() as client:
        assert client.ask(post(service, b"x" * 1000)).status == 200
        client.send(get(service, "/declared", "Content-Length: 1001", method="POST"))
        _is_text(client.read_response(), 413)
        assert client.read_all() == b""
    with proxy.connect() as client:
        client.send(get(service, "/chunked", "Transfer-Encoding: chunked", method="POST"))
        client.send(b"3e8\r\n" + b"x" * 1000 + b"\r\n1\r\nx\r\n0\r\n\r\n")
        _is_text(client.read_response(), 413)
        assert client.read_all() == b""
    assert [request.path for request in backend.requests] == [b"/"]
    assert b"/declared" not in backend.received


def test_limits_of_the_head_are_configurable(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy(
        toml=SHORT + "[limits]\nrequest_line = 300\nheader_bytes = 2000\nheader_fields = 10\n"
    )
    backend = start_backend()
    proxy.serve(service, backend)
    for request, status in (
        (get(service, "/" + "a" * 280), 200),
        (get(service, "/" + "a" * 300), 414),
        (get(service, "/", "A: " + "b" * 1800), 200),
        (get(service, "/", "A: " + "b" * 2000), 431),
        (get(service, "/", *(f"A{i}: b" for i in range(9))), 200),
        (get(service, "/", *(f"A{i}: b" for i in range(10))), 431),
    ):
        with proxy.connect() as client:
            assert client.ask(request).status == status


def test_a_head_that_takes_too_long_is_a_408(start_proxy: StartProxy) -> None:
    proxy = start_proxy(toml="[timeouts]\nhead = 0.5\ndrain = 1\nshutdown = 1\n")
    with proxy.connect() as client:
        client.send(b"GET / HTTP/1.1\r\nHost: slow.e2e.test\r\n")
        _is_text(client.read_response(), 408)
        assert client.read_all() == b""


def test_a_backend_that_refuses_is_a_502_of_the_usual_form(plain_proxy: ProxyProcess, service: str) -> None:
    plain_proxy.register(service, "127.0.0.1", free_port())
    with plain_proxy.connect() as client:
        response = client.ask(get(service))
        _is_text(response, 502)
        problem = json.loads(client.ask(get(service, "/", "Accept: application/json")).body)
    assert problem["reason"] == "connect_failed"


def test_a_malformed_request_gets_a_short_text_too(plain_proxy: ProxyProcess) -> None:
    with plain_proxy.connect() as client:
        response = client.ask(b"nonsense\r\n\r\n")
        _is_text(response, 400)
        assert response.value(b"connection") == b"close"


# 421


def test_a_host_that_another_certificate_covers_is_a_421(
    tls_proxy: ProxyProcess, start_backend: StartBackend, connect_tls: ConnectTls
) -> None:
    backend = start_backend()
    for name in ("one.other.test", "two.other.test"):
        tls_proxy.register(name, backend.host, backend.port)
    with connect_tls("one.other.test") as client:
        assert client.ask(get("one.other.test")).status == 200
        _is_text(client.ask(get("two.other.test")), 421)
        assert client.ask(get("one.other.test")).status == 200
    with connect_tls("two.other.test") as client:
        assert client.ask(get("two.other.test")).status == 200


def test_a_host_that_another_certificate_covers_is_a_421_over_http2(
    tls_proxy: ProxyProcess, start_backend: StartBackend, authority: Authority
) -> None:
    backend = start_backend()
    for name in ("one.other.test", "two.other.test"):
        tls_proxy.register(name, backend.host, backend.port)
    tls = client_context(authority.pem, "h2")
    with Http2Client(("127.0.0.1", tls_proxy.port), tls, "one.other.test") as client:
        assert client.ask(fields_of("two.other.test")).status == 421
        assert client.ask(fields_of("one.other.test")).status == 200


def test_a_host_that_no_certificate_covers_is_served(
    tls_proxy: ProxyProcess, start_backend: StartBackend, authority: Authority
) -> None:
    """Nothing could be presented that fits better: clients that do not verify are served."""
    backend = start_backend()
    tls_proxy.register("uncovered.example", backend.host, backend.port)
    context = client_context(authority.pem, "http/1.1")
    context.check_hostname = False
    with Http1Client(("127.0.0.1", tls_proxy.port), tls=context, sni="uncovered.example") as client:
        assert client.ask(get("uncovered.example")).status == 200
