"""One coarse timer wheel for all connections of a worker: setting a deadline is an attribute write.

The rules
- A watched item has `deadline`, a time of the loop's clock in seconds, or 0.0 for none. The owner moves it
  at will: later costs nothing, the wheel looks again when the old one is due. Only a move to an
  earlier time has to be told with `sooner(item)`.
- When it has passed, `on_deadline(now)` is called once; the item stays watched.
- `watch(item)` at birth, `forget(item)` at death.
- An item whose `on_deadline` raises is ended with `kill()`: nobody else would ever look after it. That costs
  the others nothing.
- The resolution is one second: deadlines fire up to one second late, never early. Every item is looked at
  once a round, so one that was moved to an earlier time without a word is up to `SLOTS` seconds late: on the
  hot path deadlines are just written.

A slot is a set; an item is in exactly one of them (`_slot_of` says which), or is young: not looked at since
`watch`. Most connections of a client that makes one for each request die young, at the cost of one set.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Final, Protocol

TICK: Final = 1.0
#: A round. Shorter: forgotten moves are noticed sooner. Longer: fewer looks at idle connections (100,000 of
#: them cost 12 ms of CPU a second).
SLOTS: Final = 6
#: Seconds by which a look may be late before the process itself counts as having been away.
AWAY: Final = 0.5
#: Seconds that it has then for reading what has come.
CATCH_UP: Final = 0.25

_log = logging.getLogger(__name__)


class Watched(Protocol):
    """Whatever has a deadline."""

    @property
    def deadline(self) -> float: ...

    def on_deadline(self, now: float) -> None:
        """The deadline has passed. Sets a new one, or ends what was waited for."""

    def kill(self) -> None:
        """`on_deadline` raised: end at once."""


class DeadlineWheel:
    """The pure part: items in slots, `advance(now)` fires what is due."""

    def __init__(self, now: float) -> None:
        self._slots: list[set[Watched]] = [set() for _ in range(SLOTS)]
        self._slot_of: dict[Watched, int] = {}
        self._young: set[Watched] = set()
        self._tick = math.floor(now / TICK)

    def __len__(self) -> int:
        return len(self._slot_of) + len(self._young)

    def watch(self, item: Watched) -> None:
        """Start to look after `item`."""
        self._young.add(item)

    def forget(self, item: Watched) -> None:
        """Stop looking after `item`; harmless when it is not watched."""
        if item in self._young:
            self._young.discard(item)
            return
        slot = self._slot_of.pop(item, None)
        if slot is not None:
            self._slots[slot].discard(item)

    def watched(self) -> list[Watched]:
        """All that it looks after now, in no order."""
        return [*self._slot_of, *self._young]

    def sooner(self, item: Watched) -> None:
        """The deadline of `item` was moved to an earlier time."""
        slot = self._slot_of.get(item)
        if slot is not None:
            self._slots[slot].discard(item)
            self._place(item, item.deadline)

    def advance(self, now: float) -> None:
        """Fire all deadlines up to `now`. Call it about once a `TICK`."""
        last = math.floor(now / TICK)
        first = max(self._tick + 1, last - SLOTS + 1)
        if first <= last:
            self._grow_up(first % SLOTS)
        for tick in range(first, last + 1):
            self._tick = tick
            slot = tick % SLOTS
            due, self._slots[slot] = self._slots[slot], set()
            while due:
                item = due.pop()
                if self._slot_of.get(item) != slot:
                    continue  # forgotten or moved by an earlier item's callback
                deadline = item.deadline
                if 0.0 < deadline <= now:
                    self._fire(item, now)
                    if self._slot_of.get(item) != slot:
                        continue
                    deadline = item.deadline
                self._place(item, deadline)
        self._tick = max(self._tick, last)

    # Private

    def _fire(self, item: Watched, now: float) -> None:
        try:
            item.on_deadline(now)
        except Exception:  # a bug of one: the wheel turns for all
            _log.exception("a fault of portero's own at a deadline; what it was of ends")
            try:
                item.kill()
            except Exception:  # the same
                _log.exception("it cannot be ended")

    def _grow_up(self, slot: int) -> None:
        """Put the young ones where they are looked at now."""
        young, self._young = self._young, set()
        self._slots[slot] |= young
        self._slot_of.update(dict.fromkeys(young, slot))

    def _place(self, item: Watched, deadline: float) -> None:
        # Rounded up, and at least one tick ahead: never early, and never in the slot being emptied.
        # Beyond one round the item waits a whole round and is placed again.
        ahead = SLOTS - 1 if deadline == 0.0 else math.ceil(deadline / TICK) - self._tick
        slot = (self._tick + min(max(ahead, 1), SLOTS - 1)) % SLOTS
        self._slot_of[item] = slot
        self._slots[slot].add(item)


class Deadlines(DeadlineWheel):
    """The wheel on a running event loop: one timer for everything.

    When the process itself stood still (SIGSTOP, a frozen container, a suspended machine), what peers sent
    meanwhile is still in the sockets, and whom it comes from must not be blamed: that is read first.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop.time())
        self._loop = loop
        self._looked_at = loop.time()
        self._catches_up = False
        self._timer: asyncio.TimerHandle | None = loop.call_later(TICK, self._on_timer)

    def close(self) -> None:
        """Stop the timer; nothing fires any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Private

    def _on_timer(self) -> None:
        now = self._loop.time()
        # Not twice in a row: a loop that is always late would never judge.
        self._catches_up = not self._catches_up and now > self._looked_at + TICK + AWAY
        self._looked_at = now
        self._timer = self._loop.call_later(CATCH_UP if self._catches_up else TICK, self._on_timer)
        if not self._catches_up:
            self.advance(now)
