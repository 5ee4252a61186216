"""Child processes as the supervisor sees them: forked, watched through shared memory, reaped, forked again.

The rules
- Children and parent share a piece of memory (`Board`): each child writes the time of its last heartbeat, how
  far it is, and the one line with which it gives up. Nothing has to be read for others to go on: a parent
  that is stopped stops nobody, and finds the newest heartbeat when it wakes up.
- A heartbeat is written by the event loop: it stands for the loop, not for the process.
- A child that dies is forked again at once; when it dies soon after, again and again, the pauses double up to
  `MAX_PAUSE`: no fork bomb, and no giving up. A fork that the system refuses (no memory, too many processes)
  counts as such a death: it is logged, and tried again.
- A judge who slept himself must not judge: after a pause of the parent's own (SIGSTOP, a suspended machine)
  every child gets a fresh `HANG_SECONDS`.
- A child never returns into its parent's code: it ends in `os._exit`.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import signal
import struct
import sys
from collections.abc import Callable
from enum import IntEnum
from typing import Final

#: Seconds between two heartbeats.
BEAT_SECONDS: Final = 1.0
#: Seconds without a heartbeat after which a child counts as hanging.
HANG_SECONDS: Final = 10.0
#: Seconds that a child must live so that its death is not one of a series.
STEADY_SECONDS: Final = 10.0
#: Seconds before the third fork of a series; the second comes at once.
FIRST_PAUSE: Final = 0.25
MAX_PAUSE: Final = 30.0

#: The exit status of a child that cannot work with its configuration; `Board.complaint` says why.
UNUSABLE: Final = 2

#: What stands for the status of a child, as waitpid(2) gives it, when nobody knows it: exit status 1.
_LOST: Final = 1 << 8

_log = logging.getLogger(__name__)


class Progress(IntEnum):
    """How far a child is."""

    STARTING = 0
    PREPARED = 1  # waits until it may serve
    READY = 2


class Board:
    """What children and parent share: one slot a child, written with single stores. Times are monotonic."""

    _BEAT: Final = struct.Struct("@d")
    _COUNT: Final = struct.Struct("@I")
    # beat 8, progress 4, restarts 4, length of the complaint 4, complaint
    _SLOT: Final = 1024
    _COMPLAINT: Final = 20

    def __init__(self, slots: int) -> None:
        self._memory = mmap.mmap(-1, slots * self._SLOT + 3 * self._COUNT.size)
        self._end = slots * self._SLOT

    # Of all: each is said by the parent

    @property
    def stopping(self) -> bool:
        """Whether the parent is ending them all."""
        return self._is_set(0)

    def stop(self) -> None:
        """Say so."""
        self._set(0, 1)

    @property
    def may_go(self) -> bool:
        """Whether those who have prepared may serve."""
        return self._is_set(1)

    def go(self) -> None:
        """Say so."""
        self._set(1, 1)

    @property
    def hands_over(self) -> bool:
        """Whether control closes for a successor in another generation."""
        return self._is_set(2)

    def hand_over(self, *, begins: bool) -> None:
        """Say so, or that it does no longer."""
        self._set(2, begins)

    # Of one child

    def clear(self, slot: int, now: float) -> None:
        """A new child begins to live in `slot`."""
        at = slot * self._SLOT
        self._BEAT.pack_into(self._memory, at, now)
        self._COUNT.pack_into(self._memory, at + 8, Progress.STARTING)
        self._COUNT.pack_into(self._memory, at + 16, 0)

    def beat(self, slot: int, now: float) -> None:
        """The child in `slot` lives."""
        self._BEAT.pack_into(self._memory, slot * self._SLOT, now)

    def last_beat(self, slot: int) -> float:
        """When it said so last."""
        return float(self._BEAT.unpack_from(self._memory, slot * self._SLOT)[0])

    def prepared(self, slot: int) -> None:
        """The child in `slot` could serve."""
        self._COUNT.pack_into(self._memory, slot * self._SLOT + 8, Progress.PREPARED)

    def is_prepared(self, slot: int) -> bool:
        """Whether it has said so, or more."""
        return self._count(slot, 8) >= Progress.PREPARED

    def ready(self, slot: int) -> None:
        """The child in `slot` serves."""
        self._COUNT.pack_into(self._memory, slot * self._SLOT + 8, Progress.READY)

    def ended(self, slot: int) -> None:
        """The child in `slot` is gone; what it complained of stays."""
        self._COUNT.pack_into(self._memory, slot * self._SLOT + 8, Progress.STARTING)

    def is_ready(self, slot: int) -> bool:
        """Whether it has said so."""
        return self._count(slot, 8) == Progress.READY

    def count_restart(self, slot: int) -> None:
        """The child in `slot` had to be replaced."""
        self._COUNT.pack_into(self._memory, slot * self._SLOT + 12, self.restarts(slot) + 1)

    def restarts(self, slot: int) -> int:
        """How often it had."""
        return self._count(slot, 12)

    def complain(self, slot: int, line: str) -> None:
        """The child in `slot` gives up, and says why."""
        at = slot * self._SLOT + self._COMPLAINT
        said = line.encode("utf-8", "replace")[: self._SLOT - self._COMPLAINT]
        self._memory[at : at + len(said)] = said
        self._COUNT.pack_into(self._memory, slot * self._SLOT + 16, len(said))

    def complaint(self, slot: int) -> str:
        """What it said; "" when nothing."""
        at = slot * self._SLOT + self._COMPLAINT
        return self._memory[at : at + self._count(slot, 16)].decode("utf-8", "replace")

    # Private

    def _is_set(self, flag: int) -> bool:
        return bool(self._COUNT.unpack_from(self._memory, self._end + flag * self._COUNT.size)[0])

    def _set(self, flag: int, value: int) -> None:
        self._COUNT.pack_into(self._memory, self._end + flag * self._COUNT.size, value)

    def _count(self, slot: int, offset: int) -> int:
        return int(self._COUNT.unpack_from(self._memory, slot * self._SLOT + offset)[0])


class Backoff:
    """When to fork again: pure, times are arguments in seconds."""

    def __init__(self) -> None:
        self._deaths = 0  # in a row, each soon after its birth

    def pause(self, lived: float) -> float:
        """How long to wait after the death of a child that lived for so long."""
        if lived >= STEADY_SECONDS:
            self._deaths = 0
        self._deaths += 1
        if self._deaths == 1:
            return 0.0
        return min(FIRST_PAUSE * 2.0 ** min(self._deaths - 2, 16), MAX_PAUSE)


class Child:
    """One place for a process: `work(again)` runs in it and returns the exit status.

    `again` says whether another process was there before.
    """

    def __init__(self, slot: int, name: str, board: Board, work: Callable[[bool], int]) -> None:
        # the place
        self.slot = slot
        self.name = name
        self._board = board
        self._work = work
        self._backoff = Backoff()
        self._forked = False
        self.fork_at: float | None = 0.0  # when to fork; None while it lives
        # one process
        self.pid = 0
        self.status: int | None = None  # of the last one that ended: exit status, or -signal
        self._born = 0.0
        self._judged_from = 0.0

    @property
    def is_ready(self) -> bool:
        """Whether it lives and serves."""
        return self.pid != 0 and self._board.is_ready(self.slot)

    @property
    def is_prepared(self) -> bool:
        """Whether it lives, and serves or could."""
        return self.pid != 0 and self._board.is_prepared(self.slot)

    @property
    def complaint(self) -> str:
        """Why it gave up."""
        return self._board.complaint(self.slot)

    def fork(self, now: float) -> bool:
        """Begin to live; whether this replaces another one.

        When the system refuses, `fork_at` says when to try again.
        """
        again = self._forked
        self._board.clear(self.slot, now)
        _flush()
        try:
            pid = os.fork()
        except OSError as error:
            pause = max(self._backoff.pause(0.0), FIRST_PAUSE)
            self.fork_at = now + pause
            why = os.strerror(error.errno or 0)
            _log.error("%s cannot be started: %s; the next attempt is in %g s", self.name, why, pause)
            return False
        if pid == 0:
            _run_child(self._work, again)
        self.pid = pid
        self._born = self._judged_from = now
        self.fork_at, self.status, self._forked = None, None, True
        if again:
            self._board.count_restart(self.slot)
        return again

    def reap(self, now: float) -> bool:
        """Whether it has ended since the last call; then `fork_at` says when to fork again."""
        if not self.pid:
            return False
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:  # somebody else took its status
            pid, status = self.pid, _LOST
        if pid == 0:
            return False
        self.pid, self.status = 0, os.waitstatus_to_exitcode(status)
        self._board.ended(self.slot)  # a new control process waits for whoever is ready
        self.fork_at = now + self._backoff.pause(now - self._born)
        return True

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it lives."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def forgive(self, now: float) -> None:
        """The parent was away: count its silence from now."""
        self._judged_from = now

    def hangs(self, now: float) -> bool:
        """Whether it lives, but its event loop does not."""
        return self.pid != 0 and now - max(self._board.last_beat(self.slot), self._judged_from) > HANG_SECONDS


# Private


def _run_child(work: Callable[[bool], int], again: bool) -> None:
    status = 1
    try:
        status = work(again)
    except BaseException:  # it must not get back into the parent's code: the status says it
        _log.exception("the process ends because of a fault")
    finally:
        _flush()
        os._exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader has gone, or it is closed
            stream.flush()
