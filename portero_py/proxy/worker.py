"""One data-plane process, or the only one: routing tables in, traffic through, counters out.

It owns what the connections share (parsers, pools, deadlines, log) and holds the one reference to the current
routing table; a new table or certificate table is swapped in by an assignment. It never waits for the control
plane: if that stalls, the worker goes on serving the last table.
"""

from __future__ import annotations

import secrets
import sys
from time import monotonic
from typing import TYPE_CHECKING

from aiohttp import web

from portero_py.core.balancing.balancers import Balancers
from portero_py.core.certificates import Certificate, CertificateTable
from portero_py.core.counters import Counters
from portero_py.core.health import Health
from portero_py.core.names import normalise_host
from portero_py.core.router import Router
from portero_py.core.routing_table import RoutingTable
from portero_py.proxy.access_log import AccessLog
from portero_py.proxy.deadlines import Deadlines
from portero_py.proxy.downstream.listener import FrontServer, ListenerSite
from portero_py.proxy.downstream.sni import FrontTls
from portero_py.proxy.peer import Clients
from portero_py.proxy.upstream.pool import Pools
from portero_py.proxy.upstream.tls import UpstreamTls
from portero_py.wire.http1 import RequestParser, ResponseParser

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Sequence

    from portero_py.config.model import Config
    from portero_py.core.challenges import Challenges
    from portero_py.errors import PorteroError
    from portero_py.proxy.downstream.http1 import Http1Downstream
    from portero_py.proxy.downstream.http2 import Http2Downstream
    from portero_py.proxy.downstream.leaving import Leaving
    from portero_py.proxy.exchange import Exchange
    from portero_py.proxy.peer import Client


