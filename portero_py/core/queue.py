"""The exchanges of one service that wait for a claim: in order of arrival, bounded, each for its own time.

The rules
- Who came first is `first`. Whoever cannot use the room that there is, because it has failed there, is passed
  over: the others must not wait for it. It keeps its place (`put_back`).
- It is full by number or by bytes. What is full takes nobody, and nobody leaves for somebody who comes.
- Who waits may grow: bytes of its body that were on their way still come. One that grows over the bound is
  refused, and goes as everybody goes.
- Everybody leaves by `leave`, exactly once, whatever the reason. `expired` only says whose time is up.
- A deadline is moved by nobody but `hold_until`, and only to a later time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from portero_py.core.expiry_queue import ExpiryQueue

T = TypeVar("T", bound=Hashable)


class Turn(Enum):
    """What came of somebody's turn.

    GONE: it waits no more. WAITS: there is no room, for nobody behind it either. PASSED: there may be some,
    but not for it.
    """

    GONE = 0
    WAITS = 1
    PASSED = 2


@dataclass(slots=True)
class _Place:
    since: float
    deadline: float
    size: int


class Queue(Generic[T]):
    """Who waits for one service. Times are seconds of the caller's clock, sizes bytes."""

    def __init__(self) -> None:
        self._places: OrderedDict[T, _Place] = OrderedDict()
        self._deadlines = ExpiryQueue[T]()
        self._size = 0

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[T]:
        return iter(self._places)

    @property
    def size(self) -> int:
        """The bytes of all who wait."""
        return self._size

    def join(self, item: T, now: float, patience: float, size: int, *, most: int, most_bytes: int) -> bool:
        """Wait behind the others, for `patience` seconds at most; False when the queue is full."""
        if len(self._places) >= most or self._size + size > most_bytes:
            return False
        self._places[item] = _Place(now, now + patience, size)
        self._deadlines.set(item, now + patience)
        self._size += size
        return True

    def grow(self, item: T, size: int, *, most_bytes: int) -> bool:
        """It has `size` bytes more; False when that is too much: it has to leave."""
        self._places[item].size += size
        self._size += size
        return self._size <= most_bytes

    def leave(self, item: T) -> float:
        """It waits no more. Returns since when it did."""
        place = self._places.pop(item)
        self._deadlines.discard(item)
        self._size -= place.size
        return place.since

    def first(self) -> T | None:
        """Whose turn it is; None when nobody waits."""
        return next(iter(self._places), None)

    def pass_over(self, item: T) -> None:
        """Let the others go before it."""
        self._places.move_to_end(item)

    def put_back(self, items: Iterable[T]) -> None:
        """Whoever of them waits still is first again, in this order."""
        for item in reversed(list(items)):
            if item in self._places:
                self._places.move_to_end(item, last=False)

    def hold_until(self, deadline: float) -> None:
        """Nobody's time is up before `deadline`."""
        for item, place in self._places.items():
            if place.deadline < deadline:
                place.deadline = deadline
                self._deadlines.set(item, deadline)

    def expired(self, now: float) -> list[T]:
        """Whose time is up, the first first. Each is named once, and has to leave."""
        return self._deadlines.pop_due(now)

    def next_deadline(self) -> float | None:
        """When the next one's time is up; None when there is none."""
        return self._deadlines.next()
