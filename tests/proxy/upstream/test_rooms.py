"""The limit of a backend that several processes keep together, whatever happens to them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import pytest

from portero_py.proxy.upstream import rooms as rooms_file
from portero_py.proxy.upstream.rooms import COURTESY_SECONDS, MAX_IDLE, NONE, TURN_SECONDS, Rooms
from tests.proxy.dialogue import Clock
from tests.proxy.upstream.slot_holder import SERVICE, Holder, lease

#: Makes worker `number` of `workers`, in a process of its own.
NewHolder = Callable[[int, int], Holder]


@pytest.fixture
def file() -> Iterator[int]:
    descriptor = os.memfd_create("limits")
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def holder(file: int) -> Iterator[NewHolder]:
    made: list[Holder] = []

    def make(number: int, workers: int) -> Holder:
        made.append(Holder(file, number, workers))
        return made[-1]

    yield make
    for each in made:
        each.kill()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(rooms_file, "monotonic", clock)
    return clock


def take_all(rooms: Rooms, limit: int) -> list[int]:
    """Every slot that there is."""
    found = []
    while (slot := rooms.take(lease(limit))) != NONE:
        found.append(slot)
    assert not rooms.has_room(lease(limit))
    return found


@pytest.mark.parametrize("limit", [1, 2, 7, 100])
def test_one_process_alone_has_all_of_it_and_no_more(file: int, limit: int) -> None:
    rooms = Rooms(file, 1, 2)
    slots = take_all(rooms, limit)
    assert sorted(slots) == list(range(limit))
    rooms.give_back(lease(limit), slots[0])
    assert rooms.has_room(lease(limit))
    assert take_all(rooms, limit) == [slots[0]]


def test_the_sum_of_all_processes_never_exceeds_the_limit(file: int, holder: NewHolder) -> None:
    mine = Rooms(file, 0, 3)
    others = [holder(number, 3) for number in (1, 2)]
    assert [each.take(4) for each in others] == [True, True]
    assert len(take_all(mine, 4)) == 2
    assert [each.has_room(4) for each in others] == [False, False]
    assert [each.take(4) for each in others] == [False, False]
    others[0].give_back(4)
    assert others[1].take(4)
    assert mine.take(lease(4)) == NONE


def test_what_a_killed_process_held_is_free_at_once(file: int, holder: NewHolder) -> None:
    mine, other = Rooms(file, 0, 2), holder(1, 2)
    for _ in range(3):
        assert other.take(3)
    assert mine.take(lease(3)) == NONE
    other.kill()
    assert len(take_all(mine, 3)) == 3


def test_a_frozen_process_keeps_what_it_holds_and_nothing_else(file: int, holder: NewHolder) -> None:
    mine, other = Rooms(file, 0, 2), holder(1, 2)
    other.wait()
    assert other.take(5)
    assert other.take(5)
    other.freeze()
    assert len(take_all(mine, 5)) == 3


def test_a_lowered_limit_counts_what_is_held_above_it(file: int, holder: NewHolder) -> None:
    mine, other = Rooms(file, 0, 2), holder(1, 2)
    for _ in range(5):  # slots 5 to 9
        assert other.take(10)
    held = [mine.take(lease(10)) for _ in range(3)]
    for left in (8, 7, 6, 5):
        assert len(held) + len(other.slots) == left
        assert mine.take(lease(5)) == NONE
        assert not other.take(5)
        if held:
            mine.give_back(lease(10), held.pop())
        else:
            other.give_back(10)
    assert mine.take(lease(5)) != NONE
    assert mine.take(lease(5)) == NONE


def test_own_slots_above_a_lowered_limit_count_too(file: int) -> None:
    rooms = Rooms(file, 0, 2)
    slots = take_all(rooms, 6)
    for slot in (0, 1, 2):
        rooms.give_back(lease(6), slot)
    assert rooms.take(lease(3)) == NONE
    rooms.give_back(lease(6), slots[5])
    assert rooms.take(lease(3)) == 0
    assert rooms.take(lease(1)) == NONE


def test_backends_do_not_share_their_slots(file: int) -> None:
    rooms = Rooms(file, 0, 2)
    assert rooms.take(lease(1)) == 0
    assert rooms.take(lease(1, 9001)) == 0
    assert rooms.take(lease(1)) == NONE


def test_backends_where_nothing_is_held_are_forgotten_when_there_are_many(file: int) -> None:
    rooms = Rooms(file, 0, 2)
    assert rooms.take(lease(1)) == 0
    for port in range(1, MAX_IDLE + 10):
        assert rooms.has_room(lease(1, port))
    assert len(rooms._rooms) < MAX_IDLE
    assert not rooms.has_room(lease(1))


def test_who_has_had_its_turn_leaves_more_than_its_share_to_those_who_wait(
    file: int, holder: NewHolder, clock: Clock
) -> None:
    mine, other = Rooms(file, 0, 2), holder(1, 2)
    slots = take_all(mine, 4)
    mine.give_back(lease(4), slots.pop())
    slots += take_all(mine, 4)  # nobody else waits
    other.wait()
    mine.give_back(lease(4), slots.pop())
    assert not mine.has_room(lease(4))
    assert mine.take(lease(4)) == NONE
    assert other.take(4)
    mine.give_back(lease(4), slots.pop())
    assert mine.take(lease(4)) == NONE  # still courteous
    clock.now += COURTESY_SECONDS
    slots += take_all(mine, 4)
    assert len(slots) == 3
    mine.give_back(lease(4), slots.pop())
    slots += take_all(mine, 4)  # a new turn has begun
    assert len(slots) == 3
    clock.now += TURN_SECONDS
    mine.give_back(lease(4), slots.pop())
    assert mine.take(lease(4)) == NONE
    assert other.take(4)


def test_nobody_is_asked_for_more_than_what_is_over_its_share(
    file: int, holder: NewHolder, clock: Clock
) -> None:
    mine, other = Rooms(file, 0, 2), holder(1, 2)
    other.wait()
    slots = [mine.take(lease(4)) for _ in range(2)]
    mine.give_back(lease(4), slots.pop())
    assert mine.take(lease(4)) != NONE
    other.wait_no_more()
    slots = take_all(mine, 4)
    mine.give_back(lease(4), slots.pop())
    assert mine.take(lease(4)) != NONE


def test_of_a_limit_of_one_everybody_has_a_turn(file: int, holder: NewHolder, clock: Clock) -> None:
    mine, others = Rooms(file, 0, 3), [holder(number, 3) for number in (1, 2)]
    for each in others:
        each.wait()
    [slot] = take_all(mine, 1)
    mine.give_back(lease(1), slot)
    assert mine.take(lease(1)) == NONE
    assert [each.take(1) for each in others] == [True, False]


def test_the_sign_of_who_waited_goes_with_its_process(file: int, holder: NewHolder, clock: Clock) -> None:
    mine, other = Rooms(file, 0, 2), holder(1, 2)
    other.wait()
    [slot] = take_all(mine, 1)
    other.kill()
    mine.give_back(lease(1), slot)
    assert mine.take(lease(1)) != NONE
    mine.wait(SERVICE)
    mine.wait(SERVICE)
    mine.wait_no_more(SERVICE)
    mine.wait_no_more(SERVICE)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_they_do_the_sum_is_kept(file: int, holder: NewHolder, seed: int) -> None:
    chance = random.Random(seed)
    workers = 3
    holders = [holder(number, workers) for number in range(workers)]
    limit = 5
    for _ in range(400):
        number = chance.randrange(workers)
        each = holders[number]
        total = sum(len(one.slots) for one in holders)
        act = chance.random()
        if act < 0.5:
            taken = each.take(limit)
            assert not (taken and total >= limit)
        elif act < 0.9 and each.slots:
            each.give_back(limit)
        elif act < 0.93:
            each.kill()
            holders[number] = holder(number, workers)
        elif act < 0.96:
            chance.choice((each.wait, each.wait_no_more))()
        else:
            limit = chance.randint(1, 9)
