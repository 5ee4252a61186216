"""What the access log, the operator's log and the metrics tell, and what they never do."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.e2e.backends import answer_with
from tests.e2e.conftest import StartBackend, StartProxy
from tests.e2e.http1_client import Http1Client, get, post
from tests.e2e.proxy_process import KEY, SECRET, ProxyProcess, free_port, token
from tests.e2e.waiting import eventually

SHORT = "[timeouts]\ndrain = 1\nshutdown = 1\n"


ConnectTls = Callable[[str], Http1Client]


def test_the_access_log_tells_an_exchange(
    tls_proxy: ProxyProcess, start_backend: StartBackend, connect_tls: ConnectTls, service: str
) -> None:
    backend = start_backend()
    tls_proxy.serve(service, backend)
    with connect_tls(service) as client:
        response = client.ask(post(service, b"hello", "/path?query=hidden"))
    (entry,) = eventually(lambda: tls_proxy.access_log(host=service), "the line in the access log")
    assert {key: entry[key] for key in ("client", "method", "host", "path", "protocol", "status")} == {
        "client": "127.0.0.1",
        "method": "POST",
        "host": service,
        "path": "/path",
        "protocol": "HTTP/1.1",
        "status": 200,
    }
    assert (entry["bytes_in"], entry["bytes_out"]) == (5, len(response.body))
    assert entry["service"] == service
    assert entry["backend"] == f"{backend.host}:{backend.port}"
    assert (entry["upstream_status"], entry["retries"], entry["reason"]) == (200, 0, "")
    assert (entry["tls_version"], entry["sni"]) == ("TLSv1.3", service)
    assert entry["request_id"].encode() == backend.requests[0].values(b"x-request-id")[0]
    assert 0 < entry["upstream_time"] <= entry["duration"] < 20
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", entry["time"])


@pytest.mark.parametrize(
    ("status", "reason"), [(404, "no_such_service"), (502, "connect_failed"), (503, "no_backend")]
)
def test_the_access_log_gives_the_reason_of_a_refusal(
    status: int, reason: str, plain_proxy: ProxyProcess, service: str
) -> None:
    if status != 404:
        plain_proxy.register(service, "127.0.0.1", free_port(), instance_id="one")
    if status == 503:
        plain_proxy.deregister(service, instance_id="one")
    with plain_proxy.connect() as client:
        assert client.ask(get(service)).status == status
    (entry,) = eventually(lambda: plain_proxy.access_log(host=service), "the line in the access log")
    assert (entry["status"], entry["reason"]) == (status, reason)


def test_a_client_that_went_away_is_a_499_in_the_log(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend(lambda peer: peer.wait_closed())
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        client.send(get(service))
        eventually(lambda: backend.received, "the request is at the backend")
        client.reset()
    (entry,) = eventually(lambda: plain_proxy.access_log(host=service), "the line in the access log")
    assert (entry["status"], entry["reason"]) == (499, "client_gone")
    assert backend.peers[0].closed.wait(30)


def test_requests_are_counted_by_service_method_and_status(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        for _ in range(3):
            client.ask(get(service))
        client.ask(post(service, b"hello"))
    for method, count in (("GET", 3), ("POST", 1)):
        assert (
            plain_proxy.metric("portero_requests_total", service=service, method=method, status="200")
            == count
        )
    assert plain_proxy.metric("portero_request_duration_seconds_count", service=service) == 4
    assert plain_proxy.metric("portero_registry_services") >= 1


@pytest.mark.parametrize("style", ["json", "text"])
def test_nothing_secret_is_ever_logged(
    style: str, start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy(toml=SHORT, environment={"PORTERO_ACCESS_LOG": style, "PORTERO_LOG": "debug"})
    backend = start_backend(
        answer_with(b"HTTP/1.1 200 OK\r\nSet-Cookie: sid=tell-nobody-1\r\nContent-Length: 2\r\n\r\nok")
    )
    proxy.serve(service, backend)
    wrong = {"X-Register-Secret": "tell-nobody-2"}
    proxy.call("POST", "/register", {"service_name": service}, wrong)
    proxy.call("POST", "/register", {"service_name": service}, {"Authorization": "Bearer tell-nobody-3"})
    lines = (
        "Cookie: sid=tell-nobody-4",
        "Authorization: Basic tell-nobody-5",
        "Proxy-Authorization: tell-nobody-6",
    )
    with proxy.connect() as client:
        assert client.ask(get(service, "/p?token=tell-nobody-7", *lines)).status == 200
        bad = get(service, "/p?token=tell-nobody-8", *lines, "Content-Length: tell-nobody-9")
        assert client.ask(bad).status == 400
    eventually(
        lambda: service in proxy.log() and " 400 " in f" {proxy.log()} ".replace(",", " ").replace(":", " "),
        "the access log",
    )
    log = proxy.log()
    assert "tell-nobody" not in log
    assert SECRET not in log
    assert KEY not in log
    assert token(service)[:30] not in log


def test_the_access_log_can_be_switched_off(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy(toml=SHORT, environment={"PORTERO_ACCESS_LOG": "off"})
    backend = start_backend()
    proxy.serve(service, backend)
    with proxy.connect() as client:
        for _ in range(3):
            client.ask(get(service, "/not-logged"))
    proxy.stop()
    assert "/not-logged" not in proxy.log()


def test_a_path_cannot_forge_a_line_of_the_text_log(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy(toml=SHORT + '[log]\naccess = "text"\n')
    backend = start_backend()
    proxy.serve(service, backend)
    with proxy.connect() as client:
        client.ask(get(service, '/a"b%0aforged\\n'))
    line = eventually(
        lambda: next((each for each in proxy.log().splitlines() if "/a" in each), ""), "the line in the log"
    )
    assert service in line
    assert " 200 " in line
