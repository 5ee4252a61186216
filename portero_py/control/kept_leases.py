"""The leases in memory that outlives the process: what a crash or an upgrade hands to the next one.

Two files in memory, which the main process keeps open. They are written in turn, each with a number, a length
and a checksum: whoever dies while he writes spoils one of them, and the other holds what was there before.
Inside are messages of the feed: a whole routing table, with whatever a lease and a service carry (states,
pauses), and what workers had counted that are gone. Behind them, in the newer file, comes what has changed
since: one table update after the other, each with a head of its own. Readers and writers may be of different
versions, as on the feed; who does not know the updates reads the whole table.

The rules
- A lease that begins, moves or ends, or gets another state, is written before anybody is told that it did:
  whoever was answered finds it after a crash. Renewals and what was counted gather for the next whole table.
- What cannot be written at once (no memory) waits for that too. It is then that it is a fault, and seen.
- One process writes. Who comes after one that may still write waits for its end (`claim`): of two that write
  one would undo what the other one has promised.

The times of leases are those of the steady clock, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from portero_py.core.counters import Counters
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import FeedError
from portero_py.feed.messages import Departed, FrameReader, TableUpdate, encode

#: Seconds between two writes, at least, and the part of the processor's time that they may take.
SHORT_INTERVAL: Final = 0.05
SHARE: Final = 0.02

#: Seconds between two looks at whether the former writer has ended, and how many it has for that.
LOOK_SECONDS: Final = 0.005
PATIENCE: Final = 5.0

#: Number of the write, length of what follows, its checksum.
_HEAD: Final = struct.Struct("!QQI")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kept:
    """What was written last: the table, and what those had counted that were gone then."""

    table: RoutingTable
    departed: Counters


class KeptLeases:
    """The two files behind `descriptors`; whoever made them closes them."""

    def __init__(self, descriptors: tuple[int, int]) -> None:
        self.descriptors = descriptors
        self._written = max((number for number, _ in self._found()), default=0)
        self._changed = asyncio.Event()
        self._last: RoutingTable | None = None  # what the newer file has, if this process has written it
        self._end = 0  # where it ends
        self._generation = -1  # of the leases in it

    @classmethod
    def make(cls) -> KeptLeases:
        """Two new ones. Raises OSError."""
        return cls((_file(), _file()))

    def load(self) -> Kept | None:
        """What was written last; None when nothing was, or nothing that can be read."""
        found = sorted(self._found(), reverse=True)
        self._last, self._generation = None, -1  # whose leases come next counts anew
        # Others may have written since: what is newest must be neither written over next, nor outdo that.
        self._written = max(self._written, found[0][0] if found else 0)
        for _, payloads in found:
            kept = _kept(payloads)
            if kept is not None:
                return kept
        return None

    def save(self, table: RoutingTable, departed: Counters) -> None:
        """Write them over the older of the two. Raises OSError, FeedError."""
        payload = encode(TableUpdate.between(None, table)) + encode(Departed(0, departed))
        number = self._written + 1
        os.ftruncate(self._file_of(number), _HEAD.size + len(payload))
        self._end = self._write(number, payload, 0)
        self._written, self._last = number, table  # until now the other one is what counts

    def changed(self, table: RoutingTable, generation: int) -> None:
        """There is a new table. When `generation` is another too, it is in memory when this returns."""
        self._changed.set()
        if generation == self._generation or self._last is None:
            return  # `run` writes it, and the first one
        former, self._last = self._last, None
        try:
            self._end = self._write(self._written, encode(TableUpdate.between(former, table)), self._end)
        except (OSError, FeedError):  # `run` is about to write all of it, and says why it cannot
            return
        self._last, self._generation = table, generation

    async def claim(self) -> None:
        """Before `load`: wait for the end of who may still write. Not for longer than `PATIENCE`.

        Locks of a file belong to a process: they end with it, however it does.
        """
        looks = int(PATIENCE / LOOK_SECONDS)
        while not self._is_claimed():
            if not looks:
                _log.error("the former version still writes its leases: some may be lost")
                return
            looks -= 1
            await asyncio.sleep(LOOK_SECONDS)

    def release(self) -> None:
        """Nothing is written from here any more."""
        self._last = None
        fcntl.lockf(self.descriptors[0], fcntl.LOCK_UN)

    async def run(self, newest: Callable[[], tuple[RoutingTable, Counters]]) -> None:
        """Save the newest table whenever it has changed, until cancelled."""
        self._changed.set()
        while True:
            await self._changed.wait()
            self._changed.clear()
            begun = time.thread_time()
            self.save(*newest())
            await asyncio.sleep(max((time.thread_time() - begun) / SHARE, SHORT_INTERVAL))

    def close(self) -> None:
        """Close both."""
        for descriptor in self.descriptors:
            os.close(descriptor)

    # Private

    def _file_of(self, number: int) -> int:
        return self.descriptors[number % 2]

    def _write(self, number: int, payload: bytes, at: int) -> int:
        """Where it ends."""
        rest = memoryview(_HEAD.pack(number, len(payload), _checksum(number, payload)) + payload)
        while rest:
            written = os.pwrite(self._file_of(number), rest, at)
            rest, at = rest[written:], at + written
        return at

    def _is_claimed(self) -> bool:
        try:
            fcntl.lockf(self.descriptors[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _found(self) -> list[tuple[int, list[bytes]]]:
        """Number of each file, and what is whole in it: a table, and what has changed since."""
        found = [_contents(_read(descriptor)) for descriptor in self.descriptors]
        return [(number, payloads) for number, payloads in found if payloads]


# Private


def _file() -> int:
    return os.memfd_create("portero-leases", os.MFD_CLOEXEC)


def _checksum(number: int, payload: bytes) -> int:
    return zlib.crc32(payload, number & 0xFFFF_FFFF)


def _contents(data: bytes) -> tuple[int, list[bytes]]:
    """The number of a file, and what is whole in it from the beginning on."""
    payloads: list[bytes] = []
    number = at = 0
    while len(data) >= at + _HEAD.size:
        of, length, checksum = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        payload = data[at : at + length]
        if (
            not payload
            or len(payload) < length
            or checksum != _checksum(of, payload)
            or (payloads and of != number)
        ):
            break
        number = of
        payloads.append(payload)
        at += length
    return number, payloads


def _kept(payloads: list[bytes]) -> Kept | None:
    """What they say, as far as this version understands it."""
    table: RoutingTable | None = None
    departed = Counters()
    for payload in payloads:
        try:
            messages = [message for _, message in FrameReader().feed(payload)]
        except FeedError:  # of a version that this one does not understand at all
            break
        for message in messages:
            if isinstance(message, TableUpdate) and (message.whole or table is not None):
                table = message.applied_to(table or RoutingTable())
            elif isinstance(message, Departed):
                departed = message.counters
    return None if table is None else Kept(table, departed)


def _read(descriptor: int) -> bytes:
    pieces, at, end = [], 0, os.fstat(descriptor).st_size
    while at < end and (piece := os.pread(descriptor, end - at, at)):
        pieces.append(piece)
        at += len(piece)
    return b"".join(pieces)
