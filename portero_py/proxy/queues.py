"""The queues of one worker: exchanges that wait for a backend with room, or for a paused service to go on.

Who waits where, and for how long, is decided in `core/queue`; here are the loop, the clock and the counts.

The rules
- A service has a queue while somebody waits in it. Its bounds are its own: no service can use up another's.
- An exchange joins by itself, and leaves by itself, from every way out. Here it is only told that its turn
  may have come (`turn_came`), or that it waited in vain.
- Turns are given in a callback of their own, BURST at most: a release never begins another exchange in the
  middle of its own work, and whoever is served and ends at once does not call itself.
- What may bring room: a claim that was released, another table, a slot that another worker gave back, a
  backend that is ejected no more. The first two are told (`freed`, `follow`); for the others somebody has to
  look: every few milliseconds when slots are shared with other workers, else rarely. Nobody looks while
  nobody waits.
- Patience and length are what the service's policy says, or else the configuration, and of a paused service
  patience is what the pause says. A pause that begins holds those too who waited before. Who has joined keeps
  the time that he was given, whatever a policy says later.
"""

from __future__ import annotations

import logging
import random
from time import monotonic
from typing import TYPE_CHECKING, Final

from portero_py.core.queue import Queue, Turn
from portero_py.errors import GoingDown, QueueFull, QueueTimeout, ServicePaused

if TYPE_CHECKING:
    import asyncio

    from portero_py.config.model import Limits
    from portero_py.core.counters import Counters
    from portero_py.core.model import Halt, Service
    from portero_py.core.routing_table import RoutingTable
    from portero_py.errors import PorteroError
    from portero_py.proxy.endpoints import Waiting
    from portero_py.proxy.upstream.rooms import Rooms

#: Turns of one queue, and queues, that are dealt with in one go.
BURST: Final = 64
#: Seconds between two looks for what nobody tells.
LOOK: Final = 0.5
#: The same where other workers may give slots back: chosen anew each time, so that no two keep step. Less
#: than `rooms.COURTESY_SECONDS`.
SHARED_LOOK: Final = (0.004, 0.012)

_log = logging.getLogger(__name__)


