"""Signals that wait until there is somebody to heed them.

`hold` is the first thing that the program does, before the imports that take most of its start: a signal that
comes before its handler would end the process without a word or, in a container, where the process is
number 1 and the kernel drops what it has no handler for, be lost. What is held back is not. This file imports
next to nothing for that reason.
"""

import signal
from typing import Final

HELD: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def hold() -> None:
    """Signals wait from now on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


def let_go() -> None:
    """They come, those that waited too."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
