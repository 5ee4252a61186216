"""Bodies and connections that break: the backend gets exactly the client's body, or the client gets an error.

Whatever the order of body bytes, breaking connections and answers: no byte is lost, no request is sent twice,
and no connection is used again behind an incomplete message.
"""

from __future__ import annotations

import asyncio
import tracemalloc
from time import monotonic
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portero_py.proxy.exchange import Exchange
from portero_py.wire.headers import Forwarding
from portero_py.wire.message import CHUNKED, Fields, RequestHead, ResponseHead
from tests.e2e.messages import Closed, Reader, Request, Truncated, read_request
from tests.proxy.dialogue import OK, Clock, ScriptedTransport, World, post, settle, statuses

if TYPE_CHECKING:
    from portero_py.errors import PorteroError
    from portero_py.proxy.endpoints import Downstream
    from portero_py.proxy.peer import Peer

REFUSED = ConnectionRefusedError(111, "Connection refused")


class ScriptedDownstream:
    """A client's side that notes the outcome, and delivers what the test says, paused or not.

    A pause asks it to stop as soon as it can: what was read already may still come.
    """

    def __init__(self) -> None:
        self.status = 0
        self.over = 0
        self.paused = False

    def send_informational(self, head: ResponseHead) -> None: ...

    def send_response(self, head: ResponseHead, body: bytes) -> None:
        self.status = head.status
        self.over += 1

    def send_head(self, head: ResponseHead) -> None:
        self.status = head.status

    def send_body(self, data: bytes) -> None:
        assert data

    def send_end(self, trailers: Fields | None) -> None:
        self.over += 1

    def flush(self) -> None: ...

    def abort(self, error: PorteroError) -> None:
        self.over += 1

    def pause_body(self) -> None:
        self.paused = True

    def resume_body(self) -> None:
        self.paused = False

    def start_tunnel(self) -> None:
        raise AssertionError("there was no upgrade")

    def half_close(self) -> bool:
        raise AssertionError("there was no upgrade")


class Someone:
    """What an exchange asks of a client."""

    certificate = None
    forwarding = Forwarding(b"192.0.2.7", b"http", trusted=False)


def begin(world: World, downstream: ScriptedDownstream, length: int) -> Exchange:
    """A POST with a body of `length` bytes, or CHUNKED, begins."""
    fields = [] if length == CHUNKED else [(b"Content-Length", b"%d" % length)]
    head = RequestHead(b"POST", b"/", b"app.example", b"1.1", fields, length)
    exchange = Exchange(world, cast("Peer", Someone()), cast("Downstream", downstream), head)
    exchange.start()
    return exchange


def requests_in(received: bytes) -> tuple[list[Request], bool]:
    """The complete requests that a backend got, and whether there is the beginning of another."""
    pieces = [received]
    reader = Reader(lambda: pieces.pop() if pieces else b"")
    found: list[Request] = []
    try:
        while True:
            found.append(read_request(reader))
    except Closed:
        return found, False
    except Truncated:
        return found, True


STEPS = ("body", "body", "end", "break", "reset", "close", "answer", "hint", "turn", "connect")
BODY = b"0123456789abcdefghij"


