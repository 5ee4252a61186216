"""How many requests may be sent a second time: a share of what a service is asked, and no more.

A backend that dies fails what it was at, and each of these requests is sent again: that is what retries are
for. When all backends of a service break under their load, retries multiply that load. So those that a
backend may have seen already have a budget: SHARE of the service's exchanges of the last WINDOW seconds, or
LEAST a second of it when that is more.

Exchanges are not counted for it. Who asks says how many of the service have finished since the process
began, and what has come since the last look is taken to have come evenly over the time since. Looked at
every WINDOW or so it is right about the last one; one that nobody has looked at for an hour would know the
hour's mean only. Time is cut into whole seconds.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Final

#: Seconds over which exchanges and retries are compared.
WINDOW: Final = 10
#: Retries for each exchange.
SHARE: Final = 0.2
#: Retries a second that anybody may have.
LEAST: Final = 3
#: So many exchanges give no more retries than LEAST does.
UNREMARKABLE: Final = int(LEAST * WINDOW / SHARE)


class RetryBudget:
    """The budget of one service, of which `finished` exchanges were over at `now`."""

    __slots__ = ("_exchanges", "_finished", "_looked_at", "_retries", "_second")

    def __init__(self, finished: int, now: float) -> None:
        self._finished = finished
        self._looked_at = now
        self._second = int(now)  # that of the last of each list
        self._exchanges = [0.0] * WINDOW
        self._retries = [0] * WINDOW

    def look(self, finished: int, now: float) -> None:
        """`finished` exchanges are over now. A number that has shrunk began anew."""
        came = finished - self._finished if finished >= self._finished else finished
        since, self._looked_at, self._finished = self._looked_at, now, finished
        self._move_to(int(now))
        oldest = self._second - WINDOW + 1
        if not came:
            return
        if now <= since:
            self._exchanges[-1] += came
            return
        rate = came / (now - since)
        for place in range(WINDOW):
            begin = oldest + place
            share = min(now, begin + 1.0) - max(since, begin)
            if share > 0.0:
                self._exchanges[place] += rate * share

    def take(self, finished: int, now: float) -> bool:
        """Whether one more retry may be made; it is counted then. `finished` as for `look`."""
        self.look(finished, now)
        if sum(self._retries) >= max(SHARE * sum(self._exchanges), LEAST * WINDOW):
            return False
        self._retries[-1] += 1
        return True

    # Private

    def _move_to(self, second: int) -> None:
        gone = min(max(second - self._second, 0), WINDOW)
        self._second = max(second, self._second)
        if gone:
            self._exchanges = self._exchanges[gone:] + [0.0] * gone
            self._retries = self._retries[gone:] + [0] * gone


class RetryBudgets:
    """The budgets of all services of a worker that began at `start`.

    A service has one from its first retry on. What it was asked before is known from the last `look`.
    """

    __slots__ = ("_budgets", "_finished", "_looked_at")

    def __init__(self, start: float) -> None:
        self._budgets: dict[str, RetryBudget] = {}
        self._finished: dict[str, int] = {}  # at the last look, of those with more than UNREMARKABLE
        self._looked_at = start

    def __len__(self) -> int:
        return len(self._budgets)

    def take(self, service: str, finished: int, now: float) -> bool:
        """As `RetryBudget.take`."""
        budget = self._budgets.get(service)
        if budget is None:
            before = self._finished.get(service, 0)
            budget = self._budgets[service] = RetryBudget(before, self._looked_at)
        return budget.take(finished, now)

    def look(self, finished: Mapping[str, int], now: float) -> None:
        """See what has come of all services: of those with more than UNREMARKABLE, that is."""
        self._finished = dict(finished)
        self._looked_at = now
        for service, budget in self._budgets.items():
            if service in finished:
                budget.look(finished[service], now)

    def keep_only(self, services: Container[str]) -> None:
        """Forget the budgets of services that are not in `services`."""
        for service in [service for service in self._budgets if service not in services]:
            del self._budgets[service]