class Worker:
    """The data plane on one event loop, for `most` clients at a time. `log_descriptor` takes the access log.

    When there are several workers, `front_tls` was made before they were forked, `start` is another number
    in each, and `log_lock` is a file that all of them have (see `access_log`).
    """

    def __init__(
        self,
        config: Config,
        loop: asyncio.AbstractEventLoop,
        *,
        front_tls: FrontTls | None = None,
        log_descriptor: int = 1,
        log_lock: int = -1,
        start: int = 0,
        most: int = sys.maxsize,
    ) -> None:
        # process
        self.loop = loop
        self.counters = Counters()
        self.draining = False
        self.router = Router()
        self.table = RoutingTable()
        self.deadlines = Deadlines(loop)
        self.handshakes = Deadlines(loop)  # of clients; apart, so that they can be counted
        self.front_tls = front_tls or FrontTls(config.tls)
        self.front_tls.counters = self.counters
        self.upstream_tls = UpstreamTls(config.proxy)
        self.pools = Pools(self, self.table)
        self.health = Health()
        self.balancers = Balancers(self.pools, self.health, start)
        self._certificates = CertificateTable()
        self._log_descriptor = log_descriptor
        self._log_lock = log_lock
        self._request_prefix = secrets.token_hex(8).encode()
        self._request_number = 0
        self._server = FrontServer(self, most)
        self._runner = web.ServerRunner(self._server, handle_signals=False)
        self._pruning: asyncio.Handle | None = None
        self.access_log = self._open_log(config)
        self.reconfigure(config)

    def reconfigure(self, config: Config) -> None:
        """Take over times, limits and the log's style; connections that live already see them at once."""
        self.config = config
        self.timeouts = config.timeouts
        self.limits = config.limits
        self.clients = Clients(config.proxy.trusted_proxies)
        self.request_parser = RequestParser(config.limits.request_line, config.limits.header_fields)
        self.response_parser = ResponseParser(config.limits.header_fields)
        if config.log.access != self.access_log.style:
            self.access_log.close()
            self.access_log = self._open_log(config)

    # The feed

    def apply(self, table: RoutingTable) -> None:
        """Route by `table` from now on."""
        self.table = table
        self.pools.follow(table)
        self.balancers.retain(table)
        if self._pruning is None:
            self._prune_later()

    def apply_certificates(self, certificates: CertificateTable) -> None:
        """Present these certificates in new handshakes."""
        self._certificates = certificates
        self.front_tls.apply(certificates)

    def apply_challenges(self, challenges: Challenges) -> None:
        """Answer these tls-alpn-01 challenges in new handshakes."""
        self.front_tls.apply_challenges(challenges)

    # The life cycle

    async def start(self, sockets: Sequence[socket.socket], *, tls: bool) -> None:
        """Accept on bound sockets."""
        if self._runner.server is None:
            await self._runner.setup()
        for sock in sockets:
            site = ListenerSite(self._runner, sock, tls=tls)
            await site.start()
            self._server.doors.sites.append(site)

    async def stop_accepting(self) -> None:
        """Close the listening sockets; connections go on."""
        await self._server.doors.close()

    async def drain(self, timeout: float) -> None:
        """Let exchanges finish, `timeout` seconds at most, then end everything."""
        self.draining = True
        await self.stop_accepting()
        self._server.pre_shutdown()
        await self._server.shutdown(timeout)
        await self._runner.cleanup()
        if self._pruning is not None:
            self._pruning.cancel()
        await self.pools.close()
        self.deadlines.close()
        self.handshakes.close()
        self.access_log.close()

    # What connections and exchanges ask

    def next_request_id(self) -> bytes:
        """Return an identifier that no other request has: 64 random bits a process, and a number."""
        self._request_number += 1
        return b"%b-%08x" % (self._request_prefix, self._request_number)

    def misdirected(self, presented: Certificate, authority: bytes) -> bool:
        """Say whether another certificate than `presented` is the one for `authority`."""
        host = normalise_host(authority)
        return host is not None and self._certificates.misdirected(presented, host)

    def connection_opened(self, connection: Http1Downstream | Http2Downstream) -> None:
        """A client's connection begins to live."""
        counters = self.counters
        counters.connections_total += 1
        counters.connections_open += 1
        self.deadlines.watch(connection)
        self._server.opened(connection)
        if self.draining:
            self.loop.call_soon(connection.start_drain)  # what came with the handshake is still served

    def found_http2(
        self, former: Http1Downstream, client: Client, transport: asyncio.Transport, start: bytes
    ) -> None:
        """What looked like HTTP/1 is HTTP/2; `start` is all that the client said so far."""
        self._server.found_http2(former, client, transport, start)

    def connection_succeeded(
        self, former: Http1Downstream | Http2Downstream, successor: Leaving | Http2Downstream
    ) -> None:
        """A client's connection goes on under another protocol."""
        self._server.opened(successor)
        self._server.closed(former)
        self.deadlines.forget(former)
        self.deadlines.watch(successor)

    def connection_closed(self, connection: Http1Downstream | Http2Downstream | Leaving) -> None:
        """A client's connection is gone."""
        self.deadlines.forget(connection)
        self.counters.connections_open -= 1
        self._server.closed(connection)

    def exchange_done(self, exchange: Exchange) -> None:
        """Count and log an exchange that has ended."""
        counters = self.counters
        counters.exchanges_in_flight -= 1
        counters.bytes_in += exchange.bytes_in
        counters.bytes_out += exchange.bytes_out
        seconds = monotonic() - exchange.started
        counters.exchange_done(exchange.service, exchange.head.method, exchange.status, seconds)
        if exchange.error is not None:
            counters.errors[exchange.error.reason] += 1
        if self.access_log.enabled:
            self.access_log.exchange(exchange)

    def request_refused(
        self, client: Client, error: PorteroError, request_id: bytes, version: bytes = b"1.1"
    ) -> None:
        """Count and log bytes that did not become a request."""
        self.counters.errors[error.reason] += 1
        if self.access_log.enabled:
            self.access_log.refused(client, error, request_id, version)

    # Private

    def _open_log(self, config: Config) -> AccessLog:
        style = config.log.access
        return AccessLog(self.loop, self.counters, style, self._log_descriptor, self._log_lock)

    def _prune(self) -> None:
        """A little at a time: the connections have their turns in between."""
        if not self.pools.prune():
            self._pruning = self.loop.call_soon(self._prune)
            return
        self.counters.keep_only(self.table.services)
        self.health.retain(self.table)
        self._pruning = None
        if self.pools.are_behind:
            self._prune_later()

    def _prune_later(self) -> None:
        # Not at once: with thousands of renewals a second this would be most of the work.
        self._pruning = self.loop.call_later(0.5, self._prune)
