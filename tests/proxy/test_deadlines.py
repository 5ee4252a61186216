"""The wheel: never early, a second late at most; who was moved without a word is late by a round at most."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portero_py.proxy.deadlines import SLOTS, Deadlines, DeadlineWheel


class Item:
    """Remembers when it was called, and does what the test says."""

    def __init__(self, deadline: float, then: Callable[[Item], None] | None = None) -> None:
        self.deadline = deadline
        self.called: list[float] = []
        self.killed = 0
        self._then = then

    def on_deadline(self, now: float) -> None:
        self.called.append(now)
        self.deadline = 0.0
        if self._then is not None:
            self._then(self)

    def kill(self) -> None:
        self.killed += 1
        if self.deadline < 0:
            raise RuntimeError("it cannot even be ended")


@given(st.floats(100.0, 1000.0), st.floats(0.01, 300.0))
def test_a_deadline_fires_once_and_at_most_a_second_late(begin: float, ahead: float) -> None:
    wheel = DeadlineWheel(begin)
    item = Item(begin + ahead)
    wheel.watch(item)
    for tick in range(1, 305):
        wheel.advance(begin + tick)
    assert len(item.called) == 1
    # The wheel is turned once a second: half of the lateness is the tick, half is the turning.
    assert begin + ahead <= item.called[0] < begin + ahead + 2.0


def test_a_deadline_that_was_moved_ahead_does_not_fire_before() -> None:
    wheel = DeadlineWheel(0.0)
    item = Item(5.0)
    wheel.watch(item)
    item.deadline = 50.0
    for second in range(1, 50):
        wheel.advance(float(second))
    assert item.called == []
    wheel.advance(50.0)
    assert item.called == [50.0]


@pytest.mark.parametrize("former", [0.0, 3600.0])
def test_a_deadline_that_was_moved_back_without_a_word_is_late_by_a_round_at_most(former: float) -> None:
    wheel = DeadlineWheel(0.0)
    item = Item(former)
    wheel.watch(item)
    item.deadline = 2.0
    for second in range(1, 20):
        wheel.advance(float(second))
    assert len(item.called) == 1
    assert 2.0 <= item.called[0] <= 2.0 + SLOTS


def test_a_deadline_that_was_moved_back_with_a_word_is_not_late() -> None:
    wheel = DeadlineWheel(0.0)
    item = Item(100.0)
    wheel.watch(item)
    item.deadline = 2.0
    wheel.sooner(item)
    wheel.advance(1.0)
    wheel.advance(2.0)
    assert item.called == [2.0]


def test_nobody_is_called_who_was_forgotten_even_by_a_neighbour_in_the_same_slot() -> None:
    wheel = DeadlineWheel(0.0)
    items: list[Item] = []

    def forget_the_others(caller: Item) -> None:
        for item in items:
            if item is not caller:
                wheel.forget(item)

    items += [Item(1.0, forget_the_others) for _ in range(5)]
    for item in items:
        wheel.watch(item)
    wheel.advance(1.0)
    assert sum(len(item.called) for item in items) == 1
    assert len(wheel) == 1


def test_nobody_is_called_whom_a_neighbour_moved() -> None:
    wheel = DeadlineWheel(0.0)
    items: list[Item] = []

    def move_the_others(caller: Item) -> None:
        for item in items:
            if item is not caller and item.deadline == 1.0:
                item.deadline = 3.0
                wheel.sooner(item)

    items += [Item(1.0, move_the_others) for _ in range(5)]
    for item in items:
        wheel.watch(item)
    wheel.advance(1.0)
    assert sum(len(item.called) for item in items) == 1
    wheel.advance(3.0)
    assert [len(item.called) for item in items] == [1] * 5


def test_an_item_may_set_a_new_deadline_or_be_forgotten_when_it_is_called() -> None:
    wheel = DeadlineWheel(0.0)

    def again(item: Item) -> None:
        item.deadline = 4.0
        wheel.sooner(item)

    renewed, gone = Item(1.0, again), Item(1.0, lambda item: wheel.forget(item))
    wheel.watch(renewed)
    wheel.watch(gone)
    for second in range(1, 5):
        wheel.advance(float(second))
    assert renewed.called == [1.0, 4.0]
    assert gone.called == [1.0]
    assert len(wheel) == 1


def test_forgetting_and_moving_what_is_not_watched_is_harmless() -> None:
    wheel = DeadlineWheel(0.0)
    item = Item(1.0)
    wheel.forget(item)
    wheel.sooner(item)
    assert len(wheel) == 0


def test_a_wheel_that_stood_still_catches_up_in_one_turn() -> None:
    wheel = DeadlineWheel(0.0)
    items = [Item(float(second)) for second in range(1, 3 * SLOTS)]
    for item in items:
        wheel.watch(item)
    wheel.advance(1000.0)
    wheel.advance(1001.0)
    assert all(len(item.called) == 1 for item in items)


def test_one_items_fault_does_not_cost_the_others_their_deadlines(caplog: pytest.LogCaptureFixture) -> None:
    wheel = DeadlineWheel(0.0)

    def fail(faulty: Item) -> None:
        for item in forgotten:
            wheel.forget(item)
        raise RuntimeError("a fault")

    items = [Item(1.0) for _ in range(20)]
    forgotten = [Item(1.0) for _ in range(20)]
    faulty = Item(1.0, fail)
    for item in (faulty, *items, *forgotten):
        wheel.watch(item)
    wheel.advance(1.0)
    before = [len(item.called) for item in forgotten]
    assert [len(item.called) for item in items] == [1] * 20
    wheel.advance(2.0)
    assert [len(item.called) for item in forgotten] == before
    assert [record.levelname for record in caplog.records] == ["ERROR"]


@pytest.mark.parametrize("deadline", [0.0, -1.0])
def test_an_item_that_raises_at_its_deadline_is_ended_and_is_watched_on(
    deadline: float, caplog: pytest.LogCaptureFixture
) -> None:
    wheel = DeadlineWheel(0.0)

    def fail(faulty: Item) -> None:
        faulty.deadline = deadline
        raise RuntimeError("a fault")

    faulty = Item(1.0, fail)
    wheel.watch(faulty)
    wheel.advance(1.0)
    assert faulty.killed == 1
    faulty.deadline = 3.0
    wheel.sooner(faulty)
    wheel.advance(2.0)
    wheel.advance(3.0)
    assert faulty.called == [1.0, 3.0]


async def test_on_a_loop_one_timer_turns_the_wheel_until_it_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    timers: list[Callable[[], None]] = []
    real = loop.call_later

    def call_later(delay: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        timers.append(callback)
        return real(3600, callback)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "call_later", call_later)
        deadlines = Deadlines(loop)
        item = Item(loop.time())
        deadlines.watch(item)
        now = loop.time()
        patched.setattr(loop, "time", lambda: now + 1.2)
        timers[0]()
    assert len(item.called) == 1
    assert len(timers) == 2
    deadlines.close()
    deadlines.close()


class Loop:
    """A loop whose clock the test turns; `timer` is the last that was asked for."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timer: tuple[float, Callable[[], None]] = (0.0, lambda: None)

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        self.timer = self.now + seconds, callback

    def run_timer(self, late: float = 0.0) -> None:
        due, callback = self.timer
        self.now = due + late
        callback()


def test_a_process_that_stood_still_reads_first_and_judges_then() -> None:
    loop = Loop()
    deadlines = Deadlines(cast("asyncio.AbstractEventLoop", loop))
    slow, answered = Item(102.0), Item(102.0)
    deadlines.watch(slow)
    deadlines.watch(answered)
    loop.run_timer(late=30.0)
    assert slow.called == answered.called == []
    answered.deadline = 0.0  # its bytes lay in the socket
    loop.run_timer(late=30.0)  # once is enough: who is always late has to judge some time
    assert (len(slow.called), len(answered.called)) == (1, 0)
