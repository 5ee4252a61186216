"""What runs beside the requests for as long as the process does: watchers, writers, renewals.

The rules
- None of them may end. One that raises, or returns, or cancels itself, is a fault: it is logged, counted, and
  begun again after a pause, which doubles up to `MAX_PAUSE` while it goes on failing.
- A fault is to be seen: `faults` names it (/readyz then says 503) until the task has run for `STEADY_SECONDS`
  without another. What fails at every attempt is so shown all the time, not now and then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

#: Seconds before the first new attempt.
FIRST_PAUSE: Final = 1.0
MAX_PAUSE: Final = 30.0
#: Seconds that a task must run so that its last fault is history.
STEADY_SECONDS: Final = 10.0

_log = logging.getLogger(__name__)


class Tasks:
    """The tasks of one owner, until `close`. `count` is called with the name of one that failed."""

    def __init__(self, count: Callable[[str], None], *, first_pause: float = FIRST_PAUSE) -> None:
        self._count = count
        self._first_pause = first_pause
        self._running: list[asyncio.Task[None]] = []
        self._faulty: set[str] = set()

    @property
    def faults(self) -> list[str]:
        """The names of those that failed lately, in order."""
        return sorted(self._faulty)

    def own(self, work: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        """Keep `work()` running."""
        self._running.append(asyncio.create_task(self._keep(work, name), name=name))

    async def close(self) -> None:
        """End them all."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        self._running.clear()

    # Private

    async def _keep(self, work: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        loop = asyncio.get_running_loop()
        pause = self._first_pause
        while True:
            begun = loop.time()
            steady = loop.call_later(STEADY_SECONDS, self._faulty.discard, name)
            try:
                await work()
                _log.error("%s ended; it begins again", name)
            except asyncio.CancelledError:
                keeper = asyncio.current_task()
                if keeper is None or keeper.cancelling():
                    raise
                # Nobody cancelled this task: something that it waited for was cancelled.
                _log.exception("%s failed; it begins again", name)
            except Exception:  # whatever ends it: that it begins again is what this file is for
                _log.exception("%s failed; it begins again", name)
            finally:
                steady.cancel()
            if loop.time() - begun >= STEADY_SECONDS:
                pause = self._first_pause
            self._faulty.add(name)
            self._count(name)
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE)
