"""Peers that die, vanish or close one side: nothing leaks, and nobody else notices."""

from __future__ import annotations

import signal
import socket
import ssl
import threading
from collections.abc import Callable
from functools import partial

import pytest

from tests.e2e.backends import Peer, RecordingBackend, answer_with, echo_each, in_turn, ok
from tests.e2e.big_bodies import SIZE, send_much
from tests.e2e.certificates import Authority, client_context
from tests.e2e.conftest import StartBackend, StartProxy
from tests.e2e.http1_client import Http1Client, get, post
from tests.e2e.http2_client import (
    Http2Client,
    fields_of,
    rst_stream,
)
from tests.e2e.proxy_process import ProxyProcess, free_port
from tests.e2e.waiting import eventually

ConnectTls = Callable[[str], Http1Client]


# Backends that die


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_backend_that_dies_in_its_body_cuts_the_response_off(
    how: str, framing: str, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    streamed = threading.Event()

    def die(peer: Peer) -> None:
        peer.read_request()
        if framing == "length":
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 500)
        else:
            peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1f4\r\n" + b"x" * 500 + b"\r\n")
        streamed.wait(20)
        if how == "reset":
            peer.reset()

    backend = start_backend(in_turn(die, echo_each))
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        client.send(get(service))
        got = b""
        while got.count(b"x") < 500:
            data = client.read_some()
            assert data, got
            got += data
        streamed.set()
        rest = client.read_all()
        assert b"0\r\n\r\n" not in rest
        assert b"HTTP/" not in rest
    with plain_proxy.connect() as client:
        assert client.ask(get(service, "/next")).body == b"GET /next "
    plain_proxy.wait_until_idle()


