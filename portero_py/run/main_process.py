"""The main process: whose number systemd, a container and the operator know. It stays through upgrades.

It serves nothing and decides little. It starts a generation of the program, which does all the work
(`supervisor`), tells it what it is told itself, and keeps for the next one what must outlive every
generation: copies of the listening sockets, the leases in memory, the socket of the feed. So a generation may
die: the next one is started, clients wait in the kernel's queue meanwhile, and no lease is lost.

An upgrade (SIGUSR2) starts the new version of the program beside the running one
- OFFERING     the running generation writes down what only it knows (the keys of TLS sessions).
- PREPARING    the new one reads the configuration, opens what is new, loads everything, and says so.
- YIELDING     the old one closes its control plane; its workers go on. Nobody takes registrations now: they
               wait in the kernel's queue.
- TAKING_OVER  the new one takes the leases over, opens its control plane, and its workers accept.
Then the old one drains and ends, and this process becomes the new version of itself (`execve`, with the same
number). Whatever goes wrong before that, however long it takes: the new one is killed, the old one goes on as
it was, and a line of the log says why. When the old one dies in the middle, the new one goes on without it.

The rules
- No event loop, no thread, few imports: it has to live when others do not, and `execve` brings it back with
  nothing but descriptors and one variable. Signals are blocked at all times, to its very end, and taken by
  `sigwait`; those that come during `execve` wait. Messages of a generation come with SIGIO, which would end
  this process if it were not blocked before the first of them: a generation may have died at once.
- SIGTERM and SIGINT are passed on, each of them: a second one is a wish of its own. SIGHUP too. The copies of
  the sockets are closed at the first: when nobody serves, nobody shall wait. A generation that has not served
  yet is killed then, and the one that serves when it has not ended in the time that it asked for.
- SIGUSR2 within a start waits for its end; within an upgrade it is ignored.
- A generation that is given up, or is dead, is not listened to: its `ready` may come late.
- No step that fails ends this process: that would end everything. It is logged, and the next look follows.
- A generation that fails before it has ever served fails the start: its exit status is ours.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping, MutableMapping
from enum import Enum
from typing import Final

from portero_py.errors import ConfigError
from portero_py.run import held_signals, logs
from portero_py.run.channel import Channel, Message, Word
from portero_py.run.generation import FEED, TICKETS, VARIABLE, Generation
from portero_py.run.processes import Backoff
from portero_py.run.systemd import FIRST_DESCRIPTOR, notify, reloading

#: The variable with which this process finds itself again after `execve`.
MAIN: Final = "PORTERO_MAIN"

#: Seconds that each step of an upgrade may take.
OFFER_SECONDS: Final = 5.0
PREPARE_SECONDS: Final = 60.0
YIELD_SECONDS: Final = 10.0
TAKE_OVER_SECONDS: Final = 30.0
#: Seconds that a generation has for its end when it has not said how many it needs.
PATIENCE: Final = 60.0
#: Seconds between two looks when nothing happens, and after one that failed.
TICK: Final = 3600.0
FAULT_TICK: Final = 1.0

_TAKEN: Final = (
    *held_signals.STOPS,
    signal.SIGHUP,
    signal.SIGUSR2,
    signal.SIGCHLD,
    signal.SIGIO,
    signal.SIGALRM,
)

_log = logging.getLogger(__name__)


class Stage(Enum):
    STARTING = 0  # there is no generation that has ever served, or none at all
    SERVING = 1
    OFFERING = 2
    PREPARING = 3
    YIELDING = 4
    TAKING_OVER = 5
    STOPPING = 6


_STARTING, _SERVING, _OFFERING, _PREPARING, _YIELDING, _TAKING_OVER, _STOPPING = Stage

#: The steps that may happen.
TRANSITIONS: Final[Mapping[Stage, frozenset[Stage]]] = {
    _STARTING: frozenset({_SERVING, _PREPARING, _STOPPING}),
    _SERVING: frozenset({_OFFERING, _STARTING, _STOPPING}),
    _OFFERING: frozenset({_PREPARING, _SERVING, _STARTING, _STOPPING}),
    _PREPARING: frozenset({_YIELDING, _TAKING_OVER, _SERVING, _STARTING, _STOPPING}),
    _YIELDING: frozenset({_TAKING_OVER, _SERVING, _STARTING, _STOPPING}),
    _TAKING_OVER: frozenset({_SERVING, _STARTING, _STOPPING}),
    _STOPPING: frozenset({_STOPPING}),
}

_SECONDS: Final[Mapping[Stage, float]] = {
    _OFFERING: OFFER_SECONDS,
    _PREPARING: PREPARE_SECONDS,
    _YIELDING: YIELD_SECONDS,
    _TAKING_OVER: TAKE_OVER_SECONDS,
}


class Member:
    """One generation, as its main process sees it."""

    def __init__(self, pid: int, channel: Channel, patience: float = PATIENCE) -> None:
        self.pid = pid
        self.channel = channel
        self.patience = patience
        self.ends_at: float | None = None  # when it is killed
        self.born = time.monotonic()
        self.holds: list[tuple[str, int]] = []  # what it wants to be kept, from its `ready` on
        self.feeds: list[int] = []  # where those of its workers that drain look for control
        self.is_ready = False
        channel.signal_arrivals()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def let_go(self) -> None:
        """Keep nothing for it."""
        for descriptor in (*self.feeds, *(held for _, held in self.holds)):
            os.close(descriptor)
        self.feeds, self.holds = [], []


class MainProcess:
    """Watches over `current`, the generation that serves, until all have ended."""

    def __init__(
        self,
        environ: MutableMapping[str, str],
        current: Member | None,
        leaving: list[Member] | None = None,
        held: list[tuple[str, int]] | None = None,
    ) -> None:
        self._environ = environ
        self._stage = _STARTING
        self._ends_at: float | None = None  # of the stage
        self._current = current
        self._next: Member | None = None
        self._leaving = leaving or []
        self._held = held or []
        self._failed: list[Member] = []  # killed, and not gone yet
        self._backoff = Backoff()
        self._start_at: float | None = None  # another generation, in the place of a dead one
        self._has_to_upgrade = False  # when it serves
        self._stops = 0
        self._status = 1
        if current is not None and current.is_ready:
            self._go_to(_SERVING)

    def run(self) -> int:
        """Watch; the exit status."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _TAKEN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever ignored it had the kernel take our children
        seconds = 0.0  # what came before `execve` waits
        while True:
            number = held_signals.next_of(_TAKEN, seconds)
            now, most = time.monotonic(), TICK
            try:
                self._heed(number)
                self._listen()
                self._reap()
                self._look(now)
            except Exception:
                _log.exception("a look at the versions failed; the next one follows")
                most = FAULT_TICK
            if not self._members() and self._start_at is None:
                return self._status
            due = [self._ends_at, self._start_at, *(member.ends_at for member in self._members())]
            now = time.monotonic()
            seconds = min([most, *(max(at - now, 0.0) for at in due if at is not None)])

    # Private

    def _heed(self, number: signal.Signals | None) -> None:
        if number in held_signals.STOPS:
            self._stop()
        elif number is signal.SIGHUP:
            for member in (self._current, self._next):
                if member is not None:
                    member.signal(signal.SIGHUP)
        elif number is signal.SIGUSR2:
            self._upgrade()

    def _members(self) -> list[Member]:
        pair = [member for member in (self._current, self._next) if member is not None]
        return [*pair, *self._leaving, *self._failed]

    def _go_to(self, stage: Stage) -> None:
        self._stage = stage
        seconds = _SECONDS.get(stage)
        self._ends_at = None if seconds is None else time.monotonic() + seconds

    # Private: what it is told

    def _stop(self) -> None:
        self._stops += 1
        self._start_at = None
        if self._stage is not _STOPPING:
            if self._next is not None and self._stage is not _TAKING_OVER:
                self._give_up()  # it serves nobody, and may be where it hears nothing
            self._go_to(_STOPPING)
            self._let_go_of_all()
            now = time.monotonic()
            for member in (self._current, self._next):
                if member is not None:
                    member.ends_at = now + member.patience
        for member in (self._current, self._next, *(self._leaving if self._stops > 1 else ())):
            if member is not None:
                member.signal(held_signals.TOLD_TO_STOP)

    def _upgrade(self) -> None:
        if self._stage is _STOPPING:
            return
        if self._current is None or not self._current.is_ready:
            _log.info("told to upgrade, which waits for the end of the start")
            self._has_to_upgrade = True
            return
        if self._stage is not _SERVING:
            _log.warning("told to upgrade in the middle of an upgrade: ignored")
            return
        _log.info("upgrading: the new version is started beside the running one")
        notify(self._environ, *reloading())
        self._go_to(_OFFERING)
        self._current.channel.say(Word.OFFER)

    # Private: what generations say

    def _listen(self) -> None:
        for member in self._members():
            for message in member.channel.heard():
                self._hear(member, message)
        for member in [one for one in self._members() if one.channel.is_over]:
            # It closes its end by dying: SIGIO would come for ever.
            member.channel.close()
            member.channel.is_over = False

    def _hear(self, member: Member, message: Message) -> None:
        word = message.word
        if word is Word.HOLD and self._stage is not _STOPPING:
            member.holds += [(str(message.fields.get("name")), fd) for fd in message.descriptors]
            return
        if word is Word.NOTIFY and member is self._current:
            notify(self._environ, str(message.fields.get("text")))
        elif word is Word.OFFERED and member is self._current and self._stage is _OFFERING:
            self._start_next(message.descriptors)
            return
        elif word is Word.PREPARED and member is self._next and self._stage is _PREPARING:
            if self._current is None:
                self._take_over()
            else:
                self._go_to(_YIELDING)
                self._current.channel.say(Word.YIELD)
        elif word is Word.YIELDED and member is self._current and self._stage is _YIELDING:
            self._take_over()
        elif word is Word.PATIENCE:
            member.patience = float(message.fields.get("seconds", PATIENCE))
        elif word is Word.READY and member in (self._current, self._next):  # not one that came too late
            member.is_ready = True
            member.patience = float(message.fields.get("patience", PATIENCE))
            self._serves(member)
        message.close()

    def _take_over(self) -> None:
        assert self._next is not None
        self._go_to(_TAKING_OVER)
        self._next.channel.say(Word.GO)

    def _serves(self, member: Member) -> None:
        """This generation serves from now on."""
        if self._stage is _STOPPING:
            return
        former = self._current if member is self._next else None
        if member is self._next:
            self._current, self._next = member, None
        if former is not None:  # the next one but one is to know of its workers too, while they drain
            former.feeds = [descriptor for name, descriptor in self._held if name == FEED]
            self._held = [each for each in self._held if each[0] != FEED]
        self._let_go_of_all()
        self._held, member.holds = member.holds, []
        self._go_to(_SERVING)
        if former is None:
            if self._has_to_upgrade:
                self._has_to_upgrade = False
                self._upgrade()
            return
        self._leave(former)
        _log.info("upgraded: the new version serves, the old one finishes its exchanges")
        self._renew()

    def _leave(self, member: Member) -> None:
        self._leaving.append(member)
        member.ends_at = time.monotonic() + member.patience
        member.channel.say(Word.LEAVE)

    def _let_go_of_all(self) -> None:
        for _, descriptor in self._held:
            os.close(descriptor)
        self._held = []
        if self._stage is _STOPPING:
            for member in self._members():
                member.let_go()

    # Private: who comes and goes

    def _start_next(self, tickets: list[int]) -> None:
        try:
            ours, theirs = Channel.pair()
        except OSError as error:
            for descriptor in tickets:
                os.close(descriptor)
            self._fail(f"it cannot be started: {os.strerror(error.errno or 0)}")
            return
        feeds = [descriptor for member in self._leaving for descriptor in member.feeds]
        held = [
            *self._held,
            *((FEED, descriptor) for descriptor in feeds),
            *((TICKETS, descriptor) for descriptor in tickets),
        ]
        passed = [theirs.fileno(), *(descriptor for _, descriptor in held)]
        content = {"channel": theirs.fileno(), "main": os.getpid(), "held": held}
        environ = {**self._environ, VARIABLE: json.dumps(content)}
        try:
            for descriptor in passed:
                os.set_inheritable(descriptor, True)
            pid = os.posix_spawn(
                sys.executable, sys.orig_argv, environ, setsigmask=held_signals.HELD, setsigdef=_TAKEN
            )
        except OSError as error:
            ours.close()
            self._fail(f"it cannot be started: {os.strerror(error.errno or 0)}")
        else:
            self._next = Member(pid, ours)
            self._go_to(_PREPARING)
        finally:
            theirs.close()
            for _, descriptor in held:
                os.set_inheritable(descriptor, False)
            for descriptor in tickets:
                os.close(descriptor)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for member in self._members():  # in a container orphans of other processes come here too
                if member.pid == pid:
                    self._ended(member, os.waitstatus_to_exitcode(status))

    def _ended(self, member: Member, status: int) -> None:
        for message in member.channel.heard() if member.channel.fileno() >= 0 else ():  # its last words
            if member is self._current:
                self._hear(member, message)
            else:
                message.close()
        member.channel.close()
        member.let_go()
        said = said_of(status)
        if member in self._failed:
            self._failed.remove(member)
        elif member in self._leaving:
            self._leaving.remove(member)
            if status:
                _log.warning("the old version %s", said)
        elif member is self._next:
            self._next = None
            if self._stage is not _STOPPING:
                self._fail(f"it {said}")
        elif member is self._current:
            self._current = None
            if self._stage is _STOPPING or not member.is_ready:
                self._status = max(status, 0) or (1 if status else 0)
                if status < 0:
                    _log.error("the proxy %s", said)
            elif self._next is not None:
                _log.error("the proxy %s in the middle of an upgrade: the new version goes on", said)
                if self._stage is _YIELDING:
                    self._take_over()
            else:
                self._start_again(f"the proxy {said}", time.monotonic() - member.born)

    def _start_again(self, why: str, lived: float) -> None:
        pause = self._backoff.pause(lived)
        _log.error("%s: it is started again%s", why, f" in {pause:g} s" if pause else "")
        self._go_to(_STARTING)
        self._start_at = time.monotonic() + pause

    def _fail(self, why: str) -> None:
        """There will be no new generation."""
        yielded = self._stage in (_YIELDING, _TAKING_OVER)
        lived = 0.0 if self._next is None else time.monotonic() - self._next.born
        self._give_up()
        if self._current is None:
            self._start_again(f"the proxy cannot be started, {why}", lived)
            return
        _log.error("the upgrade failed, the running version goes on: the new one failed, %s", why)
        self._go_to(_SERVING)
        if yielded:
            self._current.channel.say(Word.RESUME)
        notify(self._environ, "READY=1")

    def _give_up(self) -> None:
        failed, self._next = self._next, None
        if failed is not None:
            failed.signal(signal.SIGKILL)
            self._failed.append(failed)

    def _look(self, now: float) -> None:
        if self._start_at is not None and self._start_at <= now:
            self._start_at = None
            self._start_next([])
        if self._ends_at is not None and self._ends_at <= now:
            stage, self._ends_at = self._stage, None
            if stage is _OFFERING:
                self._fail("the running version does not answer")
            elif stage is _YIELDING:
                self._fail("the running version did not close its control plane in time")
            else:
                self._fail(f"it is not ready after {_SECONDS[stage]:g} s")
        for member in self._members():
            if member.ends_at is not None and member.ends_at <= now:
                which = "old version" if member in self._leaving else "proxy"
                _log.warning("the %s did not end in time: killing it", which)
                member.ends_at = None
                member.signal(signal.SIGKILL)

    def _renew(self) -> None:
        """Become the new version of the program, with the same number."""
        if self._current is None or self._next is not None or self._failed:
            return
        members = [self._current, *self._leaving]
        if any(member.channel.fileno() < 0 for member in members):  # just died: see to that first
            return
        saved = [(member.pid, member.channel.fileno(), member.patience, member.ends_at) for member in members]
        feeds = [(index, descriptor) for index, each in enumerate(members) for descriptor in each.feeds]
        content = {"members": saved, "held": self._held, "feeds": feeds}
        environ = {**self._environ, MAIN: json.dumps(content)}
        passed = [
            *(member.channel.fileno() for member in members),
            *(descriptor for _, descriptor in (*self._held, *feeds)),
        ]
        try:
            for descriptor in passed:
                os.set_inheritable(descriptor, True)
            os.execve(sys.executable, sys.orig_argv, environ)  # noqa: S606 - what we are ourselves
        except OSError as error:
            for descriptor in passed:
                os.set_inheritable(descriptor, False)
            _log.error("the main process stays of the old version: %s", os.strerror(error.errno or 0))


