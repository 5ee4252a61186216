"""A bound socket to protocols: TLS, then HTTP/2 or HTTP/1 by ALPN.

Under TLS a connection begins to live when its handshake is complete. A plain one is HTTP/1 at once; when the
first thing it says is HTTP/2's preface, its protocol gives the transport back (`found_http2`). Which of them
live, and how they end, is known to `connection.Connections`.

A site accepts on a copy of its socket: closing the copy is how accepting pauses, while the socket itself
stays open and clients wait in its queue (`doors`). It accepts while nobody wants it shut: the doors of all
listeners and its own.

The loop's own server is all that is needed here: a web framework would be 10 MB of each worker's memory.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Final

from portero_py.proxy.downstream.http1 import Http1Downstream
from portero_py.proxy.downstream.http2 import Http2Downstream
from portero_py.proxy.downstream.tls import TlsTransport
from portero_py.proxy.refusals import LISTENER_CONNECTIONS

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from portero_py.proxy.deadlines import Deadlines
    from portero_py.proxy.downstream.connection import Connection
    from portero_py.proxy.downstream.doors import Asked, Doors
    from portero_py.proxy.downstream.sni import FrontTls
    from portero_py.proxy.peer import Peer
    from portero_py.proxy.surroundings import Surroundings


#: Clients that may wait in the kernel's queue of one listener; the system's limit may be lower (somaxconn).
BACKLOG: Final = 4096


class Front:
    """What all listeners have in common: `plain` and `secure` make what a new connection begins with."""

    def __init__(self, surroundings: Surroundings, tls: FrontTls, handshakes: Deadlines) -> None:
        self.surroundings = surroundings
        self._tls = tls
        self._handshakes = handshakes
        surroundings.found_http2 = self._found_http2

    def plain(self, listener: Listener) -> Http1Downstream:
        """Make the protocol for a connection of a plain listener."""
        return Http1Downstream(self.surroundings, listener)

    def secure(self, listener: Listener) -> TlsTransport:
        """Make the protocol for a connection of a TLS listener."""
        surroundings = self.surroundings
        surroundings.connections.greets()
        return TlsTransport(self._tls, self._handshakes, surroundings.timeouts.handshake, listener)

    def opened(self, transport: TlsTransport) -> asyncio.Protocol:
        """Make the protocol for a connection whose handshake is complete."""
        surroundings = self.surroundings
        made: Http1Downstream | Http2Downstream
        if transport.get_extra_info("ssl_object").selected_alpn_protocol() == "h2":
            made = Http2Downstream(surroundings, surroundings.peers.of(transport), transport)
            surroundings.connections.arrivals.passed_on(transport, made)
            surroundings.connection_opened(made)
        else:
            made = Http1Downstream(surroundings)
            surroundings.connections.arrivals.passed_on(transport, made)
            made.connection_made(transport)
        return made

    # Private

    def _found_http2(
        self, former: Connection, peer: Peer, transport: asyncio.Transport, start: bytes
    ) -> None:
        """A plain connection began with HTTP/2's preface; `start` is all that it said so far."""
        surroundings = self.surroundings
        made = Http2Downstream(surroundings, peer, transport)
        transport.set_protocol(made)
        surroundings.connection_succeeded(former, made)
        made.data_received(start)
        if surroundings.draining:
            made.start_drain()


class Listener:
    """The connections of one listening socket, and its own doors."""

    def __init__(self, front: Front, *, secure: bool) -> None:
        self._front = front
        self._open = 0
        self.secure = secure
        surroundings = front.surroundings
        self.doors = surroundings.connections.doors_of_one(
            surroundings.loop, self._count, self._shutting, self._has
        )

    def __call__(self) -> asyncio.Protocol:
        """Make the protocol for one more connection."""
        return self._front.secure(self) if self.secure else self._front.plain(self)

    # What a connection calls

    def arrived(self, who: object, transport: asyncio.Transport) -> bool:
        """A connection is there. False: it was turned away, `who` is out."""
        return self._front.surroundings.connection_arrived(who, self, transport)

    def opened(self, transport: TlsTransport) -> asyncio.Protocol:
        """Its handshake is complete."""
        return self._front.opened(transport)

    def left(self, transport: TlsTransport) -> None:
        """It is gone, and its handshake was never complete."""
        self._front.surroundings.connection_left(transport)

    # What the list of arrivals calls

    def came(self) -> None:
        """There is one connection more."""
        self._open += 1
        if self._front.surroundings.limits.connections_per_listener and self._count() >= self.doors.most:
            self.doors.filled()

    def went(self) -> None:
        """There is one less."""
        self._open -= 1
        if self.doors.are_shut:
            self.doors.left()

    # Private

    def _count(self) -> int:
        """How many there are. The doors look at it while they are shut: the limit may be another one then."""
        surroundings = self._front.surroundings
        limit = surroundings.limits.connections_per_listener
        self.doors.most = -(-limit // surroundings.workers) if limit else sys.maxsize
        return self._open

    def _shutting(self) -> None:
        surroundings = self._front.surroundings
        surroundings.refusals.count(LISTENER_CONNECTIONS, f"{self.doors.most} in this process")

    def _has(self, connection: Asked) -> bool:
        return self._front.surroundings.connections.arrivals.place_of(connection) is self


class ListenerSite:
    """One listening socket, and who is made for each client that comes there. It closes the socket.

    `doors` are its own, which may shut beside those of all listeners.
    """

    def __init__(
        self, sock: socket.socket, accepted: Callable[[], asyncio.Protocol], doors: Doors | None = None
    ) -> None:
        self._socket = sock
        self._accepted = accepted
        self._doors = doors
        if doors is not None:
            doors.sites.append(_OwnDoors(self))
        self._server: asyncio.Server | None = None  # while it accepts
        self._is_stopped = False
        self._shut_by: set[object] = set()

    def pause(self) -> None:
        """Accept nobody for now: they wait."""
        self.pause_for(self)

    async def resume(self) -> None:
        """Accept again. Raises OSError."""
        await self.resume_for(self)

    def pause_for(self, whom: object) -> None:
        """Accept nobody as long as somebody wants that."""
        self._shut_by.add(whom)
        server, self._server = self._server, None
        if server is not None:
            server.close()

    async def resume_for(self, whom: object) -> None:
        """`whom` does not want it any more. Raises OSError; then it is to be called again."""
        self._shut_by.discard(whom)
        if self._shut_by or self._server is not None or self._is_stopped:
            return
        copy = self._socket.dup()
        try:
            self._server = await asyncio.get_running_loop().create_server(
                self._accepted, sock=copy, backlog=BACKLOG
            )
        except BaseException:  # raised on: nobody else closes the copy
            copy.close()
            raise
        if self._shut_by:  # in the meantime
            self.pause_for(self)
            self._shut_by.discard(self)

    async def stop(self) -> None:
        """Accept nobody any more: the socket is closed too."""
        self._is_stopped = True
        if self._doors is not None:
            await self._doors.close()
        self.pause()
        self._socket.close()


class _OwnDoors:
    """A site, as its own doors see it."""

    def __init__(self, site: ListenerSite) -> None:
        self._site = site

    def pause(self) -> None:
        self._site.pause_for(self)

    async def resume(self) -> None:
        await self._site.resume_for(self)

    async def stop(self) -> None:
        """The site stops by itself."""
