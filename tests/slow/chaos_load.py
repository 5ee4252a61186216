"""Steady, well-behaved clients over TLS, each a task: what they are answered is checked to the byte.

- *keep-alive*: HTTP/1.1, many GETs and POSTs on one connection. *new*: a connection for each request.
  *http2*: several streams at once. *slow*: answers that take seconds.
- *steady* services have backends that never die, *shaky* ones also such as do, or hang, or fail (only GETs
  go there: a POST that was with a backend when that died may be a 502). *Rolling* services are deployed again
  and again: their backends go when they are told that nothing is in flight there, so nothing is lost, also no
  POST and no slow answer. A *fleeting* service has leases of a few seconds: 404
  and 503 are right answers whenever no lease is sure.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import h2.config
import h2.connection
import h2.events
import h2.exceptions

from tests.slow.chaos_journal import Breakage, Journal, now
from tests.slow.chaos_ledger import Leases

#: Longer than anything is stopped or replaced in.
PATIENCE: Final = 45.0

#: Streams that an HTTP/2 client has at a time.
STREAMS: Final = 4

_SIZES: Final = (0, 10, 300, 300, 5_000, 60_000)


@dataclass(frozen=True)
class Services:
    """Where the load goes."""

    steady: tuple[str, ...]
    shaky: tuple[str, ...]
    rolling: tuple[str, ...]
    fleeting: Callable[[], list[str]]  # those of the moment


@dataclass(frozen=True)
class Request:
    """One request, and what its answer must be."""

    service: str
    path: str
    body: bytes | None
    padding: int

    @property
    def method(self) -> str:
        return "GET" if self.body is None else "POST"

    def fits(self, answer: bytes) -> bool:
        """Whether the answer's body is the one of this request."""
        first, _, rest = answer.partition(b"\n")
        said = first.split(b" ")
        body = self.body or b""
        return (
            len(said) == 4
            and said[2:] == [b"%d" % len(body), b"%08x" % zlib.crc32(body)]
            and rest == b"x" * self.padding
        )


def worker_of(answer: bytes) -> bytes:
    """Which worker passed the request on: the beginning of its request ids."""
    return answer.split(b" ", 2)[1]


def instance_of(answer: bytes) -> str:
    """Which backend answered."""
    return answer.split(b" ", 1)[0].decode()


