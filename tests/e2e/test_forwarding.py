"""What a backend is told, and which backend it is: forwarded fields, Host, routing, turns, TLS upstream."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.backends import answer_with, echo_each, ok
from tests.e2e.certificates import Authority, client_context, server_context
from tests.e2e.conftest import StartBackend, StartProxy
from tests.e2e.http1_client import get
from tests.e2e.http2_client import Http2Client, fields_of
from tests.e2e.proxy_process import ProxyProcess

SHORT = "[timeouts]\ndrain = 1\nshutdown = 1\n"


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
    plain_proxy.serve(service, backend)
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
    tls_proxy.serve(service, backend)
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
    proxy.serve(service, backend)
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
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        for _ in range(20):
            client.ask(get(service))
    ids = [request.values(b"x-request-id")[0] for request in backend.requests]
    assert len(set(ids)) == 20
    assert all(re.fullmatch(rb"[0-9A-Za-z._-]{8,64}", each) for each in ids)


def test_host_passes_unchanged(plain_proxy: ProxyProcess, start_backend: StartBackend, service: str) -> None:
    backend = start_backend()
    plain_proxy.serve(service, backend)
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
    proxy.serve(service, backend)
    with proxy.connect() as client:
        assert client.ask(get("anything.example", "/x")).body == b"GET /x "


def test_backends_take_turns_evenly_while_others_come_and_go(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backends = [start_backend() for _ in range(4)]
    for backend in backends[:3]:
        plain_proxy.serve(service, backend)
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


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_backend_that_left_loses_its_idle_connections_and_its_neighbour_does_not(
    workers: str, start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy(flags=("--workers", workers))
    leaving, staying = start_backend(), start_backend()
    proxy.serve(f"leaving.{service}", leaving)
    proxy.serve(f"staying.{service}", staying)
    with proxy.connect() as client:
        for _ in range(2):
            for host in (f"leaving.{service}", f"staying.{service}"):
                assert client.ask(get(host)).status == 200
            # A renewal, which changes the table too, closes nothing.
            proxy.serve(f"leaving.{service}", leaving)
        proxy.deregister(f"leaving.{service}", host=leaving.host, port=leaving.port)
        assert leaving.wait_for_peers()[0].closed.wait(20)
        assert client.ask(get(f"staying.{service}")).status == 200
    assert (len(leaving.peers), len(staying.peers)) == (1, 1)


def test_a_renewal_with_another_address_takes_effect_at_once(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    first, second = start_backend(answer_with(ok(b"first"))), start_backend(answer_with(ok(b"second")))
    with plain_proxy.connect() as client:
        for backend, body in ((first, b"first"), (second, b"second"), (first, b"first")):
            plain_proxy.register(service, backend.host, backend.port, instance_id="one")
            for _ in range(3):
                assert client.ask(get(service)).body == body


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
