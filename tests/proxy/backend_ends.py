"""Backends of every HTTP version, for the dialogues that every upstream has to hold.

A `BackendEnd` is a backend, and the pool before it that makes connections to it. `await end.connected()` has
a scripted exchange ask for one; what pool and upstream tell that exchange is in `exchange.said`, and what the
test has it tell the upstream is what `end.requests()` finds that the backend was sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from portero_py.core.model import Backend
from portero_py.proxy.endpoints import ResponseSide, Upstream
from portero_py.wire.message import RequestHead
from tests.e2e.messages import Closed, Reader, Request, Truncated, read_request
from tests.proxy.dialogue import ScriptedTransport, World, leased, settle

if TYPE_CHECKING:
    from portero_py.errors import PorteroError
    from portero_py.proxy.upstream.pool import BackendPool
    from portero_py.wire.headers import Forwarded
    from portero_py.wire.message import Fields, ResponseHead


class ScriptedExchange(ResponseSide):
    """Writes down what the pool and the upstream say.

    `half_closes`: its client can be told that the backend's side of a tunnel has ended.
    """

    upstream: Upstream

    def __init__(self, head: RequestHead, *, half_closes: bool = True) -> None:
        self.head = head
        self.service = "app.example"
        self.said: list[object] = []
        self.heads: list[ResponseHead] = []
        self.body = b""
        self.refused_body = b""
        self.half_closes = half_closes

    # What the pool says

    def upstream_ready(self, upstream: Upstream) -> None:
        self.said.append("ready")
        self.upstream = upstream

    def connect_failed(self, error: PorteroError) -> None:
        self.said.append(("connect failed", error.reason))

    def connect_cancelled(self, error: PorteroError) -> None:
        self.said.append("connect cancelled")

    # What the upstream says

    def body_refused(self, data: bytes) -> None:
        self.refused_body += data

    def upstream_failed(self, error: PorteroError, *, reused: bool, silent: bool, unsent: bool) -> None:
        given = {"reused": reused, "silent": silent, "unsent": unsent}
        self.said.append(("failed", error.reason, *(name for name, holds in given.items() if holds)))

    def upstream_timed_out(self, error: PorteroError) -> None:
        self.said.append(("timed out", error.reason))

    def upstream_paused(self) -> None:
        self.said.append("paused")

    def upstream_resumed(self) -> None:
        self.said.append("resumed")

    def response_informational(self, head: ResponseHead) -> None:
        self.said.append(head.status)

    def response_head(self, head: ResponseHead) -> None:
        self.said.append(("head", head.status))
        self.heads.append(head)

    def response(self, head: ResponseHead, body: bytes, now: float) -> None:
        self.said.append(("response", head.status, body))
        self.heads.append(head)

    def response_body(self, data: bytes) -> None:
        assert data, "a body without bytes"
        if self.said[-1:] != ["body"]:
            self.said.append("body")
        self.body += data

    def response_end(self, trailers: Fields | None) -> None:
        self.said.append(("end", trailers))

    def flush(self) -> None:
        """Said after every read."""

    def tunnel_half_closed(self) -> bool:
        self.said.append("half closed")
        return self.half_closes

    def broke(self) -> None:
        raise AssertionError("a fault of our own")


class BackendEnd:
    """A backend at one address. A response's pieces are given as statuses, fields and bytes."""

    #: Whether a tunnel can be made.
    tunnels = False

    def __init__(self, world: World) -> None:
        self.world = world
        self.backend = Backend("127.0.0.1", 9000)

    @property
    def pool(self) -> BackendPool:
        """The pool of its connections."""
        return self.world.pools.of(leased(self.backend), b"app.example")

    def exchange(
        self, method: bytes = b"GET", body_length: int = 0, *, half_closes: bool = True, upgrade: bytes = b""
    ) -> ScriptedExchange:
        """An exchange with nothing but its request's head."""
        fields = [(b"X-From", b"client")]
        if body_length > 0:
            fields.append((b"Content-Length", b"%d" % body_length))
        head = RequestHead(method, b"/path", b"app.example", b"1.1", fields, body_length)
        if upgrade:
            head.upgrade = upgrade
        return ScriptedExchange(head, half_closes=half_closes)

    async def connected(self, exchange: ScriptedExchange) -> Upstream:
        """The upstream of a new connection for `exchange`; `transport` is the backend's side of it."""
        self.pool.connect(exchange)
        self.transport = await self.world.backend()
        await settle()
        assert exchange.said == ["ready"]
        exchange.said.clear()
        return exchange.upstream

    def again(self) -> Upstream | None:
        """The upstream of an idle connection, or None."""
        return self.pool.take(self.world.clock(), retriable=True)

    def send_head(self, upstream: Upstream, exchange: ScriptedExchange) -> None:
        """Begin the exchange, as an `Exchange` does."""
        exchange.upstream_started = self.world.clock()
        upstream.send_head(exchange, exchange.head, self._forwarded(exchange), b"id-7")

    async def asked(self, exchange: ScriptedExchange) -> Upstream:
        """The upstream of a new connection, with the head sent."""
        upstream = await self.connected(exchange)
        self.send_head(upstream, exchange)
        return upstream

    def requests(self) -> list[Request]:
        """The complete requests that the backend has got on its latest connection."""
        raise NotImplementedError

    def answer(self, status: int, body: bytes | None = None, *, whole: bool = True) -> None:
        """Send a response's head, with a body of known length, unless it is None; all of it, or its head."""
        raise NotImplementedError

    def answer_unsized(self) -> None:
        """Send a 200's head; a body of unknown length follows."""
        raise NotImplementedError

    def send_body(self, data: bytes) -> None:
        """Send some of a body of unknown length."""
        raise NotImplementedError

    def send_end(self, trailers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        """Send its end."""
        raise NotImplementedError

    def send_nonsense(self) -> None:
        """Break the protocol."""
        raise NotImplementedError

    def may_send(self) -> bool:
        """Whether more of the body would be taken from the backend."""
        raise NotImplementedError

    # Private

    def _forwarded(self, exchange: ScriptedExchange) -> Forwarded:
        peer = self.world.peers.of(ScriptedTransport())
        return peer.forwarding.fields(exchange.head.authority, exchange.head.forwarded)


class Http1Backend(BackendEnd):
    tunnels = True

    def requests(self) -> list[Request]:
        came = [self.transport.received]
        reader = Reader(lambda: came.pop() if came else b"")
        found = []
        while True:
            try:
                found.append(read_request(reader))
            except (Closed, Truncated):
                return found

    def answer(self, status: int, body: bytes | None = None, *, whole: bool = True) -> None:
        sized = b"" if body is None else b"Content-Length: %d\r\n" % len(body)
        upgrade = b"Connection: upgrade\r\nUpgrade: websocket\r\n" if status == 101 else b""
        head = b"HTTP/1.1 %d Fine\r\nX-From: backend\r\n%b%b\r\n" % (status, sized, upgrade)
        self.transport.send(head + (body or b"") if whole else head)

    def answer_unsized(self) -> None:
        self.transport.send(b"HTTP/1.1 200 OK\r\nX-From: backend\r\nTransfer-Encoding: chunked\r\n\r\n")

    def send_body(self, data: bytes) -> None:
        self.transport.send(b"%x\r\n%b\r\n" % (len(data), data))

    def send_end(self, trailers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        lines = b"".join(b"%b: %b\r\n" % pair for pair in trailers)
        self.transport.send(b"0\r\n%b\r\n" % lines)

    def send_nonsense(self) -> None:
        self.transport.send(b"nonsense\r\n\r\n")

    def may_send(self) -> bool:
        return self.transport.reading


#: Whoever implements `Upstream` joins by one line.
BACKEND_ENDS: dict[str, type[BackendEnd]] = {
    "http1": Http1Backend,
}
