"""What stands before an aiohttp server that strangers may talk to: it bounds connections and time.

aiohttp waits for a request's head for an hour, takes every connection, and logs a traceback for every
malformed request. On a public port the first two cost file descriptors that the data plane needs, the last
one fills the disk.

The rules
- A connection is *waiting* (for a request's head, or for its client to take the answer) or *busy* (a request
  is at work). Either has its time; when that is up it is aborted.
- When there are too many, one of the address that has most makes way: one that does not take its answer, or
  else the one that has waited longest. So strangers who say nothing push each other out, and who has
  something to say is heard: also when it has been said and just not read yet, as in a burst of many agents
  behind one address. That counts only before anything was read, and for a moment when it was a whole head:
  who sends request after request and takes no answer has unread bytes for ever. When nobody can make way the
  new one is turned away.
- An answer that its client knows to wait for may have more time (`may_take`): whoever makes it sees when the
  client hangs up, and bounds how many of those there are.
- An arrival at a full door costs at most `MOST_ASKED` questions to the kernel, however many are inside.
- An IPv6 host has 2^64 addresses: a /64 counts as one.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import math
import socket
import termios
import time
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import IPv6Address
from itertools import islice
from typing import Any, Final, TypeVar, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

#: Seconds until a request's head is complete, from the connection's begin or the end of the answer before.
#: More than aiohttp's own client keeps a connection (15 s), which would otherwise lose a race now and then.
WAIT_SECONDS: Final = 20.0

#: Seconds from a request's head until its answer is made.
BUSY_SECONDS: Final = 60.0

MAX_CONNECTIONS: Final = 256

#: Seconds that who was heard for the first time has until its request counts as being at work: aiohttp reads
#: in one turn of the loop and begins in a later one.
HEARD_SECONDS: Final = 0.25

#: Connections that are looked at to find one that makes way.
MOST_ASKED: Final = 16

#: Seconds between two lines of the log about connections that had to go.
SAY_SECONDS: Final = 60.0

_log = logging.getLogger(__name__)

_Asked = TypeVar("_Asked", bound=web.BaseRequest)


class _NotForMalformed(logging.Filter):
    """Lets everything pass but aiohttp's tracebacks of requests that were no HTTP."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


#: For aiohttp's `logger`: bugs are logged, other people's mistakes are not.
quiet_logger: Final = logging.getLogger("portero_py.control.aiohttp")
quiet_logger.addFilter(_NotForMalformed())


class Door:
    """Lets connections in, `most` at a time. `name` is for the log."""

    def __init__(
        self,
        name: str,
        most: int = MAX_CONNECTIONS,
        *,
        wait_seconds: float = WAIT_SECONDS,
        busy_seconds: float = BUSY_SECONDS,
    ) -> None:
        self.wait_seconds = wait_seconds
        self.busy_seconds = busy_seconds
        self._name = name
        self._most = most
        self._inside: dict[asyncio.BaseTransport, _Guest] = {}
        self._groups: dict[str, _Group] = {}
        #: Those in which somebody may make way, by size.
        self._movable: dict[int, dict[_Group, None]] = {}
        self._gone = 0  # since the last line in the log
        self._said_at = -SAY_SECONDS

    def __len__(self) -> int:
        return len(self._inside)

    @property
    def most(self) -> int:
        """How many it lets in at a time."""
        return self._most

    @property
    def has_silent(self) -> bool:
        """Whether somebody inside has not said anything yet."""
        return any(guest.is_silent for guest in self._inside.values())

    def may_take(self, request: web.BaseRequest, seconds: float) -> asyncio.Future[None]:
        """Let a busy one be busy for so long from now on; the future is done when its connection is lost."""
        transport = request.transport
        guest = None if transport is None else self._inside.get(transport)
        if guest is not None:
            return guest.may_take(seconds)
        lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if transport is None or transport.is_closing():
            lost.set_result(None)
        return lost

    async def busy(self, request: _Asked, answer: Callable[[_Asked], Awaitable[web.StreamResponse]]) -> Any:
        """Answer a request; its connection is busy meanwhile."""
        transport = request.transport
        guest = None if transport is None else self._inside.get(transport)
        if guest is None:  # gone meanwhile, or let in by another site
            return await answer(request)
        guest.begin()
        try:
            return await answer(request)
        finally:
            guest.end()

    # What guests call

    def enter(self, guest: _Guest) -> bool:
        """Let a new one in, if there is a place or somebody can make way."""
        if len(self._inside) >= self._most:
            self._say()
            former = self._who_makes_way()
            if former is None:
                return False
            self.leave(former)
            former.abort()
        group = self._groups.get(guest.address)
        if group is None:
            group = self._groups[guest.address] = _Group()
        group.size += 1
        self._inside[guest.transport] = guest
        group.waiting[guest] = None
        self._sort(group)
        return True

    def leave(self, guest: _Guest) -> None:
        """One is gone, or has to go; harmless when it is gone already."""
        if self._inside.pop(guest.transport, None) is None:
            return
        group = self._groups[guest.address]
        group.waiting.pop(guest, None)
        group.stuck.pop(guest, None)
        group.size -= 1
        self._sort(group)
        if not group.size:
            del self._groups[guest.address]

    def wait(self, guest: _Guest) -> None:
        """One waits from now on, if it is still there."""
        if guest.transport in self._inside:
            group = self._groups[guest.address]
            group.waiting[guest] = None
            self._sort(group)

    def work(self, guest: _Guest) -> None:
        """One waits no longer."""
        if guest.transport in self._inside:
            group = self._groups[guest.address]
            group.waiting.pop(guest, None)
            self._sort(group)

    def stick(self, guest: _Guest) -> None:
        """One does not take what it is sent."""
        if guest.transport in self._inside:
            group = self._groups[guest.address]
            group.stuck[guest] = None
            self._sort(group)

    def flow(self, guest: _Guest) -> None:
        """One takes again what it is sent."""
        if guest.transport in self._inside:
            group = self._groups[guest.address]
            group.stuck.pop(guest, None)
            self._sort(group)

    # Private

    def _sort(self, group: _Group) -> None:
        """Put a group where it belongs now; of two that are as large the one that came first is before."""
        size = group.size if group.waiting or group.stuck else 0
        if size == group.place:
            return
        if group.place:
            place = self._movable[group.place]
            del place[group]
            if not place:
                del self._movable[group.place]
        if size:
            self._movable.setdefault(size, {})[group] = None
        group.place = size

    def _who_makes_way(self) -> _Guest | None:
        for guest in islice(self._candidates(), MOST_ASKED):
            if not guest.has_spoken():
                return guest
        return None

    def _candidates(self) -> Iterator[_Guest]:
        for size in sorted(self._movable, reverse=True):  # there are few: n sizes need n * n / 2 guests
            for group in self._movable[size]:
                yield from group.stuck
                yield from group.waiting

    def _say(self) -> None:
        self._gone += 1
        now = time.monotonic()
        if now - self._said_at >= SAY_SECONDS:
            _log.warning("%s: too many connections, %d had to go", self._name, self._gone)
            self._said_at, self._gone = now, 0


