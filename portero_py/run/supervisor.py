"""The composition root: what runs is put together here, in one process or in several.

Everything that can be wrong with the configuration is said before anything is opened; then come the process
(memory, open files) and all sockets: nothing serves before every port is ours.

Above all is the main process (`main_process`), which starts this one, a generation, and another one for an
upgrade (`generation` is the way to it). With one worker `SingleProcess` does everything. With several this
process holds what must outlive the others (listening sockets, the front TLS context with its ticket keys, the
feed's socket), forks one control process and the workers, and from then on only waits, signals and forks
again. It runs no event loop and no thread: forking under either is unsafe. If it stops or dies, the others
serve on, or drain.

Nothing that goes wrong in a look at the children ends this process: it is logged, and the next look follows.
A system that refuses to fork is asked again (`processes`).

Signals come one after the other from `sigwait`, a stop before all others; they are blocked from the start of
the program on (`held_signals`), in a child too until it heeds them
- TOLD_TO_STOP (the main process got SIGTERM or SIGINT): /readyz says 503, the workers drain, control closes
  when they are gone. Exit status 0. A second one ends everything at once, with 1.
- SIGHUP: the configuration is read again (`live_configuration`), and everybody is told to take what was read
  (`readings`). The control process sends it too, when a file has changed.
- SIGCHLD: whoever died is forked again (`processes`).
- SIGIO: the main process has said something, or is gone: then this process ends as if it had been killed too.
- SIGALRM: the interval timer, whose end is the next look at the children.

Beside another generation (an upgrade): control closes when it has to yield, and is forked again if that other
one fails; the workers stay, and drain when it serves. In a new generation nobody serves before it may, and
whoever dies until then fails it.
"""

from __future__ import annotations

import gc
import logging
import mmap
import os
import signal
import time
from collections.abc import MutableMapping
from functools import partial
from typing import Final

import uvloop

from portero_py import __version__
from portero_py.config.model import Config
from portero_py.config.sources import Flags
from portero_py.control import lean_imports
from portero_py.control.kept_leases import KeptLeases
from portero_py.core.limits import SharedCounts
from portero_py.core.rate_limit import Buckets
from portero_py.errors import ConfigError
from portero_py.proxy.downstream.sni import FrontTls
from portero_py.run import held_signals, logs, main_process, preflight, tuning
from portero_py.run.channel import Word
from portero_py.run.children import CONTROL, Inheritance, run_control, run_worker
from portero_py.run.generation import FEED, LEASES, LIMITS, LOG, Generation
from portero_py.run.live_configuration import read_again
from portero_py.run.main_process import said_of
from portero_py.run.processes import UNUSABLE, Board, Child
from portero_py.run.readings import Reader, Readings
from portero_py.run.sockets import Listening, Rendezvous, address_of, open_sockets
from portero_py.run.systemd import Notifier

_STOP: Final = held_signals.TOLD_TO_STOP
_SIGNALS: Final = (_STOP, signal.SIGHUP, signal.SIGCHLD, signal.SIGIO, signal.SIGALRM)

#: Seconds between two looks at the children: as a rule, and while they start or end.
TICK: Final = 1.0
SHORT_TICK: Final = 0.02
#: Seconds by which two looks may be late before the supervisor itself counts as having been away.
AWAY: Final = 3.0
#: Seconds that a worker may take to end when its exchanges have ended.
LAST_STEPS: Final = 5.0

_log = logging.getLogger(__name__)


