"""Signals that wait until there is somebody to heed them.

`hold` is the first thing that the program does, before the imports that take most of its start: a signal that
comes before its handler would end the process without a word or, in a container, where the process is
number 1 and the kernel drops what it has no handler for, be lost. What is held back is not. This file imports
next to nothing for that reason.

SIGTERM and SIGINT are for the main process, which tells its generation by `TOLD_TO_STOP`: who signals a whole
process group, as a terminal does, means one stop and not two.
"""

import signal
from collections.abc import Callable, Collection
from typing import Final, NoReturn, TypeVar

T = TypeVar("T")

STOPS: Final = (signal.SIGTERM, signal.SIGINT)
#: How the main process tells a generation to stop.
TOLD_TO_STOP: Final = signal.SIGUSR1
HELD: Final = (*STOPS, signal.SIGHUP, TOLD_TO_STOP, signal.SIGUSR2)


def hold() -> None:
    """Signals wait from now on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


def let_go(numbers: Collection[signal.Signals] = HELD) -> None:
    """They come, those that waited too."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def next_of(numbers: Collection[signal.Signals], seconds: float) -> signal.Signals | None:
    """The next of these, which are held back, or None when there was none for `seconds`; stops before others.

    SIGALRM is one of them: the interval timer. (`sigtimedwait` would be simpler, but when the process was
    stopped until its time was over, CPython returns what happens to be on the stack.)
    """
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))  # 0 would be never
    number = signal.Signals(signal.sigwait(numbers))
    stops = {*STOPS, TOLD_TO_STOP} & set(numbers)
    if number not in stops and signal.sigpending() & stops:
        # The kernel gives the lowest number first: SIGHUPs that do not cease would be all that there is.
        number = signal.Signals(signal.sigwait(stops))
    return None if number is signal.SIGALRM else number


class Stopped(BaseException):
    """A stop came in the midst of something. It is held back again, for whoever waits for it next."""


def unless_stopped(work: Callable[[], T]) -> T:
    """What `work` returns; in a process without an event loop. A stop that comes meanwhile raises `Stopped`.

    Also in a system call that would wait for ever: that is what it is for.
    """
    former = signal.signal(TOLD_TO_STOP, _abandon)
    try:
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {TOLD_TO_STOP})
            return work()
        finally:
            # the last moment in which `_abandon` is called
            signal.pthread_sigmask(signal.SIG_BLOCK, {TOLD_TO_STOP})
    finally:
        signal.signal(TOLD_TO_STOP, former)


# Private


def _abandon(number: int, _: object) -> NoReturn:
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    signal.raise_signal(number)  # now it waits
    raise Stopped
