"""Well-behaved backends, and the agents that keep their leases.

A backend answers every request at once with one line (who it is, which worker asked, what it got) and the
padding that the path asks for; `/drip/N` comes in N pieces. It dies by closing its port and resetting what is
open, never in the middle of an answer, and comes back on the same port. It may hang (it takes what it is sent
and says nothing until it is well again, as a stopped process does) or fail (503 to everything). Probes, `/up`
and `OPTIONS *`, it answers as it is.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from tests.e2e.proxy_process import SECRET, free_port, registration, token
from tests.slow.chaos_journal import Breakage, Journal, now
from tests.slow.chaos_ledger import Leases, Name

#: Longer than control is ever stopped; see `chaos_ledger`.
API_PATIENCE: Final = 30.0

#: Seconds between the pieces of a slow answer.
DRIP: Final = 0.2

#: What a failing backend says.
FAILING: Final = b"failing on purpose"

HEALTH_PATH: Final = "/up"


class Mood(Enum):
    WELL = "well"
    HANGS = "hangs"
    FAILS = "fails"


class Backend:
    """One address, and what it serves. `instance` is its name in every lease of it."""

    def __init__(self, instance: str, journal: Journal) -> None:
        self.instance = instance
        self.port = free_port()
        self.journal = journal
        self.connections: set[_Connection] = set()
        self.mood = Mood.WELL
        self.asked_at = 0.0  # the last request, probes not counted
        self.held: list[Callable[[], None]] = []  # answers that it owes while it hangs
        self._server: asyncio.Server | None = None

    @property
    def is_alive(self) -> bool:
        """Whether it listens."""
        return self._server is not None

    async def live(self) -> None:
        """Listen."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self), "127.0.0.1", self.port, backlog=1024
        )

    async def die(self) -> None:
        """Close the port and reset every connection."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        self.hang_up()
        if server is not None:
            await server.wait_closed()

    def recover(self) -> None:
        """Be well again, and say what was owed."""
        self.mood = Mood.WELL
        held, self.held = self.held, []
        for answer in held:
            answer()

    def hang_up(self) -> None:
        """Let go of every connection, so that the proxy holds none to here."""
        for connection in list(self.connections):
            connection.transport.abort()


class _Connection(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._received = bytearray()
        self._drips: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._backend.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._backend.connections.discard(self)
        if self._drips is not None:
            self._drips.cancel()

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            lines = bytes(self._received[:end]).split(b"\r\n")
            fields = {k.lower(): v.strip() for k, _, v in (line.partition(b":") for line in lines[1:])}
            stop = end + 4 + int(fields.get(b"content-length", b"0"))
            if len(self._received) < stop:
                return
            body = bytes(self._received[end + 4 : stop])
            del self._received[:stop]
            self._answer(lines[0], fields, body)

    # Private

    def _answer(self, line: bytes, fields: dict[bytes, bytes], body: bytes) -> None:
        backend = self._backend
        is_probe = line.startswith((b"OPTIONS * ", b"GET %b " % HEALTH_PATH.encode()))
        if not is_probe:
            backend.asked_at = now()
        if backend.mood is Mood.HANGS:
            backend.held.append(lambda: self._answer(line, fields, body))
        elif self.transport.is_closing():
            return
        elif backend.mood is Mood.FAILS:
            said = FAILING + b" by " + backend.instance.encode()
            self.transport.write(
                b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: %d\r\n\r\n" % len(said) + said
            )
        elif is_probe:
            self.transport.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        else:
            self._serve(line, fields, body)

    def _serve(self, line: bytes, fields: dict[bytes, bytes], body: bytes) -> None:
        try:
            _, path, _ = line.split(b" ")
            kind, number = path.decode().strip("/").split("/")
            worker = fields[b"x-request-id"].partition(b"-")[0]
        except (ValueError, KeyError) as error:
            detail = f"{self._backend.instance} got {line!r}, {fields}: {error!r}"
            self._backend.journal.broke(Breakage("corrupt", "backend", now(), now(), detail))
            self.transport.abort()
            return
        first = b"%b %b %d %08x\n" % (self._backend.instance.encode(), worker, len(body), zlib.crc32(body))
        if kind == "pad":
            content = first + b"x" * int(number)
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
        else:
            self.transport.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            self._drip(first, int(number))

    def _drip(self, piece: bytes, left: int) -> None:
        self.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        if left == 0:
            self.transport.write(b"0\r\n\r\n")
            return
        self._drips = asyncio.get_running_loop().call_later(DRIP, self._drip, b"x", left - 1)


# The registration API


@dataclass(frozen=True)
class ApiAnswer:
    """`status` is 0 when there was none: then `body` says why."""

    status: int
    body: bytes


class RegistrationClient:
    """Asks the registration API, on a connection of its own each time."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def ask(self, method: str, path: str, content: dict[str, object] | None = None) -> ApiAnswer:
        """One request, with secret and token."""
        writer = None
        try:
            async with asyncio.timeout(API_PATIENCE):
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                writer.write(self._request(method, path, content))
                answer = await reader.read(-1)
        except (OSError, TimeoutError) as error:
            return ApiAnswer(0, repr(error).encode())
        finally:
            if writer is not None:
                writer.transport.abort()
        head, found, body = answer.partition(b"\r\n\r\n")
        if not found:
            return ApiAnswer(0, b"no whole answer, but %d bytes" % len(answer))
        if b"transfer-encoding: chunked" in head.lower():
            whole = _unchunked(body)
            if whole is None:
                return ApiAnswer(0, b"an answer that broke off")
            body = whole
        return ApiAnswer(int(head.split(b" ", 2)[1]), body)

    # Private

    def _request(self, method: str, path: str, content: dict[str, object] | None) -> bytes:
        body = json.dumps(content).encode() if content is not None else b""
        service = str(content["service_name"]) if content is not None else ""
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: api\r\nConnection: close\r\n"
            f"X-Register-Secret: {SECRET}\r\nAuthorization: Bearer {token(service)}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


