"""What the tests of the listener's TLS share: certificates, the layer on a port, a client's context."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import uvloop

from portero_py.core.certificate_pairs import parse_pair
from portero_py.core.certificates import Certificate, CertificateTable
from portero_py.demo.self_signed import Authority
from portero_py.proxy.deadlines import Deadlines
from portero_py.proxy.downstream.sni import FrontTls
from portero_py.proxy.downstream.tls import TlsTransport

AUTHORITY = Authority()
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}

Scene = Callable[[], Awaitable[None]]
#: Runs a scene on one kind of loop.
Play = Callable[[Scene], None]


def issued(name: str, *names: str) -> Certificate:
    pair = AUTHORITY.issue(*(names or (name,)))
    return parse_pair(name, pair.chain_pem, pair.key_pem, f"certs/{name}")


def table(*certificates: Certificate, version: int = 1) -> CertificateTable:
    return CertificateTable(certificates, version)


def client(*alpn: str, trusting: bool = True, highest: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=AUTHORITY.pem.decode() if trusting else None)
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # the default since Python 3.13
    context.check_hostname = False
    if alpn:
        context.set_alpn_protocols(list(alpn))
    if highest is not None:
        context.maximum_version = highest
    return context


class Entrance:
    """Everybody may come in."""

    def __init__(self, made: Callable[[TlsTransport], asyncio.Protocol]) -> None:
        self._made = made
        self.there = 0

    def arrived(self, who: object, transport: asyncio.Transport) -> bool:
        self.there += 1
        return True

    def opened(self, transport: TlsTransport) -> asyncio.Protocol:
        return self._made(transport)

    def left(self, transport: TlsTransport) -> None:
        self.there -= 1


@asynccontextmanager
async def accepting(
    front: FrontTls, opened: Callable[[TlsTransport], asyncio.Protocol], handshake: float
) -> AsyncIterator[tuple[int, Deadlines]]:
    """The layer on a free port of 127.0.0.1, on the running loop."""
    deadlines = Deadlines(asyncio.get_running_loop())
    server = await asyncio.get_running_loop().create_server(
        lambda: TlsTransport(front, deadlines, handshake, Entrance(opened)), "127.0.0.1", 0
    )
    try:
        yield server.sockets[0].getsockname()[1], deadlines
    finally:
        deadlines.close()
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0.01)
