"""A bound socket to protocols: TLS, then HTTP/2 or HTTP/1 by ALPN.

aiohttp's low-level server and runner own the life cycle (accept, stop accepting, drain, close); the protocols are
ours. Every connection starts as `_Arriving`, which hands its transport over as soon as it knows what the client speaks:
at once under TLS, with the first bytes on a plain listener (an HTTP/2 client may start with its preface there).
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, cast

from aiohttp import web

from portero_py.proxy.client import Client
from portero_py.proxy.downstream_http1 import Http1Downstream
from portero_py.proxy.downstream_http2 import Http2Downstream

if TYPE_CHECKING:
    import socket

    from portero_py.proxy.worker import Worker

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class FrontServer(web.Server):
    """The protocol factory of all listeners, and the set of live connections."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(_never_called)
        self._worker = worker
        self.live: set[Arriving] = set()

    def __call__(self) -> Arriving:  # type: ignore[override]  # our protocol in place of aiohttp's
        return Arriving(self._worker, self)

    def pre_shutdown(self) -> None:
        """Ask every connection to finish: GOAWAY, or Connection: close."""
        for connection in list(self.live):
            connection.start_drain()

    async def shutdown(self, timeout: float | None = None) -> None:
        """Wait until the connections are gone, `timeout` seconds at most, then end the rest."""
        deadline = asyncio.get_running_loop().time() + (timeout or 0.0)
        while self.live and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        for connection in list(self.live):
            connection.kill()
        while self.live:
            await asyncio.sleep(0.01)


class ListenerSite(web.BaseSite):
    """One listening socket; what aiohttp's SockSite is, with the handshake's time-out."""

    def __init__(
        self, runner: web.ServerRunner, sock: socket.socket, context: ssl.SSLContext | None, handshake: float
    ) -> None:
        super().__init__(runner, ssl_context=context, backlog=4096)
        self._socket = sock
        self._handshake = handshake

    @property
    def name(self) -> str:
        """What the listener is bound to."""
        return str(self._socket.getsockname())

    async def start(self) -> None:
        """Begin to accept."""
        await super().start()
        server = self._runner.server
        assert server is not None
        self._server = await asyncio.get_running_loop().create_server(
            server,  # type: ignore[arg-type]  # FrontServer makes our protocol
            sock=self._socket,
            ssl=self._ssl_context,
            backlog=self._backlog,
            ssl_handshake_timeout=self._handshake if self._ssl_context else None,
            ssl_shutdown_timeout=2.0 if self._ssl_context else None,
        )


class Arriving(asyncio.Protocol):
    """A connection whose HTTP version is not known yet; afterwards the owner of the protocol that is."""

    __slots__ = ("_protocol", "_server", "_start", "_transport", "_worker", "deadline")

    def __init__(self, worker: Worker, server: FrontServer) -> None:
        self._worker = worker
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._protocol: Http1Downstream | Http2Downstream | None = None
        self._start = b""
        self.deadline = 0.0

    def start_drain(self) -> None:
        """Finish what was begun, take nothing new."""
        if self._protocol is not None:
            self._protocol.start_drain()
        else:
            self.kill()

    def kill(self) -> None:
        """End at once."""
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        self._server.live.add(self)
        worker = self._worker
        worker.counters.connections_total += 1
        worker.counters.connections_open += 1
        tls = transport.get_extra_info("ssl_object")
        if tls is None:
            self.deadline = worker.loop.time() + worker.timeouts.head
            worker.deadlines.watch(self)
            return
        self._become(Http2Downstream if tls.selected_alpn_protocol() == "h2" else Http1Downstream)

    def data_received(self, data: bytes) -> None:
        protocol = self._protocol
        if protocol is None:
            self._start += data
            start = self._start
            if len(start) < len(_PREFACE) and _PREFACE.startswith(start):
                return
            self._worker.deadlines.forget(self)
            protocol = self._become(Http2Downstream if start.startswith(_PREFACE) else Http1Downstream)
            self._start = b""
            data = start
        protocol.data_received(data)

    def eof_received(self) -> bool | None:
        return self._protocol.eof_received() if self._protocol is not None else False

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.live.discard(self)
        self._worker.counters.connections_open -= 1
        self._worker.deadlines.forget(self)
        if self._protocol is not None:
            self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        if self._protocol is not None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        if self._protocol is not None:
            self._protocol.resume_writing()

    # The deadline wheel

    def on_deadline(self, now: float) -> None:
        """Not one byte came."""
        self.kill()

    # Private

    def _become(
        self, protocol: type[Http1Downstream] | type[Http2Downstream]
    ) -> Http1Downstream | Http2Downstream:
        transport = self._transport
        assert transport is not None
        client = Client(transport, self._worker.config.proxy.trusted_proxies)
        self._protocol = made = protocol(self._worker, client, transport)
        if self._worker.draining:
            made.start_drain()
        return made


async def _never_called(request: web.BaseRequest) -> web.StreamResponse:
    raise NotImplementedError
