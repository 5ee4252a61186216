"""What runs in the processes that the supervisor forks: control in the first, a worker in each other one.

The rules
- A child inherits everything ready: listening sockets, the front TLS context, the feed's socket. It closes
  what is not for it: a listening socket is only closed when its last holder has closed it.
- Signals are blocked until the loop heeds them: none is lost between the fork and that. SIGINT is for the
  supervisor alone, who tells the others (a terminal sends it to all). A stop goes before reloads (`signals`),
  and no reload ends a process, whatever may go wrong with it.
- A worker: SIGTERM drains, then it ends. SIGHUP means that the supervisor has read the configuration again:
  everybody takes that reading (`readings`). Control follows the files, and asks the supervisor by SIGHUP.
- Control: SIGHUP too, and looks at the certificates. SIGTERM only makes /readyz say 503: backends renew to
  the end. SIGUSR1, when the workers are gone, ends it. (A SIGTERM for it alone ends it too, in the end.)
- Beside another generation (an upgrade) both prepare and wait: control until the board says that they may go,
  workers for the first table. Before control closes for a successor, the board says that too.
- The supervisor's death is the end of the lifeline, a pipe that nobody writes to: a worker drains as if told
  to. Control closes for the next generation, which the main process starts; when that is gone too, it stays
  until the workers are.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import signal
import socket
import time
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any, Final

import uvloop

from portero_py.config.files import Seen
from portero_py.config.model import Config
from portero_py.control.api.state import State
from portero_py.control.kept_leases import KeptLeases
from portero_py.core.limits import SharedCounts
from portero_py.core.rate_limit import Buckets
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import ConfigError
from portero_py.feed.client import FeedClient
from portero_py.feed.feed import Feed
from portero_py.feed.server import FeedServer
from portero_py.proxy.downstream.sni import FrontTls
from portero_py.proxy.worker import Leave, Worker
from portero_py.run import logs, tuning
from portero_py.run.generation import Generation
from portero_py.run.processes import BEAT_SECONDS, HANG_SECONDS, UNUSABLE, Board
from portero_py.run.readings import Readings
from portero_py.run.signals import Signals
from portero_py.run.slack import Slack
from portero_py.run.sockets import Listening, Rendezvous

#: Control's slot on the board; the workers have those behind it.
CONTROL: Final = 0

#: Seconds in which a SIGTERM to control must turn out to be the supervisor's wish.
STRAY_SECONDS: Final = 1.0

#: Seconds that a new control process waits for a worker that is slow: if it hangs, it is replaced by then.
PATIENCE: Final = HANG_SECONDS + 3.0

#: Seconds between two looks at whether the other generation has left.
LOOK_SECONDS: Final = 0.005

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Inheritance:
    """What the supervisor made before it forked. `https_port` is where plain HTTP redirects to."""

    config: Config
    readings: Readings
    seen: Seen  # what `config` was read from
    supervisor: int  # its process id
    listening: Listening
    https_port: int
    rendezvous: Rendezvous
    front_tls: FrontTls
    board: Board
    lifeline: tuple[int, int]  # a pipe: its writing end is the supervisor's
    log_lock: int
    limit_file: int  # see proxy/upstream/rooms.py
    clients: mmap.mmap  # how many connections each has in each worker
    buckets: mmap.mmap  # what is left of rate limits, see core/rate_limit.py
    place: Generation
    kept: KeptLeases
    former_feeds: list[socket.socket]  # where workers of the former generation look for control

    def restarts(self) -> dict[str, int]:
        """How often each process was replaced, by its name in the metrics."""
        names = ["control", *(str(number) for number in range(self.config.workers))]
        return {name: self.board.restarts(slot) for slot, name in enumerate(names)}


def run_control(inherited: Inheritance, again: bool) -> int:
    """The control process, from the fork to the exit status; `again` when it replaces another."""
    inherited.listening.close_proxy()
    inherited.front_tls.forget_keys()
    return _run(inherited, CONTROL, _Control(inherited, again).serve())


def run_worker(inherited: Inheritance, number: int) -> int:
    """A worker process, from the fork to the exit status."""
    inherited.listening.close_control()
    inherited.rendezvous.stop_listening()
    for sock in inherited.former_feeds:
        sock.close()
    return _run(inherited, CONTROL + 1 + number, _Worker(inherited, number).serve())


# Private


def _run(inherited: Inheritance, slot: int, serve: Coroutine[Any, Any, None]) -> int:
    tuning.set_name("portero-control" if slot == CONTROL else f"portero-work{slot - 1}")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # for the main process: who sends it to all means that one
    os.close(inherited.lifeline[1])
    inherited.place.channel.close()  # the supervisor's end of it alone must say that it lives
    try:
        uvloop.run(serve)
    except ConfigError as error:
        inherited.board.complain(slot, str(error))
        return UNUSABLE
    return 0


class _Process:
    """What both kinds have in common: a heartbeat, signals through one queue, the lifeline."""

    def __init__(self, inherited: Inheritance, slot: int) -> None:
        self.inherited = inherited
        self.config = inherited.config
        self.slot = slot
        self.signals = Signals()

    async def listen_to(self, *numbers: signal.Signals) -> asyncio.Task[None]:
        """From now on signals and the lifeline's end (as SIGTERM) are heeded; returns the heartbeat."""
        loop = asyncio.get_running_loop()
        loop.set_default_executor(tuning.Threads(thread_name_prefix="portero"))
        self.signals.listen_to(*numbers)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        loop.add_reader(self.inherited.lifeline[0], self._orphaned, loop)
        return asyncio.create_task(self._beat(), name="heartbeat")

    # Private

    def _orphaned(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.remove_reader(self.inherited.lifeline[0])
        _log.error("the supervisor is gone: ending")
        self.signals.tell(signal.SIGTERM)
        self.orphaned()

    def orphaned(self) -> None:
        """The supervisor will not tell anything any more."""

    async def _beat(self) -> None:
        board, slot, slack = self.inherited.board, self.slot, Slack()
        while True:
            board.beat(slot, time.monotonic())
            slack.look()
            await asyncio.sleep(BEAT_SECONDS)


class _Worker(_Process):
    def __init__(self, inherited: Inheritance, number: int) -> None:
        super().__init__(inherited, CONTROL + 1 + number)
        self.config = replace(inherited.config, services=(), routes=())  # they come by the feed
        self._number = number

    async def serve(self) -> None:
        heartbeat = await self.listen_to(signal.SIGTERM, signal.SIGHUP)
        inherited = self.inherited
        worker = Worker(
            self.config,
            asyncio.get_running_loop(),
            front_tls=inherited.front_tls,
            log_lock=inherited.log_lock,
            limit_file=inherited.limit_file,
            start=self._number,
            shared=SharedCounts(memoryview(inherited.clients), self._number),
            buckets=Buckets(memoryview(inherited.buckets), self.config.workers, self._number),
            most=tuning.shares(tuning.open_files(), control=False, traffic=True).clients,
        )
        feed = FeedClient(worker, inherited.rendezvous.path, self._number, time.monotonic)
        worker.tell(feed.found)
        fed = asyncio.create_task(feed.run(), name="feed")
        fed.add_done_callback(self._unfed)
        inherited.board.prepared(self.slot)
        starting = asyncio.create_task(self._start(worker, feed), name="start")
        while await self.signals.next() is signal.SIGHUP:
            await self.signals.unless_stopped(self._reload(worker))
        starting.cancel()
        await asyncio.wait([starting])
        board = inherited.board
        if board.hands_over:
            leave = Leave.TO_SUCCESSOR
        else:
            leave = Leave.SOCKETS_STAY if "https" in inherited.listening.kept else Leave.ALONE
        await worker.drain(self.config.timeouts.drain, leave)
        fed.cancel()
        await asyncio.wait([fed])
        await feed.close()
        heartbeat.cancel()
        if not starting.cancelled():
            starting.result()

    # Private

    async def _reload(self, worker: Worker) -> None:
        try:
            found = self.inherited.readings.common()
            if found is not None and found != self.config:
                logs.set_level(found.log.level)
                worker.reconfigure(found)
                self.config = found
        except Exception:  # a bug: no reason to end what serves
            _log.exception("the reload failed: what it had not changed yet stays")
            worker.counters.errors["reload"] += 1

    def _unfed(self, fed: asyncio.Task[None]) -> None:
        """Whatever it is that broke the feed: a worker without one must be replaced."""
        if not fed.cancelled():
            _log.error("the feed ended", exc_info=fed.exception())
            self.signals.tell(signal.SIGTERM)

    async def _start(self, worker: Worker, feed: FeedClient) -> None:
        """Accept as soon as there is a table: before, every answer would be 404."""
        try:
            await feed.supplied()
            await worker.start(self.inherited.listening.proxy, tls=self.config.tls.enabled)
        except Exception:  # raised on: it ends, and is replaced
            self.signals.tell(signal.SIGTERM)
            raise
        feed.serving()
        self.inherited.board.ready(self.slot)


class _Control(_Process):
    def __init__(self, inherited: Inheritance, again: bool) -> None:
        super().__init__(inherited, CONTROL)
        self._again = again
        self._draining = False
        self._has_successor = False
        self._was_ready = again
        self._watch: asyncio.Task[None] | None = None
        self._late: asyncio.Queue[RoutingTable] = asyncio.Queue()  # one table a worker at most

    async def serve(self) -> None:
        from portero_py.run.control_plane import ControlPlane  # the supervisor has loaded it

        heartbeat = await self.listen_to(signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
        inherited, loop = self.inherited, asyncio.get_running_loop()
        feed = Feed()
        self._server = FeedServer(
            feed, inherited.rendezvous.socket, self.config.workers, lambda _: self._tell_state()
        )
        self._server.on_late = self._late.put_nowait
        self._plane = ControlPlane(
            self.config,
            inherited.listening,
            inherited.https_port,
            feed,
            tuning.shares(tuning.open_files(), control=True, traffic=False),
            kept=inherited.kept,
            refresh=self._server.refresh,
            restarts=inherited.restarts,
            reloads=lambda: inherited.readings.reloads,
            ask=self._ask_for_reading,
            seen=inherited.seen,
        )
        if not await self.signals.unless_stopped(self._start()):
            _log.info("told to stop before everything was there")
        while (number := await self.signals.next()) is not signal.SIGUSR1:
            if number is signal.SIGHUP:
                await self.signals.unless_stopped(self._reload())
            else:
                self._draining = True
                self._tell_state()
                loop.call_later(STRAY_SECONDS, self._end_if_stray)
        await self._plane.close(hand_over=inherited.board.hands_over or self._has_successor)
        await self._server.close()
        heartbeat.cancel()

    def orphaned(self) -> None:
        if self.inherited.place.has_main_process:
            # It starts another generation: registrations wait for that one, and so do the workers that drain.
            self._has_successor = True
            self.signals.tell(signal.SIGUSR1)
        else:
            self._watch = asyncio.create_task(self._wait_for_workers(), name="last worker")

    # Private

    async def _start(self) -> None:
        if not self._again and not self.inherited.place.is_first:
            await self._plane.prepare()
            await self._until_it_may_go()
        await self.inherited.kept.claim()
        kept = self.inherited.kept.load()
        if kept is not None and not self._again:
            self._server.counted_before(kept.departed)
        await self._server.start()
        table = await self._server.recover(self._serves, PATIENCE) if self._again else None
        if kept is not None and (table is None or table.version < kept.table.version):
            table = kept.table  # of another generation, which had served for a moment, or is gone
        for sock in self.inherited.former_feeds:
            await self._server.welcome(sock)
        if self.inherited.former_feeds and not self._again:
            await self._server.welcomed()
        knows_others = self._again or self.inherited.former_feeds
        certificates = self._server.certificates_of if knows_others else None
        if table is None:
            await self._plane.load(certificates)
        else:
            await self._plane.take_over(table, certificates)
        self._server.feed_guests()
        await self._plane.serve()
        self._plane.own(self._adopt, "late workers")
        self.inherited.board.ready(self.slot)
        self._tell_state()

    async def _until_it_may_go(self) -> None:
        board = self.inherited.board
        board.prepared(self.slot)
        while not board.may_go:  # noqa: ASYNC110 - memory that processes share wakes up nobody
            await asyncio.sleep(LOOK_SECONDS)

    async def _adopt(self) -> None:
        while True:
            await self._plane.adopt(await self._late.get())

    def _serves(self, number: int) -> bool:
        """Whether that worker lives, as far as the supervisor knows, and has had a table."""
        return self.inherited.board.is_ready(CONTROL + 1 + number)

    async def _reload(self) -> None:
        try:
            found = await asyncio.to_thread(self.inherited.readings.whole)
            if found is not None:
                logs.set_level(found[0].log.level)
                await self._plane.reconfigure(*found)
                self.config = found[0]
            await self._plane.rescan()
        except Exception:  # a bug: no reason to end what serves
            _log.exception("the reload failed: what it had not changed yet stays")
            self._plane.count_fault("reload")

    def _ask_for_reading(self) -> None:
        """The supervisor reads, and tells everybody."""
        parent = os.getppid()
        if parent == self.inherited.supervisor:
            os.kill(parent, signal.SIGHUP)

    def _end_if_stray(self) -> None:
        """Somebody else sent SIGTERM, to control alone: end, and be replaced."""
        if not self.inherited.board.stopping and self._watch is None:
            self.signals.tell(signal.SIGUSR1)

    async def _wait_for_workers(self) -> None:
        """Nobody will send SIGUSR1: see for oneself when the workers are gone."""
        timeouts = self.config.timeouts
        try:
            await self._plane.lend()
            async with asyncio.timeout(timeouts.drain + timeouts.shutdown):
                await self._server.emptied()
        except TimeoutError:
            _log.warning("some workers are still there")
        finally:
            self.signals.tell(signal.SIGUSR1)

    def _tell_state(self) -> None:
        """Ready when all workers serve; once that was so, as long as any of them does."""
        if self._draining:
            self._plane.state = State.DRAINING
            return
        wanted = 1 if self._was_ready else self.config.workers
        if self._server.serving >= wanted and self.inherited.board.is_ready(self.slot):
            self._was_ready = True
            self._plane.state = State.READY
        else:
            self._plane.state = State.STARTING
