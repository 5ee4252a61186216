"""The client's end of a connection: opened with a deadline, and each way of failing has a name.

`refused` and `no connection`: there was none to ask on. `closed`: it ended before a byte of the answer.
`cut`: it ended in the middle of one. `garbled`: what came is no answer. `kept connection closed` (RFC 9112,
9.3.1): the request met the end of a connection that had been idle; browsers ask again, here it is lost.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass

from benchmarks.faults.ledger import Lost

HOST = "localhost"


@dataclass(frozen=True)
class Place:
    """Where the proxy is. Without contexts it is asked in the clear (then HTTP/2 with prior knowledge)."""

    port: int
    tls: ssl.SSLContext | None = None
    http2_tls: ssl.SSLContext | None = None


def contexts(certificates: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """For HTTP/1.1 and for HTTP/2, both trusting the certificates in this file and no other."""
    made = []
    for protocol in ("http/1.1", "h2"):
        context = ssl.create_default_context(cafile=certificates)
        context.set_alpn_protocols([protocol])
        made.append(context)
    return made[0], made[1]


async def connect(port: int, tls: ssl.SSLContext | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection, its handshake done. Raises Lost."""
    try:
        return await asyncio.open_connection(
            "127.0.0.1", port, ssl=tls, server_hostname=HOST if tls else None, limit=1 << 20
        )
    except ConnectionRefusedError as error:
        raise Lost("refused") from error
    except OSError as error:  # ssl.SSLError is one
        raise Lost("no connection") from error
