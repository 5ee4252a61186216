"""Which signal is heeded when: stops before reloads, many reloads as one."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from portero_py.run import held_signals, tuning
from portero_py.run.signals import Signals
from tests.own_process import alone

HUP, TERM, INT = signal.SIGHUP, signal.SIGTERM, signal.SIGINT
TOLD = held_signals.TOLD_TO_STOP


async def test_a_stop_overtakes_reloads_and_many_reloads_are_one() -> None:
    signals = Signals()
    for number in (HUP, HUP, TERM, HUP, INT):
        signals.tell(number)
    assert [await signals.next() for _ in range(3)] == [TERM, INT, HUP]
    waiting = asyncio.create_task(signals.next())
    await asyncio.sleep(0)
    assert not waiting.done()
    signals.tell(HUP)
    assert await waiting is HUP


async def test_the_next_stop_forgets_reloads_on_its_way() -> None:
    signals = Signals()
    waiting = asyncio.create_task(signals.stop())
    signals.tell(HUP)
    await asyncio.sleep(0)
    signals.tell(HUP)
    await asyncio.sleep(0)
    signals.tell(TERM)
    assert await waiting is TERM


async def test_work_is_abandoned_when_a_stop_comes_and_not_when_a_reload_comes() -> None:
    signals, begun, cancelled = Signals(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    doing = asyncio.create_task(signals.unless_stopped(work()))
    await begun.wait()
    signals.tell(HUP)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not doing.done()
    signals.tell(TERM)
    assert await doing is False
    assert cancelled.is_set()
    assert await signals.next() is TERM
    assert await signals.next() is HUP


async def test_work_that_ends_or_raises_says_so() -> None:
    signals, done = Signals(), asyncio.Event()

    async def work() -> None:
        done.set()

    async def fail() -> None:
        raise ValueError("odd")

    assert await signals.unless_stopped(work())
    assert done.is_set()
    with pytest.raises(ValueError, match="odd"):
        await signals.unless_stopped(fail())


async def test_who_gives_up_waiting_takes_the_work_along() -> None:
    signals, cancelled = Signals(), asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    doing = asyncio.create_task(signals.unless_stopped(work()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    doing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await doing
    assert cancelled.is_set()


def test_a_thread_that_hangs_holds_up_no_exit_and_what_was_written_is_written() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _HANG_AND_LEAVE], capture_output=True, timeout=60, check=False, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "said", "")


_HANG_AND_LEAVE = """
import asyncio, concurrent.futures, threading, uvloop
from portero_py.run import held_signals
from portero_py.run import tuning

async def serve():
    loop = asyncio.get_running_loop()
    loop.set_default_executor(tuning.Threads())
    other = concurrent.futures.ThreadPoolExecutor(1)
    begun = [threading.Event(), threading.Event()]
    def hang(number):
        begun[number].set()
        threading.Event().wait()
    for number, executor in enumerate((None, other)):
        work = loop.run_in_executor(executor, hang, number)
        begun[number].wait()
        work.cancel()
    print("said", end="")

uvloop.run(serve())
tuning.leave(3)
"""


def test_a_process_without_threads_leaves_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threading.active_count", lambda: 1)
    with pytest.raises(SystemExit) as caught:
        tuning.leave(2)
    assert caught.value.code == 2


def test_the_program_holds_signals_back_before_it_loads_anything_big() -> None:
    """And the commands that are not the proxy let them come."""
    code = """
import signal, sys
from portero_py.run import held_signals
held_signals.hold()
print(len(signal.pthread_sigmask(signal.SIG_BLOCK, ())), "asyncio" in sys.modules, "logging" in sys.modules)
from portero_py.cli import main
main.run(["token", "--service", "a.example", "--jwt-hmac-key", "k" * 32])
print(len(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=60, check=True, text=True
    )
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == (f"{len(held_signals.HELD)} False False", "0")


@alone
def test_a_stop_gets_through_to_what_waits_without_a_loop_and_is_still_to_be_heeded() -> None:
    fifo = Path(tempfile.mkdtemp(), "fifo")
    os.mkfifo(fifo)
    before = signal.getsignal(TOLD)
    asking = threading.Timer(0.05, signal.pthread_kill, (threading.get_ident(), TOLD))
    former = signal.pthread_sigmask(signal.SIG_BLOCK, held_signals.HELD)
    try:
        asking.start()
        with pytest.raises(held_signals.Stopped):
            held_signals.unless_stopped(fifo.open)
        assert signal.sigwait([TOLD]) is TOLD
        assert signal.getsignal(TOLD) is before
        assert held_signals.unless_stopped(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            held_signals.unless_stopped(lambda: 1 // 0)
        assert set(held_signals.HELD) <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert signal.getsignal(TOLD) is before
    finally:
        asking.join()
        shutil.rmtree(fifo.parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
