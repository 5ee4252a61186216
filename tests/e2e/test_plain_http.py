"""`--http-addr`: everything goes to https, ACME challenges go to whoever answers them."""

from __future__ import annotations

import pytest

from tests.e2e.backends import answer_with, ok
from tests.e2e.conftest import StartBackend, StartProxy
from tests.e2e.http1_client import Http1Client, get, post
from tests.e2e.proxy_process import free_port

CHALLENGE = "/.well-known/acme-challenge/token"


@pytest.mark.parametrize(("method", "status"), [("GET", 301), ("HEAD", 301), ("POST", 308), ("PUT", 308)])
def test_a_request_is_sent_to_https_with_its_path_and_query(
    method: str, status: int, start_proxy: StartProxy
) -> None:
    port = free_port()
    proxy = start_proxy(tls=True, flags=("--http-addr", f"127.0.0.1:{port}"))
    with Http1Client(("127.0.0.1", port)) as client:
        request = get("a.e2e.test", "/x/y?z=%20", "Content-Length: 0", method=method)
        response = client.ask(request, method.encode())
    assert response.status == status
    expected = f"https://a.e2e.test:{proxy.port}/x/y?z=%20"
    assert response.value(b"location") == expected.encode()


def test_hosts_that_could_lead_elsewhere_are_refused(start_proxy: StartProxy) -> None:
    port = free_port()
    start_proxy(tls=True, flags=("--http-addr", f"127.0.0.1:{port}"))
    for host in ("a@evil.test", "a.test/x", "", "a.test, b.test"):
        with Http1Client(("127.0.0.1", port)) as client:
            assert client.ask(get(host)).status == 400
    with Http1Client(("127.0.0.1", port)) as client:
        location = client.ask(get("a.test", "//evil.test/")).value(b"location")
        assert location.startswith(b"https://a.test:")


def test_challenges_go_to_the_acme_upstream_only(
    start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    port, backend = free_port(), start_backend(answer_with(ok(b"authorization")))
    upstream = ("--acme-upstream", f"{backend.host}:{backend.port}")
    start_proxy(tls=True, flags=("--http-addr", f"127.0.0.1:{port}", *upstream))
    with Http1Client(("127.0.0.1", port)) as client:
        response = client.ask(get("a.e2e.test", CHALLENGE))
        assert (response.status, response.body) == (200, b"authorization")
        assert client.ask(get("a.e2e.test", "/other")).status == 301
    with Http1Client(("127.0.0.1", port)) as client:
        assert client.ask(post("a.e2e.test", b"x", CHALLENGE)).status in (404, 405)
    assert [request.path for request in backend.requests] == [CHALLENGE.encode()]


def test_challenges_without_an_upstream_are_a_404(start_proxy: StartProxy) -> None:
    port = free_port()
    start_proxy(tls=True, flags=("--http-addr", f"127.0.0.1:{port}"))
    with Http1Client(("127.0.0.1", port)) as client:
        assert client.ask(get("a.e2e.test", CHALLENGE)).status == 404
