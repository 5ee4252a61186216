"""A proxy without sockets: scripted transports on both sides, and the state machines between them.

    client = world.client()
    client.send(b"GET / HTTP/1.1\\r\\nHost: app.example\\r\\n\\r\\n")
    backend = await world.backend()          # the connection that the pool made
    backend.send(b"HTTP/1.1 204 No Content\\r\\n\\r\\n")
    assert client.received == ...

`World` is the surroundings of all of it, with a loop that connects to nobody and no listener. The
scripted transport is as strict as uvloop's: writing behind a close or an end of file raises.
Time: `world.clock` is the clock of all of it; `world.pass_time(seconds)` moves it and turns the wheel;
nothing sleeps.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, cast

from portero_py.config.model import Config, Log
from portero_py.core.model import Backend, Lease, Service
from portero_py.core.routing_table import RoutingTable
from portero_py.proxy.deadlines import DeadlineWheel
from portero_py.proxy.downstream.connection import Connections
from portero_py.proxy.downstream.http1 import Http1Downstream
from portero_py.proxy.surroundings import Surroundings
from portero_py.proxy.upstream.connector import HttpConnector

if TYPE_CHECKING:
    from portero_py.errors import PorteroError
    from portero_py.proxy.endpoints import Record
    from portero_py.proxy.peer import Peer
    from portero_py.proxy.upstream.pool import BackendPool
    from portero_py.proxy.upstream.tls import UpstreamTls

HIGH_WATER = 65536


def leased(backend: Backend, service: str = "app.example") -> Lease:
    """A lease for ever."""
    return Lease(service, backend.address, backend, float("inf"), None)


GET = b"GET / HTTP/1.1\r\nHost: app.example\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class ScriptedTransport(asyncio.Transport):
    """One side of a connection, seen by the protocol; the test plays the peer."""

    def __init__(self, *, tls: bool = False) -> None:
        super().__init__()
        self.protocol: asyncio.Protocol | None = None
        self.received = b""  # by the peer
        self.ended = False  # write_eof was called
        self.aborted = False
        self.reading = True
        self.lost = False
        self.unsent = 0
        self.peer_reads = True
        self._tls = tls
        self._closing = False
        self._last_protocol: asyncio.Protocol | None = None
        self._writing_paused = False

    # What the peer does

    def send(self, data: bytes) -> None:
        """The peer sends bytes; nobody may be reading, which a test has to know."""
        assert self.reading, "the peer's bytes stay in the kernel: reading is paused"
        assert self.protocol is not None
        if not self._closing:
            self.protocol.data_received(data)

    def send_end(self) -> None:
        """The peer closes its side."""
        assert self.protocol is not None
        if not self._closing and not self.protocol.eof_received():
            self.close()

    def vanish(self, error: Exception | None = None) -> None:
        """The connection is gone."""
        self._closing = True
        self._lose(error)

    def stop_reading(self) -> None:
        """The peer leaves what is sent in the socket's buffers."""
        self.peer_reads = False

    def read_all(self) -> None:
        """The peer reads everything, and goes on reading."""
        self.peer_reads = True
        self.unsent = 0
        if self._writing_paused:
            self._writing_paused = False
            assert self.protocol is not None
            self.protocol.resume_writing()
        if self._closing:
            self._lose(None)

    def break_off(self) -> None:
        """The connection is broken, and the loop knows it; the protocol is told later, by `vanish`."""
        self._closing = True

    @property
    def closed(self) -> bool:
        return self._closing

    # asyncio.Transport

    def write(self, data: Any) -> None:
        assert data, "an empty write"
        if self._closing:
            raise RuntimeError("write to a closed transport")
        if self.ended:
            raise RuntimeError("write after write_eof")
        self.received += bytes(data)
        if not self.peer_reads:
            self.unsent += len(data)
            if self.unsent > HIGH_WATER and not self._writing_paused:
                self._writing_paused = True
                assert self.protocol is not None
                self.protocol.pause_writing()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.Protocol)
        self.protocol = protocol

    def can_write_eof(self) -> bool:
        return not self._tls

    def write_eof(self) -> None:
        self.ended = True

    def pause_reading(self) -> None:
        assert not self._closing
        self.reading = False

    def resume_reading(self) -> None:
        assert not self._closing
        self.reading = True

    def is_closing(self) -> bool:
        return self._closing

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._last_protocol = self.protocol  # a later set_protocol changes nothing, as with uvloop
            if not self.unsent:
                asyncio.get_running_loop().call_soon(self._lose, None)

    def abort(self) -> None:
        self.aborted = True
        if not self._closing:
            self._closing = True
            self._last_protocol = self.protocol
        asyncio.get_running_loop().call_soon(self._lose, None)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("192.0.2.7", 50000) if name == "peername" else default  # there is no socket

    # Private

    def _lose(self, error: Exception | None) -> None:
        if not self.lost:
            self.lost = True
            protocol = self._last_protocol or self.protocol
            assert protocol is not None
            protocol.connection_lost(error)


