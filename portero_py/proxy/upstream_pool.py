"""Idle connections per backend, and the making of new ones.

The rules
- A connection is idle in exactly one pool, or belongs to exactly one exchange.
- Last in, first out: the busiest connections stay fresh, the others time out.
- A backend may close an idle connection at any moment. A request that can be sent again takes any of them;
  one that can't (a body, or a method that is not idempotent) takes only one that was used within the last
  second, because servers close idle connections after 2 s (gunicorn), 5 s (node, uvicorn) or 75 s (nginx),
  and the race between its last moment and our first byte would lose the request.
- TLS connections are shared among requests with the same server name only: the backend saw it as SNI.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
from time import monotonic
from typing import TYPE_CHECKING, Final

from portero_py.core.names import normalise_host
from portero_py.errors import ConnectFailed, OutOfDescriptors, PorteroError, UpstreamTlsFailed
from portero_py.proxy.upstream_http1 import UpstreamHttp1

if TYPE_CHECKING:
    from portero_py.core.model import Backend
    from portero_py.core.routing_table import RoutingTable
    from portero_py.proxy.exchange import Exchange
    from portero_py.proxy.worker import Worker

#: Most idle connections kept for one backend.
MAX_IDLE: Final = 1024
#: Seconds after which an idle connection is closed.
IDLE_SECONDS: Final = 60.0
#: Longest idleness of a connection that takes a request which cannot be sent again.
FRESH_SECONDS: Final = 1.0


#: What a system call says when the process or the machine has no descriptor left.
NO_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE)


class Connecting:
    """A connection that is being made for one exchange, which may give it up meanwhile."""

    __slots__ = ("exchange",)

    def __init__(self, exchange: Exchange) -> None:
        self.exchange: Exchange | None = exchange

    def give_up(self) -> None:
        """The exchange is over: the connection, when it comes, goes to the pool."""
        self.exchange = None


class BackendPool:
    """The connections to one backend, under one server name when it speaks TLS."""

    def __init__(self, worker: Worker, backend: Backend, server_name: str) -> None:
        self.backend = backend
        self.claims = 0
        self._worker = worker
        self._server_name = server_name
        self._idle: list[UpstreamHttp1] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def idle(self) -> int:
        """Number of idle connections."""
        return len(self._idle)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing here: no claim, no connection that is idle or being made."""
        return not (self.claims or self._idle or self._tasks)

    def take(self, now: float, *, retriable: bool) -> UpstreamHttp1 | None:
        """Return an idle connection that is alive as far as can be known, or None."""
        idle = self._idle
        while idle:
            if not retriable and idle[-1].idle_since < now - FRESH_SECONDS:
                return None
            upstream = idle.pop()
            if upstream.is_usable():
                return upstream
        return None

    def put(self, upstream: UpstreamHttp1, now: float) -> None:
        """Take back a usable connection whose response is complete."""
        if self._closed or len(self._idle) >= MAX_IDLE:
            upstream.close()
            return
        upstream.idle_since = now
        upstream.deadline = now + IDLE_SECONDS
        self._idle.append(upstream)

    def discard(self, upstream: UpstreamHttp1) -> None:
        """An idle connection is gone."""
        if upstream in self._idle:
            self._idle.remove(upstream)

    def connect(self, exchange: Exchange) -> Connecting:
        """Make a connection; the exchange hears `upstream_ready` or `connect_failed`."""
        connecting = Connecting(exchange)
        task = self._worker.loop.create_task(self._connect(connecting))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return connecting

    def close_idle(self) -> None:
        """Close every idle connection; those in use are closed when their exchange ends."""
        self._closed = True
        self.empty()

    def empty(self) -> None:
        """Close every idle connection, and go on."""
        idle, self._idle = self._idle, []
        for upstream in idle:
            upstream.close()

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
            upstream = await self._open()
        except TimeoutError:
            seconds = self._worker.timeouts.connect
            error = ConnectFailed(f"backend {self.backend.address} did not answer within {seconds:g} s")
        except (ssl.SSLError, ssl.CertificateError) as failure:
            error = UpstreamTlsFailed(f"TLS with backend {self.backend.address} failed: {failure}")
        except OSError as failure:
            reason = failure.strerror or str(failure)
            error = ConnectFailed(f"backend {self.backend.address} cannot be reached: {reason}")
        except (UpstreamTlsFailed, OutOfDescriptors) as failure:
            error = failure
        else:
            if upstream.is_usable():
                if connecting.exchange is None:
                    self.put(upstream, monotonic())
                else:
                    connecting.exchange.upstream_ready(upstream)
                return
            # Lost between the connection's beginning and this task's turn: nobody would ever be told.
            error = ConnectFailed(f"backend {self.backend.address} closed the connection at once")
        if connecting.exchange is not None:
            connecting.exchange.connect_failed(error)

    async def _open(self) -> UpstreamHttp1:
        try:
            return await self._open_once()
        except OSError as failure:
            if failure.errno not in NO_DESCRIPTORS:
                raise
            # The backend has no part in it. Idle connections, of whomever, are worth less than this one.
            self._worker.pools.close_idle()
            await asyncio.sleep(0)  # uvloop closes them then
        try:
            return await self._open_once()
        except OSError as failure:
            if failure.errno not in NO_DESCRIPTORS:
                raise
            raise OutOfDescriptors("there is no descriptor left for a connection to a backend") from failure

    async def _open_once(self) -> UpstreamHttp1:
        worker = self._worker
        backend = self.backend
        loop = worker.loop
        context = worker.upstream_tls.context(backend) if backend.use_tls else None
        async with asyncio.timeout(worker.timeouts.connect):
            transport, upstream = await loop.create_connection(
                lambda: UpstreamHttp1(worker, self),
                backend.host,
                backend.port,
                ssl=context,
                server_hostname=(self._server_name or backend.host) if context else None,
            )
        if context is not None:
            try:
                worker.upstream_tls.check_pin(backend, transport)
            except UpstreamTlsFailed:
                transport.abort()
                raise
        return upstream


class Pools:
    """All pools of a worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._pools: dict[tuple[str, int, str, str] | tuple[Backend, str], BackendPool] = {}

    def of(self, backend: Backend, authority: bytes) -> BackendPool:
        """Return the pool for requests to `authority` served by `backend`."""
        if not backend.use_tls:
            # All that such backends can differ in. The Backend itself, which is another object after each
            # renewal, would be hashed and compared in Python: 0.19 µs instead of 0.05.
            address = (backend.host, backend.port, backend.protocol, backend.tls_fingerprint)
            pool = self._pools.get(address)
            if pool is None:
                pool = self._pools[address] = BackendPool(self._worker, backend, "")
            return pool
        server_name = normalise_host(authority) or ""
        key = (backend, server_name)
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = BackendPool(self._worker, backend, server_name)
        return pool

    def close_idle(self) -> None:
        """Close every idle connection: descriptors are short."""
        for pool in self._pools.values():
            pool.empty()

    def keep_only(self, table: RoutingTable) -> None:
        """Close the idle connections of every backend that is in no service any more.

        Pools that hold nothing are dropped: clients choose the server names under a wildcard.
        """
        live = {lease.backend for service in table.services.values() for lease in service.leases}
        for key, pool in list(self._pools.items()):
            if pool.backend in live:
                pool.reopen()
            else:
                pool.close_idle()
            if pool.is_empty:
                del self._pools[key]

    async def close(self) -> None:
        """Close every connection that is idle or being made."""
        for pool in list(self._pools.values()):
            await pool.close()
        self._pools.clear()
