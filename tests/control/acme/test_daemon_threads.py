"""Threads that nobody waits for: answers, errors, bounds, and an exit that is not held up."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from portero_py.control.acme.daemon_threads import DaemonThreads


async def test_an_answer_or_an_error_comes_back() -> None:
    threads = DaemonThreads(2, "test")
    assert await threads.call(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await threads.call(divmod, 7, 0)
    threads.close()


async def test_there_are_never_more_threads_than_were_allowed() -> None:
    threads = DaemonThreads(3, "counted")

    def alive() -> int:
        return sum(thread.name.startswith("counted-") for thread in threading.enumerate())

    everybody = threading.Barrier(4)
    calls = [asyncio.create_task(threads.call(everybody.wait)) for _ in range(3)]
    more = [asyncio.create_task(threads.call(int)) for _ in range(20)]
    while everybody.n_waiting < 3:
        await asyncio.sleep(0.001)
    assert alive() == 3
    everybody.wait()
    assert sorted(await asyncio.gather(*calls)) in ([0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3])
    assert await asyncio.gather(*more) == [0] * 20
    threads.close()
    while alive():
        await asyncio.sleep(0.001)


async def test_what_nobody_waits_for_any_more_is_not_begun() -> None:
    threads = DaemonThreads(1, "test")
    began, release = threading.Event(), threading.Event()
    done: list[str] = []

    def hold() -> None:
        began.set()
        release.wait()

    holding = asyncio.create_task(threads.call(hold))
    given_up = asyncio.create_task(threads.call(done.append, "given up"))
    kept = asyncio.create_task(threads.call(done.append, "kept"))
    while not began.is_set():
        await asyncio.sleep(0.001)
    holding.cancel()
    given_up.cancel()
    await asyncio.wait([holding, given_up])
    release.set()
    await kept
    assert done == ["kept"]
    threads.close()


@pytest.mark.parametrize("ends", ["threads.close()", "pass"])
def test_the_exit_does_not_wait_for_one_that_hangs(ends: str) -> None:
    code = f"""
import asyncio, threading
from portero_py.control.acme.daemon_threads import DaemonThreads

async def main():
    threads = DaemonThreads(1, "hangs")
    began = threading.Event()
    task = asyncio.create_task(threads.call(lambda: (began.set(), threading.Event().wait())))
    while not began.is_set():
        await asyncio.sleep(0.001)
    task.cancel()
    {ends}

asyncio.run(main())
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
