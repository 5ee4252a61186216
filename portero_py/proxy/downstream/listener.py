"""A bound socket to protocols: TLS, then HTTP/2 or HTTP/1 by ALPN.

Under TLS a connection begins to live when its handshake is complete. A plain one is HTTP/1 at once; when the
first thing it says is HTTP/2's preface, its protocol gives the transport back (`found_http2`). Which of them
live, and how they end, is known to `connection.Connections`.

A site accepts on a copy of its socket: closing the copy is how accepting pauses, while the socket itself
stays open and clients wait in its queue (`doors`).

The loop's own server is all that is needed here: a web framework would be 10 MB of each worker's memory.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from portero_py.proxy.downstream.http1 import Http1Downstream
from portero_py.proxy.downstream.http2 import Http2Downstream
from portero_py.proxy.downstream.tls import TlsTransport

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from portero_py.proxy.deadlines import Deadlines
    from portero_py.proxy.downstream.connection import Connection
    from portero_py.proxy.downstream.sni import FrontTls
    from portero_py.proxy.peer import Peer
    from portero_py.proxy.surroundings import Surroundings


#: Clients that may wait in the kernel's queue of one listener; the system's limit may be lower (somaxconn).
BACKLOG: Final = 4096


class Front:
    """The protocol factory of all listeners: `plain` and `secure` make what a new connection begins with."""

    def __init__(self, surroundings: Surroundings, tls: FrontTls, handshakes: Deadlines) -> None:
        self._surroundings = surroundings
        self._tls = tls
        self._handshakes = handshakes
        surroundings.found_http2 = self._found_http2

    def plain(self) -> Http1Downstream:
        """Make the protocol for a connection of a listener without TLS."""
        return Http1Downstream(self._surroundings)

    def secure(self) -> TlsTransport:
        """Make the protocol for a connection of a TLS listener."""
        surroundings = self._surroundings
        surroundings.connections.greets()
        return TlsTransport(
            self._tls, self._handshakes, surroundings.timeouts.handshake, self._handshake_done
        )

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


class ListenerSite:
    """One listening socket, and who is made for each client that comes there. It closes the socket."""

    def __init__(self, sock: socket.socket, accepted: Callable[[], asyncio.Protocol]) -> None:
        self._socket = sock
        self._accepted = accepted
        self._server: asyncio.Server | None = None  # while it accepts
        self._is_stopped = False

    def pause(self) -> None:
        """Accept nobody for now: they wait."""
        server, self._server = self._server, None
        if server is not None:
            server.close()

    async def resume(self) -> None:
        """Accept, for the first time or again. Raises OSError."""
        if self._server is not None or self._is_stopped:
            return
        copy = self._socket.dup()
        try:
            self._server = await asyncio.get_running_loop().create_server(
                self._accepted, sock=copy, backlog=BACKLOG
            )
        except BaseException:
            copy.close()
            raise

    async def stop(self) -> None:
        """Accept nobody any more: the socket is closed too."""
        self._is_stopped = True
        self.pause()
        self._socket.close()
