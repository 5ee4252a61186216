"""Signals of a process with an event loop: what it was told, and has not heeded yet.

The rules
- A stop overtakes reloads, also the one that is going on: that is abandoned.
- However many SIGHUPs come before a reload begins, it is one. One that comes while it goes on is another.
- Every stop counts: the second one is a wish of its own.
- SIGUSR2 stands for a word of the main process: they are counted, and come before reloads.
- Before there is a loop that heeds them they are held back (`held_signals`).
"""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import Coroutine
from typing import Any


class Signals:
    """Signals in the order in which they are to be heeded.

    SIGHUP is a reload, SIGUSR2 a word of the main process, every other one a stop.
    """

    def __init__(self) -> None:
        self._stops: deque[signal.Signals] = deque()
        self._words = 0
        self._reload = False
        self._news = asyncio.Event()

    def listen_to(self, *numbers: signal.Signals) -> None:
        """From now on the loop heeds them."""
        loop = asyncio.get_running_loop()
        for number in numbers:
            loop.add_signal_handler(number, self.tell, number)

    def tell(self, number: signal.Signals) -> None:
        """It was sent, or something else means the same."""
        if number is signal.SIGHUP:
            self._reload = True
        elif number is signal.SIGUSR2:
            self._words += 1
        else:
            self._stops.append(number)
        self._news.set()

    async def next(self) -> signal.Signals:
        """Wait for the next one: stops first."""
        while True:
            if self._stops:
                return self._stops.popleft()
            if self._words:
                self._words -= 1
                return signal.SIGUSR2
            if self._reload:
                self._reload = False
                return signal.SIGHUP
            self._news.clear()
            await self._news.wait()

    async def stop(self) -> signal.Signals:
        """Wait for the next stop; everything else in between is forgotten."""
        while (number := await self.next()) in (signal.SIGHUP, signal.SIGUSR2):
            pass
        return number

    async def unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do `work` and return True; False when a stop came first: `work` is cancelled, the stop is the next.

        Raises what `work` raises.
        """
        working = asyncio.create_task(work, name="until told to stop")
        watching = asyncio.create_task(self._until_stop(), name="stop")
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            is_done = working.done()
            working.cancel()
            watching.cancel()
            await asyncio.wait({working, watching})
        if is_done or not working.cancelled():
            working.result()
        return is_done

    # Private

    async def _until_stop(self) -> None:
        while not self._stops:
            self._news.clear()
            await self._news.wait()
