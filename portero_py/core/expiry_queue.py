"""What ends next: keys with an expiry that moves all the time.

A heap with lazy deletion. A lease is renewed far more often than it expires, so moving an expiry to a later
time touches only a dictionary; the heap's entry is looked at again when its old time comes. Only a move to an
earlier time is pushed. Entries that nobody needs any more are swept out when they outnumber the keys, so the
heap never holds more than twice the keys (plus a constant) whatever the callers do.
"""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_SLACK: Final = 64


class ExpiryQueue(Generic[K]):
    """Keys, each with one time at which it expires (seconds of the caller's clock)."""

    def __init__(self) -> None:
        self._expiry: dict[K, float] = {}  # the truth
        self._queued: dict[
            K, float
        ] = {}  # the time of a key's one valid heap entry; never later than its expiry
        self._heap: list[tuple[float, int, K]] = []
        self._serial = count()  # ends comparisons before they reach a key

    def __len__(self) -> int:
        return len(self._expiry)

    def set(self, key: K, expires_at: float) -> None:
        """Let `key` expire at `expires_at`, instead of when it would have."""
        self._expiry[key] = expires_at
        queued = self._queued.get(key)
        if queued is None or expires_at < queued:
            self._push(key, expires_at)

    def discard(self, key: K) -> None:
        """Forget `key`; harmless when it is not there."""
        self._expiry.pop(key, None)
        self._queued.pop(key, None)
        self._sweep()

    def pop_due(self, now: float) -> list[K]:
        """Take out and return every key that has expired at `now`, the earliest first."""
        due = []
        while self._settle() and self._heap[0][0] <= now:
            key = heappop(self._heap)[2]
            del self._expiry[key], self._queued[key]
            due.append(key)
        return due

    def next(self) -> float | None:
        """When the first key expires; None when there is none."""
        return self._heap[0][0] if self._settle() else None

    def first(self) -> K | None:
        """The key that expires first; None when there is none."""
        return self._heap[0][2] if self._settle() else None

    # Private

    def _push(self, key: K, at: float) -> None:
        self._queued[key] = at
        heappush(self._heap, (at, next(self._serial), key))
        self._sweep()

    def _settle(self) -> bool:
        """Make the heap's top a true one; False when there is none."""
        while self._heap:
            at, _, key = self._heap[0]
            if self._queued.get(key) != at:
                heappop(self._heap)
            elif (expires_at := self._expiry[key]) > at:
                heappop(self._heap)
                self._push(key, expires_at)
            else:
                return True
        return False

    def _sweep(self) -> None:
        if len(self._heap) > 2 * len(self._expiry) + _SLACK:
            self._queued = dict(self._expiry)
            self._heap = [(at, next(self._serial), key) for key, at in self._expiry.items()]
            heapify(self._heap)