class Queues:
    """All queues of a worker. `rooms` has the slots that it shares with others, if there are any."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, counters: Counters, limits: Limits, rooms: Rooms | None
    ) -> None:
        self.limits = limits
        self._loop = loop
        self._counters = counters
        self._rooms = rooms
        self._lines: dict[str, _Line] = {}
        self._due: dict[str, None] = {}  # services whose queue gets turns, in order
        self._turn: asyncio.Handle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._ended = False

    def __contains__(self, service: str) -> bool:
        return service in self._lines

    def __len__(self) -> int:
        return sum([len(line.queue) for line in self._lines.values()])

    # What exchanges call

    def patience(self, service: Service) -> float:
        """For how long an exchange of `service` may wait for a backend with room, seconds."""
        policy = service.policy
        if policy is None or policy.queue_seconds is None:
            return self.limits.queue_seconds
        return policy.queue_seconds

    def join(
        self, exchange: Waiting, service: Service, now: float, size: int, *, failed: bool = False
    ) -> None:
        """Wait behind the others for `service`; `size` is what the request takes in memory, bytes.

        `failed`: not everybody who is in the service can take it, so there may be room for who comes next.
        Raises QueueFull, or GoingDown. Whoever has joined leaves by `leave`.
        """
        name, halt, limits, policy = service.name, service.halt, self.limits, service.policy
        if self._ended:
            raise self._turned_away(name, GoingDown("this proxy is going down"))
        most = limits.queue_length
        if policy is not None and policy.queue_length is not None:
            most = policy.queue_length
        patience = self.patience(service) if halt is None else halt.seconds or 0.0
        line = self._lines.get(name) or _Line(service)
        if patience <= 0 or not line.queue.join(
            exchange, now, patience, size, most=most, most_bytes=limits.queue_bytes
        ):
            raise self._turned_away(name, QueueFull("all backends are busy, and no more requests can wait"))
        if name not in self._lines:
            self._lines[name] = line
            if self._rooms is not None:
                self._rooms.wait(name)
            self._look_later()
        self._counters.queued[name] += 1
        self._arm(name, line, now)
        if line.passes:
            self.freed(name)
        line.passes = line.passes or failed

    def grew(self, exchange: Waiting, size: int) -> bool:
        """Bytes of its body have come; False when they are too many, which is counted: it has to go."""
        queue = self._lines[exchange.service].queue
        if queue.grow(exchange, size, most_bytes=self.limits.queue_bytes):
            return True
        self._counters.queue_refused[exchange.service, QueueFull.reason] += 1
        return False

    def leave(self, exchange: Waiting, now: float) -> float:
        """It waits no more. Returns for how long it did, seconds."""
        name = exchange.service
        line = self._lines[name]
        waited = now - line.queue.leave(exchange)
        if not line.queue:
            del self._lines[name]
            line.disarm()
            if self._rooms is not None:
                self._rooms.wait_no_more(name)
        self._counters.queue_left(name, waited)
        return waited

    def freed(self, service: str) -> None:
        """There may be room for who waits for this service."""
        if service in self._lines:
            self._due[service] = None
            if self._turn is None:
                self._turn = self._loop.call_soon(self._give_turns)

    # What the worker calls

    def follow(self, table: RoutingTable) -> None:
        """Another table is in force."""
        now = monotonic()
        for name, line in self._lines.items():
            service = table.services.get(name)
            if service is not line.service:
                halt = None if service is None else service.halt
                if halt is not None and halt != line.halt and halt.seconds:
                    line.queue.hold_until(now + halt.seconds)
                    self._arm(name, line, now)
                line.service = service
                self.freed(name)
            elif name.startswith("*") or name == table.default_service:
                self.freed(name)  # another service may have come for the hosts of those who wait here

    def end(self) -> None:
        """Nobody is held any longer, nor from now on: this process ends."""
        self._ended = True
        for name, line in list(self._lines.items()):
            for exchange in list(line.queue):
                self._refuse(name, exchange, GoingDown("this proxy is going down"))

    def close(self) -> None:
        """No callback comes any more."""
        self.end()
        for handle in (self._turn, self._look):
            if handle is not None:
                handle.cancel()
        self._turn = self._look = None

    # Private: turns

    def _give_turns(self) -> None:
        self._turn = None
        due, self._due = self._due, {}
        for name in due:
            if self._give_turns_to(name):
                self.freed(name)

    def _give_turns_to(self, name: str) -> bool:
        """Let go on who can; whether there may be more of them than one burst."""
        line = self._lines.get(name)
        if line is None:
            return False
        went = False
        passed: list[Waiting] = []
        for _ in range(min(BURST, len(line.queue))):
            exchange = line.queue.first()
            if exchange is None:
                went = False
                break
            try:
                turn = exchange.turn_came()
            except Exception:  # a bug: the exchange logs it, counts it, and is over
                exchange.broke()
                turn = Turn.GONE
            if turn is Turn.WAITS:
                went = False
                break
            if turn is Turn.PASSED:
                line.queue.pass_over(exchange)
                passed.append(exchange)
            else:
                went = True
        line.passes = bool(passed)
        if len(passed) < BURST:  # else nobody behind them would ever have a turn
            line.queue.put_back(passed)
        return went

    # Private: time

    def _arm(self, name: str, line: _Line, now: float) -> None:
        """One timer a queue, for whose time is up first."""
        deadline = line.queue.next_deadline()
        if deadline is not None and (line.timer is None or deadline < line.due):
            line.disarm()
            line.due = deadline
            # Never in no time: a loop's clock is coarser than ours, and we would be called again and again.
            line.timer = self._loop.call_later(max(deadline - now, 0.001), self._time_is_up, name, line)

    def _time_is_up(self, name: str, line: _Line) -> None:
        line.timer = None
        now = monotonic()
        halt = line.halt
        for exchange in line.queue.expired(now):
            error: PorteroError = QueueTimeout("no backend had room in time")
            if halt is not None:
                error = ServicePaused(halt.message or "the service is paused")
            self._refuse(name, exchange, error)
        self._arm(name, line, now)

    def _look_later(self) -> None:
        if self._look is None:
            pause = LOOK if self._rooms is None else random.uniform(*SHARED_LOOK)  # noqa: S311 - no secret
            self._look = self._loop.call_later(pause, self._look_around)

    def _look_around(self) -> None:
        """Try what nobody tells: the queues in turn, some at a time."""
        self._look = None
        names = list(self._lines)[:BURST]
        for name in names:
            if len(self._lines) > BURST:
                self._lines[name] = self._lines.pop(name)
            if self._lines[name].halt is None:
                self.freed(name)
        if self._lines:
            self._look_later()

    # Private: who is turned away

    def _refuse(self, name: str, exchange: Waiting, error: PorteroError) -> None:
        try:
            exchange.waited_in_vain(self._turned_away(name, error))
        except Exception:  # a bug: the exchange logs it, counts it, and is over
            exchange.broke()

    def _turned_away(self, name: str, error: PorteroError) -> PorteroError:
        self._counters.queue_refused[name, error.reason] += 1
        return error


# Private


class _Line:
    """The queue of a service, as it is in the table now, and its timer."""

    __slots__ = ("due", "passes", "queue", "service", "timer")

    def __init__(self, service: Service) -> None:
        self.queue = Queue["Waiting"]()
        self.service: Service | None = service
        self.timer: asyncio.TimerHandle | None = None
        self.due = 0.0
        self.passes = False  # somebody waits who leaves room to others

    @property
    def halt(self) -> Halt | None:
        return None if self.service is None else self.service.halt

    def disarm(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
