"""The life cycle of one data-plane process, or of the only one: start, take tables, reconfigure, drain.

It composes the data plane (`surroundings`, what listens, what connects) and owns its sockets; a new routing
table or certificate table is swapped in by an assignment. It never waits for the control plane: if that
stalls, the worker goes on serving the last table. Nobody in this room knows it.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from enum import Enum
from time import monotonic
from typing import TYPE_CHECKING, Final

from portero_py.core.model import Standing
from portero_py.core.retry_budget import WINDOW
from portero_py.proxy.deadlines import Deadlines
from portero_py.proxy.downstream.connection import Connections
from portero_py.proxy.downstream.listener import Front, Listener, ListenerSite
from portero_py.proxy.downstream.sni import FrontTls
from portero_py.proxy.moves import Moves
from portero_py.proxy.surroundings import Surroundings
from portero_py.proxy.upstream.connector import HttpConnector
from portero_py.proxy.upstream.rooms import Rooms
from portero_py.proxy.upstream.tls import UpstreamTls

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from portero_py.config.model import Config
    from portero_py.core.certificates import CertificateTable
    from portero_py.core.challenges import Challenges
    from portero_py.core.counters import Counters
    from portero_py.core.health import Evidence
    from portero_py.core.limits import SharedCounts
    from portero_py.core.rate_limit import Buckets
    from portero_py.core.routing_table import RoutingTable


#: The part of a drain in which exchanges may go on waiting in queues.
WAITING_SHARE: Final = 0.9
#: Seconds over which idle clients are asked to go, when somebody else takes them, and when nobody does.
LONG_SPREAD: Final = 10.0
SHORT_SPREAD: Final = 1.0
#: Seconds of a drain that are left for who came last, when clients are accepted while it goes on.
LAST_SECONDS: Final = 3.0
#: Seconds that they have for their request then: everybody else waits for the successor.
HURRY_SECONDS: Final = 0.25

_log = logging.getLogger(__name__)


class Leave(Enum):
    """What becomes of clients who come while a worker drains."""

    ALONE = 0  # they are refused
    SOCKETS_STAY = 1  # they wait, for a process that begins when this one has ended
    TO_SUCCESSOR = 2  # somebody else accepts them already


class Worker:
    """The data plane on one event loop, for `most` clients at a time. `log_descriptor` takes the access log.

    When there are several workers, `front_tls` was made before they were forked, `start` is another number
    in each, `log_lock` and `limit_file` are files that all of them have (see `access_log`, `rooms`), and
    `shared` tells what the others have of each client, `buckets` what they took of rate limits.
    """

    def __init__(
        self,
        config: Config,
        loop: asyncio.AbstractEventLoop,
        *,
        front_tls: FrontTls | None = None,
        log_descriptor: int = 1,
        log_lock: int = -1,
        limit_file: int = -1,
        start: int = 0,
        most: int = sys.maxsize,
        shared: SharedCounts | None = None,
        buckets: Buckets | None = None,
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
            rooms=None if limit_file < 0 else Rooms(limit_file, start, config.workers),
            buckets=buckets,
        )
        self._front_tls.counters = surroundings.counters
        surroundings.pools.connector = HttpConnector(surroundings, upstream_tls)
        self._front = Front(surroundings, self._front_tls, self._handshakes)
        self._connections.descriptors = lambda: len(self._deadlines) + len(self._handshakes)
        self._connections.make_room = surroundings.pools.close_idle
        self._moves = Moves(loop, self._deadlines, surroundings.pools)
        self._pruning: asyncio.Handle | None = None
        self._looking: asyncio.Handle = loop.call_later(WINDOW, self._look)

    @property
    def counters(self) -> Counters:
        """Everything that was counted here."""
        return self._surroundings.counters

    def tell(self, found: Callable[[Evidence], None]) -> None:
        """Call `found` from now on when a backend has failed too often in a row."""
        self._surroundings.outcomes.on_evidence = found

    def reconfigure(self, config: Config) -> None:
        """Take over times, limits and the log's style; connections that live already see them at once."""
        self._surroundings.configure(config)

    # The feed

    def apply(self, table: RoutingTable) -> None:
        """Route by `table` from now on."""
        surroundings = self._surroundings
        former, surroundings.table = surroundings.table, table
        surroundings.pools.follow(table)
        surroundings.balancers.retain(table)
        surroundings.queues.follow(table)
        self._moves.follow(former, table)
        if self._pruning is None:
            self._prune_later()

    def apply_certificates(self, certificates: CertificateTable) -> None:
        """Present these certificates in new handshakes."""
        self._surroundings.certificates = certificates
        self._front_tls.apply(certificates)

    def apply_challenges(self, challenges: Challenges) -> None:
        """Answer these tls-alpn-01 challenges in new handshakes."""
        self._front_tls.apply_challenges(challenges)

    def standings(self, service: str) -> list[Standing]:
        """What there is to say of the backends of a service, or of all ("")."""
        held = self._surroundings.pools.claims_by_backend(service)
        marked = self._surroundings.health.by_backend(service)
        found = []
        for place in {**held, **marked}:
            mark = marked.get(place)
            is_ejected, error = (False, "") if mark is None else (mark.is_ejected, mark.error)
            found.append(Standing(*place, held.get(place, 0), is_ejected, error))
        return found

    # The life cycle

    async def start(self, sockets: Sequence[socket.socket], *, tls: bool) -> None:
        """Accept on bound sockets."""
        for sock in sockets:
            listener = Listener(self._front, secure=tls)
            site = ListenerSite(sock, listener, listener.doors)
            await site.resume()
            self._connections.doors.sites.append(site)

    async def stop_accepting(self) -> None:
        """Close the listening sockets; connections go on."""
        await self._connections.doors.close()

    async def drain(self, timeout: float, leave: Leave = Leave.ALONE) -> None:
        """Let exchanges finish, `timeout` seconds at most, then end everything."""
        surroundings, connections = self._surroundings, self._connections
        surroundings.draining = True
        ends_at = self._loop.time() + timeout
        # Without a successor nobody takes those who come back: the sooner this ends, the better.
        most = LONG_SPREAD if leave is Leave.TO_SUCCESSOR else SHORT_SPREAD
        connections.drain(timeout, min(most, timeout / 4))
        # What waits may still be served; who has not been by then gets an answer instead of an end.
        ending = self._loop.call_later(timeout * WAITING_SHARE, surroundings.queues.end)
        if leave is Leave.SOCKETS_STAY:
            await connections.wait_for_former(timeout - min(LAST_SECONDS, timeout / 2))
            connections.hurry(HURRY_SECONDS)
        await self.stop_accepting()
        await asyncio.sleep(0)  # whom the loop has accepted in this turn already is there in the next one
        cut_off, tunnels = await connections.wait(max(ends_at - self._loop.time(), 0.0))
        if cut_off:
            _log.warning(
                "cut off at the end of the drain: %d connections, %d of them tunnels, with %d exchanges",
                cut_off,
                tunnels,
                surroundings.counters.exchanges_in_flight,
            )
        await connections.end()
        ending.cancel()
        self._moves.close()
        surroundings.queues.close()
        if self._pruning is not None:
            self._pruning.cancel()
        self._looking.cancel()
        await surroundings.pools.close()
        self._deadlines.close()
        self._handshakes.close()
        surroundings.ended()

    # Private

    def _prune(self) -> None:
        """A little at a time: the connections have their turns in between."""
        surroundings = self._surroundings
        self._pruning = None
        try:
            if not surroundings.pools.prune():
                self._pruning = self._loop.call_soon(self._prune)
                return
            surroundings.counters.keep_only(surroundings.table.services)
            surroundings.rules.retain(surroundings.table)
            surroundings.patience.retain(surroundings.table)
            surroundings.outcomes.retain(surroundings.table, monotonic())
        except Exception:  # what is left now goes with another table
            _log.exception("a fault of portero's own: what is gone was not forgotten")
        if surroundings.pools.are_behind:
            self._prune_later()

    def _look(self) -> None:
        is_done = True
        try:
            is_done = self._surroundings.outcomes.look(monotonic())
        except Exception:  # a bug: the next look follows
            _log.exception("a fault of portero's own: retries were not counted")
        if is_done:
            self._looking = self._loop.call_later(WINDOW, self._look)
        else:
            self._looking = self._loop.call_soon(self._look)

    def _prune_later(self) -> None:
        # Not at once: with thousands of renewals a second this would be most of the work.
        self._pruning = self._loop.call_later(0.5, self._prune)
