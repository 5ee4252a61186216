"""What all connections of a worker share (parsers, memories): nobody leaves anything there for the others.

A hostile client and a hostile backend send seeded heads, mostly almost right; between them an honest client
asks an honest backend. What these two get is compared byte for byte with what they always get.
"""

from __future__ import annotations

import re
from random import Random

import pytest

from tests.e2e.backends import Peer, Script
from tests.e2e.conftest import StartBackend
from tests.e2e.http1_client import get
from tests.e2e.proxy_process import ProxyProcess
from tests.wire.hostile_heads import request_head, response_head

ROUNDS = 120

_BEHIND = [
    b"",
    b"",
    b"hello",
    b"5\r\nhello\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison",
]


def _misbehave(seed: int) -> Script:
    """Answer each connection's first request with another head, and what may come behind one; then close."""

    def script(peer: Peer) -> None:
        peer.read_head()
        random = Random(f"{seed} {peer.number}")
        heads = [response_head(random) for _ in range(random.choice([1, 1, 1, 2, 3]))]
        peer.send(b"".join(heads) + random.choice(_BEHIND))

    return script


def _own_answer(peer: Peer) -> None:
    while True:
        request = peer.read_request()
        peer.send(_answer(request.path[1:]) + b"own  ")


def _answer(number: bytes, connection: bytes = b"") -> bytes:
    fields = b"X-Number: %b\r\nContent-Length: 5\r\nSet-Cookie: own\r\n%b" % (number, connection)
    return b"HTTP/1.1 200 OK\r\n%b\r\n" % fields


def _ask_honestly(proxy: ProxyProcess, service: str, number: int) -> bytes:
    with proxy.connect() as client:
        client.send(get(service, f"/{number}", f"X-Number: {number}", "Connection: close"))
        return client.read_all()


@pytest.mark.parametrize("seed", range(4))
def test_hostile_peers_change_no_byte_of_what_the_others_get(
    seed: int, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    honest, hostile = start_backend(_own_answer), start_backend(_misbehave(seed))
    bad = f"bad-{service}"
    plain_proxy.serve(service, honest)
    plain_proxy.serve(bad, hostile)
    random = Random(seed)
    for number in range(ROUNDS):
        with plain_proxy.connect() as client:
            client.send(get(bad, "/", "Connection: close"))
            client.read_all()
        with plain_proxy.connect() as client:
            client.send(request_head(random, bad.encode()) + random.choice(_BEHIND))
            client.shut()
            client.read_all()
        for each in (number, 0):  # a head that is new, and one that is remembered
            got = _ask_honestly(plain_proxy, service, each)
            assert got == _answer(b"%d" % each, b"Connection: close\r\n") + b"own  ", number
    asked = [number for pair in ((each, 0) for each in range(ROUNDS)) for number in pair]
    assert sorted(request.path for request in honest.requests) == sorted(b"/%d" % each for each in asked)
    for request in honest.requests:
        raw = re.sub(rb"X-Request-ID: [0-9a-f-]+\r\n", b"", request.raw)
        name = service.encode()
        assert raw == (
            b"GET %b HTTP/1.1\r\nHost: %b\r\nX-Number: %b\r\nX-Forwarded-For: 127.0.0.1\r\n"
            b"X-Forwarded-Proto: http\r\nX-Forwarded-Host: %b\r\n\r\n"
        ) % (request.path, name, request.path[1:], name)
    assert len(hostile.peers) >= ROUNDS


@pytest.mark.parametrize("status", [100, 102, 103, 104, 150, 199])
@pytest.mark.parametrize("line", [b"Content-Length: 40", b"Transfer-Encoding: chunked"])
def test_a_length_in_an_informational_response_is_waited_for_by_nobody(
    status: int, line: bytes, plain_proxy: ProxyProcess, start_backend: StartBackend, service: str
) -> None:
    def inform(peer: Peer) -> None:
        peer.read_head()
        peer.send(b"HTTP/1.1 %d Early\r\n%b\r\n\r\n" % (status, line))
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate")

    honest, hostile = start_backend(_own_answer), start_backend(inform)
    bad = f"bad-{service}"
    plain_proxy.serve(service, honest)
    plain_proxy.serve(bad, hostile)
    for number in range(3):
        with plain_proxy.connect() as client:
            response = client.ask(get(bad))
            assert (response.status, response.body) == (200, b"late")
            assert response.informational == [status]
        got = _ask_honestly(plain_proxy, service, number)
        assert got == _answer(b"%d" % number, b"Connection: close\r\n") + b"own  "
