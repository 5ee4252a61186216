"""Memory that was needed once and is free now: given back to the system while the process has nothing to do.

Under load the heap must not shrink: to give a buffer back and to ask for it again costs more than a request
(`tuning.tune_malloc`). So what a burst has taken stays: after a hundred slow readers and some thousand
streams a process of 56 MB had 111, 47 of them free. To give those back took 11 ms, once.

The rules
- A look every `LOOK_SECONDS`. There is time when the process has used less than `IDLE` of a processor since
  the last one, and it is worth it when at least `WORTH` bytes are free.
- Not in a thread: all may be waiting for a disk, and the heartbeat must not.
- Only glibc says how much is free. Other C libraries give back by themselves.
"""

from __future__ import annotations

import asyncio
import ctypes
import time
from collections.abc import Callable
from typing import Final, Protocol

LOOK_SECONDS: Final = 10.0
IDLE: Final = 0.05
WORTH: Final = 8 << 20


class Heap(Protocol):
    """The C library's."""

    def free(self) -> int:
        """Bytes that it holds and nobody uses."""

    def give_back(self) -> None:
        """Let the system have them."""


class Slack:
    """Looks after one process. `cpu` gives the seconds that it has used, `clock` those that have passed."""

    def __init__(
        self,
        heap: Heap | None = None,
        *,
        cpu: Callable[[], float] = time.process_time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._heap = heap or glibc()
        self._cpu = cpu
        self._clock = clock
        self._looked_at, self._used = clock(), cpu()

    async def run(self) -> None:
        """Look again and again."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_SECONDS)

    def look(self) -> None:
        """Look if it is time to; it may be called more often."""
        now = self._clock()
        seconds = now - self._looked_at
        if self._heap is None or seconds < LOOK_SECONDS:
            return
        used = self._cpu()
        spent, self._looked_at, self._used = used - self._used, now, used
        if spent < IDLE * seconds and self._heap.free() >= WORTH:
            self._heap.give_back()


def glibc() -> Heap | None:
    """The heap of this process, if its C library is glibc 2.33 or later."""
    try:
        library = ctypes.CDLL(None)
        return _Glibc(library.mallinfo2, library.malloc_trim)
    except (AttributeError, OSError):
        return None


# Private


class _Mallinfo2(ctypes.Structure):
    """mallinfo(3); `fordblks` is what is free."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )
    fordblks: int


class _Glibc:
    def __init__(self, mallinfo2: ctypes._NamedFuncPointer, malloc_trim: ctypes._NamedFuncPointer) -> None:
        mallinfo2.argtypes, mallinfo2.restype = (), _Mallinfo2
        malloc_trim.argtypes, malloc_trim.restype = (ctypes.c_size_t,), ctypes.c_int
        self._mallinfo2, self._malloc_trim = mallinfo2, malloc_trim

    def free(self) -> int:
        info: _Mallinfo2 = self._mallinfo2()
        return info.fordblks

    def give_back(self) -> None:
        self._malloc_trim(0)
