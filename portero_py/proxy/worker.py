"""The life cycle of one data-plane process, or of the only one: start, take tables, reconfigure, drain.

It composes the data plane (`surroundings`, what listens, what connects) and owns its sockets; a new routing
table or certificate table is swapped in by an assignment. It never waits for the control plane: if that
stalls, the worker goes on serving the last table. Nobody in this room knows it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from aiohttp import web

from portero_py.proxy.deadlines import Deadlines
from portero_py.proxy.downstream.connection import Connections
from portero_py.proxy.downstream.listener import FrontServer, ListenerSite
from portero_py.proxy.downstream.sni import FrontTls
from portero_py.proxy.surroundings import Surroundings
from portero_py.proxy.upstream.connector import HttpConnector
from portero_py.proxy.upstream.tls import UpstreamTls

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Sequence

    from portero_py.config.model import Config
    from portero_py.core.certificates import CertificateTable
    from portero_py.core.challenges import Challenges
    from portero_py.core.counters import Counters
    from portero_py.core.limits import SharedCounts
    from portero_py.core.routing_table import RoutingTable


class Worker:
    """The data plane on one event loop, for `most` clients at a time. `log_descriptor` takes the access log.

    When there are several workers, `front_tls` was made before they were forked, `start` is another number
    in each, `log_lock` is a file that all of them have (see `access_log`), and `shared` tells what the others
    have of each client.
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
        shared: SharedCounts | None = None,
    ) -> None:
        # process
        self._front_tls = front_tls or FrontTls(config.tls)
        upstream_tls = UpstreamTls(config.proxy)
        self._loop = loop
        self._deadlines = Deadlines(loop)
        self._handshakes = Deadlines(loop)  # of clients; apart, so that they can be counted
        self._connections = Connections(loop, most, self._handshakes.__len__, shared)
        self._surroundings = surroundings = Surroundings(
            config,
            loop,
            self._deadlines,
            self._connections,
            start=start,
            log_descriptor=log_descriptor,
            log_lock=log_lock,
        )
        self._front_tls.counters = surroundings.counters
        surroundings.pools.connector = HttpConnector(surroundings, upstream_tls)
        self._connections.descriptors = lambda: len(self._deadlines) + len(self._handshakes)
        self._connections.make_room = surroundings.pools.close_idle
        self._server = FrontServer(surroundings, self._front_tls, self._handshakes)
        self._runner = web.ServerRunner(self._server, handle_signals=False)
        self._pruning: asyncio.Handle | None = None

    @property
    def counters(self) -> Counters:
        """Everything that was counted here."""
        return self._surroundings.counters

    def reconfigure(self, config: Config) -> None:
        """Take over times, limits and the log's style; connections that live already see them at once."""
        self._surroundings.configure(config)

    # The feed

    def apply(self, table: RoutingTable) -> None:
        """Route by `table` from now on."""
        surroundings = self._surroundings
        surroundings.table = table
        surroundings.pools.follow(table)
        surroundings.balancers.retain(table)
        if self._pruning is None:
            self._prune_later()

    def apply_certificates(self, certificates: CertificateTable) -> None:
        """Present these certificates in new handshakes."""
        self._surroundings.certificates = certificates
        self._front_tls.apply(certificates)

    def apply_challenges(self, challenges: Challenges) -> None:
        """Answer these tls-alpn-01 challenges in new handshakes."""
        self._front_tls.apply_challenges(challenges)

    # The life cycle

    async def start(self, sockets: Sequence[socket.socket], *, tls: bool) -> None:
        """Accept on bound sockets."""
        if self._runner.server is None:
            await self._runner.setup()
        for sock in sockets:
            site = ListenerSite(self._runner, sock, tls=tls)
            await site.start()
            self._connections.doors.sites.append(site)

    async def stop_accepting(self) -> None:
        """Close the listening sockets; connections go on."""
        await self._connections.doors.close()

    async def drain(self, timeout: float) -> None:
        """Let exchanges finish, `timeout` seconds at most, then end everything."""
        surroundings = self._surroundings
        surroundings.draining = True
        await self.stop_accepting()
        self._server.pre_shutdown()
        await self._server.shutdown(timeout)
        await self._runner.cleanup()
        if self._pruning is not None:
            self._pruning.cancel()
        await surroundings.pools.close()
        self._deadlines.close()
        self._handshakes.close()
        surroundings.ended()

    # Private

    def _prune(self) -> None:
        """A little at a time: the connections have their turns in between."""
        surroundings = self._surroundings
        if not surroundings.pools.prune():
            self._pruning = self._loop.call_soon(self._prune)
            return
        surroundings.counters.keep_only(surroundings.table.services)
        surroundings.health.retain(surroundings.table)
        self._pruning = None
        if surroundings.pools.are_behind:
            self._prune_later()

    def _prune_later(self) -> None:
        # Not at once: with thousands of renewals a second this would be most of the work.
        self._pruning = self._loop.call_later(0.5, self._prune)