def _unchunked(body: bytes) -> bytes | None:
    """What the chunks hold; None when the last one is missing."""
    whole = b""
    while True:
        size, found, rest = body.partition(b"\r\n")
        if not found:
            return None
        length = int(size, 16)
        if not length:
            return whole
        if len(rest) < length + 2:
            return None
        whole, body = whole + rest[:length], rest[length + 2 :]


class Agents:
    """Registers, renews and releases leases, and keeps the ledger.

    Of two requests for one lease at a time nobody knows which comes first: each waits for the one before it.
    """

    def __init__(self, journal: Journal, leases: Leases, api: RegistrationClient) -> None:
        self._journal = journal
        self._leases = leases
        self._api = api
        self._turns: dict[Name, asyncio.Lock] = {}
        self.last_answer = ApiAnswer(0, b"")  # to a release

    async def register(self, service: str, instance: str, port: int, ttl: int, health_path: str = "") -> bool:
        """Ask for a lease, or for its renewal; whether it was granted."""
        name: Name = (service, instance)
        async with self._turn(name):
            asked = self._leases.asked(name, port, ttl)
            fields = registration(service, "127.0.0.1", port, ttl_seconds=ttl, instance_id=instance)
            if health_path:
                fields["health_path"] = health_path
            answer = await self._api.ask("POST", "/register", fields)
            self._leases.answered(name, asked, ttl, granted=answer.status == 200)
        self._judge("register", name, asked, answer)
        return answer.status == 200

    async def release(self, service: str, instance: str, wait_seconds: float = 0.0) -> bool:
        """Give a lease back; whether that was answered. That there was none any more is an answer, too.

        With `wait_seconds` the answer comes when nothing is in flight there any more.
        """
        name: Name = (service, instance)
        async with self._turn(name):
            asked = now()
            sure_until = self._leases.releasing(name)
            fields: dict[str, object] = {"service_name": service, "instance_id": instance}
            if wait_seconds:
                fields["wait_seconds"] = wait_seconds
            answer = self.last_answer = await self._api.ask("DELETE", "/register", fields)
            if answer.status in (200, 404):
                self._leases.released(name)
        if answer.status == 404 and now() < sure_until:
            detail = f"{instance} of {service}: 404 to its release, {sure_until - now():.1f} s before its end"
            self._journal.broke(Breakage("lease lost", "agent", asked, now(), detail, service))
        elif answer.status != 404:
            self._judge("release", name, asked, answer)
        return answer.status in (200, 404)

    async def keep(
        self, service: str, backend: Backend, ttl: int, renew_after: float, health_path: str = ""
    ) -> None:
        """Keep a lease for as long as the backend lives, until cancelled. It does not release it."""
        while True:
            pause = renew_after
            if backend.is_alive and not await self.register(
                service, backend.instance, backend.port, ttl, health_path
            ):
                pause = min(0.3, renew_after)
            await asyncio.sleep(pause)

    # Private

    def _turn(self, name: Name) -> asyncio.Lock:
        return self._turns.setdefault(name, asyncio.Lock())

    def _judge(self, what: str, name: Name, asked: float, answer: ApiAnswer) -> None:
        if answer.status == 200:
            self._journal.served[f"api {what}"] += 1
            return
        kind = "api broken" if answer.status == 0 else "api refused"
        detail = f"{what} {name[1]} of {name[0]}: {answer.status} {answer.body[:200]!r}"
        self._journal.broke(
            Breakage(kind, "agent", asked, now(), detail, service=name[0], status=answer.status)
        )