def test_a_backend_that_dies_in_its_body_resets_the_stream_over_http2(
    tls_proxy: ProxyProcess, start_backend: StartBackend, authority: Authority, service: str
) -> None:
    def die(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhello")

    tls_proxy.serve(service, start_backend(in_turn(die, echo_each)))
    tls = client_context(authority.pem, "h2")
    with Http2Client(("127.0.0.1", tls_proxy.port), tls, service) as client:
        outcome = client.ask(fields_of(service))
        assert outcome.reset is not None or outcome.status == 502
        assert client.ask(fields_of(service, b"/next")).body == b"GET /next "


def test_a_backend_that_dies_during_an_upload_is_a_502(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    def die(peer: Peer) -> None:
        peer.read_head()
        peer.reset()

    backend = start_backend(in_turn(die, echo_each))
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        client.send(get(service, "/", "Content-Length: 1000000", method="POST") + b"x" * 1000)
        assert client.read_response().status == 502
    assert len(backend.peers) == 1, "an upload was sent again"
    plain_proxy.wait_until_idle()


def test_every_request_is_answered_while_nine_of_ten_backends_refuse_connections(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    plain_proxy.serve(service, start_backend())
    for _ in range(9):
        plain_proxy.register(service, "127.0.0.1", free_port())
    with plain_proxy.connect() as client:
        for number in range(20):
            assert client.ask(get(service, f"/{number}")).status == 200
            assert client.ask(post(service, b"body")).body == b"POST / body"
    plain_proxy.wait_until_idle()


@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize("first", ["reset", "body"])
def test_no_byte_of_a_body_is_lost_when_its_connection_breaks_at_the_same_time(
    framing: str, first: str, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    """The proxy is stopped while both happen, and finds them in one batch of events; the rest comes later."""
    go_on, broken = threading.Event(), threading.Event()

    def break_when_told(peer: Peer) -> None:
        request = peer.read_request()
        peer.send(ok(b"idle now", request))
        go_on.wait(60)
        peer.reset()
        broken.set()

    backend = start_backend(in_turn(break_when_told, echo_each))
    plain_proxy.serve(service, backend)
    if framing == "length":
        head, body, rest = get(service, "/", "Content-Length: 6", method="POST"), b"abc", b"def"
    else:
        head = get(service, "/", "Transfer-Encoding: chunked", method="POST")
        body, rest = b"6\r\nabc", b"def\r\n0\r\n\r\n"
    with plain_proxy.connect() as client:
        assert client.ask(get(service)).body == b"idle now"
        client.send(head)
        eventually(lambda: plain_proxy.metric("portero_requests_in_flight") == 1, "the head was taken")
        plain_proxy.signal(signal.SIGSTOP)
        try:
            if first == "body":
                client.send(body)
            go_on.set()
            assert broken.wait(20)
            if first == "reset":
                client.send(body)
        finally:
            plain_proxy.signal(signal.SIGCONT)
        eventually(
            lambda: len(backend.peers) == 2 or not plain_proxy.metric("portero_requests_in_flight"),
            "it was tried again, or refused",
        )
        client.send(rest)
        answer = client.read_response()
        assert answer.status == 502 or answer.body == b"POST / abcdef"
    with plain_proxy.connect() as client:
        for number in range(3):
            assert client.ask(get(service, f"/{number}")).body == b"GET /%d " % number
    assert [request.body for request in backend.requests if request.method == b"POST"] in ([], [b"abcdef"])
    plain_proxy.wait_until_idle()


# Clients that vanish


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_vanishes_during_its_upload_ends_the_backends_connection(
    how: str, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend()
    plain_proxy.serve(service, backend)
    client = plain_proxy.connect()
    client.send(get(service, "/", "Content-Length: 1000000", method="POST") + b"x" * 1000)
    eventually(lambda: b"xxx" in backend.received, "the upload is streamed")
    (client.close if how == "close" else client.reset)()
    assert backend.peers[0].closed.wait(30)
    assert not backend.requests
    plain_proxy.wait_until_idle()


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_vanishes_during_its_download_ends_the_backends_connection(
    how: str, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend(send_much)
    plain_proxy.serve(service, backend)
    client = plain_proxy.connect()
    client.send(get(service))
    assert client.read_some()
    (client.close if how == "close" else client.reset)()
    assert backend.peers[0].closed.wait(30)
    assert backend.peers[0].sent < SIZE
    plain_proxy.wait_until_idle()


def test_a_client_that_vanishes_while_it_waits_ends_the_backends_connection(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    backend = start_backend(lambda peer: peer.wait_closed())
    plain_proxy.serve(service, backend)
    client = plain_proxy.connect()
    client.send(get(service))
    eventually(lambda: backend.received, "the request is at the backend")
    client.reset()
    assert backend.peers[0].closed.wait(30)
    plain_proxy.wait_until_idle()


def test_a_stream_that_is_cancelled_ends_the_backends_connection(
    tls_proxy: ProxyProcess, start_backend: StartBackend, authority: Authority, service: str
) -> None:
    backend = start_backend(in_turn(lambda peer: peer.wait_closed(), echo_each))
    tls_proxy.serve(service, backend)
    tls = client_context(authority.pem, "h2")
    with Http2Client(("127.0.0.1", tls_proxy.port), tls, service) as client:
        stream = client.request(fields_of(service, b"/cancelled"))
        eventually(lambda: backend.received, "the request is at the backend")
        client.send(rst_stream(stream))
        assert backend.peers[0].closed.wait(30)
        assert client.ask(fields_of(service, b"/next")).body == b"GET /next "
    tls_proxy.wait_until_idle()


def test_a_tls_client_that_vanishes_without_a_word_leaves_nothing(
    tls_proxy: ProxyProcess, start_backend: StartBackend, connect_tls: ConnectTls, service: str
) -> None:
    backend = start_backend(in_turn(*[lambda peer: peer.wait_closed()] * 10, echo_each))
    tls_proxy.serve(service, backend)
    for i in range(10):
        client = connect_tls(service)
        client.send(get(service, f"/{i}"))
        eventually(partial(_has_received, backend, b"GET /%d " % i), "the request is at the backend")
        if i % 2:
            client.reset()
        else:
            client.socket.close()
    for peer in backend.peers:
        assert peer.closed.wait(30)
    tls_proxy.wait_until_idle()


def _has_received(backend: RecordingBackend, line: bytes) -> bool:
    return any(line in peer.received for peer in backend.peers)


@pytest.mark.parametrize(
    "sent", [b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello"]
)
def test_clients_that_break_off_the_handshake_leave_nothing(
    sent: bytes, tls_proxy: ProxyProcess, start_backend: StartBackend, connect_tls: ConnectTls, service: str
) -> None:
    tls_proxy.serve(service, start_backend())
    before = tls_proxy.open_files()
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", tls_proxy.port)) as raw:
            raw.sendall(sent)
    with connect_tls(service) as client:
        assert client.ask(get(service)).status == 200
    eventually(lambda: tls_proxy.open_files() <= before + 4, "the descriptors are given back")


def test_a_tls_client_gets_its_refusal_in_the_middle_of_an_upload(
    start_proxy: StartProxy, start_backend: StartBackend, client_tls: ssl.SSLContext, service: str
) -> None:
    """All of it, and the end of TLS behind it: no reset overtakes them."""
    proxy = start_proxy(tls=True, toml="[timeouts]\ndrain = 1\n[limits]\nbody_bytes = 500000\n")
    proxy.serve(service, start_backend())
    too_long = get(service, "/", "Content-Length: 900000", method="POST") + b"x" * 900_000
    broken = get(service, "/", "Transfer-Encoding: chunked", method="POST") + b"5\r\nhelloX\r\n" * 60_000
    for upload, status in ((too_long, 413), (broken, 400)):
        with (
            socket.create_connection(("127.0.0.1", proxy.port), timeout=60) as raw,
            client_tls.wrap_socket(raw, server_hostname=service, suppress_ragged_eofs=False) as secure,
        ):
            secure.sendall(upload)
            got = b""
            while data := secure.recv(65536):
                got += data
            head, _, body = got.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 %d " % status)
            assert b"content-length: %d\r\n" % len(body) in head.lower() + b"\r\n"
    proxy.wait_until_idle()
    eventually(lambda: proxy.metric("portero_connections_open") == 0, "no connection is left")


def test_a_client_that_closes_its_writing_side_still_gets_its_answer(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    """`printf ... | nc -N`: half-closed behind a complete request."""
    go_on = threading.Event()

    def answer_late(peer: Peer) -> None:
        request = peer.read_request()
        go_on.wait(60)
        peer.send(ok(b"late", request))
        peer.wait_closed()

    backend = start_backend(answer_late)
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        client.send(get(service))
        client.shut()
        eventually(lambda: backend.requests, "the request is at the backend")
        go_on.set()
        assert client.read_response().body == b"late"
        assert client.read_all() == b""


def test_what_a_client_sends_behind_its_last_request_does_not_cut_its_answer_off(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    """A connection that is closed with unread bytes is reset: the client loses what it has not read yet."""
    body = bytes(4_000_000)
    plain_proxy.serve(service, start_backend(answer_with(ok(body))))
    with plain_proxy.connect() as client:
        client.send(get(service, "/", "Connection: close") + get(service, "/never"))
        for _ in range(20):
            client.send(b"x" * 10_000)
        assert client.read_response().body == body
        assert client.read_all() == b""
    plain_proxy.wait_until_idle()


def test_pipelined_requests_of_a_half_closed_client_are_all_answered(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    plain_proxy.serve(service, start_backend())
    with plain_proxy.connect() as client:
        client.send(get(service, "/1") + get(service, "/2") + get(service, "/3"))
        client.shut()
        assert [client.read_response().body for _ in range(3)] == [b"GET /1 ", b"GET /2 ", b"GET /3 "]
        assert client.read_all() == b""


def test_a_backend_that_closes_its_writing_side_early_still_ends_in_order(
    plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    def half_close(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
        peer.shut()
        peer.wait_closed()

    backend = start_backend(half_close)
    plain_proxy.serve(service, backend)
    with plain_proxy.connect() as client:
        for _ in range(3):
            assert client.ask(get(service)).body == b"hello"
