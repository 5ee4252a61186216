"""A bound socket to protocols: TLS, then HTTP/2 or HTTP/1 by ALPN.

aiohttp's low-level server and runner own the life cycle (accept, stop accepting, drain, close); the protocols
are ours. Under TLS a connection begins to live when its handshake is complete. A plain one is HTTP/1 at once;
when the first thing it says is HTTP/2's preface, its protocol gives the transport back (`found_http2`).

A site accepts on a copy of its socket: closing the copy is how accepting pauses, while the socket itself
stays open and clients wait in its queue (`doors`).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp import web

from portero_py.proxy.downstream.http1 import Http1Downstream
from portero_py.proxy.downstream.http2 import Http2Downstream
from portero_py.proxy.downstream.tls import TlsTransport

if TYPE_CHECKING:
    import socket

    from portero_py.proxy.deadlines import Deadlines
    from portero_py.proxy.downstream.connection import Connection
    from portero_py.proxy.downstream.sni import FrontTls
    from portero_py.proxy.peer import Peer
    from portero_py.proxy.surroundings import Surroundings


class FrontServer(web.Server):
    """The protocol factory of all listeners."""

    def __init__(self, surroundings: Surroundings, tls: FrontTls, handshakes: Deadlines) -> None:
        super().__init__(_never_called)
        self._surroundings = surroundings
        self._tls = tls
        self._handshakes = handshakes
        surroundings.found_http2 = self._found_http2

    def __call__(self) -> Http1Downstream:  # type: ignore[override]  # our protocol in place of aiohttp's
        return Http1Downstream(self._surroundings)

    def secure(self) -> TlsTransport:
        """Make the protocol for a connection of a TLS listener."""
        surroundings = self._surroundings
        surroundings.connections.greets()
        return TlsTransport(
            self._tls, self._handshakes, surroundings.timeouts.handshake, self._handshake_done
        )

    def pre_shutdown(self) -> None:
        """Ask every connection to finish."""
        self._surroundings.connections.start_drain()

    async def shutdown(self, timeout: float | None = None) -> None:
        """End what is left: `Worker.drain` has waited before."""
        await self._surroundings.connections.end()

    # Private

    def _handshake_done(self, transport: TlsTransport) -> asyncio.Protocol:
        surroundings = self._surroundings
        if transport.get_extra_info("ssl_object").selected_alpn_protocol() == "h2":
            http2 = Http2Downstream(surroundings, surroundings.peers.of(transport), transport)
            surroundings.connection_opened(http2)
            return http2
        http1 = Http1Downstream(surroundings)
        http1.connection_made(transport)
        return http1

    def _found_http2(
        self, former: Connection, peer: Peer, transport: asyncio.Transport, start: bytes
    ) -> None:
        """A plain connection began with HTTP/2's preface; `start` is all that it said so far."""
        surroundings = self._surroundings
        made = Http2Downstream(surroundings, peer, transport)
        transport.set_protocol(made)
        surroundings.connection_succeeded(former, made)
        made.data_received(start)
        if surroundings.draining:
            made.start_drain()


class ListenerSite(web.BaseSite):
    """One listening socket; what aiohttp's SockSite is, with our own TLS."""

    def __init__(self, runner: web.ServerRunner, sock: socket.socket, *, tls: bool) -> None:
        super().__init__(runner, backlog=4096)
        self._socket = sock
        self._tls = tls
        self._is_stopped = False

    @property
    def name(self) -> str:
        """What the listener is bound to."""
        return str(self._socket.getsockname())

    async def start(self) -> None:
        """Begin to accept."""
        await super().start()
        await self.resume()

    def pause(self) -> None:
        """Accept nobody for now: they wait."""
        server, self._server = self._server, None
        if server is not None:
            server.close()

    async def resume(self) -> None:
        """Accept again. Raises OSError."""
        if self._server is not None or self._is_stopped:
            return
        front = self._runner.server
        assert isinstance(front, FrontServer)
        copy = self._socket.dup()
        try:
            self._server = await asyncio.get_running_loop().create_server(
                front.secure if self._tls else front, sock=copy, backlog=self._backlog
            )
        except BaseException:
            copy.close()
            raise

    async def stop(self) -> None:
        """Accept nobody any more: the socket is closed too."""
        self._is_stopped = True
        await super().stop()
        self._socket.close()


async def _never_called(request: web.BaseRequest) -> web.StreamResponse:
    raise NotImplementedError