class Load:
    """The clients of one run. `stop` lets them finish what they have begun."""

    def __init__(
        self,
        journal: Journal,
        leases: Leases,
        port: int,
        tls: ssl.SSLContext,
        http2_tls: ssl.SSLContext,
        services: Services,
        seed: str,
    ) -> None:
        self.port = port
        self.tls = tls
        self.http2_tls = http2_tls
        self.journal = journal
        self._leases = leases
        self._services = services
        self._seed = seed
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, *, keep_alive: int = 5, new: int = 2, http2: int = 2, slow: int = 2) -> None:
        """Let that many of each kind begin."""
        self._stopping = False
        kinds: list[tuple[str, Callable[[str, random.Random], Awaitable[None]], int]] = [
            ("keep-alive", self._keep_alive, keep_alive),
            ("new", self._new, new),
            ("http2", self._http2, http2),
            ("slow", self._slow, slow),
        ]
        for kind, client, count in kinds:
            for number in range(count):
                source = random.Random(f"{self._seed} {kind} {number}")
                self._tasks.append(asyncio.create_task(self._run(kind, client, source), name=kind))

    async def stop(self) -> None:
        """Let every client finish its exchange and go. What a client did not expect is raised here."""
        self._stopping = True
        tasks, self._tasks = self._tasks, []
        for done in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(done, BaseException):
                raise done

    def answered(
        self, kind: str, request: Request, begun: float, place: Place, status: int, body: bytes
    ) -> None:
        """Check an answer."""
        place.answered += 1
        if status == 200:
            if request.fits(body):
                self.journal.served[kind] += 1
            else:
                self._broke("corrupt", kind, request, begun, place, status, repr(body[:100]))
        elif status in (404, 503) and not self._leases.covers(request.service, begun, now()):
            self.journal.served[f"{kind}, refused: no lease was sure"] += 1
        else:
            known = self._leases.last_of(request.service)
            self._broke("status", kind, request, begun, place, status, f"{body[:150]!r} ({known})")

    def failed(self, kind: str, request: Request, begun: float, place: Place, error: BaseException) -> None:
        """An exchange that has no answer."""
        what = "hung" if isinstance(error, TimeoutError) else "broken"
        self._broke(what, kind, request, begun, place, 0, repr(error))

    # Private

    def _broke(
        self, what: str, kind: str, request: Request, begun: float, place: Place, status: int, detail: str
    ) -> None:
        text = f"{request.method} {request.path} of {request.service}: {status or ''} {detail}"
        self.journal.broke(
            Breakage(
                what,
                kind,
                begun,
                now(),
                text,
                request.service,
                status,
                place.port,
                place.opened,
                place.answered,
            )
        )

    async def _run(
        self, kind: str, client: Callable[[str, random.Random], Awaitable[None]], source: random.Random
    ) -> None:
        while not self._stopping:
            await client(kind, source)
            await asyncio.sleep(source.uniform(0.01, 0.05))

    def _request(self, source: random.Random) -> Request:
        services = self._services
        padding = source.choice(_SIZES)
        path = f"/pad/{padding}"
        draw = source.random()
        fleeting = services.fleeting()
        if draw < 0.2 and fleeting:
            return Request(source.choice(fleeting), path, None, padding)
        if draw < 0.5:
            return Request(source.choice(services.shaky), path, None, padding)
        body = source.randbytes(source.choice(_SIZES)) if source.random() < 0.4 else None
        return Request(source.choice((*services.steady, *services.rolling)), path, body, padding)

    async def _keep_alive(self, kind: str, source: random.Random) -> None:
        await self._http1(kind, [lambda: self._request(source)] * source.randrange(50, 400), source)

    async def _new(self, kind: str, source: random.Random) -> None:
        await self._http1(kind, [lambda: self._request(source)], source)

    async def _slow(self, kind: str, source: random.Random) -> None:
        pieces = source.randrange(5, 25)
        service = source.choice((*self._services.steady, *self._services.rolling))
        request = Request(service, f"/drip/{pieces}", None, pieces)
        await self._http1(kind, [lambda: request], source)

    async def _http1(self, kind: str, requests: list[Callable[[], Request]], source: random.Random) -> None:
        """Ask one after the other on one connection."""
        place, request, begun = Place(), requests[0](), now()
        try:
            async with asyncio.timeout(PATIENCE):
                client = await Http1.open(self.port, self.tls, request.service, place)
        except (OSError, TimeoutError) as error:
            self.failed(kind, request, begun, place, error)
            return
        try:
            for number, make in enumerate(requests):
                if self._stopping and number:
                    return
                request, begun = (request if number == 0 else make()), now()
                async with asyncio.timeout(PATIENCE):
                    status, body = await client.ask(request)
                self.answered(kind, request, begun, place, status, body)
                if client.told_to_leave:
                    return
                await asyncio.sleep(source.uniform(0.01, 0.07))
        except (OSError, EOFError, TimeoutError) as error:
            self.failed(kind, request, begun, place, error)
        finally:
            client.close()

    async def _http2(self, kind: str, source: random.Random) -> None:
        """Some rounds of several streams at once, on one connection."""
        place, requests, begun = Place(), [self._request(source) for _ in range(STREAMS)], now()
        try:
            async with asyncio.timeout(PATIENCE):
                client = await Http2.open(self.port, self.http2_tls, requests[0].service, place)
        except (OSError, TimeoutError) as error:
            self.failed(kind, requests[0], begun, place, error)
            return
        try:
            for _ in range(source.randrange(20, 100)):
                begun = now()
                async with asyncio.timeout(PATIENCE):
                    answers = await client.ask(requests)
                for request, (status, body) in zip(requests, answers, strict=True):
                    self.answered(kind, request, begun, place, status, body)
                if self._stopping:
                    return
                await asyncio.sleep(source.uniform(0.03, 0.15))
                requests = [self._request(source) for _ in range(STREAMS)]
        except ToldToLeave:
            self.journal.served[f"{kind}, told to leave"] += 1
        except (OSError, EOFError, TimeoutError, h2.exceptions.ProtocolError) as error:
            self.failed(kind, requests[0], begun, place, error)
        finally:
            client.close()


# Clients


@dataclass
class Place:
    """Where a connection comes from, and since when."""

    port: int = 0
    opened: float = 0.0
    answered: int = 0