async def play(steps: list[str], *, chunked: bool, idle: int, refusals: list[bool]) -> None:
    clock = Clock()
    clock.now = monotonic()
    world = World(clock)
    world.register(3)
    stale = [world.client() for _ in range(idle)]
    for client in stale:
        client.send(b"GET / HTTP/1.1\r\nHost: app.example\r\n\r\n")
    await settle()
    for transport in world.loop.connections:
        transport.send(OK)
        transport.received = b""
    for client in stale:
        client.vanish()
    held = [asyncio.Event() for refused in refusals if not refused]
    waiting = list(held)
    world.loop.outcomes = [REFUSED if refused else waiting.pop() for refused in refusals]
    answered: dict[ScriptedTransport, int] = {}
    downstream = ScriptedDownstream()
    exchange = begin(world, downstream, CHUNKED if chunked else len(BODY))
    given_bytes = 0
    ended = False

    def current() -> ScriptedTransport | None:
        """The connection that has the request, or would have it."""
        live = [transport for transport in world.loop.connections if not transport.lost]
        busy = [
            transport
            for transport in live
            if transport.received.count(b" HTTP/1.1\r\n") > answered.get(transport, 0)
        ]
        found = busy or live
        return found[-1] if found else None

    def do(step: str) -> None:
        nonlocal given_bytes, ended
        transport = current()
        if step == "body":
            if given_bytes < len(BODY):
                piece = BODY[given_bytes : given_bytes + 7]
                given_bytes += len(piece)
                exchange.request_body(piece)
        elif step == "end":
            if given_bytes == len(BODY) and not ended:
                ended = True
                exchange.request_end([(b"X-Sum", b"1")] if chunked else None)
        elif transport is None:
            return
        elif step == "break":
            transport.break_off()
        elif step == "reset":
            transport.vanish(ConnectionResetError())
        elif step == "close":
            transport.send_end()
        elif step == "answer" and not transport.closed and transport.reading:
            answered[transport] = answered.get(transport, 0) + 1
            transport.send(OK)
        elif step == "hint" and not transport.closed and transport.reading:
            transport.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")

    for step in steps:
        if step == "turn":
            await settle()
        elif step == "connect":
            if held:
                held.pop().set()
                await settle()
        else:
            do(step)
    while not ended:
        do("body")
        do("end")
    for event in held:
        event.set()
    await settle()
    for transport in world.loop.connections:
        if transport.closed and not transport.lost:
            transport.vanish(ConnectionResetError())  # what broke off is told in the end
    await settle()
    if exchange not in world.done:
        assert current() is not None, "the client waits for nobody"
        do("answer")
        await settle()

    assert exchange in world.done
    assert downstream.over == 1
    got = 0
    for transport in world.loop.connections:
        complete, begun = requests_in(transport.received)
        got += len(complete) + begun
        for request in complete:
            assert request.body == BODY
            assert request.trailers == ([(b"x-sum", b"1")] if chunked else [])
        assert transport.closed or not begun, "a connection is used again behind half a request"
    assert got <= 1, "a body was sent twice"
    if downstream.status < 300:
        assert sum(answered.values()), "an answer that no backend gave"
    world.loop.outcomes = []
    late = world.client()
    late.send(b"GET /next HTTP/1.1\r\nHost: app.example\r\n\r\n")
    await settle()
    [asked] = [transport for transport in world.loop.connections if b"GET /next" in transport.received]
    assert requests_in(asked.received)[0][-1].path == b"/next"
    asked.send(OK)
    assert statuses(late.received) == [200]
    world.connected = [late]
    await world.close()


@settings(deadline=None, max_examples=400, derandomize=True)
@given(
    st.lists(st.sampled_from(STEPS), max_size=14),
    st.booleans(),
    st.integers(0, 3),
    st.lists(st.booleans(), max_size=2),
)
def test_a_backend_gets_exactly_the_clients_body_or_the_client_gets_an_error(
    steps: list[str], chunked: bool, idle: int, refusals: list[bool]
) -> None:
    asyncio.run(play(steps, chunked=chunked, idle=idle, refusals=refusals))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("then", [["body", "end"], ["body"], ["body", "body", "body", "end"]])
async def test_what_came_while_the_connection_broke_is_sent_over_the_next_one(
    world: World, chunked: bool, then: list[str]
) -> None:
    stale = await world.idle_backend()
    downstream = ScriptedDownstream()
    exchange = begin(world, downstream, CHUNKED if chunked else len(BODY))
    stale.break_off()  # in the same batch of events
    sent = 0
    for step in then:
        if step == "body":
            exchange.request_body(BODY[sent : sent + 7])
            sent = min(sent + 7, len(BODY))
    assert downstream.paused
    stale.vanish(ConnectionResetError())
    backend = await world.backend()
    assert not downstream.paused
    if sent < len(BODY):
        exchange.request_body(BODY[sent:])
    exchange.request_end(None)
    [request], begun = requests_in(backend.received)
    assert (request.body, begun) == (BODY, False)
    assert stale.received == b""
    backend.send(OK)
    assert (downstream.status, downstream.over) == (200, 1)


async def test_a_body_that_was_begun_is_not_sent_over_another_connection(world: World) -> None:
    stale = await world.idle_backend()
    client = world.client()
    client.send(post(b"abcdef")[:-3])
    stale.break_off()
    client.send(b"def")
    stale.vanish(ConnectionResetError())
    await settle()
    assert statuses(client.received) == [502]
    assert len(world.loop.connections) == 1


async def test_a_body_in_tiny_pieces_takes_little_more_memory_than_its_bytes(world: World) -> None:
    world.loop.outcomes = [asyncio.Event()]
    downstream = ScriptedDownstream()
    exchange = begin(world, downstream, 60_000)
    await settle()
    pieces = [b"%02d" % (number % 100) for number in range(30_000)]
    tracemalloc.start()
    for piece in pieces:
        # A slice of a buffer, as what was read is: each is an object of its own.
        exchange.request_body(bytes(bytearray(piece)))
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 2 * 60_000
    await world.pools.close()
    assert downstream.status == 502
