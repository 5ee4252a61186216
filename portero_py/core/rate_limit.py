"""Rate limits of services: a bucket of tokens for each key of each limit, counted by all workers together.

A bucket holds `requests` tokens and gets them back evenly, all of them in `seconds`. So a client that was
quiet may send `requests` at once, and goes on at the pace of the limit. What is kept of a bucket is one
number: when it will be full again (the generic cell rate algorithm). Times are nanoseconds of the system's
monotonic clock, which all processes share; whole numbers, so that nothing is lost by rounding.

The rules
- Several limits of a service are asked before any of them is charged: who is refused by one uses up nothing
  of the others. Who goes on trying loses nothing by it.
- All workers look at one memory. Each writes its own rows only, with single stores, and reads those of the
  others: of one bucket the latest time counts. Nobody waits for anybody, and whoever dies or stands still
  leaves nothing behind that could be wrong: times that have passed mean a full bucket. In one worker the
  count is exact. Two workers that admit requests of the same key in the same microsecond may count them as
  one: so much is the error, never more, because no store undoes another's.
- A key is known by its keyed hash of 64 bits, and has WAYS places where it can be. When all are taken by
  others, the bucket goes that is full first: who is near a limit is remembered longest. So the memory is
  bounded whatever clients send, and what is forgotten lets in, it does not shut out.
- Keys that clients choose freely (a header's value) have a table of their own: they displace no addresses.
- A limit that stays the same keeps its counts, whatever else changes in its service's policy: its numbers
  are part of the key.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from portero_py.core.policies import RateLimit

SECOND: Final = 1_000_000_000
#: Places where one key can be.
WAYS: Final = 8
#: Groups of so many places, of the tables for clients, headers and services, in each worker.
SETS: Final = (16_384, 16_384, 1_024)

_WORD: Final = 8
#: The keys of a group, then their times.
_GROUP: Final = 2 * WAYS
# Native: each number is one load, so nobody reads half of one.
_KEYS: Final = struct.Struct(f"@{WAYS}q")


class Table:
    """Buckets of one kind: keys, and when each is full again. `cells` are the rows of all workers."""

    def __init__(self, cells: memoryview, workers: int, own: int) -> None:
        self._bytes = cells.cast("B")
        self._cells = self._bytes.cast("q")
        self._row = len(self._cells) // workers
        self._sets = self._row // _GROUP
        self._own = own * self._row
        self._rows = [worker * self._row for worker in range(workers)]
        self._others = [row for row in self._rows if row != self._own]

    def full_at(self, key: int) -> int:
        """When the bucket of `key` is full again, or 0 when that is not known: it is full."""
        latest = 0
        group = key % self._sets * _GROUP
        for row in self._rows:
            at = row + group
            keys = _KEYS.unpack_from(self._bytes, at * _WORD)
            if key in keys:
                full_at = self._cells[at + WAYS + keys.index(key)]
                if full_at > latest:
                    latest = full_at
        return latest

    def take(self, key: int, now: int, lead: int, gap: int) -> int:
        """`full_at` and `put` in one look, for who has one limit only: charge it `gap`, if it is full again
        within `lead` from `now`. Returns for how long it has to wait otherwise, else 0.
        """
        cells = self._cells
        group = key % self._sets * _GROUP
        at = self._own + group
        keys = _KEYS.unpack_from(self._bytes, at * _WORD)
        place = -1
        latest = now
        if key in keys:
            place = at + WAYS + keys.index(key)
            if cells[place] > latest:
                latest = cells[place]
        for row in self._others:
            there = row + group
            theirs = _KEYS.unpack_from(self._bytes, there * _WORD)
            if key in theirs:
                full_at = cells[there + WAYS + theirs.index(key)]
                if full_at > latest:
                    latest = full_at
        if latest - now > lead:
            return latest - now - lead
        if place < 0:
            self.put(key, latest + gap)
        else:
            cells[place] = latest + gap
        return 0

    def put(self, key: int, full_at: int) -> None:
        """Say when it is full again."""
        cells = self._cells
        at = self._own + key % self._sets * _GROUP
        keys = _KEYS.unpack_from(self._bytes, at * _WORD)
        if key in keys:
            cells[at + WAYS + keys.index(key)] = full_at
            return
        times = _KEYS.unpack_from(self._bytes, (at + WAYS) * _WORD)
        way = times.index(min(times))
        cells[at + WAYS + way] = 0  # nobody is to see the former one's time under this key, or the reverse
        cells[at + way] = key
        cells[at + WAYS + way] = full_at


class Buckets:
    """All buckets, in `memory` that so many workers share, as worker `own` sees them."""

    @staticmethod
    def size(workers: int) -> int:
        """Bytes of memory for so many workers; what is not used is never touched."""
        return workers * sum(SETS) * _GROUP * _WORD

    def __init__(self, memory: memoryview, workers: int, own: int) -> None:
        tables = []
        start = 0
        for sets in SETS:
            end = start + workers * sets * _GROUP * _WORD
            tables.append(Table(memory[start:end], workers, own))
            start = end
        self.clients, self.headers, self.services = tables


class Limiter:
    """One limit of one service. The key of a request is "" where the limit is the whole service's."""

    def __init__(self, service: str, limit: RateLimit, buckets: Buckets) -> None:
        self.limit = limit
        kind, _, name = limit.key.partition(":")
        #: The header field whose value is the key, in lower case, or b"".
        self.field = name.lower().encode() if kind == "header" else b""
        self.is_of_clients = kind == "client"
        # A token comes back each `_gap`; a bucket with one in it is full again within `_lead`.
        self._gap: int = max(int(limit.seconds * SECOND) // limit.requests, 1)
        self._lead: int = self._gap * (limit.requests - 1)
        self._table = buckets.services
        if kind != "service":
            self._table = buckets.headers if self.field else buckets.clients
        self._salt = hash((service, limit))

    def find(self, key: str | bytes) -> tuple[int, int]:
        """The bucket of `key`: its name in the table, and when it is full again."""
        hashed = hash((self._salt, key)) or 1  # 0 is nobody's
        return hashed, self._table.full_at(hashed)

    def take(self, key: str | bytes, now: int) -> int:
        """Charge a request with this key; for how long it has to wait instead, or 0."""
        hashed = hash((self._salt, key)) or 1  # 0 is nobody's
        return self._table.take(hashed, now, self._lead, self._gap)

    def wait(self, bucket: tuple[int, int], now: int) -> int:
        """For how long a request has to wait for a token; 0 or less: there is one."""
        return bucket[1] - now - self._lead

    def charge(self, bucket: tuple[int, int], now: int) -> None:
        """A request goes on."""
        name, full_at = bucket
        self._table.put(name, (max(now, full_at)) + self._gap)


def take(limiters: Sequence[Limiter], keys: Sequence[str | bytes], now: int) -> int:
    """Charge a request with these keys to all limits, unless one refuses it.

    Returns for how many nanoseconds it has to wait, 0: it goes on.
    """
    if len(limiters) == 1:  # as most services have it
        return limiters[0].take(keys[0], now)
    buckets = [limiter.find(key) for limiter, key in zip(limiters, keys, strict=True)]
    wait = max([limiter.wait(bucket, now) for limiter, bucket in zip(limiters, buckets, strict=True)])
    if wait > 0:
        return wait
    for limiter, bucket in zip(limiters, buckets, strict=True):
        limiter.charge(bucket, now)
    return 0
