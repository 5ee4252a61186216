"""The limits of backends that several workers keep together: slots, each of which one process holds.

A slot is one byte of a file that all workers have, and who holds it has the kernel's record lock on it
(fcntl, F_SETLK). So the sum never exceeds the limit, whatever happens: there is no count that could be wrong.
What a process held that dies is free at once, one that is frozen keeps what it holds and nothing else, and
nobody ever waits for anybody: a lock is had at once or not at all. The file has no content.

The rules
- Each backend of a service has a range of its own, which follows from their names. Should two of millions
  have the same one, they share their slots: never too many.
- Slots are below the limit. When a limit was lowered, those above it that are still held count too, so the
  bound for new ones sinks further until they are gone (`_bound`).
- Record locks belong to a process, and all are lost when it closes any descriptor of the file: it is for
  nothing else, and never closed.
- Each worker looks for slots from a place of its own on: what it holds is few ranges, and found in few calls.

Fairness
Who has exchanges that wait holds another lock, the sign of its service, and looks every few milliseconds for
what others gave back. A worker that always has somebody for what it gives back would take it again at once.
So when its turn is over (`TURN_SECONDS`) and others wait, it is courteous for a moment (`COURTESY_SECONDS`):
it takes nothing beyond its fair share (the limit, divided by those who wait and itself), long enough for the
others to have looked. Moments and not slots are what is given up: of a limit of one there is no share.
"""

from __future__ import annotations

import fcntl
import struct
from hashlib import blake2b
from time import monotonic
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from portero_py.core.model import Lease

#: No slot.
NONE: Final = -1
#: Longer than any limit may be.
MAX_SLOTS: Final = 1 << 20
#: Seconds for which a worker takes more than its share again and again, though others wait.
TURN_SECONDS: Final = 0.1
#: Seconds in which it leaves to others what is beyond its share: longer than they wait between two looks.
COURTESY_SECONDS: Final = 0.03
#: Backends that are remembered though nothing is held there.
MAX_IDLE: Final = 4096

# struct flock of fcntl(2): type, whence, start, length, pid.
_FLOCK: Final = struct.Struct("@hhqqi4x")


class Rooms:
    """The slots of all limited backends, as worker `number` of `workers` sees them in `file`."""

    def __init__(self, file: int, number: int, workers: int) -> None:
        self._file = file
        self._number = number
        self._workers = workers
        self._rooms: dict[tuple[str, str, int], _Room] = {}
        self._waiting: dict[str, int] = {}  # service -> where its sign is; while we wait

    def has_room(self, lease: Lease) -> bool:
        """Whether `take` would have found a slot a moment ago."""
        return self._free(self._of(lease), lease, monotonic()) != NONE

    def take(self, lease: Lease) -> int:
        """Hold a slot of the backend, to be given back; NONE when there is none."""
        room = self._of(lease)
        now = monotonic()
        # Each try that fails is a slot which another worker got.
        for _ in range(lease.max_in_flight):
            slot = self._free(room, lease, now)
            if slot == NONE:
                break
            if self._lock(room.base + slot):
                room.held.add(slot)
                return slot
        return NONE

    def give_back(self, lease: Lease, slot: int) -> None:
        """The slot is free again, for whomever."""
        room = self._of(lease)
        share = lease.max_in_flight // self._workers
        over = len(room.held) > share  # whoever waits: their shares are not smaller than that
        room.held.discard(slot)
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, room.base + slot)
        if over:
            now = monotonic()
            if now >= room.turn_ends and self._others_wait(room):
                room.courteous_until = now + COURTESY_SECONDS
                room.turn_ends = now + COURTESY_SECONDS + TURN_SECONDS

    def wait(self, service: str) -> None:
        """Tell the others that exchanges of this service wait here."""
        if service not in self._waiting:
            sign = self._waiting[service] = _sign(service) + self._number
            self._lock(sign)

    def wait_no_more(self, service: str) -> None:
        """Nobody waits here any more; harmless when nobody did."""
        sign = self._waiting.pop(service, NONE)
        if sign != NONE:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, sign)

    # Private

    def _of(self, lease: Lease) -> _Room:
        key = (lease.service, lease.backend.host, lease.backend.port)
        room = self._rooms.get(key)
        if room is None:
            if len(self._rooms) >= MAX_IDLE:
                self._rooms = {each: kept for each, kept in self._rooms.items() if kept.held}
            room = self._rooms[key] = _Room(*key)
        return room

    def _free(self, room: _Room, lease: Lease, now: float) -> int:
        """A slot that nobody held a moment ago and that we may take, or NONE."""
        limit, held = lease.max_in_flight, room.held
        if len(held) >= limit:
            return NONE
        if now < room.courteous_until:
            others = self._others_wait(room)
            if others and len(held) >= limit // (others + 1):
                return NONE
        bound = self._bound(room, limit)
        start = min(self._number * limit // self._workers, bound)
        for first, end in ((start, bound), (0, start)):
            at = first
            while at < end:
                if at in held:
                    at += 1
                    continue
                run = self._taken(room.base + at, 1)
                if run is None:
                    return at
                at = run[1] - room.base
        return NONE

    def _bound(self, room: _Room, limit: int) -> int:
        """Where new slots end: what is held from there on, by anybody, fits into the rest of the limit."""
        bound = limit
        while bound > 0:
            beyond = self._count(room.base + bound, room.base + MAX_SLOTS)
            beyond += sum([slot >= bound for slot in room.held])
            if beyond <= limit - bound:
                break
            bound = limit - beyond
        return max(bound, 0)

    def _others_wait(self, room: _Room) -> int:
        """How many other workers have exchanges of this service that wait."""
        return self._count(room.sign, room.sign + self._workers)

    def _count(self, first: int, end: int) -> int:
        """How many bytes others have locked between the two."""
        found = 0
        parts = [(first, end)]
        while parts:
            first, end = parts.pop()
            run = self._taken(first, end - first) if first < end else None
            if run is not None:
                start, stop = max(run[0], first), min(run[1], end)
                found += stop - start
                parts += [(first, start), (stop, end)]
        return found

    def _taken(self, start: int, length: int) -> tuple[int, int] | None:
        """One of the ranges, beginning and end, that others have locked there; None when there is none."""
        asked = _FLOCK.pack(fcntl.F_WRLCK, 0, start, length, 0)
        kind, _, at, size, _ = _FLOCK.unpack(fcntl.fcntl(self._file, fcntl.F_GETLK, asked))
        return None if kind == fcntl.F_UNLCK else (at, at + size)

    def _lock(self, at: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, at)
        except (BlockingIOError, PermissionError):  # POSIX allows both
            return False
        return True


# Private


class _Room:
    """What this worker holds of one backend."""

    __slots__ = ("base", "courteous_until", "held", "sign", "turn_ends")

    def __init__(self, service: str, host: str, port: int) -> None:
        self.base = _place(f"{service} {host} {port}")
        self.sign = _sign(service)
        self.held: set[int] = set()
        self.turn_ends = 0.0
        self.courteous_until = 0.0


def _sign(service: str) -> int:
    """Where the workers' signs of a service begin, one byte each."""
    return _place(service) + MAX_SLOTS


def _place(name: str) -> int:
    """Where the range of a name begins: the same in every process, and below 2**62."""
    hashed = int.from_bytes(blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")
    return (hashed >> 23) * (2 * MAX_SLOTS)