def begin(environ: MutableMapping[str, str]) -> Generation | int:
    """Fork: in the child its place as the first generation, in this process the exit status, at the end.

    Raises `ConfigError` when the system refuses.
    """
    ours, theirs = Channel.pair()
    main_pid = os.getpid()
    gc.collect()
    gc.freeze()  # a collection in the child would write to, and so copy, every page
    try:
        pid = os.fork()
    except OSError as error:
        raise ConfigError(f"no process can be started: {os.strerror(error.errno or 0)}") from None
    if pid == 0:
        ours.close()
        return Generation(theirs, main_pid)
    theirs.close()
    logs.set_up("info", environ)
    _forget_inherited(environ)
    return MainProcess(environ, Member(pid, ours)).run()


def resume(environ: MutableMapping[str, str]) -> int | None:
    """Go on where this process was before `execve`; the exit status, or None when it was not."""
    given = environ.pop(MAIN, None)
    if given is None:
        return None
    logs.set_up("info", environ)
    content = json.loads(given)
    members = []
    for pid, descriptor, patience, ends_at in content["members"]:
        member = Member(pid, Channel.of(descriptor), patience)
        member.ends_at = ends_at
        members.append(member)
    held = [(str(name), int(descriptor)) for name, descriptor in content["held"]]
    for _, descriptor in held:
        os.set_inheritable(descriptor, False)
    for index, descriptor in content.get("feeds", []):
        os.set_inheritable(descriptor, False)
        members[index].feeds.append(descriptor)
    current, *leaving = members
    current.is_ready = True
    return MainProcess(environ, current, leaving, held).run()


def said_of(status: int) -> str:
    """How a process ended, in words."""
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


# Private


def _forget_inherited(environ: MutableMapping[str, str]) -> None:
    """The sockets that systemd opened are the generation's; what it wants to be kept it gives back."""
    count = environ.pop("LISTEN_FDS", "0")
    if environ.pop("LISTEN_PID", "") == str(os.getpid()) and count.isdecimal():
        for index in range(int(count)):
            with contextlib.suppress(OSError):
                os.close(FIRST_DESCRIPTOR + index)
    environ.pop("LISTEN_FDNAMES", None)
