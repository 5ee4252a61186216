"""Both planes in one process: what runs without `--workers`, under the main process.

The order of a start: certificates and leases are read and published, the data plane accepts, the registration
API and plain HTTP follow; /readyz says 200 and systemd hears READY=1. Beside another generation it prepares
first, and waits until it may go.

Signals (`signals`: a stop goes before reloads, and abandons a start or a reload that is going on)
- TOLD_TO_STOP (the main process got SIGTERM or SIGINT): /readyz says 503, the listeners close, the exchanges
  in flight have `timeouts.drain` seconds, then the control plane closes (it stays until then: backends renew
  their leases to the end). Exit status 0. A second signal ends everything at once, with 1.
- SIGHUP: certificates are scanned again, and the configuration is read again (`live_config`). Whatever may go
  wrong with that, the proxy goes on as it was.

Words of the main process, when another generation is to take the place of this one
- It yields: the control plane closes and leaves the leases in memory. The data plane goes on, from then on as
  a guest of the other one's feed.
- It resumes, when the other one failed: the control plane is made anew, with what is in memory.
- It leaves: it drains and ends. When the main process is gone it does the same.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections import deque

from portero_py import __version__
from portero_py.config.model import Config
from portero_py.control.api.state import State
from portero_py.control.kept_leases import KeptLeases
from portero_py.core.certificates import Certificate
from portero_py.errors import ConfigError
from portero_py.feed.client import FeedClient
from portero_py.feed.feed import Feed
from portero_py.feed.server import FeedServer
from portero_py.proxy.downstream.sni import FrontTls
from portero_py.proxy.worker import Leave, Worker
from portero_py.run import held_signals, tuning
from portero_py.run.channel import Word
from portero_py.run.control_plane import ControlPlane
from portero_py.run.generation import FEED, LEASES, LIMITS, Generation
from portero_py.run.live_configuration import read_again
from portero_py.run.readings import Reader
from portero_py.run.signals import Signals
from portero_py.run.slack import Slack
from portero_py.run.sockets import Listening, Rendezvous, address_of
from portero_py.run.systemd import Notifier

_log = logging.getLogger(__name__)


class SingleProcess:
    """Both planes on one loop. `read` reads the configuration again.

    The caller closes `listening` and `kept`.
    """

    def __init__(
        self,
        config: Config,
        read: Reader,
        listening: Listening,
        notifier: Notifier,
        place: Generation,
        front_tls: FrontTls,
        kept: KeptLeases,
    ) -> None:
        self._config = config
        self._read = read
        self._listening = listening
        self._notifier = notifier
        self._place = place
        self._front_tls = front_tls
        self._kept = kept
        self._signals = Signals()
        self._feed = Feed()
        self._guests = FeedServer(self._feed, None, 0)
        self._limits = _limit_file(place)
        # beside another generation
        self._words: deque[Word] = deque()
        self._may_go = asyncio.Event()
        self._rendezvous: Rendezvous | None = None
        self._follows: tuple[FeedClient, asyncio.Task[None]] | None = None  # the other one's feed
        self._has_yielded = False
        self._leaves = False
        self._is_stopping = False

    async def serve(self) -> int:
        """Start, heed signals, stop; the exit status. Raises `ConfigError` when the start fails."""
        loop = asyncio.get_running_loop()
        loop.set_default_executor(tuning.Threads(thread_name_prefix="portero"))
        self._rendezvous = _rendezvous()
        heeded = (held_signals.TOLD_TO_STOP, signal.SIGHUP)
        self._signals.listen_to(*heeded)
        loop.add_reader(self._place.channel.fileno(), self._hear, loop)
        shares = tuning.shares(tuning.open_files(), control=True, traffic=True)
        self._worker = Worker(
            self._config,
            loop,
            front_tls=self._front_tls,
            limit_file=self._limits,
            most=shares.clients,
        )
        self._make_control()
        held_signals.let_go(heeded)
        try:
            if await self._signals.unless_stopped(self._start()):
                while (number := await self._signals.next()) in (signal.SIGHUP, signal.SIGUSR2):
                    if number is signal.SIGHUP:
                        await self._signals.unless_stopped(self._reload())
                    else:
                        await self._heed(self._words.popleft())
            else:
                await self._signals.stop()
            return await self._stop()
        finally:
            held_signals.hold()  # what comes late was meant for a process that is ending
            if self._rendezvous is not None:
                self._rendezvous.close()

    # Private

    def _make_control(self) -> None:
        shares = tuning.shares(tuning.open_files(), control=True, traffic=True)
        self._control = ControlPlane(
            self._config,
            self._listening,
            address_of(self._listening.proxy[0]).port,
            self._feed,
            shares,
            kept=self._kept,
            refresh=self._guests.refresh,
            reloads=lambda: self._read.reloads,
            ask=lambda: self._signals.tell(signal.SIGHUP),
            seen=self._read.seen,
        )
        self._feed.subscribe(self._worker)
        self._worker.tell(self._feed.found)

    async def _start(self) -> None:
        config, listening, notifier, place = self._config, self._listening, self._notifier, self._place
        if not place.is_first:
            await self._control.prepare()
            place.prepared()
            await self._may_go.wait()
        await self._kept.claim()
        kept, former_feeds = self._kept.load(), place.take_sockets(FEED)
        for sock in former_feeds:
            await self._guests.welcome(sock)
        if former_feeds:
            await self._guests.welcomed()
        certificates = self._guests.certificates_of if former_feeds else None
        if kept is None:
            await self._control.load(certificates)
        else:
            self._guests.counted_before(kept.departed)
            await self._control.take_over(kept.table, certificates)
        self._guests.feed_guests()
        place.drop_rest()
        await self._worker.start(listening.proxy, tls=config.tls.enabled)
        await self._open_control()
        others = [(LEASES, descriptor) for descriptor in self._kept.descriptors]
        if self._rendezvous is not None:
            others.append((FEED, self._rendezvous.socket.fileno()))
        if self._limits >= 0:
            others.append((LIMITS, self._limits))
        place.ready(config, listening, *others)
        notifier.ready(listening.summary())
        _log.info("portero-py %s: %s", __version__, listening.summary())

    async def _open_control(self) -> None:
        await self._control.serve()
        self._control.own(Slack().run, "memory")
        watchdog_seconds = self._notifier.watchdog_seconds
        if watchdog_seconds:
            self._control.own(lambda: self._tell_alive(watchdog_seconds / 2), "watchdog")
        self._control.state = State.READY

    async def _tell_alive(self, interval: float) -> None:
        while True:
            self._notifier.alive()
            await asyncio.sleep(interval)

    async def _reload(self) -> None:
        self._notifier.reloading()
        try:
            found = await asyncio.to_thread(read_again, self._config, self._read)
            self._read.count(ok=found is not None)
            if found is not None:
                if found is not self._config:
                    self._worker.reconfigure(found)
                    self._config = found
                    self._place.configured(found)
                _log.info("configuration read again")
            if not self._has_yielded:
                await self._control.reconfigure(self._config, self._read.seen)
                await self._control.rescan()
        except Exception:  # a bug: no reason to end what serves
            _log.exception("the reload failed: what it had not changed yet stays")
            self._control.count_fault("reload")
        self._notifier.ready(self._listening.summary())

    # Private: beside another generation

    def _hear(self, loop: asyncio.AbstractEventLoop) -> None:
        for message in self._place.heard():
            message.close()
            if message.word is Word.GO:
                self._may_go.set()
            elif message.word is Word.LEAVE:
                self._leaves = True
                self._signals.tell(held_signals.TOLD_TO_STOP)
            else:
                self._words.append(message.word)
                self._signals.tell(signal.SIGUSR2)
        if self._place.is_orphaned:
            loop.remove_reader(self._place.channel.fileno())
            _log.error("the main process is gone: ending")
            if not self._is_stopping:  # it is no second wish
                self._signals.tell(held_signals.TOLD_TO_STOP)

    async def _heed(self, word: Word) -> None:
        """A fault here must not end what serves: the main process gives up, and has it resume."""
        try:
            if word is Word.OFFER:
                self._place.offered(self._front_tls.written_keys)
            elif word is Word.YIELD:
                await self._yield()
            elif word is Word.RESUME and self._has_yielded:
                await self._resume()
        except Exception:  # a bug: the main process gives up waiting
            _log.exception("a step of an upgrade failed")
            if word is Word.RESUME:  # nobody takes registrations: another process will
                raise

    async def _yield(self) -> None:
        self._has_yielded = True
        await self._control.close(hand_over=True)
        await self._guests.close()
        if self._rendezvous is not None:
            client = FeedClient(self._worker, self._rendezvous.path, 0, time.monotonic)
            if self._feed.certificates is not None:
                client.presents(self._feed.certificates)
            self._worker.tell(client.found)
            self._follows = client, asyncio.create_task(client.run(), name="feed")
        self._place.yielded()

    async def _resume(self) -> None:
        await self._unfollow()
        presented = self._feed.certificates
        certificates = () if presented is None else presented.certificates
        self._feed = Feed()
        self._guests = FeedServer(self._feed, None, 0)
        self._make_control()
        await self._kept.claim()
        kept = self._kept.load()

        async def former(names: list[str]) -> list[Certificate]:
            return [each for each in certificates if each.name in names]

        if kept is None:
            await self._control.load(former)
        else:
            self._guests.counted_before(kept.departed)
            await self._control.take_over(kept.table, former)
        await self._open_control()
        self._has_yielded = False

    async def _unfollow(self) -> None:
        if self._follows is not None:
            client, running = self._follows
            self._follows = None
            running.cancel()
            await asyncio.wait([running])
            await client.close()  # says what was counted last

    # Private: stop

    async def _stop(self) -> int:
        self._is_stopping = True
        self._control.state = State.DRAINING
        self._notifier.stopping()
        if self._leaves:
            self._listening.close_control()  # what the new one does not want any more is refused
            _log.info("another version serves: exchanges in flight have %g s", self._config.timeouts.drain)
        else:
            _log.info("stopping: exchanges in flight have %g s", self._config.timeouts.drain)
        ending = asyncio.create_task(self._end(), name="end")
        hurry = asyncio.create_task(self._signals.stop(), name="second signal")
        await asyncio.wait({ending, hurry}, return_when=asyncio.FIRST_COMPLETED)
        if not ending.done():
            _log.warning("told to stop again: ending at once")
            ending.cancel()
            return 1
        hurry.cancel()
        return ending.result()

    @property
    def _leave(self) -> Leave:
        if self._leaves:
            return Leave.TO_SUCCESSOR
        return Leave.SOCKETS_STAY if "https" in self._listening.kept else Leave.ALONE

    async def _end(self) -> int:
        """The data plane first, then the control plane; the exit status."""
        timeouts, status = self._config.timeouts, 0
        if self._place.is_orphaned:
            await self._control.lend()
        try:
            await self._worker.drain(timeouts.drain, self._leave)
        except Exception:  # a bug: the rest of the end must still come; the status says it
            _log.exception("the drain failed")
            status = 1
        await self._unfollow()
        try:
            async with asyncio.timeout(timeouts.shutdown):
                if not self._has_yielded:
                    await self._control.close()
                await self._guests.close()
        except TimeoutError:
            _log.warning("the control plane did not close within %g s", timeouts.shutdown)
        _log.info("stopped")
        return status


# Private


def _limit_file(place: Generation) -> int:
    """Where the limits of backends are kept together with a former generation, which may still drain.

    -1 where the system has no such files: then each generation counts for itself.
    """
    held = place.take(LIMITS)[:1]
    if held:
        return held[0]
    return os.memfd_create("portero-limits", os.MFD_CLOEXEC) if hasattr(os, "memfd_create") else -1


def _rendezvous() -> Rendezvous | None:
    """Where the next generation hears of this one while it drains; not every system has the means."""
    try:
        return Rendezvous()
    except ConfigError as error:
        _log.debug("a drain after an upgrade will be left to itself: %s", error)
        return None