class ScriptedLoop:
    """A loop that connects to nobody; each outcome in `outcomes` answers one attempt to connect."""

    def __init__(self, clock: Clock) -> None:
        self.time = clock
        self.outcomes: list[OSError | asyncio.Event] = []
        self.connections: list[ScriptedTransport] = []
        self.addresses: list[tuple[str, int]] = []
        self.greet: Callable[[ScriptedTransport], None] | None = None

    def call_soon(self, callback: Callable[..., None], *arguments: object) -> asyncio.Handle:
        return asyncio.get_running_loop().call_soon(callback, *arguments)

    def call_later(
        self, seconds: float, callback: Callable[..., None], *arguments: object
    ) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, callback, *arguments)

    def create_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(work)

    async def create_connection(
        self, factory: Callable[[], asyncio.Protocol], host: str, port: int, **_: object
    ) -> tuple[ScriptedTransport, asyncio.Protocol]:
        self.addresses.append((host, port))
        outcome = self.outcomes.pop(0) if self.outcomes else None
        if isinstance(outcome, asyncio.Event):
            await outcome.wait()
        elif outcome is not None:
            raise outcome
        transport = ScriptedTransport()
        transport.protocol = factory()
        transport.protocol.connection_made(transport)
        self.connections.append(transport)
        if self.greet is not None:
            self.greet(transport)
        return transport, transport.protocol


class Clock:
    """Stands in for `monotonic` in the modules under test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class World(Surroundings):
    """The surroundings of a dialogue, which write down what ended and know what is random."""

    loop: Any  # a ScriptedLoop

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        loop = cast("asyncio.AbstractEventLoop", ScriptedLoop(clock))
        connections = Connections(loop, sys.maxsize, lambda: 0)
        super().__init__(Config(log=Log(access="off")), loop, DeadlineWheel(clock()), connections)
        self.done: list[Record] = []
        self.refused: list[PorteroError] = []
        self.connected: list[ScriptedTransport] = []
        self.misdirects = False
        self._ids = 0
        self._seen = 0
        self.upstream_tls(cast("UpstreamTls", None))
        self.register(1)

    # The test's side

    def upstream_tls(self, policy: UpstreamTls) -> None:
        """How connections to backends that speak TLS are made."""
        self.pools.connector = HttpConnector(self, policy)

    def register(self, backends: int) -> None:
        """Lease so many backends for app.example."""
        leases = tuple(
            Lease("app.example", f"b{n}", Backend("127.0.0.1", 9000 + n), self.clock() + 1e6, 60)
            for n in range(backends)
        )
        self.table = RoutingTable(1, {"app.example": Service("app.example", leases)})

    def apply(self, table: RoutingTable) -> None:
        """A new routing table comes, and the pools take notice of it."""
        self.table = table
        self.pools.follow(table)
        while not self.pools.prune():
            pass

    def client(self, *, tls: bool = False) -> ScriptedTransport:
        """A client connects."""
        transport = ScriptedTransport(tls=tls)
        transport.protocol = Http1Downstream(self)
        transport.protocol.connection_made(transport)
        if tls:
            transport.protocol._peer.tls_version = "TLSv1.3"
        self.connected.append(transport)
        return transport

    async def backend(self) -> ScriptedTransport:
        """The next connection to a backend that was made."""
        await settle()
        assert len(self.loop.connections) > self._seen, "no connection was made"
        self._seen += 1
        made: ScriptedTransport = self.loop.connections[self._seen - 1]
        return made

    async def idle_backend(self) -> ScriptedTransport:
        """A connection that waits in the pool after one exchange of another client."""
        client = self.client()
        client.send(GET)
        backend = await self.backend()
        backend.send(OK)
        backend.received = b""
        client.vanish()
        await settle()
        return backend

    async def pass_time(self, seconds: float) -> None:
        """Let the deadline wheel turn, a second at a time."""
        for _ in range(int(seconds)):
            self.clock.now += 1
            self.deadlines.advance(self.clock.now)
            await settle()

    def all_pools(self) -> list[BackendPool]:
        """Every pool there is."""
        return list(self.pools._pools.values())

    def check_released(self) -> None:
        """Nothing is held any more: every exchange ended once and gave back what it had."""
        assert self.counters.exchanges_in_flight == 0
        assert [pool.claims for pool in self.all_pools()] == [0] * len(self.all_pools())
        assert len(set(self.done)) == len(self.done), "an exchange ended twice"

    async def close(self) -> None:
        """End every connection, and see that nothing stays behind."""
        await settle()
        self.check_released()
        for transport in (*self.connected, *self.loop.connections):
            if not transport.lost:
                transport.vanish()
        await self.pools.close()
        await settle()
        self.check_released()
        assert len(self.deadlines) == 0, "a connection is still watched"
        assert self.counters.connections_open == 0

    # What is asked of it

    def next_request_id(self) -> bytes:
        self._ids += 1
        return b"id-%d" % self._ids

    def misdirected(self, presented: object, authority: bytes) -> bool:
        return self.misdirects

    def exchange_done(self, exchange: Record) -> None:
        assert exchange.status, "an exchange without a status"
        super().exchange_done(exchange)
        self.done.append(exchange)

    def request_refused(
        self, peer: Peer, error: PorteroError, request_id: bytes, version: bytes = b"1.1"
    ) -> None:
        super().request_refused(peer, error, request_id, version)
        self.refused.append(error)


async def settle() -> None:
    """Let everything happen that can happen without a peer."""
    for _ in range(12):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Let things happen until `condition` holds; they need no peer, so it must come to hold soon."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not come to hold")


def statuses(received: bytes) -> list[int]:
    """The status codes in what a client received, given that no body holds a status line."""
    return [int(code) for code in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", received)]


def get(path: bytes, fields: bytes = b"", host: bytes = b"app.example") -> bytes:
    """A GET request."""
    return b"GET %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (path, host, fields)


def post(body: bytes, fields: bytes = b"") -> bytes:
    """A POST request with a body of known length."""
    return b"POST / HTTP/1.1\r\nHost: app.example\r\nContent-Length: %d\r\n%b\r\n%b" % (
        len(body),
        fields,
        body,
    )
