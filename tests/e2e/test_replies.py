"""Every row of DESIGN 7: what a client sees, what a backend is told, and what the access log says of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.backends import answer_with, echo_each, ok
from tests.e2e.certificates import Authority, client_context, server_context
from tests.e2e.conftest import StartBackend, StartProxy
from tests.e2e.http1_client import Http1Client, get, post
from tests.e2e.http2_client import Http2Client, fields_of
from tests.e2e.messages import Response
from tests.e2e.proxy_process import KEY, SECRET, ProxyProcess, free_port, token
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
    proxy.register(service, backend.host, backend.port)
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
    proxy.register(service, backend.host, backend.port)
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


# What the backend is told


def _seen(backend_fields: list[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    return [value for given, value in backend_fields if given == name]


FORGED = (
    "X-Forwarded-For: 192.0.2.66",
    "X-Forwarded-Proto: gopher",
    "X-Forwarded-Host: evil.test",
    "X-Request-ID: forged",
    "Forwarded: for=192.0.2.66",
    "X-Real-IP: 192.0.2.66",
    "X_Forwarded_For: 192.0.2.66",
    "X-Forwarded_For: 192.0.2.66",
    "X_REQUEST_ID: forged",
)


def test_forwarded_fields_of_a_stranger_are_overwritten(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.register(service, backend.host, backend.port)
    with plain_proxy.connect() as client:
        client.ask(get(service, "/", *FORGED))
    (request,) = backend.requests
    assert request.values(b"x-forwarded-for") == [b"127.0.0.1"]
    assert request.values(b"x-forwarded-proto") == [b"http"]
    assert request.values(b"x-forwarded-host") == [service.encode()]
    assert request.values(b"x-request-id") != [b"forged"]
    assert request.values(b"host") == [service.encode()]
    for value in (b"192.0.2.66", b"forged", b"gopher", b"evil.test"):
        assert value not in request.raw
    assert not any(b"_" in name for name, _ in request.fields)


def test_forwarded_fields_are_overwritten_over_http2_too(
    tls_proxy: ProxyProcess, start_backend: StartBackend, authority: Authority, service: str
) -> None:
    backend = start_backend()
    tls_proxy.register(service, backend.host, backend.port)
    forged = [tuple(line.lower().encode().split(b": ")) for line in FORGED]
    fields = fields_of(service, b"/", *((name, value) for name, value in forged))
    with Http2Client(("127.0.0.1", tls_proxy.port), client_context(authority.pem, "h2"), service) as client:
        assert client.ask(fields).status == 200
    (request,) = backend.requests
    assert request.values(b"x-forwarded-for") == [b"127.0.0.1"]
    assert request.values(b"x-forwarded-proto") == [b"https"]
    for value in (b"192.0.2.66", b"forged", b"gopher", b"evil.test"):
        assert value not in request.raw


def test_a_trusted_proxy_keeps_what_it_forwards(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy(toml=SHORT + '[proxy]\ntrusted_proxies = ["127.0.0.0/8"]\n')
    backend = start_backend()
    proxy.register(service, backend.host, backend.port)
    with proxy.connect() as client:
        response = client.ask(get(service, "/", *FORGED))
    with proxy.connect("::1") as client:
        client.ask(get(service, "/stranger", *FORGED))
    trusted, stranger = backend.requests
    assert trusted.values(b"x-forwarded-for") == [b"192.0.2.66, 127.0.0.1"]
    assert trusted.values(b"x-forwarded-proto") == [b"gopher"]
    assert trusted.values(b"x-forwarded-host") == [b"evil.test"]
    assert trusted.values(b"x-request-id") == [b"forged"]
    assert response.status == 200
    assert not any(b"_" in name for name, _ in trusted.fields)
    assert stranger.values(b"x-forwarded-for") == [b"::1"]
    assert b"192.0.2.66" not in stranger.raw


def test_every_request_has_an_id_of_its_own(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.register(service, backend.host, backend.port)
    with plain_proxy.connect() as client:
        for _ in range(20):
            client.ask(get(service))
    ids = [request.values(b"x-request-id")[0] for request in backend.requests]
    assert len(set(ids)) == 20
    assert all(re.fullmatch(rb"[0-9A-Za-z._-]{8,64}", each) for each in ids)


def test_host_passes_unchanged(plain_proxy: ProxyProcess, start_backend: StartBackend, service: str) -> None:
    backend = start_backend()
    plain_proxy.register(service, backend.host, backend.port)
    spellings = [service.upper(), f"{service}:8443", f"{service}."]
    with plain_proxy.connect() as client:
        for spelling in spellings:
            assert client.ask(get(spelling)).status == 200
    assert [request.values(b"host") for request in backend.requests] == [[s.encode()] for s in spellings]


def test_a_service_named_by_an_ipv6_literal_is_found(
    plain_proxy: ProxyProcess, start_backend: StartBackend
) -> None:
    backend = start_backend()
    plain_proxy.register("2001:db8::7", backend.host, backend.port)
    with plain_proxy.connect() as client:
        for host in ("[2001:db8::7]", "[2001:DB8:0:0::7]:8443"):
            assert client.ask(get(host)).status == 200
        assert client.ask(get("[2001:db8::8]")).status == 404


def test_a_wildcard_service_takes_one_label(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.register(f"*.{service}", backend.host, backend.port)
    with plain_proxy.connect() as client:
        assert client.ask(get(f"any.{service}")).status == 200
        assert client.ask(get(service)).status == 404
        assert client.ask(get(f"a.b.{service}")).status == 404


def test_the_default_service_takes_the_rest(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy(toml=SHORT + f'[proxy]\ndefault_service = "{service}"\n')
    backend = start_backend()
    proxy.register(service, backend.host, backend.port)
    with proxy.connect() as client:
        assert client.ask(get("anything.example", "/x")).body == b"GET /x "


def test_backends_take_turns_evenly_while_others_come_and_go(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backends = [start_backend() for _ in range(4)]
    for backend in backends[:3]:
        plain_proxy.register(service, backend.host, backend.port)
    with plain_proxy.connect() as client:
        for _ in range(30):
            assert client.ask(get(service)).status == 200
        assert [len(backend.requests) for backend in backends] == [10, 10, 10, 0]
        plain_proxy.register(service, backends[3].host, backends[3].port)
        for _ in range(40):
            client.ask(get(service))
        assert [len(backend.requests) for backend in backends] == [20, 20, 20, 10]
        plain_proxy.deregister(service, host=backends[0].host, port=backends[0].port)
        for _ in range(30):
            client.ask(get(service))
    assert [len(backend.requests) for backend in backends] == [20, 30, 30, 20]


def test_a_renewal_with_another_address_takes_effect_at_once(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    first, second = start_backend(answer_with(ok(b"first"))), start_backend(answer_with(ok(b"second")))
    with plain_proxy.connect() as client:
        for backend, body in ((first, b"first"), (second, b"second"), (first, b"first")):
            plain_proxy.register(service, backend.host, backend.port, instance_id="one")
            for _ in range(3):
                assert client.ask(get(service)).body == body


# The access log


def test_the_access_log_tells_an_exchange(
    tls_proxy: ProxyProcess, start_backend: StartBackend, connect_tls: ConnectTls, service: str
) -> None:
    backend = start_backend()
    tls_proxy.register(service, backend.host, backend.port)
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
    plain_proxy.register(service, backend.host, backend.port)
    with plain_proxy.connect() as client:
        client.send(get(service))
        eventually(lambda: backend.received, "the request is at the backend")
        client.reset()
    (entry,) = eventually(lambda: plain_proxy.access_log(host=service), "the line in the access log")
    assert (entry["status"], entry["reason"]) == (499, "client_gone")
    assert backend.peers[0].closed.wait(10)


def test_requests_are_counted_by_service_method_and_status(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.register(service, backend.host, backend.port)
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
    proxy.register(service, backend.host, backend.port)
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
    proxy.register(service, backend.host, backend.port)
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
    proxy.register(service, backend.host, backend.port)
    with proxy.connect() as client:
        client.ask(get(service, '/a"b%0aforged\\n'))
    line = eventually(
        lambda: next((each for each in proxy.log().splitlines() if "/a" in each), ""), "the line in the log"
    )
    assert service in line
    assert " 200 " in line


# TLS to backends


def test_a_backend_over_tls_is_reached_with_the_hosts_name(
    plain_proxy: ProxyProcess,
    start_backend: StartBackend,
    authority: Authority,
    service: str,
    tmp_path: Path,
) -> None:
    context = server_context(authority.issue("whatever.test").write(tmp_path / "backend"))
    names: list[str | None] = []
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    backend = start_backend(tls=context)
    plain_proxy.register(service, backend.host, backend.port, use_tls=True)
    with plain_proxy.connect() as client:
        assert client.ask(get(f"{service}:8443")).status == 200
    assert names == [service]


@pytest.mark.parametrize("matches", [True, False])
def test_a_pinned_backend_is_verified_before_a_byte_is_sent(
    matches: bool,
    plain_proxy: ProxyProcess,
    start_backend: StartBackend,
    authority: Authority,
    service: str,
    tmp_path: Path,
) -> None:
    pair = authority.issue("whatever.test")
    backend = start_backend(echo_each, tls=server_context(pair.write(tmp_path / "backend")))
    pin = pair.fingerprint if matches else "0" * 64
    plain_proxy.register(service, backend.host, backend.port, use_tls=True, tls_fingerprint=pin)
    with plain_proxy.connect() as client:
        response = client.ask(get(service, "/", "Cookie: secret"))
    assert response.status == (200 if matches else 502)
    assert bool(backend.received) == matches
