"""What connections and exchanges ask of the process that they are in.

One for all that lives on one event loop. The worker makes it, changes it (a new routing table, another
configuration) and ends it; whoever serves a request only reads it, and tells it what happened. So nobody on
the way of a request knows the worker, or who stands before him on that way.

What `apply` and `configure` change is taken up at once: it is to be asked for each time, not to be kept.
"""

from __future__ import annotations

import secrets
from time import monotonic
from typing import TYPE_CHECKING

from portero_py.core.balancing.balancers import Balancers
from portero_py.core.certificates import Certificate, CertificateTable
from portero_py.core.counters import Counters
from portero_py.core.health import Health
from portero_py.core.names import normalise_host
from portero_py.core.router import Router
from portero_py.core.routing_table import RoutingTable
from portero_py.proxy.access_log import AccessLog
from portero_py.proxy.budget import HEAVY, Budget
from portero_py.proxy.downstream.connection import NOBODY
from portero_py.proxy.outcomes import Outcomes
from portero_py.proxy.patience import AllPatience
from portero_py.proxy.peer import Peers
from portero_py.proxy.queues import Queues
from portero_py.proxy.refusals import Refusals
from portero_py.proxy.rules import AllRules
from portero_py.proxy.upstream.pool import Pools
from portero_py.wire.http1 import RequestParser, ResponseParser

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from portero_py.config.model import Config
    from portero_py.core.rate_limit import Buckets
    from portero_py.errors import PorteroError
    from portero_py.proxy.deadlines import DeadlineWheel
    from portero_py.proxy.downstream.arrivals import Place
    from portero_py.proxy.downstream.connection import Connection, Connections
    from portero_py.proxy.endpoints import Record
    from portero_py.proxy.peer import Peer
    from portero_py.proxy.upstream.rooms import Rooms


class Surroundings:
    """The surroundings of everything on `loop`, before any routing table has come.

    `start` shifts the balancers' first turns: it is another number in each worker. The access log goes to
    `log_descriptor`, in turns with the others who lock `log_lock` (see `access_log`). `rooms` is where
    workers keep the limits of backends together, and `buckets` where they keep the rate limits.
    """

    def __init__(
        self,
        config: Config,
        loop: asyncio.AbstractEventLoop,
        deadlines: DeadlineWheel,
        connections: Connections,
        *,
        start: int = 0,
        log_descriptor: int = 1,
        log_lock: int = -1,
        rooms: Rooms | None = None,
        buckets: Buckets | None = None,
    ) -> None:
        # process
        self.loop = loop
        self.deadlines = deadlines
        self.connections = connections
        self.counters = Counters()
        self.refusals = Refusals(loop, self.counters)
        self.budget = Budget(loop, self.counters, self.refusals)
        self.draining = False
        self.router = Router()
        self.health = Health()
        #: Those of `health`: most often they are empty, which is to be seen at a glance.
        self.marks = self.health.marks
        self.ejected = self.health.ejected
        self.outcomes = Outcomes(self.health, self.counters, monotonic())
        self._log_descriptor = log_descriptor
        self._log_lock = log_lock
        self._request_prefix = secrets.token_hex(8).encode()
        self._request_number = 0
        #: Goes on with a connection that turned out to speak HTTP/2: (the former protocol of the transport,
        #: who is there, the transport, all that was said so far). The listener knows how.
        self.found_http2: Callable[[Connection, Peer, asyncio.Transport, bytes], None]
        # routing table
        self.table = RoutingTable()
        self.certificates = CertificateTable()
        self.patience = AllPatience(config)
        self.pools = Pools(loop, self.table, self.patience, rooms)
        self.balancers = Balancers(self.pools, self.health, start)
        self.queues = Queues(loop, self.counters, config.limits, rooms)
        self.rules = AllRules(self.pools, self.counters, self.patience, self.refusals, buckets, config)
        # configuration
        self.access_log = self._open_log(config)
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Take over times, limits and the log's style; connections that live already see them at once."""
        self.timeouts = config.timeouts
        self.limits = config.limits
        self.patience.configure(config)
        self.health.configure(config.health.fall, config.health.timeout, config.health.statuses)
        self.outcomes.configure(config.health.interval, config.health.timeout)
        self.queues.limits = config.limits
        self.rules.configure(config)
        self.workers = config.workers
        self.budget.most = config.limits.buffered_bytes
        self.connections.configure(config.limits, config.workers, self.refusals)
        self.peers = Peers(config.proxy.trusted_proxies)
        self.request_parser = RequestParser(config.limits.request_line, config.limits.header_fields)
        self.response_parser = ResponseParser(config.limits.header_fields)
        if config.log.access != self.access_log.style:
            self.access_log.close()
            self.access_log = self._open_log(config)

    def ended(self) -> None:
        """Everything has ended."""
        self.access_log.close()
        self.refusals.close()
        self.rules.close()
        self.budget.close()
        self.connections.arrivals.close()

    # Connections

    def connection_arrived(self, who: object, place: Place, transport: asyncio.Transport) -> bool:
        """A connection is there; `who` has its transport, unless the answer is False: then it is closed."""
        arrivals = self.connections.arrivals
        client = self.peers.client_of(transport) if arrivals.by_client else ""
        reason = arrivals.arrive(who, place, client, self.loop.time())
        if not reason:
            transport.set_write_buffer_limits(HEAVY)
            return True
        self.refusals.count(reason, client)
        transport.set_protocol(NOBODY)
        transport.abort()
        return False

    def connection_left(self, who: object) -> None:
        """A connection that arrived is gone, and was never opened."""
        self.connections.arrivals.leave(who)

    def connection_opened(self, connection: Connection) -> None:
        """A client's connection begins to live."""
        counters = self.counters
        counters.connections_total += 1
        counters.connections_open += 1
        self.deadlines.watch(connection)
        self.connections.opened(connection)

    def connection_succeeded(self, former: Connection, successor: Connection) -> None:
        """A client's connection goes on under another protocol."""
        self.connections.succeeded(former, successor)
        self.budget.passed_on(former, successor)
        self.deadlines.forget(former)
        self.deadlines.watch(successor)

    def connection_closed(self, connection: Connection) -> None:
        """A client's connection is gone."""
        self.deadlines.forget(connection)
        self.counters.connections_open -= 1
        self.connections.closed(connection)
        self.budget.gone(connection)

    # Requests

    def next_request_id(self) -> bytes:
        """Return an identifier that no other request has: 64 random bits a process, and a number."""
        self._request_number += 1
        return b"%b-%08x" % (self._request_prefix, self._request_number)

    def misdirected(self, presented: Certificate, authority: bytes) -> bool:
        """Say whether another certificate than `presented` is the one for `authority`."""
        host = normalise_host(authority)
        return host is not None and self.certificates.misdirected(presented, host)

    def exchange_done(self, exchange: Record) -> None:
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
        self, peer: Peer, error: PorteroError, request_id: bytes, version: bytes = b"1.1"
    ) -> None:
        """Count and log bytes that did not become a request."""
        self.counters.errors[error.reason] += 1
        if self.access_log.enabled:
            self.access_log.refused(peer, error, request_id, version)

    # Private

    def _open_log(self, config: Config) -> AccessLog:
        style = config.log.access
        return AccessLog(self.loop, self.counters, style, self._log_descriptor, self._log_lock)
