"""HTTP/2 on a plain listener, where only the first bytes of a connection can tell; and nowhere else."""

from __future__ import annotations

import signal
import ssl

import pytest

from tests.e2e.conftest import StartBackend, StartProxy
from tests.e2e.http1_client import Http1Client, get
from tests.e2e.http2_client import PREFACE, SETTINGS, Http2Client, fields_of, frame
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.waiting import eventually

BEGINNING = PREFACE + frame(SETTINGS, 0, 0, b"")


def _knowing(proxy: ProxyProcess, service: str) -> Http2Client:
    return Http2Client(("127.0.0.1", proxy.port), None, service, begins=False)


@pytest.mark.parametrize("size", [1, 5, 17, 18, 19, 23, len(BEGINNING)])
def test_the_preface_may_come_in_pieces(
    size: int, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    plain_proxy.serve(service, start_backend())
    with _knowing(plain_proxy, service) as client:
        for start in range(0, len(BEGINNING), size):
            client.send(BEGINNING[start : start + size])
        assert client.ask(fields_of(service, b"/one"), b"body").body == b"GET /one body"
        assert client.ask(fields_of(service, b"/two")).body == b"GET /two "


@pytest.mark.parametrize("size", [1, 18, len(BEGINNING)])
def test_a_used_connection_does_not_become_http2(
    size: int, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        assert client.ask(get(service, "/one")).status == 200
        received = len(backend.received)
        for start in range(0, len(BEGINNING), size):
            client.send(BEGINNING[start : start + size])
        assert client.read_response().status == 400
        assert client.read_all() == b""
        assert len(backend.received) == received


def test_a_connection_does_not_become_http2_behind_a_pipelined_request(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        client.send(get(service, "/one") + BEGINNING)
        assert client.read_response().status == 200
        assert client.read_response().status == 400
        assert client.read_all() == b""
        assert [request.path for request in backend.requests] == [b"/one"]


@pytest.mark.parametrize("start", [b"\r\n", b"\r\n\r\n", b"\n", b" ", b"\x00"])
def test_something_before_the_preface_makes_it_a_bad_request(start: bytes, plain_proxy: ProxyProcess) -> None:
    with plain_proxy.connect() as client:
        client.send(start + BEGINNING)
        assert client.read_response().status == 400
        assert client.read_all() == b""


@pytest.mark.parametrize("size", [1, 18, len(BEGINNING)])
def test_a_tls_client_that_agreed_on_http1_does_not_get_http2(
    size: int, tls_proxy: ProxyProcess, client_tls: ssl.SSLContext, service: str, start_backend: StartBackend
) -> None:
    backend = start_backend()
    tls_proxy.serve(service, backend)
    with Http1Client(("127.0.0.1", tls_proxy.port), tls=client_tls, sni=service) as client:
        for start in range(0, len(BEGINNING), size):
            client.send(BEGINNING[start : start + size])
        assert client.read_response().status == 400
        assert client.read_all() == b""
        assert not backend.received


def test_a_preface_that_is_completed_during_a_drain_is_served(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = start_proxy(toml="[timeouts]\ndrain = 20\nshutdown = 5\n")
    proxy.serve(service, start_backend())
    with _knowing(proxy, service) as client:
        client.send(BEGINNING[:10])
        eventually(lambda: proxy.metric("portero_connections_open") == 1, "the connection is there")
        with proxy.connect() as other:  # behind it, so what it said was read
            assert other.ask(get(service)).status == 200
        proxy.signal(signal.SIGTERM)
        eventually(lambda: proxy.call("GET", "/readyz").status == 503, "it says that it is not ready")
        client.send(BEGINNING[10:])
        stream = client.request(fields_of(service, b"/late"))
        client.read_until_closed()
        assert client.answers[stream].body == b"GET /late "
        assert client.goaway == 0
    assert proxy.wait() == 0
