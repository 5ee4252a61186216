"""The budget of buffered bytes (`limits.buffered_bytes`): what this process holds for peers that are slow to
take it.

Each connection is bounded by itself: its peer's source is not read while much waits for the peer. But much is
a few hundred KB (what one read brings), and twenty thousand slow connections times that is no bound.

The theory
- Bytes that pass straight through are nobody's business here. Whoever is behind is a *holder*: its transport
  is over its mark, a stream waits for a window, a body for a connection, a head for its end. It says how much
  it holds when it begins to, and when that has changed (`holds`), and when it is rid of it (`drops`). What
  never comes over HEAVY is not counted: it is the price of a connection, and `limits.connections` is its
  bound.
- Over three quarters of the budget nobody who was behind gets more: a holder that is rid of everything, and
  wants its source read again, waits until there is room (`may_go_on`), in the order in which they came. Peers
  that were never behind are not concerned.
- Those who wait hold nothing, and those who hold something wait for nobody but their own peer. So whoever
  takes what is held for it makes room, and nothing ever waits in a circle.
- Who will be behind for the first time is not known beforehand: its bytes are here when it turns out. So over
  the whole budget those are ended that have taken nothing for PATIENCE; a slow client that reads all the time
  may leave what waits here as it is for seconds (`progress`). Twice the budget is the end: from there on the
  one goes that was looked at longest ago and has taken nothing since, however short that was.
- A transport keeps the whole of what it has written a part of, which is one read: so each holder counts for
  RETAINED bytes more than it says. (Measured: 718 of them that said 63 MiB had 229 MB.)
- Where nothing moves and nothing new comes, the time-outs of slow peers end them, as without a budget.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Protocol

from portero_py.proxy.refusals import BUFFERED_BYTES

if TYPE_CHECKING:
    import asyncio

    from portero_py.core.counters import Counters
    from portero_py.proxy.refusals import Refusals

#: What a connection may hold uncounted. It is also where a transport says that it is behind: one record of
#: TLS.
HEAVY: Final = 16_384
#: About what somebody who goes on will hold soon: one read.
GRANT: Final = 262_144
#: What a holder keeps beside what it says.
RETAINED: Final = GRANT - 65_536
#: Seconds in which a holder must have taken something when the budget is used up.
PATIENCE: Final = 10.0
#: Seconds between two looks for room while somebody waits.
LOOK_SECONDS: Final = 0.1
#: Holders that are looked at for one that is over the budget.
MAX_LOOKED_AT: Final = 64

_log = logging.getLogger(__name__)


class Holder(Protocol):
    """Somebody whose peer is behind."""

    def held_bytes(self) -> int:
        """How much it holds now."""

    def kill(self) -> None:
        """End at once: `drops` need not follow."""


class Waiting(Protocol):
    """Somebody who wants to have his source read again."""

    def go_on(self) -> None:
        """There is room."""


class Budget:
    """The account of one process; `most` is 0 when there is no limit, and is counted all the same."""

    def __init__(self, loop: asyncio.AbstractEventLoop, counters: Counters, refusals: Refusals) -> None:
        self.most = 0
        self._loop = loop
        self._counters = counters
        self._refusals = refusals
        self._total = 0
        self._held: dict[Holder, int] = {}
        self._moved: dict[Holder, float] = {}  # and when; who was looked at longest ago first
        self._waiting: dict[Waiting, None] = {}
        self._looking: asyncio.TimerHandle | None = None

    @property
    def total(self) -> int:
        """The bytes that are held."""
        return self._total

    @property
    def waiting(self) -> int:
        """How many wait for room."""
        return len(self._waiting)

    def holds(self, holder: Holder, size: int) -> None:
        """So many bytes wait there now. May end others, or `holder` itself."""
        size += RETAINED
        former = self._held.get(holder, 0)
        self._add(size - former)
        self._held[holder] = size
        if not former:
            self._moved[holder] = self._loop.time()
        if self._total > self.most > 0:
            self._end_some()

    def drops(self, holder: Holder) -> None:
        """It is rid of what it held, if it held anything."""
        size = self._held.pop(holder, None)
        if size is not None:
            del self._moved[holder]
            self._add(-size)

    def passed_on(self, former: object, successor: object) -> None:
        """The bytes are somebody else's now. Harmless when `former` held none."""
        size = self._held.pop(former, None)  # type: ignore[call-overload]  # any key may be asked for
        if size is not None:
            self._held[successor] = size  # type: ignore[index]  # who takes bytes over is a holder
            self._moved[successor] = self._moved.pop(former)  # type: ignore[index,call-overload]  # as above
        self._waiting.pop(former, None)  # type: ignore[call-overload]  # any key may be asked for

    def gone(self, who: object) -> None:
        """It holds nothing, and waits for nothing. Harmless when it never did."""
        self.drops(who)  # type: ignore[arg-type]  # as above
        self._waiting.pop(who, None)  # type: ignore[call-overload]  # any key may be asked for

    def may_go_on(self, who: Waiting) -> bool:
        """Say whether the source of somebody that was behind may be read again; else `go_on` comes later."""
        if self._has_room() and not self._waiting:
            return True
        self._waiting[who] = None
        if self._looking is None:
            self._looking = self._loop.call_later(LOOK_SECONDS, self._look)
        return False

    def close(self) -> None:
        """Everything has ended."""
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None

    # Private

    def _add(self, size: int) -> None:
        self._total += size
        self._counters.buffered_bytes = self._total

    def _has_room(self) -> bool:
        return not self.most or self._total < self.most - self.most // 4

    def _look(self) -> None:
        """Let as many go on as there is room for, if each takes a GRANT; one at least."""
        self._looking = None
        left = len(self._waiting)
        if self.most:
            left = min(left, max((self.most - self.most // 4 - self._total) // GRANT, 1))
        while left and self._waiting and self._has_room():
            left -= 1
            who = next(iter(self._waiting))
            del self._waiting[who]
            try:
                who.go_on()
            except Exception:  # the others wait still
                _log.exception("a fault of portero's own: somebody cannot go on")
        if self._waiting and self._looking is None:
            self._looking = self._loop.call_later(LOOK_SECONDS, self._look)

    def _end_some(self) -> None:
        now = self._loop.time()
        for _ in range(min(MAX_LOOKED_AT, len(self._held))):
            if self._total <= self.most:
                return
            holder, moved = next(iter(self._moved.items()))
            former = self._held[holder]
            size = holder.held_bytes() + RETAINED
            del self._moved[holder]
            if size < former:
                self._moved[holder] = now
                self._held[holder] = size
                self._add(size - former)
            elif self._total <= 2 * self.most and now - moved < PATIENCE:
                self._moved[holder] = moved
            else:
                del self._held[holder]
                self._add(-former)
                self._refusals.count(BUFFERED_BYTES)
                self._loop.call_soon(holder.kill)  # whoever called may stand in the middle of it
