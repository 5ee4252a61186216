"""The leases in memory that outlives the process: what a crash or an upgrade hands to the next one.

Two files in memory, which the main process keeps open. They are written in turn, each with a number, a length
and a checksum: whoever dies while he writes spoils one of them, and the other holds what was there before.
Inside are messages of the feed: a whole routing table, with whatever a lease and a service carry (states,
pauses), and what workers had counted that are gone. Readers and writers may be of different versions, as on
the feed.

The times of leases are those of the steady clock, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
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

#: Number of the write, length of what follows, its checksum.
_HEAD: Final = struct.Struct("!QQI")


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

    @classmethod
    def make(cls) -> KeptLeases:
        """Two new ones. Raises OSError."""
        return cls((_file(), _file()))

    def load(self) -> Kept | None:
        """What was written last; None when nothing was, or nothing that can be read."""
        found = sorted(self._found(), reverse=True)
        # Others may have written since: what is newest must be neither written over next, nor outdo that.
        self._written = max(self._written, found[0][0] if found else 0)
        for _, payload in found:
            try:
                messages = [message for _, message in FrameReader().feed(payload)]
            except FeedError:  # of a version that this one does not understand at all
                continue
            for message in messages:
                if isinstance(message, TableUpdate):
                    counted = [each.counters for each in messages if isinstance(each, Departed)]
                    return Kept(message.applied_to(RoutingTable()), counted[0] if counted else Counters())
        return None

    def save(self, table: RoutingTable, departed: Counters) -> None:
        """Write them over the older of the two. Raises OSError, FeedError."""
        payload = encode(TableUpdate.between(None, table)) + encode(Departed(0, departed))
        self._written += 1
        descriptor = self.descriptors[self._written % 2]
        head = _HEAD.pack(self._written, len(payload), _checksum(self._written, payload))
        os.ftruncate(descriptor, _HEAD.size + len(payload))
        view = memoryview(head + payload)
        at = 0
        while at < len(view):
            at += os.pwrite(descriptor, view[at:], at)

    def changed(self) -> None:
        """There is a new table."""
        self._changed.set()

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

    def _found(self) -> list[tuple[int, bytes]]:
        """Number and content of each file that is whole."""
        found = []
        for descriptor in self.descriptors:
            head = os.pread(descriptor, _HEAD.size, 0)
            if len(head) < _HEAD.size:
                continue
            number, length, checksum = _HEAD.unpack(head)
            payload = _read(descriptor, length)
            if len(payload) == length and checksum == _checksum(number, payload):
                found.append((number, payload))
        return found


# Private


def _file() -> int:
    return os.memfd_create("portero-leases", os.MFD_CLOEXEC)


def _checksum(number: int, payload: bytes) -> int:
    return zlib.crc32(payload, number & 0xFFFF_FFFF)


def _read(descriptor: int, length: int) -> bytes:
    pieces, at, end = [], _HEAD.size, min(os.fstat(descriptor).st_size, _HEAD.size + length)
    while at < end and (piece := os.pread(descriptor, end - at, at)):
        pieces.append(piece)
        at += len(piece)
    return b"".join(pieces)