class OpenSite(web.BaseSite):
    """A listening socket behind a door; otherwise what aiohttp's SockSite is."""

    def __init__(self, runner: web.BaseRunner, sock: socket.socket, door: Door) -> None:
        super().__init__(runner)
        self._socket = sock
        self._door = door

    @property
    def name(self) -> str:
        """What it is bound to."""
        return str(self._socket.getsockname())

    async def start(self) -> None:
        """Begin to accept."""
        await super().start()
        server, door = self._runner.server, self._door
        assert server is not None
        self._server = await asyncio.get_running_loop().create_server(
            lambda: _Guest(door, server), sock=self._socket, backlog=self._backlog
        )


# Private


class _Group:
    """The connections of one address; of those who wait the one that has waited longest is the first.

    `stuck` do not take their answer; `place` is where the door keeps it, 0: nowhere.
    """

    __slots__ = ("place", "size", "stuck", "waiting")

    def __init__(self) -> None:
        self.size = 0
        self.place = 0
        self.waiting: dict[_Guest, None] = {}
        self.stuck: dict[_Guest, None] = {}


class _Guest(asyncio.Protocol):
    """One connection: passes everything on to aiohttp's protocol, which is made once it is let in."""

    def __init__(self, door: Door, server: Callable[[], asyncio.BaseProtocol]) -> None:
        self._door = door
        self._server = server
        # connection
        self.transport: asyncio.Transport = cast("asyncio.Transport", None)  # set by connection_made
        self.address = ""
        self._inner: asyncio.Protocol | None = None
        self._heard_at = 0.0  # when its first head was read; long ago once that is at work, or was not whole
        self._lost: asyncio.Future[None] | None = None  # for who wants to know when it is gone
        self._end: asyncio.TimerHandle | None = None

    @property
    def is_silent(self) -> bool:
        """Whether nothing of it was read."""
        return not self._heard_at

    def abort(self) -> None:
        """End it at once."""
        self.transport.abort()

    def has_spoken(self) -> bool:
        """Whether there is something of it to read, and nothing was read yet; or its first head just was."""
        if self._heard_at:
            return asyncio.get_running_loop().time() - self._heard_at < HEARD_SECONDS
        sock = self.transport.get_extra_info("socket")
        if sock is None:
            return False
        try:
            unread = fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4))
        except (OSError, ValueError):  # it is gone
            return False
        return any(unread)

    def begin(self) -> None:
        """A request is there."""
        self._heard_at = -math.inf
        self._door.work(self)
        self._within(self._door.busy_seconds)

    def may_take(self, seconds: float) -> asyncio.Future[None]:
        """Its answer may take so long; done when the connection is lost."""
        if self._end is not None:
            self._within(seconds)
        if self._lost is None:
            self._lost = asyncio.get_running_loop().create_future()
            if self._end is None:
                self._lost.set_result(None)
        return self._lost

    def end(self) -> None:
        """Its answer is made."""
        if self._end is not None:
            self._door.wait(self)
            self._within(self._door.wait_seconds)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        self.address = _address(transport)
        if not self._door.enter(self):
            self.abort()
            return
        self._within(self._door.wait_seconds)
        self._inner = cast("asyncio.Protocol", self._server())
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if not self._heard_at:
            # Half a head is no request: whoever sends a byte now and then would never have to go.
            is_whole = data.find(b"\r\n\r\n") >= 0
            self._heard_at = asyncio.get_running_loop().time() if is_whole else -math.inf
        if self._inner is not None:
            self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return None if self._inner is None else self._inner.eof_received()

    def pause_writing(self) -> None:
        self._door.stick(self)
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._door.flow(self)
        if self._inner is not None:
            self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._door.leave(self)
        if self._end is not None:
            self._end.cancel()
            self._end = None
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(None)
        if self._inner is not None:
            self._inner.connection_lost(exc)

    # Private

    def _within(self, seconds: float) -> None:
        if self._end is not None:
            self._end.cancel()
        self._end = asyncio.get_running_loop().call_later(seconds, self.abort)


def _address(transport: asyncio.BaseTransport) -> str:
    peer = transport.get_extra_info("peername")
    host = str(peer[0]) if isinstance(peer, tuple) and peer else ""
    if ":" not in host:
        return host
    found = IPv6Address(host.partition("%")[0])
    return str(found.ipv4_mapped or found.packed[:8].hex())
