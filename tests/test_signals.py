"""Which signal is heeded when: stops before reloads, many reloads as one."""

from __future__ import annotations

import asyncio
import signal

import pytest

from portero_py.signals import Signals

HUP, TERM, INT = signal.SIGHUP, signal.SIGTERM, signal.SIGINT


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