def run(flags: Flags, environ: MutableMapping[str, str]) -> int:
    """Run the proxy until it is told to stop; returns the exit status.

    Raises `ConfigError` for whatever keeps it from starting.
    """
    held_signals.hold()  # the program has done so long before
    resumed = main_process.resume(environ)  # `__main__` knows it earlier; not everybody comes from there
    if resumed is not None:
        return resumed
    place = Generation.inherited(environ) or main_process.begin(environ)
    if isinstance(place, int):
        return place
    # An upgraded program is started with more signals blocked, by a process that takes them itself.
    signal.pthread_sigmask(signal.SIG_SETMASK, held_signals.HELD)
    read = Reader(flags, environ)
    config = read()
    read.count(ok=True, again=False)
    logs.set_up(config.log.level, environ)
    if config.log.level == "debug":
        from portero_py.run import debugging

        debugging.watch()
    for warning in preflight.require(config):
        _log.warning("%s", warning)
    preflight.make_directories(config)
    tuning.tune_malloc()
    tuning.raise_open_files()
    notifier = Notifier(environ, place.main_pid, place.notify)
    listening = open_sockets(config, *place.inherited_sockets(environ))
    front_tls = FrontTls(config.tls, tickets=place.tickets())
    kept = _kept_leases(place)
    try:
        if config.workers == 1:
            lean_imports.load_parts()
            from portero_py.run.single_process import SingleProcess  # it holds both planes: not for a parent

            return uvloop.run(
                SingleProcess(config, read, listening, notifier, place, front_tls, kept).serve()
            )
        return Supervisor(config, read, listening, notifier, place, front_tls, kept).run()
    finally:
        listening.close()
        kept.close()


