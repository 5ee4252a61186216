"""Whether the configuration is still what is in its files: who follows it, and asks for another reading.

The rules
- What is compared is what was read last (`Seen`) with what is there now: files by what they are, not by what
  happened to them. So a look too many costs a few `stat`s and asks for nothing, and a change in the middle of
  a reading is found by the next look.
- A change is seen at once by inotify, in the folders of the files and where links among them lead (a mounted
  ConfigMap is a link to a folder that is replaced), and within `rescan_seconds` where inotify is blind.
- A file that is being written is waited for: what is there has to be the same in two looks, `step_seconds`
  apart. Who writes without end is waited for `most_steps` times.
- One request at a time: the next one follows the answer (`follow`), or `PATIENCE` when none comes. So there
  are never more readings than answers, however many changes there are.
- A reading that fails is one too: it is not asked for again before something has changed.
- Who asked, and was told nothing of what is there, asks for the same again after a pause, which doubles:
  there may be no memory to tell it in.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final

from watchfiles.main import FileChange, awatch

from portero_py.config.files import Seen

RESCAN_SECONDS: Final = 30.0
STEP_SECONDS: Final = 0.1
MOST_STEPS: Final = 20
#: Seconds that an answer is waited for: a reading of many files takes its time.
PATIENCE: Final = 60.0
#: The longest pause before the same is asked for again; the first is that between two looks.
MAX_PAUSE: Final = 600.0
_BURST_MS: Final = 200
_STEP_MS: Final = 50

_log = logging.getLogger(__name__)


class FileWatch:
    """Follows the files of `seen`; calls `ask` when they are others, and waits then for `follow`."""

    def __init__(
        self,
        ask: Callable[[], None],
        seen: Seen,
        *,
        rescan_seconds: float = RESCAN_SECONDS,
        step_seconds: float = STEP_SECONDS,
        most_steps: int = MOST_STEPS,
    ) -> None:
        # process
        self._ask = ask
        self._rescan_seconds = rescan_seconds
        self._step_seconds = step_seconds
        self._most_steps = most_steps
        self._changed = asyncio.Event()
        self._answered = asyncio.Event()
        self._other_files = asyncio.Event()  # than those that are watched
        # the last reading
        self._seen = seen
        # the last request
        self._asked: Seen | None = None  # what was there
        self._pause = rescan_seconds
        self._again_at = 0.0

    def follow(self, seen: Seen) -> None:
        """The configuration has been read, or could not be: this is what was looked at."""
        if seen.paths != self._seen.paths:
            self._other_files.set()
        self._seen = seen
        self._answered.set()
        self._changed.set()

    async def run(self) -> None:
        """Follow until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch())
            while True:
                try:
                    async with asyncio.timeout(self._rescan_seconds):
                        await self._changed.wait()
                except TimeoutError:
                    pass  # nothing was seen: look all the same
                self._changed.clear()
                await self._look()

    # Private

    async def _look(self) -> None:
        seen = self._seen
        now = await asyncio.to_thread(seen.again)
        if now == seen:
            return
        for _ in range(self._most_steps):
            await asyncio.sleep(self._step_seconds)
            former, now = now, await asyncio.to_thread(seen.again)
            if former == now:
                break
        if now == self._seen:
            return  # it was read meanwhile, or is as it was
        loop, is_first = asyncio.get_running_loop(), now != self._asked
        if is_first:
            self._asked, self._pause = now, self._rescan_seconds
        elif loop.time() < self._again_at:
            return
        else:
            self._pause = min(2 * self._pause, MAX_PAUSE)
        self._answered.clear()
        self._ask()
        try:
            async with asyncio.timeout(PATIENCE):
                await self._answered.wait()
        except TimeoutError:
            if is_first:
                _log.warning("asked for another reading of the configuration, and nobody answered")
        self._again_at = loop.time() + self._pause

    async def _watch(self) -> None:
        """Set `_changed` whenever something happens in one of the folders."""
        blind = False
        while True:
            self._other_files.clear()
            folders = await asyncio.to_thread(self._seen.folders)
            # Whoever waits for this looks after the next step, in which the watch is set up:
            # what changed before is seen by him, what changes later by the watch.
            self._changed.set()
            try:
                async with aclosing(self._changes(sorted(folders))) as changes:
                    async for _ in changes:
                        blind = False
                        self._changed.set()
                        if await asyncio.to_thread(self._seen.folders) != folders:
                            break
                    continue
            except (OSError, RuntimeError) as error:  # RuntimeError: what watchfiles makes of the others
                if not blind:
                    _log.warning(
                        "the configuration's folders cannot be watched, only looked at every %g s: %s",
                        self._rescan_seconds,
                        error,
                    )
                blind = True
            await asyncio.sleep(self._rescan_seconds)

    def _changes(self, folders: list[str]) -> AsyncGenerator[set[FileChange], None]:
        return awatch(
            *folders,
            watch_filter=None,
            debounce=_BURST_MS,
            step=_STEP_MS,
            rust_timeout=int(self._rescan_seconds * 1000),
            stop_event=self._other_files,
            yield_on_timeout=True,
            recursive=False,  # it would follow links, into whatever tree they point at
        )
