"""A hundred MiB that pass the proxy, and what they hash to."""

from __future__ import annotations

import hashlib
import threading

from tests.e2e.backends import Peer, Script, echo_each, ok

MEGABYTE = 1 << 20
PIECE = bytes(range(256)) * 4096  # one MiB
PIECES = 100
SIZE = PIECES * len(PIECE)


def _digest() -> str:
    hashed = hashlib.sha256()
    for _ in range(PIECES):
        hashed.update(PIECE)
    return hashed.hexdigest()


#: SHA-256 of all pieces.
DIGEST = _digest()


def send_much(peer: Peer) -> None:
    """Answer the first request with all pieces."""
    peer.read_request()
    peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % SIZE)
    for _ in range(PIECES):
        peer.send(PIECE)
    echo_each(peer)


def read_much(gate: threading.Event, digest: list[str]) -> Script:
    """Wait for the gate, then read a request and note its body's SHA-256."""

    def script(peer: Peer) -> None:
        gate.wait(60)
        request = peer.read_request()
        digest.append(hashlib.sha256(request.body).hexdigest())
        peer.send(ok(b"read"))
        peer.wait_closed()

    return script
