"""Signals that wait until there is somebody to heed them.

`hold` is the first thing that the program does, before the imports that take most of its start: a signal that
comes before its handler would end the process without a word or, in a container, where the process is
number 1 and the kernel drops what it has no handler for, be lost. What is held back is not. This file imports
next to nothing for that reason.
"""

import signal
from collections.abc import Callable
from typing import Final, NoReturn, TypeVar

T = TypeVar("T")

STOPS: Final = (signal.SIGTERM, signal.SIGINT)
HELD: Final = (*STOPS, signal.SIGHUP)


def hold() -> None:
    """Signals wait from now on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


def let_go() -> None:
    """They come, those that waited too."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


class Stopped(BaseException):
    """A stop came in the midst of something. It is held back again, for whoever waits for it next."""


def unless_stopped(work: Callable[[], T]) -> T:
    """What `work` returns; in a process without an event loop. A stop that comes meanwhile raises `Stopped`.

    Also in a system call that would wait for ever: that is what it is for.
    """
    former = {number: signal.signal(number, _abandon) for number in STOPS}
    try:
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            return work()
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # the last moment in which `_abandon` is called
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


# Private


def _abandon(number: int, _: object) -> NoReturn:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    signal.raise_signal(number)  # now it waits
    raise Stopped
