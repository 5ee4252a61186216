"""A bound socket to protocols: TLS, then HTTP/2 or HTTP/1 by ALPN.

aiohttp's low-level server and runner own the life cycle (accept, stop accepting, drain, close); the protocols
are ours. Every connection starts as `Arriving`, which hands its transport over as soon as it knows what the
client speaks: at once under TLS, with the first bytes on a plain listener (an HTTP/2 client may start with
its preface there).
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Final, Protocol, cast

from aiohttp import web

from portero_py.proxy.client import Client
from portero_py.proxy.downstream_http1 import Http1Downstream
from portero_py.proxy.downstream_http2 import Http2Downstream

if TYPE_CHECKING:
    import socket

    from portero_py.proxy.worker import Worker

#: Limit on what TLS needs to close, unsent bytes included. The protocols' own deadlines are shorter and look
#: for progress; this must not cut off the end of a response to a slow client.
SHUTDOWN_SECONDS: Final = 60.0

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class FrontServer(web.Server):
    """The protocol factory of all listeners, and the set of live connections."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(_never_called)
        self._worker = worker
        self._live: set[Connection] = set()
        self._emptied = asyncio.Event()

    def __call__(self) -> Arriving:  # type: ignore[override]  # our protocol in place of aiohttp's
        return Arriving(self._worker, self)

    def opened(self, connection: Connection) -> None:
        """A connection begins to live."""
        self._live.add(connection)

    def closed(self, connection: Connection) -> None:
        """A connection is gone, or somebody else stands for it now."""
        self._live.discard(connection)
        if not self._live:
            self._emptied.set()

    def pre_shutdown(self) -> None:
        """Ask every connection to finish: GOAWAY, or Connection: close."""
        for connection in list(self._live):
            connection.start_drain()

    async def shutdown(self, timeout: float | None = None) -> None:
        """Wait until the connections are gone, `timeout` seconds at most, then end the rest."""
        await self._wait_until_empty(timeout or 0.0)
        for connection in list(self._live):
            connection.kill()
        await self._wait_until_empty(1.0)

    # Private

    async def _wait_until_empty(self, seconds: float) -> None:
        if self._live:
            self._emptied.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._emptied.wait()
            except TimeoutError:
                pass


class Connection(Protocol):
    """A client's connection, as its life cycle sees it."""

    def start_drain(self) -> None:
        """Finish what was begun, take nothing new."""

    def kill(self) -> None:
        """End at once."""


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
            server,
            sock=self._socket,
            ssl=self._ssl_context,
            backlog=self._backlog,
            ssl_handshake_timeout=self._handshake if self._ssl_context else None,
            ssl_shutdown_timeout=SHUTDOWN_SECONDS if self._ssl_context else None,
        )


class Arriving(asyncio.Protocol):
    """A connection whose HTTP version is not known yet. It hands the transport over when it is."""

    __slots__ = ("_server", "_start", "_transport", "_worker", "deadline")

    def __init__(self, worker: Worker, server: FrontServer) -> None:
        self._worker = worker
        self._server = server
        self._transport: asyncio.Transport = cast("asyncio.Transport", None)
        self._start = b""
        self.deadline = 0.0

    def start_drain(self) -> None:
        """Nothing was begun."""
        self.kill()

    def kill(self) -> None:
        """End at once."""
        self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        worker = self._worker
        worker.counters.connections_total += 1
        worker.counters.connections_open += 1
        tls = transport.get_extra_info("ssl_object")
        if tls is not None:
            if getattr(
                tls, "is_challenge", False
            ):  # a CA has seen what it came for (RFC 8737, 3: no application data follows)
                self._server.opened(self)
                transport.close()
                return
            self._become(Http2Downstream if tls.selected_alpn_protocol() == "h2" else Http1Downstream)
            return
        self._server.opened(self)
        self.deadline = worker.loop.time() + worker.timeouts.head
        worker.deadlines.watch(self)

    def data_received(self, data: bytes) -> None:
        start = self._start + data
        if len(start) < len(_PREFACE) and _PREFACE.startswith(start):
            self._start = start
            return
        self._worker.deadlines.forget(self)
        self._server.closed(self)
        self._become(Http2Downstream if start.startswith(_PREFACE) else Http1Downstream).data_received(start)

    def connection_lost(self, exc: Exception | None) -> None:
        self._worker.deadlines.forget(self)
        self._server.closed(self)
        self._worker.counters.connections_open -= 1

    # The deadline wheel

    def on_deadline(self, now: float) -> None:
        """Not one byte came."""
        self.kill()

    # Private

    def _become(
        self, protocol: type[Http1Downstream] | type[Http2Downstream]
    ) -> Http1Downstream | Http2Downstream:
        """Hand the transport over. From now on it calls the new protocol, not this object."""
        worker = self._worker
        client = Client(self._transport, worker.config.proxy.trusted_proxies)
        made = protocol(worker, client, self._transport)
        self._transport.set_protocol(made)
        self._server.opened(made)
        if worker.draining:
            made.start_drain()
        return made


async def _never_called(request: web.BaseRequest) -> web.StreamResponse:
    raise NotImplementedError
