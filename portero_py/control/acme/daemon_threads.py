"""Threads for what blocks, and that nobody waits for at the end.

`concurrent.futures` joins its threads when the interpreter exits, so one that waits for a silent CA holds up
the exit until its own time-out. These are daemons: the exit cuts them off wherever they are. What runs here
must bear that, as it bears SIGKILL.

A thread is started when there is work and none is idle, up to `count`. A call whose waiter was cancelled
before it began is left out; one that has begun goes on, and its answer is dropped.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

_Answer = TypeVar("_Answer")


class DaemonThreads:
    """At most `count` threads. `close` when nothing more is to be called."""

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._started = 0
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)

    async def call(self, function: Callable[..., _Answer], *arguments: object) -> _Answer:
        """Run `function` in a thread; its result, or what it raised."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_Answer] = loop.create_future()

        def job() -> None:
            if answer.cancelled():
                return
            result: _Answer
            try:
                result = function(*arguments)
            except BaseException as error:  # raised where it is waited for; the thread goes on
                _tell(loop, _refuse, answer, error)
            else:
                _tell(loop, _grant, answer, result)

        self._jobs.put(job)
        if not self._idle.acquire(blocking=False) and self._started < self._count:
            self._started += 1
            name = f"{self._name}-{self._started}"
            threading.Thread(target=self._work, name=name, daemon=True).start()
        return await answer

    def close(self) -> None:
        """End the threads that are idle; the others end when what they do has ended, or with the process."""
        for _ in range(self._started):
            self._jobs.put(None)

    # Private

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                self._idle.release()
                job = self._jobs.get()
            if job is None:
                return
            job()
            del job  # it holds its arguments


def _tell(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        pass  # the loop has ended, and with it whoever waited


def _grant(answer: asyncio.Future[_Answer], result: _Answer) -> None:
    if not answer.done():
        answer.set_result(result)


def _refuse(answer: asyncio.Future[object], error: BaseException) -> None:
    if not answer.done():
        answer.set_exception(error)