class Supervisor:
    """The parent of one control process and several workers. The caller closes `listening` and `kept`."""

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
        self._notifier = notifier
        self._listening = listening
        self._place = place
        self._summary = f"{listening.summary()}; {config.workers} workers"
        self._read = read
        self._board = Board(CONTROL + 1 + config.workers)
        [log_lock] = place.take(LOG)[:1] or [os.memfd_create("portero-access-log", os.MFD_CLOEXEC)]
        [limit_file] = place.take(LIMITS)[:1] or [os.memfd_create("portero-limits", os.MFD_CLOEXEC)]
        self._inherited = Inheritance(
            config=config,
            readings=Readings(),
            seen=read.seen,
            supervisor=os.getpid(),
            listening=listening,
            https_port=address_of(listening.proxy[0]).port,
            rendezvous=Rendezvous(),
            front_tls=front_tls,
            board=self._board,
            lifeline=os.pipe(),
            limit_file=limit_file,
            clients=mmap.mmap(-1, SharedCounts.size(config.workers)),
            buckets=mmap.mmap(-1, Buckets.size(config.workers)),
            log_lock=log_lock,
            place=place,
            kept=kept,
            former_feeds=place.take_sockets(FEED),
        )
        place.drop_rest()
        inherited = self._inherited
        inherited.readings.write(config, read)
        self._control = Child(CONTROL, "control", self._board, partial(run_control, inherited))
        self._workers = [
            Child(CONTROL + 1 + number, f"worker {number}", self._board, partial(_work, inherited, number))
            for number in range(config.workers)
        ]
        self._children = [self._control, *self._workers]
        self._tick = TICK
        if notifier.watchdog_seconds:
            self._tick = min(TICK, notifier.watchdog_seconds / 2)
        # beside another generation
        self._has_yielded = False  # or is about to
        self._leaves = False

    def run(self) -> int:
        """Fork, watch, stop; the exit status. Raises `ConfigError` when the start fails."""
        former = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever ignored it had the kernel take our children
        self._place.channel.signal_arrivals()
        self._load_for_children()
        gc.collect()
        gc.freeze()  # a collection in a child would write to, and so copy, every page
        try:
            early = self._start()
            if early is None:
                return 1
            return self._stop() if early or self._watch() else 1
        finally:
            self._end_all()
            os.close(self._inherited.lifeline[0])
            os.close(self._inherited.lifeline[1])
            os.close(self._inherited.log_lock)
            os.close(self._inherited.limit_file)
            for sock in self._inherited.former_feeds:
                sock.close()
            self._inherited.rendezvous.close()
            self._inherited.readings.close()
            gc.unfreeze()
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._place.channel.stop_signals()
            while signal.sigtimedwait(_SIGNALS, 0) is not None:
                pass  # what came late was meant for a process that is ending
            signal.pthread_sigmask(signal.SIG_SETMASK, former)

    # Private: start

    def _load_for_children(self) -> None:
        """Load what only control needs here too, before the fork.

        Who is forked later, in a dead one's place, must not read files that an installation has replaced
        meanwhile; and it is there 0.3 s sooner. Shared, it costs 1.5 MB in all.
        """
        lean_imports.load_parts()
        from portero_py.run import control_plane

        control_plane.load_features(self._inherited.config)

    def _start(self) -> bool | None:
        """Fork until all are ready; True when told to stop meanwhile, None when a new generation failed.

        Raises `ConfigError`.
        """
        waits, is_outdated = not self._place.is_first, False
        while not all(child.is_ready for child in self._children):
            self._fork_due(time.monotonic())
            if waits and all(child.is_prepared for child in self._children):
                waits = False
                self._place.prepared()
            number = self._next_signal(SHORT_TICK)
            is_outdated = is_outdated or number == signal.SIGHUP
            if self._is_told_to_stop(number):
                return True
            ended = self._reap(time.monotonic())
            for child in ended:
                if child.status == UNUSABLE and child.complaint:
                    raise ConfigError(child.complaint)
            self._report(ended)
            if ended and not self._place.is_first and not self._board.may_go:
                return None
        self._place.ready(
            self._inherited.config,
            self._listening,
            *((LEASES, descriptor) for descriptor in self._inherited.kept.descriptors),
            (FEED, self._inherited.rendezvous.socket.fileno()),
            (LOG, self._inherited.log_lock),
            (LIMITS, self._inherited.limit_file),
        )
        self._notifier.ready(self._summary)
        _log.info("portero-py %s: %s", __version__, self._summary)
        if is_outdated:
            self._reload()
        return False

    # Private: while it runs

    def _watch(self) -> bool:
        """Heed signals and children until told to stop."""
        looked_at = time.monotonic()
        while True:
            due = [child.fork_at - looked_at for child in self._children if child.fork_at is not None]
            number = self._next_signal(min([self._tick, *due]))
            if self._is_told_to_stop(number):
                return True
            now = time.monotonic()
            was_away, looked_at = now - looked_at > self._tick + AWAY, now
            try:
                if number == signal.SIGHUP:
                    self._reload()
                self._look(now, was_away=was_away)
            except Exception:  # a bug: nobody else looks after the processes
                _log.exception("a look at the processes failed; the next one follows")

    def _is_told_to_stop(self, number: signal.Signals | None) -> bool:
        """Heed what the main process has said; whether that, or the signal, is a stop."""
        for message in self._place.heard():
            message.close()
            word = message.word
            if word is Word.GO:
                self._board.go()
            elif word is Word.OFFER:
                self._offer()
            elif word is Word.YIELD:
                self._yield()
            elif word is Word.RESUME:
                self._resume()
            elif word is Word.LEAVE:
                self._leaves = True
        self._heed_orphanhood()
        return number is _STOP or self._leaves

    def _heed_orphanhood(self) -> None:
        if self._place.is_orphaned:
            _log.error("the main process is gone: ending")
            os._exit(1)  # the others drain, as whenever the supervisor dies

    def _offer(self) -> None:
        try:
            self._place.offered(self._inherited.front_tls.written_keys)
        except OSError as error:  # no descriptors, no memory: the main process hears nothing, and gives up
            _log.error("a step of an upgrade failed: %s", os.strerror(error.errno or 0))

    def _yield(self) -> None:
        if not self._control.pid:
            return  # what it knew has to be found first: it is forked again, and there is no upgrade
        self._has_yielded = True
        self._board.hand_over(begins=True)
        self._control.fork_at = None
        self._control.signal(signal.SIGUSR1)

    def _resume(self) -> None:
        self._has_yielded = False
        self._board.hand_over(begins=False)
        if not self._control.pid:
            self._control.fork_at = time.monotonic()

    def _look(self, now: float, *, was_away: bool) -> None:
        if was_away:
            for child in self._children:
                child.forgive(now)
        self._replace_hanging(now)
        self._report(self._reap(now))
        self._fork_due(now)
        self._inherited.front_tls.turn()
        if self._notifier.watchdog_seconds and self._is_alive(now):
            self._notifier.alive()

    def _reload(self) -> None:
        self._notifier.reloading()
        inherited, read = self._inherited, self._read
        try:
            found = held_signals.unless_stopped(partial(read_again, inherited.config, read))
            read.count(ok=found is not None)
            if self._is_written(found or inherited.config):
                inherited.seen = read.seen
            else:
                found = None
            if found is not None:
                inherited.config = found  # what is forked later has it too
                self._place.configured(found)
                _log.info("configuration read again")
        except held_signals.Stopped:
            return
        except Exception:  # a bug: no reason to end what serves
            _log.exception("the configuration stays as it was")
        for child in self._children:
            child.signal(signal.SIGHUP)
        self._notifier.ready(self._summary)

    def _is_written(self, config: Config) -> bool:
        """Whether all can read it: what only some know is not in force."""
        try:
            self._inherited.readings.write(config, self._read)
        except OSError as error:
            self._read.count(ok=False)
            why = os.strerror(error.errno or 0)
            _log.error("the configuration stays as it was: no memory to tell it to all: %s", why)
            return False
        return True

    def _replace_hanging(self, now: float) -> None:
        for child in self._children:
            if child.hangs(now):
                _log.error("%s (pid %d) hangs: killing it", child.name, child.pid)
                child.signal(signal.SIGKILL)

    def _reap(self, now: float) -> list[Child]:
        """The children that have ended since the last call, and should not have."""
        ended = [child for child in self._children if child.reap(now)]
        if self._has_yielded and self._control in ended:
            if self._control.status == 0:
                self._control.fork_at = None
                self._place.yielded()
                ended.remove(self._control)
            else:
                self._has_yielded = False  # it has not saved what it knew: as above
                self._board.hand_over(begins=False)
        return ended

    def _report(self, ended: list[Child]) -> None:
        for child in ended:
            why = f": {child.complaint}" if child.complaint else ""
            _log.error("%s %s%s", child.name, said_of(child.status or 0), why)

    def _fork_due(self, now: float) -> None:
        for child in self._children:
            if child.fork_at is not None and child.fork_at <= now:
                child.fork(now)

    def _is_alive(self, now: float) -> bool:
        """Whether traffic is served and backends can register: a worker alone may be missing."""
        alive = [child for child in self._children if child.pid and not child.hangs(now)]
        return self._control in alive and len(alive) > 1

    # Private: stop

    def _stop(self) -> int:
        """Workers first, then control; the exit status."""
        timeouts = self._inherited.config.timeouts
        self._notifier.stopping()
        self._board.stop()
        if self._leaves:
            self._listening.close_control()  # what the new one does not want any more is refused
            _log.info("another version serves: exchanges in flight have %g s", timeouts.drain)
        else:
            _log.info("stopping: exchanges in flight have %g s", timeouts.drain)
        self._listening.close_proxy()
        self._control.signal(signal.SIGTERM)
        status = 0
        for children, number, seconds in (
            (self._workers, signal.SIGTERM, timeouts.drain + LAST_STEPS),
            ([self._control], signal.SIGUSR1, timeouts.shutdown + LAST_STEPS),
        ):
            living = [child for child in children if child.pid]
            for child in living:
                child.signal(number)
            if not self._wait_for(living, seconds):
                _log.warning("told to stop again: ending at once")
                return 1
            for child in living:
                if child.pid:
                    _log.warning("%s did not end in time: killing it", child.name)
                    child.signal(signal.SIGKILL)
                if child.status != 0:
                    status = 1
        _log.info("stopped")
        return status

    def _wait_for(self, children: list[Child], seconds: float) -> bool:
        """Wait until they are gone, or the time is over; False when told to stop once more."""
        ends_at = time.monotonic() + seconds
        while any(child.pid for child in children) and (now := time.monotonic()) < ends_at:
            if self._next_signal(min(TICK, ends_at - now)) is _STOP:
                return False
            self._place.heard()  # it has nothing more to say, but it may be gone
            self._heed_orphanhood()
            for child in self._children:
                child.reap(time.monotonic())
        return True

    def _end_all(self) -> None:
        """Whoever is left, at once."""
        for child in self._children:
            child.signal(signal.SIGKILL)
        while any(child.pid for child in self._children):
            for child in self._children:
                child.reap(time.monotonic())
            time.sleep(0.005)

    def _next_signal(self, seconds: float) -> signal.Signals | None:
        """The next signal, or None when there was none for `seconds`."""
        return held_signals.next_of(_SIGNALS, seconds)


def _work(inherited: Inheritance, number: int, again: bool) -> int:
    return run_worker(inherited, number)


def _kept_leases(place: Generation) -> KeptLeases:
    """Those of the former generation, or new ones."""
    found = place.take(LEASES)
    return KeptLeases((found[0], found[1])) if len(found) == 2 else KeptLeases.make()
