"""A bound socket to protocols: TLS, then HTTP/2 or HTTP/1 by ALPN.

aiohttp's low-level server and runner own the life cycle (accept, stop accepting, drain, close); the protocols
are ours. Under TLS a connection begins to live when its handshake is complete. A plain one is HTTP/1 at once;
when the first thing it says is HTTP/2's preface, its protocol gives the transport back (`found_http2`).

A site accepts on a copy of its socket: closing the copy is how accepting pauses, while the socket itself
stays open and clients wait in its queue (`doors`).
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from aiohttp import web

from portero_py.proxy.downstream.doors import Doors
from portero_py.proxy.downstream.http1 import Http1Downstream
from portero_py.proxy.downstream.http2 import Http2Downstream
from portero_py.proxy.downstream.tls import TlsTransport

if TYPE_CHECKING:
    import socket

    from portero_py.proxy.peer import Peer
    from portero_py.proxy.worker import Worker


class FrontServer(web.Server):
    """The protocol factory of all listeners, and the set of live connections; `most` of them."""

    def __init__(self, worker: Worker, most: int) -> None:
        super().__init__(_never_called)
        self._worker = worker
        self._most = most
        self._live: dict[Connection, float] = {}  # and when each was opened; the oldest first
        self.doors = Doors(worker.loop, most, self._live, self._count)
        self._emptied = asyncio.Event()

    def __call__(self) -> Http1Downstream:  # type: ignore[override]  # our protocol in place of aiohttp's
        return Http1Downstream(self._worker)

    def secure(self) -> TlsTransport:
        """Make the protocol for a connection of a TLS listener."""
        worker = self._worker
        if self._count() + 1 >= self._most:
            self.doors.filled()
        return TlsTransport(
            worker.front_tls, worker.handshakes, worker.timeouts.handshake, self._handshake_done
        )

    def found_http2(
        self, former: Http1Downstream, peer: Peer, transport: asyncio.Transport, start: bytes
    ) -> None:
        """A plain connection began with HTTP/2's preface; `start` is all that it said so far."""
        worker = self._worker
        made = Http2Downstream(worker, peer, transport)
        transport.set_protocol(made)
        worker.connection_succeeded(former, made)
        made.data_received(start)
        if worker.draining:
            made.start_drain()

    def opened(self, connection: Connection) -> None:
        """A connection begins to live."""
        self._live[connection] = monotonic()
        if len(self._live) >= self._most:
            self.doors.filled()

    def closed(self, connection: Connection) -> None:
        """A connection is gone, or somebody else stands for it now."""
        self._live.pop(connection, None)
        if self.doors.are_shut:
            self.doors.left()
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

    def _count(self) -> int:
        """Return how many clients there are, those included that are in the middle of a handshake."""
        return len(self._live) + len(self._worker.handshakes)

    def _handshake_done(self, transport: TlsTransport) -> asyncio.Protocol:
        worker = self._worker
        if transport.get_extra_info("ssl_object").selected_alpn_protocol() == "h2":
            http2 = Http2Downstream(worker, worker.peers.of(transport), transport)
            worker.connection_opened(http2)
            return http2
        http1 = Http1Downstream(worker)
        http1.connection_made(transport)
        return http1

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
