"""Who waits, in which order, and for how long: against a model that is a plain list."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from portero_py.core.queue import Queue

MOST = 5
MOST_BYTES = 100


def queue_of(*items: str, patience: float = 10.0) -> Queue[str]:
    queue = Queue[str]()
    for number, item in enumerate(items):
        assert queue.join(item, float(number), patience, 10, most=MOST, most_bytes=MOST_BYTES)
    return queue


def test_the_first_who_came_is_the_first_to_go() -> None:
    queue = queue_of("a", "b", "c")
    left = []
    while (item := queue.first()) is not None:
        left.append((item, queue.leave(item)))
    assert left == [("a", 0.0), ("b", 1.0), ("c", 2.0)]
    assert queue.size == 0
    assert queue.next_deadline() is None


def test_who_cannot_use_the_room_lets_the_others_go_first_and_keeps_its_time() -> None:
    queue = queue_of("a", "b")
    queue.pass_over("a")
    assert list(queue) == ["b", "a"]
    assert queue.expired(10.0) == ["a"]
    assert queue.leave("a") == 0.0


def test_those_who_were_passed_over_and_wait_still_are_first_again_in_their_order() -> None:
    queue = queue_of("a", "b", "c", "d")
    for item in "abc":
        queue.pass_over(item)
    queue.leave("b")
    queue.put_back(["a", "b", "c"])
    assert list(queue) == ["a", "c", "d"]


def test_it_is_full_by_number() -> None:
    queue = queue_of("a", "b", "c", "d", "e")
    assert not queue.join("f", 9.0, 10.0, 0, most=MOST, most_bytes=MOST_BYTES)
    assert list(queue) == ["a", "b", "c", "d", "e"]
    queue.leave("c")
    assert queue.join("f", 9.0, 10.0, 0, most=MOST, most_bytes=MOST_BYTES)


def test_it_is_full_by_bytes_and_one_that_grows_too_much_has_to_leave() -> None:
    queue = queue_of("a", "b")
    assert not queue.join("c", 2.0, 10.0, 81, most=MOST, most_bytes=MOST_BYTES)
    assert queue.join("c", 2.0, 10.0, 80, most=MOST, most_bytes=MOST_BYTES)
    assert not queue.grow("a", 1, most_bytes=MOST_BYTES)
    assert list(queue) == ["a", "b", "c"]
    queue.leave("a")
    assert queue.size == 90
    assert queue.grow("b", 10, most_bytes=MOST_BYTES)


def test_everybody_waits_for_its_own_patience() -> None:
    queue = queue_of("patient", patience=100.0)
    queue.join("hasty", 5.0, 1.0, 0, most=MOST, most_bytes=MOST_BYTES)
    assert queue.next_deadline() == 6.0
    assert queue.expired(5.9) == []
    assert queue.expired(6.0) == ["hasty"]
    assert queue.expired(6.0) == []
    queue.leave("hasty")
    assert queue.next_deadline() == 100.0


def test_a_pause_holds_those_who_waited_before_and_shortens_nobodys_time() -> None:
    queue = queue_of("a", "b")
    queue.join("patient", 2.0, 100.0, 0, most=MOST, most_bytes=MOST_BYTES)
    queue.hold_until(50.0)
    assert queue.expired(49.9) == []
    assert queue.expired(50.0) == ["a", "b"]
    assert queue.next_deadline() == 102.0


@dataclass
class Held:
    name: int
    since: float
    deadline: float
    size: int


class QueueMachine(RuleBasedStateMachine):
    """Every step on the queue, and on a list of who waits."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue[int]()
        self.model: list[Held] = []
        self.now = 0.0
        self.names = 0

    @rule(patience=st.floats(0.1, 30.0), size=st.integers(0, 60))
    def join(self, patience: float, size: int) -> None:
        self.names += 1
        full = len(self.model) >= MOST or sum(held.size for held in self.model) + size > MOST_BYTES
        joined = self.queue.join(self.names, self.now, patience, size, most=MOST, most_bytes=MOST_BYTES)
        assert joined == (not full)
        if joined:
            self.model.append(Held(self.names, self.now, self.now + patience, size))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.model))
        assert self.queue.leave(held.name) == held.since
        self.model.remove(held)

    @precondition(lambda self: self.model)
    @rule()
    def hand_over(self) -> None:
        first = self.queue.first()
        assert first == self.model[0].name
        self.queue.leave(first)
        del self.model[0]

    @precondition(lambda self: self.model)
    @rule()
    def pass_over(self) -> None:
        self.queue.pass_over(self.model[0].name)
        self.model.append(self.model.pop(0))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), size=st.integers(0, 60))
    def grow(self, data: st.DataObject, size: int) -> None:
        held = data.draw(st.sampled_from(self.model))
        held.size += size
        fits = sum(each.size for each in self.model) <= MOST_BYTES
        assert self.queue.grow(held.name, size, most_bytes=MOST_BYTES) == fits
        if not fits:
            self.queue.leave(held.name)
            self.model.remove(held)

    @rule(seconds=st.floats(0.0, 20.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        due = [held for held in self.model if held.deadline <= self.now]
        deadlines = {held.name: held.deadline for held in due}
        expired = self.queue.expired(self.now)
        assert sorted(expired) == sorted(deadlines)
        assert [deadlines[name] for name in expired] == sorted(deadlines.values())
        for held in due:
            self.queue.leave(held.name)
            self.model.remove(held)

    @rule(seconds=st.floats(0.0, 30.0))
    def hold(self, seconds: float) -> None:
        self.queue.hold_until(self.now + seconds)
        for held in self.model:
            held.deadline = max(held.deadline, self.now + seconds)

    @invariant()
    def they_agree(self) -> None:
        assert list(self.queue) == [held.name for held in self.model]
        assert len(self.queue) == len(self.model)
        assert self.queue.size == sum(held.size for held in self.model)
        assert self.queue.next_deadline() == min((held.deadline for held in self.model), default=None)


TestAgainstAModel = QueueMachine.TestCase
