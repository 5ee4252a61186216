"""Idle connections per backend of a service, and the making of new ones.

The rules
- A connection is idle in exactly one pool, or belongs to exactly one exchange.
- Last in, first out: the busiest connections stay fresh, the others time out.
- A backend may close an idle connection at any moment. A request that can be sent again takes any of them;
  one that can't (a body, or a method that is not idempotent) takes only one that was used within the last
  second, because servers close idle connections after 2 s (gunicorn), 5 s (node, uvicorn) or 75 s (nginx),
  and the race between its last moment and our first byte would lose the request.
- TLS connections are shared among requests with the same server name only: the backend saw it as SNI.
- Services that have the same address have a pool there each, as in nginx and HAProxy: what is in flight for
  one is to be told from what is for another (a drain waits for it), and connections are not shared either.
- A pool whose backend left its service closes its idle connections, and takes none until the backend is back
  or somebody is sent to it again.
- A change of the routing table costs what the change is worth, in steps of STEP leases: looking at all of
  100,000 leases stopped everybody for 30 ms, twice a second. Empty pools are found little by little too: a
  few whenever one is made, so that names which clients make up cannot grow into a heap.
- Who is no backend (`apart`) is in no table: its pool is closed by whoever asked for it.
- Whatever goes wrong while a connection is made, its exchange hears of it.
- A pool knows how patient its service is (`patience`): by the table in force when it was made, then by each
  that it was compared with. One whose backend left goes on as it was.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import ssl
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol

from portero_py.core.balancing.policy import Claims
from portero_py.core.names import normalise_host
from portero_py.errors import ConnectFailed, OutOfDescriptors, PorteroError, Unconnectable, UpstreamTlsFailed
from portero_py.proxy.upstream.rooms import NONE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from portero_py.core.model import Backend, Lease, Service
    from portero_py.core.routing_table import RoutingTable
    from portero_py.proxy.endpoints import ResponseSide, Upstream
    from portero_py.proxy.patience import AllPatience, Patience
    from portero_py.proxy.upstream.connection import UpstreamConnection
    from portero_py.proxy.upstream.rooms import Rooms

    PoolKey = tuple[str, str, int, str, str] | tuple[str, Backend, str]

#: Most idle connections kept for one backend.
MAX_IDLE: Final = 1024
#: Seconds after which an idle connection is closed.
IDLE_SECONDS: Final = 60.0
#: Longest idleness of a connection that takes a request which cannot be sent again.
FRESH_SECONDS: Final = 1.0
#: Services and leases that are compared, and pools that are looked at, in one go: 1 ms at most.
STEP: Final = 500

_log = logging.getLogger(__name__)

#: What a system call says when the process or the machine has no descriptor left.
NO_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE)


class Connecting:
    """A connection that is being made for one exchange, which may give it up meanwhile."""

    __slots__ = ("exchange",)

    def __init__(self, exchange: ResponseSide) -> None:
        self.exchange: ResponseSide | None = exchange

    def give_up(self) -> None:
        """The exchange is over: the connection, when it comes, goes to the pool."""
        self.exchange = None


class Connector(Protocol):
    """Makes connections, of whatever HTTP version."""

    async def connect(self, pool: BackendPool) -> UpstreamConnection:
        """Connect to the backend of `pool`. Raises PorteroError, OSError or ssl.SSLError."""


class BackendPool:
    """The connections to one backend of a service, under one server name when it speaks TLS."""

    def __init__(
        self, pools: Pools, service: str, backend: Backend, server_name: str, patience: Patience
    ) -> None:
        self.service = service
        self.backend = backend
        self.server_name = server_name
        self.patience = patience
        self.claims = 0
        self.is_limited = False  # somebody had to take a slot for it
        self._pools = pools
        self._idle: list[UpstreamConnection] = []
        self._tasks: dict[asyncio.Task[None], Connecting] = {}
        self._closed = False  # the backend left: nothing is kept
        self._fault_told = False

    @property
    def idle(self) -> int:
        """Number of idle connections."""
        return len(self._idle)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing here: no claim, no connection that is idle or being made."""
        return not (self.claims or self._idle or self._tasks)

    @property
    def is_left(self) -> bool:
        """Whether it was closed, and nothing is left in it."""
        return self._closed and self.is_empty

    def take(self, now: float, *, retriable: bool) -> Upstream | None:
        """Return an idle connection's upstream, alive as far as can be known, or None."""
        idle = self._idle
        while idle:
            if not retriable and idle[-1].idle_since < now - FRESH_SECONDS:
                return None
            upstream = idle.pop().upstream()
            if upstream is not None:
                return upstream
        return None

    def put(self, connection: UpstreamConnection, now: float) -> None:
        """Take back a usable connection whose response is complete."""
        if self._closed or len(self._idle) >= MAX_IDLE:
            connection.close()
            return
        connection.idle_since = now
        connection.deadline = now + IDLE_SECONDS
        self._idle.append(connection)

    def discard(self, connection: UpstreamConnection) -> None:
        """An idle connection is gone."""
        if connection in self._idle:
            self._idle.remove(connection)

    def connect(self, exchange: ResponseSide) -> Connecting:
        """Make a connection; the exchange hears `upstream_ready` or `connect_failed`."""
        if self._closed:  # who was sent here found the backend in the table
            self._closed = False
            self._pools.watch(self)
        connecting = Connecting(exchange)
        task = self._pools.loop.create_task(self._connect(connecting))
        self._tasks[task] = connecting
        task.add_done_callback(self._tasks.pop)
        return connecting

    def waiting(self) -> list[ResponseSide]:
        """The exchanges for which connections are being made."""
        return [each.exchange for each in self._tasks.values() if each.exchange is not None]

    def close_idle(self) -> None:
        """Close every idle connection; those in use are closed when their exchange ends."""
        self._closed = True
        self.empty()

    def empty(self) -> None:
        """Close every idle connection, and go on."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def reopen(self) -> None:
        """The backend registered again."""
        self._closed = False

    async def close(self) -> None:
        """Close all idle connections and end the making of new ones."""
        self.close_idle()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # Private

    async def _connect(self, connecting: Connecting) -> None:
        error: PorteroError
        try:
            connection = await self._open()
        except (ssl.SSLError, ssl.CertificateError) as failure:
            error = UpstreamTlsFailed(f"TLS with backend {self.backend.address} failed: {failure}")
        except OSError as failure:
            reason = failure.strerror or str(failure)
            error = ConnectFailed(f"backend {self.backend.address} cannot be reached: {reason}")
        except PorteroError as failure:
            error = failure.with_traceback(None)  # it would hold this frame, which holds it
        except asyncio.CancelledError:
            exchange = connecting.exchange
            if exchange is not None:
                exchange.connect_cancelled(ConnectFailed("portero is going down"))
            raise
        except Exception as failure:
            # A server name that cannot be encoded or checked, for one: nothing that only sockets raise.
            error = Unconnectable(f"backend {self.backend.address} cannot be connected to: {failure!r}")
            if not self._fault_told:
                self._fault_told = True
                _log.error("backend %s cannot be connected to", self.backend.address, exc_info=failure)
        else:
            if self._connected(connecting, connection):
                return
            # Lost between the connection's beginning and this task's turn: nobody would ever be told.
            error = ConnectFailed(f"backend {self.backend.address} closed the connection at once")
        exchange = connecting.exchange
        if exchange is not None:
            try:
                exchange.connect_failed(error)
            except Exception:  # a bug: the exchange logs it, counts it, and is over
                exchange.broke()

    def _connected(self, connecting: Connecting, connection: UpstreamConnection) -> bool:
        """Give the connection to who waits for it, or keep it; False when it is lost already."""
        exchange = connecting.exchange
        if exchange is None:
            if connection.is_usable():
                self.put(connection, monotonic())
            return True
        upstream = connection.upstream()
        if upstream is None:
            return False
        try:
            exchange.upstream_ready(upstream)
        except Exception:  # a bug: the exchange logs it, counts it, and is over
            exchange.broke()
            upstream.abort()
        return True

    async def _open(self) -> UpstreamConnection:
        pools = self._pools
        try:
            return await pools.connector.connect(self)
        except OSError as failure:
            if failure.errno not in NO_DESCRIPTORS:
                raise
            # The backend has no part in it. Idle connections, of whomever, are worth less than this one.
            pools.close_idle()
            await asyncio.sleep(0)  # uvloop closes them then
        try:
            return await pools.connector.connect(self)
        except OSError as failure:
            if failure.errno not in NO_DESCRIPTORS:
                raise
            raise OutOfDescriptors("there is no descriptor left for a connection to a backend") from failure


class Pools(Claims):
    """All pools of a worker, who shares the slots of limited backends in `rooms` with others, if with any.

    `connector` makes their connections: to be set before the first is asked for.

    `follow(table)` with every new table, then `prune()`, in turns of the event loop of its own, until it
    says that it is done.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        table: RoutingTable,
        patience: AllPatience,
        rooms: Rooms | None = None,
    ) -> None:
        self.loop = loop
        self.patience = patience
        self._rooms = rooms
        self.connector: Connector
        self._pools: dict[PoolKey, BackendPool] = {}
        self._apart: list[BackendPool] = []
        self._tls_keys: dict[tuple[str, Backend], set[PoolKey]] = {}  # a backend's pools, one a server name
        self._round: list[PoolKey] = []  # still to be looked at, before all of them are looked at again
        # what the pools know of the routing tables
        self._compared = table
        self._latest = table
        self._changed: set[str] | None = set()  # services that differ between the two; None: nobody knows
        self._comparing: Iterator[None] | None = None
        # Service -> pools made for it under a table that is not compared yet: they may leave before.
        self._young: dict[str, list[BackendPool]] = {}

    def of(self, lease: Lease, authority: bytes) -> BackendPool:
        """Return the pool for requests to `authority` served by the backend of `lease`."""
        backend = lease.backend
        if not backend.use_tls:
            # All that such backends can differ in. The Backend itself, which is another object after each
            # renewal, would be hashed and compared in Python: 0.19 µs instead of 0.05.
            address = (lease.service, backend.host, backend.port, backend.protocol, backend.tls_fingerprint)
            return self._pools.get(address) or self._make(address, lease, "")
        server_name = normalise_host(authority) or ""
        key = (lease.service, backend, server_name)
        return self._pools.get(key) or self._make(key, lease, server_name)

    def apart(self, service: str, backend: Backend, server_name: str) -> BackendPool:
        """Another pool than that of a backend, for somebody who is asked about the requests to `service`."""
        pool = BackendPool(self, service, backend, server_name, self.patience.general)
        self._apart = [each for each in self._apart if not each.is_left]
        self._apart.append(pool)
        return pool

    def claims_of(self, lease: Lease) -> int:
        """How many exchanges of its service hold the backend of `lease` now, under whatever server name."""
        backend = lease.backend
        if not backend.use_tls:  # asked of each backend, by policies that go by it
            pool = self._pools.get(
                (lease.service, backend.host, backend.port, backend.protocol, backend.tls_fingerprint)
            )
            return 0 if pool is None else pool.claims
        return sum([self._pools[key].claims for key in self._keys(lease.service, lease.backend)])

    def has_room(self, lease: Lease) -> bool:
        """Whether one exchange more may hold the backend of `lease`, by its limit."""
        if not lease.max_in_flight:
            return True
        rooms = self._rooms
        return self.claims_of(lease) < lease.max_in_flight and (rooms is None or rooms.has_room(lease))

    def take_slot(self, lease: Lease) -> int:
        """Hold a slot of a limited backend, until `give_slot_back`; `rooms.NONE` when there is none."""
        if self.claims_of(lease) >= lease.max_in_flight:
            return NONE
        return 0 if self._rooms is None else self._rooms.take(lease)

    def give_slot_back(self, lease: Lease, slot: int) -> None:
        """The exchange that held the slot holds nothing there any more."""
        if self._rooms is not None:
            self._rooms.give_back(lease, slot)

    def waiting_for(self, lease: Lease) -> list[ResponseSide]:
        """The exchanges for which connections to the backend of `lease` are being made."""
        keys = self._keys(lease.service, lease.backend)
        return [exchange for key in keys for exchange in self._pools[key].waiting()]

    def claims_by_backend(self, service: str = "") -> dict[tuple[str, str, int], int]:
        """How many exchanges hold each backend that is held, by service, host and port."""
        found: dict[tuple[str, str, int], int] = {}
        for pool in self._pools.values():
            if pool.claims and (not service or pool.service == service):
                place = (pool.service, pool.backend.host, pool.backend.port)
                found[place] = found.get(place, 0) + pool.claims
        return found

    def watch(self, pool: BackendPool) -> None:
        """Look whether the backend is there still, when the next comparison has come to its end."""
        if self._compared is not self._latest:
            self._young.setdefault(pool.service, []).append(pool)

    def close_idle(self) -> None:
        """Close every idle connection: descriptors are short."""
        for pool in (*self._pools.values(), *self._apart):
            pool.empty()

    def follow(self, table: RoutingTable) -> None:
        """Remember that `table` is in force now."""
        if self._changed is not None:
            if table.since == self._latest.version:
                self._changed |= table.changed
            else:
                self._changed = None
        self._latest = table

    @property
    def are_behind(self) -> bool:
        """Whether there is a table that they have not been compared with."""
        return self._compared is not self._latest

    def prune(self) -> bool:
        """Do a little of what the tables up to now have brought; True when that is done.

        Idle connections to backends that left their service are closed, empty pools are dropped.
        """
        if self._comparing is None:
            self._comparing = self._compare(self._compared, self._latest, self._changed)
            self._compared = self._latest
            self._changed = set()
        if next(self._comparing, self) is self:
            self._comparing = None
            self._drop_empty(STEP)
            return True
        return False

    async def close(self) -> None:
        """Close every connection that is idle or being made."""
        for pool in (*self._pools.values(), *self._apart):
            await pool.close()
        self._pools.clear()
        self._apart.clear()
        self._tls_keys.clear()

    # Private

    def _make(self, key: PoolKey, lease: Lease, server_name: str) -> BackendPool:
        self._drop_empty(2)  # one more than is made
        service, backend = lease.service, lease.backend
        pool = self._pools[key] = BackendPool(self, service, backend, server_name, self._patience_of(service))
        if backend.use_tls:
            self._tls_keys.setdefault((service, backend), set()).add(key)
        self.watch(pool)
        return pool

    def _patience_of(self, service: str) -> Patience:
        found = self._latest.services.get(service)
        return self.patience.of(service, None if found is None else found.policy)

    def _keys(self, service: str, backend: Backend) -> list[PoolKey]:
        if backend.use_tls:
            return list(self._tls_keys.get((service, backend), ()))
        key = (service, backend.host, backend.port, backend.protocol, backend.tls_fingerprint)
        return [key] if key in self._pools else []

    def _drop(self, key: PoolKey, pool: BackendPool) -> None:
        del self._pools[key]
        if pool.backend.use_tls:
            keys = self._tls_keys[pool.service, pool.backend]
            keys.discard(key)
            if not keys:
                del self._tls_keys[pool.service, pool.backend]

    def _drop_empty(self, count: int) -> None:
        """Look at `count` more pools, none of them twice in a row."""
        if not self._round:
            self._round = list(self._pools)
        for _ in range(min(count, len(self._round))):
            key = self._round.pop()
            pool = self._pools.get(key)
            if pool is not None and pool.is_empty:
                self._drop(key, pool)

    def _compare(self, former: RoutingTable, table: RoutingTable, changed: set[str] | None) -> Iterator[None]:
        """Tell the pools whose backends came or went; stops after each STEP of services and leases."""
        old, new = former.services, table.services
        looked = 0
        for name in old if changed is None else changed:
            before, after = old.get(name), new.get(name)
            looked += 1
            if before is not after:
                looked += self._compare_service(name, before, after)
            if looked >= STEP:
                looked = 0
                yield
        for name in new if changed is None else ():
            looked += 1
            if name not in old:
                looked += self._compare_service(name, None, new[name])
            if looked >= STEP:
                looked = 0
                yield
        young, self._young = self._young, {}
        for name, pools in young.items():
            looked += self._settle(name, pools, table)
            if looked >= STEP:
                looked = 0
                yield

    def _compare_service(self, name: str, before: Service | None, after: Service | None) -> int:
        """Compare one service; return how much work that was."""
        held: tuple[Lease, ...] = before.leases if before is not None else ()
        holds: tuple[Lease, ...] = after.leases if after is not None else ()
        if len(held) != len(holds) or not all(map(_is_same, held, holds)):
            were, are = {lease.backend for lease in held}, {lease.backend for lease in holds}
            for backend in were - are:
                self._left(name, backend)
            for backend in are - were:
                for key in self._keys(name, backend):
                    self._pools[key].reopen()
        if after is not None and (None if before is None else before.policy) is not after.policy:
            patience = self._patience_of(name)
            for lease in holds:
                for key in self._keys(name, lease.backend):
                    self._pools[key].patience = patience
        return len(held) + len(holds)

    def _settle(self, name: str, pools: list[BackendPool], table: RoutingTable) -> int:
        """Look whether the backends of young pools are in their service; return how much work that was."""
        compared, latest = table.services.get(name), self._latest.services.get(name)
        known = {lease.backend for lease in compared.leases} if compared is not None else set()
        there = {lease.backend for lease in latest.leases} if latest is not None else set()
        for pool in pools:
            pool.patience = self._patience_of(name)
            if pool.backend in known:
                pass  # from now on the comparisons see it
            elif pool.backend in there:
                self.watch(pool)
            else:
                self._left(name, pool.backend)
        return len(known) + len(there) + len(pools)

    def _left(self, service: str, backend: Backend) -> None:
        """Close what is idle; drop what is empty."""
        for key in self._keys(service, backend):
            pool = self._pools[key]
            pool.close_idle()
            if pool.is_empty:
                self._drop(key, pool)


# Private


def _is_same(held: Lease, holds: Lease) -> bool:
    """Whether two leases, most often one and the same or one before and after its renewal, agree."""
    return held is holds or held.backend == holds.backend