class _Client:
    """A TLS connection whose own port is known before the handshake."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @staticmethod
    async def connect(
        port: int, tls: ssl.SSLContext, name: str, place: Place
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect and shake hands; `place` is filled in on the way."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            sock.setblocking(False)
            place.opened = now()
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
            place.port = sock.getsockname()[1]
            return await asyncio.open_connection(
                sock=sock, ssl=tls, server_hostname=name, ssl_handshake_timeout=PATIENCE
            )
        except BaseException:
            sock.close()
            raise

    def close(self) -> None:
        """Go, without a word."""
        self.writer.transport.abort()


class ToldToLeave(Exception):
    """A GOAWAY without an error: the proxy would answer still, but the h2 library reads no more."""


class Http1(_Client):
    """One HTTP/1.1 connection; `told_to_leave` when its last answer said that no other would follow."""

    told_to_leave = False

    @classmethod
    async def open(cls, port: int, tls: ssl.SSLContext, name: str, place: Place) -> Http1:
        return cls(*await cls.connect(port, tls, name, place))

    async def ask(self, request: Request) -> tuple[int, bytes]:
        """Send, and read the answer: status and body. Raises OSError, EOFError."""
        length = "" if request.body is None else f"Content-Length: {len(request.body)}\r\n"
        head = f"{request.method} {request.path} HTTP/1.1\r\nHost: {request.service}\r\n{length}\r\n"
        self.writer.write(head.encode() + (request.body or b""))
        lines = (await self.reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        fields = {k.lower(): v.strip() for k, _, v in (line.partition(b":") for line in lines[1:])}
        status = int(lines[0].split(b" ", 2)[1])
        self.told_to_leave = fields.get(b"connection", b"").lower() == b"close"
        if b"content-length" in fields:
            return status, await self.reader.readexactly(int(fields[b"content-length"]))
        body = b""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            body += (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)
        return status, body


class Http2(_Client):
    """One HTTP/2 connection, by the h2 library."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__(reader, writer)
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
        self._h2.initiate_connection()
        self._unsent: dict[int, bytes] = {}
        self._statuses: dict[int, int] = {}
        self._bodies: dict[int, bytearray] = {}
        self._ended: set[int] = set()
        self._aborted = ""  # what the proxy said when it gave a stream or the connection up
        self._frames = b""  # not yet looked at for a GOAWAY

    @classmethod
    async def open(cls, port: int, tls: ssl.SSLContext, name: str, place: Place) -> Http2:
        return cls(*await cls.connect(port, tls, name, place))

    async def ask(self, requests: list[Request]) -> list[tuple[int, bytes]]:
        """Send all at once and read all answers. Raises OSError, EOFError, ProtocolError, ToldToLeave."""
        streams = [self._begin(request) for request in requests]
        self._statuses, self._bodies, self._ended = {}, {stream: bytearray() for stream in streams}, set()
        self._send()
        while len(self._ended) < len(streams):
            data = await self.reader.read(1 << 16)
            if not data:
                raise EOFError(f"{len(streams) - len(self._ended)} streams had not ended")
            self._look_for_goaway(data)
            for event in self._h2.receive_data(data):
                self._take(event)
            if self._aborted:
                raise EOFError(self._aborted)
            self._send()
        return [(self._statuses[stream], bytes(self._bodies[stream])) for stream in streams]

    # Private

    def _look_for_goaway(self, data: bytes) -> None:
        self._frames += data
        while len(self._frames) >= 9:
            end = 9 + int.from_bytes(self._frames[:3], "big")
            if len(self._frames) < end:
                return
            frame, self._frames = self._frames[:end], self._frames[end:]
            if frame[3] == 7 and not any(frame[13:17]):  # GOAWAY with NO_ERROR
                raise ToldToLeave

    def _begin(self, request: Request) -> int:
        stream = self._h2.get_next_available_stream_id()
        fields = [
            (":method", request.method),
            (":scheme", "https"),
            (":authority", request.service),
            (":path", request.path),
        ]
        if request.body is not None:
            fields.append(("content-length", str(len(request.body))))
        self._h2.send_headers(stream, fields, end_stream=not request.body)
        if request.body:
            self._unsent[stream] = request.body
        return stream

    def _send(self) -> None:
        for stream, body in list(self._unsent.items()):
            while body:
                room = min(self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size)
                if room == 0:
                    break
                self._h2.send_data(stream, body[:room], end_stream=len(body) <= room)
                body = body[room:]
            if body:
                self._unsent[stream] = body
            else:
                del self._unsent[stream]
        self.writer.write(self._h2.data_to_send())

    def _take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.ResponseReceived):
            self._statuses[event.stream_id] = int(dict(event.headers)[b":status"])
        elif isinstance(event, h2.events.DataReceived):
            self._bodies[event.stream_id] += event.data
            self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            self._ended.add(event.stream_id)
        elif isinstance(event, h2.events.StreamReset):
            self._aborted = f"RST_STREAM with {event.error_code}"
        elif isinstance(event, h2.events.ConnectionTerminated):
            self._aborted = f"GOAWAY with {event.error_code}, last stream {event.last_stream_id}"
