"""What is asked, and what the only right answer to it is, byte for byte.

Client and backend agree on this file alone. Every ask has an identity of its own and every byte of an answer
is made from it: an answer of another ask, one that came twice, one with a byte too many or too few, or with
pieces of two of them, cannot be right.

Asks come at a steady rate, whoever is slow (an open loop): `stream` says when each is due. What is late is
then late for the one who asks, and not hidden by asking less.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

#: Seconds between two pieces of a download, and between two messages of a WebSocket.
PIECE_SECONDS = 0.1
MESSAGE_SECONDS = 0.25

#: Pieces of a download and messages of a WebSocket: three seconds of the one, four of the other.
PIECES = 30
MESSAGES = 16

PIECE_BYTES = 4096
HEALTH_PATH = "/health"
WEBSOCKET_PATH = "/websocket"

_SIZES = (200, 200, 2_000, 2_000, 20_000)
_POST_SIZES = (100, 1_000, 8_000)


class Kind(StrEnum):
    """The classes that are counted apart."""

    GET = "GET"
    POST = "POST"
    DOWNLOAD = "download"
    WEBSOCKET = "WebSocket"


@dataclass(frozen=True, slots=True)
class Ask:
    """One exchange. `size` is the body's (POST: the request's), in pieces for a download, in messages for a
    WebSocket. `fresh`: on a connection of its own; the others share those that are open.
    """

    identity: str
    kind: Kind
    size: int
    http2: bool = False
    fresh: bool = False

    @property
    def method(self) -> str:
        return "POST" if self.kind is Kind.POST else "GET"

    @property
    def path(self) -> str:
        if self.kind is Kind.GET:
            return f"/get/{self.identity}/{self.size}"
        if self.kind is Kind.POST:
            return f"/post/{self.identity}"
        if self.kind is Kind.DOWNLOAD:
            return f"/download/{self.identity}/{self.size}"
        return WEBSOCKET_PATH

    @property
    def body(self) -> bytes | None:
        """What is sent, or None where nothing is."""
        return content(f"{self.identity} sent", self.size) if self.kind is Kind.POST else None

    @property
    def answer(self) -> bytes:
        """The whole body that comes back."""
        if self.kind is Kind.POST:
            return receipt(self.identity, self.body or b"")
        if self.kind is Kind.DOWNLOAD:
            return b"".join(piece(self.identity, number) for number in range(self.size))
        return content(self.identity, self.size)

    @property
    def seconds(self) -> float:
        """How long it takes when nothing is in its way."""
        pause = {Kind.DOWNLOAD: PIECE_SECONDS, Kind.WEBSOCKET: MESSAGE_SECONDS}.get(self.kind, 0.0)
        return pause * self.size


def content(identity: str, size: int) -> bytes:
    """`size` bytes that belong to `identity` and nobody else, if they are long enough to hold it."""
    line = f"{identity}\n".encode()
    return (line * (size // len(line) + 1))[:size]


def piece(identity: str, number: int) -> bytes:
    """One piece of a download."""
    return content(f"{identity} {number}", PIECE_BYTES)


def receipt(identity: str, body: bytes) -> bytes:
    """What a backend answers to a POST: whose it was, and what came."""
    return f"{identity} {len(body)} {zlib.crc32(body):08x}\n".encode()


def message(identity: str, number: int) -> str:
    """What a WebSocket's client says, and hears again."""
    return f"{identity} {number}"


def stream(seed: str, rate: float) -> Iterator[tuple[float, Ask]]:
    """Without end: in how many seconds from the beginning to ask, and what.

    Of a hundred 69 are GETs and 28 POSTs, two take three seconds and one is a WebSocket; half of all go over
    HTTP/2 and a tenth on connections of their own. At 200 a second that makes 12 downloads and 8 WebSockets
    at any time.
    """
    source = random.Random(seed)
    number = 0
    while True:
        number += 1
        yield number / rate, _ask(f"{seed}-{number}", source)


# Private


def _ask(identity: str, source: random.Random) -> Ask:
    draw, http2, fresh = source.random(), source.random() < 0.5, source.random() < 0.1
    if draw < 0.01:
        return Ask(identity, Kind.WEBSOCKET, MESSAGES, fresh=True)
    if draw < 0.03:
        return Ask(identity, Kind.DOWNLOAD, PIECES, http2, fresh)
    if draw < 0.31:
        return Ask(identity, Kind.POST, source.choice(_POST_SIZES), http2, fresh)
    return Ask(identity, Kind.GET, source.choice(_SIZES), http2, fresh)
