"""Control's end of the feed when the workers are processes: one `RemoteWorker` for every connection.

The theory
- The workers connect, control accepts: the socket is the supervisor's, so it is there before either of them
  and stays when one is replaced. A worker that connects while there is no control waits in the backlog.
- A worker says hello with everything that it has. A control process that took a dead one's place waits for
  that (`recover`) before it publishes anything: the leases live on in the workers' tables, and what departed
  workers had counted in what they were given to keep. Certificates it reads again; only one whose files were
  spoilt meanwhile lives on in what the workers present (`certificates_of`).
- A worker that was just forked has nothing, and says nothing about what others have: as long as one that
  serves is merely slow, it is waited for. What a worker had that reported and died stays said.
- A worker that reports only after that is heard once all the same: what is newer in its table than what was
  taken over goes to `on_late`. Later hellos of it say nothing that did not come from here.
- Workers of the generation before an upgrade, while they drain, are guests: they get every table, and count
  as long as they are there, but nobody waits for them, and nothing is taken over from them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from portero_py.core.counters import Counters
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import FeedError
from portero_py.feed.feed import ACK_SECONDS, Feed
from portero_py.feed.messages import Departed, Hello
from portero_py.feed.remote_worker import RemoteWorker

if TYPE_CHECKING:
    from portero_py.core.certificates import Certificate
    from portero_py.core.health import Evidence

#: Seconds that a new control process waits for the other workers' hellos after the first one.
OTHERS_SECONDS: Final = 0.3
#: Seconds that it waits for any worker at all.
ANY_SECONDS: Final = 5.0
#: Seconds that it waits for the first worker of each former generation, and then for others.
GUEST_SECONDS: Final = 1.0
OTHER_GUESTS_SECONDS: Final = 0.1
#: Seconds between two looks at whether a slow worker is still there.
LOOK_SECONDS: Final = 0.1
#: Seconds that a scrape waits for the workers' newest counters.
ASK_SECONDS: Final = 0.25

_log = logging.getLogger(__name__)


class FeedServer:
    """Accepts the workers on `sock` and subscribes them to `feed`. Without `sock` there are guests alone.

    `workers` is how many there should be; `on_serving` is called whenever another number of them serves.
    """

    def __init__(
        self,
        feed: Feed,
        sock: socket.socket | None,
        workers: int,
        on_serving: Callable[[int], None] | None = None,
    ) -> None:
        self.feed = feed
        self._socket = sock
        self._workers = workers
        self._on_serving = on_serving
        self._connected: dict[RemoteWorker, Hello | None] = {}  # what it said, until that is not needed
        self._guests: set[RemoteWorker] = set()
        self._guests_wait = False  # they have what their former control gave them, and may be asked for it
        self._unheard: set[int] = set()  # former generations, by the descriptor, none of whom has reported
        self._changed = asyncio.Event()  # somebody came or went
        self._recovering = False
        self.on_late: Callable[[RoutingTable], None] | None = None
        self._heard: set[int] | None = None  # the workers that have reported; None before `recover` has ended
        self._recovered = 0  # the version that was taken over
        self._last_words: list[Hello] = []  # of workers that have died during the recovery
        self._departed_version = 0
        self._servers: list[asyncio.Server] = []

    @property
    def serving(self) -> int:
        """How many workers serve."""
        return sum(1 for worker in self._connected if worker.serving)

    @property
    def connected(self) -> int:
        """How many have said hello and are there."""
        return len(self._connected)

    async def start(self) -> None:
        """Accept workers."""
        if self._socket is not None:
            await self._accept(self._socket, are_guests=False)

    async def welcome(self, sock: socket.socket) -> None:
        """Accept the workers of a former generation, which connect to `sock`. First they only tell."""
        self._guests_wait = True
        self._unheard.add(sock.fileno())
        await self._accept(sock, are_guests=True)

    def feed_guests(self) -> None:
        """From now on they get what the others get."""
        self._guests_wait = False
        for worker in self._guests:
            self.feed.subscribe(worker)

    async def welcomed(self) -> None:
        """Wait a moment for them: they come at once, if they are there.

        What they have in flight counts for whoever asks then.
        """
        try:
            async with asyncio.timeout(GUEST_SECONDS):
                while self._unheard:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            _log.warning("no worker of a former version has reported")
        else:
            await asyncio.sleep(OTHER_GUESTS_SECONDS)

    async def close(self) -> None:
        """Let every worker go."""
        for server in self._servers:
            server.close()
        for worker in [*self._connected, *self._guests]:
            worker.close()

    def counted_before(self, counters: Counters) -> None:
        """Workers of former generations had counted this. To be called before `start`."""
        self.feed.add_departed(counters)
        self._departed_version += 1

    async def recover(
        self, may_have_tables: Callable[[int], bool] | None = None, patience: float = 0.0
    ) -> RoutingTable | None:
        """Take over from a control process that died: the newest table of any worker, None when none has one.

        Its services may have been published under a higher version than any that the caller knows.
        `may_have_tables` says of the number of a worker that has not reported whether it lives and has a
        table: such a one is waited for, up to `patience` seconds.
        """
        self._recovering = True
        await self._wait_for_hellos(1, ANY_SECONDS)
        await self._wait_for_hellos(self._workers, OTHERS_SECONDS)
        if may_have_tables is not None:
            await self._wait_for_tables(may_have_tables, patience)
        self._recovering = False
        hellos = {worker: hello for worker, hello in self._connected.items() if hello is not None}
        last_words, self._last_words = self._last_words, []
        self._connected = dict.fromkeys(self._connected)
        departed = (hello.departed for hello in (*hellos.values(), *last_words))
        kept = max(departed, key=lambda each: each.version, default=Departed())
        self.feed.add_departed(kept.counters)
        self._departed_version = max(self._departed_version, kept.version)
        if self._departed_version:  # not all have it, and some have left meanwhile
            self._departed_version += 1
            self._have_departed_kept()
        tables = {worker: hello.table.applied_to(RoutingTable()) for worker, hello in hellos.items()}
        every = [*tables.values(), *(hello.table.applied_to(RoutingTable()) for hello in last_words)]
        newest = max(every, key=lambda table: table.version, default=RoutingTable())
        for worker, table in tables.items():
            if table == newest:
                worker.has(newest)
        self._heard = {hello.worker for hello in (*hellos.values(), *last_words)}
        self._recovered = newest.version
        return newest if newest.services else None

    async def certificates_of(self, names: list[str]) -> list[Certificate]:
        """What the workers present for these names; of several for one name that which began last."""
        answers = [worker.ask_certificates(names) for worker in (*self._connected, *self._guests)]
        if not answers:
            return []
        done, _ = await asyncio.wait(answers, timeout=ACK_SECONDS)
        found: dict[str, Certificate] = {}
        for answer in done:
            for certificate in answer.result():
                former = found.get(certificate.name)
                if former is None or former.not_before < certificate.not_before:
                    found[certificate.name] = certificate
        return list(found.values())

    async def refresh(self) -> None:
        """Ask every worker for its counters, and wait a short while for them."""
        answers = [worker.ask() for worker in (*self._connected, *self._guests)]
        if answers:
            await asyncio.wait(answers, timeout=ASK_SECONDS)

    async def emptied(self) -> None:
        """Wait until no worker is there."""
        while self._connected:
            self._changed.clear()
            await self._changed.wait()

    # What its connections tell

    def joined(self, worker: RemoteWorker, hello: Hello) -> None:
        """A worker has said hello. Raises FeedError when it had done so before."""
        if worker in self._connected or worker in self._guests:
            raise FeedError("a worker says hello once")
        if worker.is_guest:
            self._guests.add(worker)
            self._unheard.discard(worker.came_by)
            if not self._guests_wait:
                self.feed.subscribe(worker)
            self._changed.set()
            return
        self._connected[worker] = hello
        if self._heard is not None and hello.worker not in self._heard:
            self._heard.add(hello.worker)
            if hello.table.version > self._recovered and self.on_late is not None:
                self.on_late(hello.table.applied_to(RoutingTable()))
        if self._departed_version and not self._recovering:
            worker.keep(Departed(self._departed_version, self.feed.departed))
        self.feed.subscribe(worker)
        self._changed.set()
        self.tell_serving()

    def left(self, worker: RemoteWorker) -> None:
        """A worker is gone: dead, most likely."""
        if worker in self._guests:
            self._guests.remove(worker)
            hello = None
            if self._guests_wait:
                self.feed.add_departed(worker.counters)
                return
        elif worker in self._connected:
            hello = self._connected.pop(worker)
        else:
            return  # it never said hello
        self.feed.unsubscribe(worker)
        self._departed_version += 1
        if not self._recovering:
            self._have_departed_kept()
        elif hello is not None:
            self._last_words.append(hello)  # and the others may keep more than is known here
        self._changed.set()
        self.tell_serving()

    def tell_serving(self) -> None:
        """Another number of workers serves, perhaps."""
        if self._on_serving is not None:
            self._on_serving(self.serving)

    def found(self, evidence: Evidence) -> None:
        """A worker has seen how a backend does."""
        self.feed.found(evidence)

    # Private

    async def _accept(self, sock: socket.socket, *, are_guests: bool) -> None:
        loop = asyncio.get_running_loop()
        came_by = sock.fileno()
        server = await loop.create_unix_server(
            lambda: RemoteWorker(self, is_guest=are_guests, came_by=came_by), sock=sock
        )
        self._servers.append(server)

    def _have_departed_kept(self) -> None:
        departed = Departed(self._departed_version, self.feed.departed)
        for worker in self._connected:
            try:
                worker.keep(departed)
            except Exception:  # one that is broken must not keep the others from it
                _log.exception("a worker could not be given what others had counted")
                self.feed.count_fault(FeedError.reason)

    async def _wait_for_tables(self, may_have_tables: Callable[[int], bool], patience: float) -> None:
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + patience
        while True:
            reported = {
                hello.worker for hello in (*self._connected.values(), *self._last_words) if hello is not None
            }
            missing = [
                number
                for number in range(self._workers)
                if number not in reported and may_have_tables(number)
            ]
            if not missing:
                return
            if loop.time() >= ends_at:
                _log.error("going on without what these workers know, they do not report: %s", missing)
                return
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._changed.wait()

    async def _wait_for_hellos(self, count: int, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                while len(self._connected) < count:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            _log.warning("%d of %d workers have reported", len(self._connected), self._workers)
