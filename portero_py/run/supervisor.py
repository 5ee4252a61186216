"""The composition root: what runs is put together here, in one process or in several.

Everything that can be wrong with the configuration is said before anything is opened; then come the process
(memory, open files) and all sockets: nothing serves before every port is ours.

With one worker `SingleProcess` does everything. With several this process holds what must outlive the others
(listening sockets, the front TLS context with its ticket keys, the feed's socket), forks one control process
and the workers, and from then on only waits, signals and forks again. It runs no event loop and no thread:
forking under either is unsafe. If it stops or dies, the others serve on, or drain.

Nothing that goes wrong in a look at the children ends this process: it is logged, and the next look follows.
A system that refuses to fork is asked again (`processes`).

Signals come one after the other from `sigwait`, a stop before all others; they are blocked from the start of
the program on (`held_signals`), in a child too until it heeds them
- SIGTERM, SIGINT: /readyz says 503, the workers drain, control closes when they are gone. Exit status 0. A
  second one ends everything at once, with 1.
- SIGHUP: the configuration is read again (`live_config`), and everybody is told to do so too.
- SIGCHLD: whoever died is forked again (`processes`).
- SIGALRM: the interval timer, whose end is the next look at the children. (`sigtimedwait` would be simpler,
  but when the process was stopped until its time was over, CPython returns what happens to be on the stack.)
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Final

import uvloop

from portero_py import __version__
from portero_py.config import sources
from portero_py.config.model import Config
from portero_py.config.sources import Environ, Flags
from portero_py.control import lean_imports
from portero_py.errors import ConfigError
from portero_py.proxy.downstream.sni import FrontTls
from portero_py.run import held_signals, logs, preflight, tuning
from portero_py.run.children import CONTROL, Inheritance, run_control, run_worker
from portero_py.run.live_configuration import read_again
from portero_py.run.processes import UNUSABLE, Board, Child
from portero_py.run.sockets import Listening, Rendezvous, address_of, open_sockets
from portero_py.run.systemd import Notifier, inherited_sockets

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGALRM)
#: With the one that ends control: it may come before control, which loads much first, has a handler for it.
_HELD: Final = (*_SIGNALS, signal.SIGUSR1)
_STOP: Final = frozenset({signal.SIGTERM, signal.SIGINT})

#: Seconds between two looks at the children: as a rule, and while they start or end.
TICK: Final = 1.0
SHORT_TICK: Final = 0.02
#: Seconds by which two looks may be late before the supervisor itself counts as having been away.
AWAY: Final = 3.0
#: Seconds that a worker may take to end when its exchanges have ended.
LAST_STEPS: Final = 5.0

_log = logging.getLogger(__name__)


def run(flags: Flags, environ: Environ) -> int:
    """Run the proxy until it is told to stop; returns the exit status.

    Raises `ConfigError` for whatever keeps it from starting.
    """
    held_signals.hold()  # the program has done so long before
    read = partial(sources.load, flags, environ)
    config = read()
    logs.set_up(config.log.level, environ)
    if config.log.level == "debug":
        from portero_py.run import debugging

        debugging.watch()
    for warning in preflight.require(config):
        _log.warning("%s", warning)
    preflight.make_directories(config)
    tuning.tune_malloc()
    tuning.raise_open_files()
    notifier = Notifier(environ)
    listening = open_sockets(config, inherited_sockets(environ, os.getpid()))
    try:
        if config.workers == 1:
            lean_imports.load_parts()
            from portero_py.run.single_process import SingleProcess  # it holds both planes: not for a parent

            return uvloop.run(SingleProcess(config, read, listening, notifier).serve())
        return Supervisor(config, read, listening, notifier).run()
    finally:
        listening.close()


class Supervisor:
    """The parent of one control process and several workers. The caller closes `listening`."""

    def __init__(
        self, config: Config, read: Callable[[], Config], listening: Listening, notifier: Notifier
    ) -> None:
        self._notifier = notifier
        self._listening = listening
        self._summary = f"{listening.summary()}; {config.workers} workers"
        self._board = Board(CONTROL + 1 + config.workers)
        self._inherited = Inheritance(
            config=config,
            read=read,
            listening=listening,
            https_port=address_of(listening.proxy[0]).port,
            rendezvous=Rendezvous(),
            front_tls=FrontTls(config.tls),
            board=self._board,
            lifeline=os.pipe(),
            log_lock=os.memfd_create("portero-access-log", os.MFD_CLOEXEC),
        )
        inherited = self._inherited
        self._control = Child(CONTROL, "control", self._board, partial(run_control, inherited))
        self._workers = [
            Child(CONTROL + 1 + number, f"worker {number}", self._board, partial(_work, inherited, number))
            for number in range(config.workers)
        ]
        self._children = [self._control, *self._workers]
        self._tick = TICK
        if notifier.watchdog_seconds:
            self._tick = min(TICK, notifier.watchdog_seconds / 2)

    def run(self) -> int:
        """Fork, watch, stop; the exit status. Raises `ConfigError` when the start fails."""
        former = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever ignored it had the kernel take our children
        gc.collect()
        gc.freeze()  # a collection in a child would write to, and so copy, every page
        try:
            early = self._start()
            return self._stop() if early or self._watch() else 1
        finally:
            self._end_all()
            os.close(self._inherited.lifeline[0])
            os.close(self._inherited.lifeline[1])
            os.close(self._inherited.log_lock)
            self._inherited.rendezvous.close()
            gc.unfreeze()
            signal.setitimer(signal.ITIMER_REAL, 0)
            while signal.sigtimedwait(_HELD, 0) is not None:
                pass  # what came late was meant for a process that is ending
            signal.pthread_sigmask(signal.SIG_SETMASK, former)

    # Private: start

    def _start(self) -> bool:
        """Fork until all are ready; True when told to stop meanwhile. Raises `ConfigError`."""
        while not all(child.is_ready for child in self._children):
            self._fork_due(time.monotonic())
            number = self._next_signal(SHORT_TICK)
            if number in _STOP:
                return True
            ended = self._reap(time.monotonic())
            for child in ended:
                if child.status == UNUSABLE and child.complaint:
                    raise ConfigError(child.complaint)
            self._report(ended)
        self._notifier.ready(self._summary)
        _log.info("portero-py %s: %s", __version__, self._summary)
        return False

    # Private: while it runs

    def _watch(self) -> bool:
        """Heed signals and children until told to stop."""
        looked_at = time.monotonic()
        while True:
            due = [child.fork_at - looked_at for child in self._children if child.fork_at is not None]
            number = self._next_signal(min([self._tick, *due]))
            if number in _STOP:
                return True
            now = time.monotonic()
            was_away, looked_at = now - looked_at > self._tick + AWAY, now
            try:
                if number == signal.SIGHUP:
                    self._reload()
                self._look(now, was_away=was_away)
            except Exception:
                _log.exception("a look at the processes failed; the next one follows")

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
        try:
            found = held_signals.unless_stopped(
                partial(read_again, self._inherited.config, self._inherited.read)
            )
        except held_signals.Stopped:
            return
        except Exception:
            _log.exception("the configuration stays as it was")
        else:
            if found is not None:
                self._inherited.config = found  # what is forked later has it too
                _log.info("configuration read again")
        for child in self._children:
            child.signal(signal.SIGHUP)
        self._notifier.ready(self._summary)

    def _replace_hanging(self, now: float) -> None:
        for child in self._children:
            if child.hangs(now):
                _log.error("%s (pid %d) hangs: killing it", child.name, child.pid)
                child.signal(signal.SIGKILL)

    def _reap(self, now: float) -> list[Child]:
        """The children that have ended since the last call."""
        return [child for child in self._children if child.reap(now)]

    def _report(self, ended: list[Child]) -> None:
        for child in ended:
            why = f": {child.complaint}" if child.complaint else ""
            _log.error("%s %s%s", child.name, _said(child.status or 0), why)

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
            if self._next_signal(min(TICK, ends_at - now)) in _STOP:
                return False
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
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))  # 0 would be never
        number = signal.Signals(signal.sigwait(_SIGNALS))
        if number not in _STOP and signal.sigpending() & _STOP:
            # The kernel gives the lowest number first: SIGHUPs that do not cease would be all that there is.
            number = signal.Signals(signal.sigwait(_STOP))
        return None if number is signal.SIGALRM else number


def _work(inherited: Inheritance, number: int, again: bool) -> int:
    return run_worker(inherited, number)


def _said(status: int) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"
