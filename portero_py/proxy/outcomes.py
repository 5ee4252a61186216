"""What became of the tries: told to the worker's health, and from there to the counters, the log and control.

The exchange calls it when a try has failed or a backend has answered, and asks it before a request is sent
again that a backend may have seen. All of it is off the way of an ordinary request: an answer below 500 is
not told here as long as nobody has a mark.

A request that has waited for as long as a probe may take is told too (`slow`). That is no failure: when many
of a row are slow, control is asked for a probe, once an interval.

A service in trouble has a line of the log a second: what could not be said in between is a number in the
next.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Final

from portero_py.core.health import Evidence, Failure, Health, Mark
from portero_py.core.retry_budget import UNREMARKABLE, RetryBudgets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from portero_py.core.counters import Counters
    from portero_py.core.model import Lease, Service
    from portero_py.core.routing_table import RoutingTable
    from portero_py.errors import PorteroError
    from portero_py.proxy.endpoints import Record

#: Seconds between two lines of the log about one service.
QUIET: Final = 1.0
#: Services that are looked at in one go: 1 ms at most.
STEP: Final = 500

_log = logging.getLogger(__name__)


class Outcomes:
    """Judges by `health`, counts in `counters`; both were made at `start`."""

    def __init__(self, health: Health, counters: Counters, start: float) -> None:
        self._health = health
        self._counters = counters
        self._budgets = RetryBudgets(start)
        self._to_count: list[str] = []  # services of this look
        self._counted: dict[str, int] = {}
        self._told: dict[str, tuple[float, int]] = {}  # service -> its last line's time, lines since then
        self._asked: dict[tuple[str, str], float] = {}  # service, instance id -> when it may be again
        self._interval = 0.0  # seconds until it may be asked for again
        self._patience = 0.0  # seconds that a probe waits
        #: Told when a backend has failed too often in a row, or is slow.
        self.on_evidence: Callable[[Evidence], None] = _to_nobody

    def configure(self, interval: float, patience: float) -> None:
        """Probes are made each `interval`, and wait for `patience`; seconds."""
        self._interval = interval
        self._patience = patience

    def failed(
        self,
        exchange: Record,
        table: RoutingTable,
        failure: Failure,
        error: PorteroError,
        trial: Mark | None,
        now: float,
    ) -> None:
        """The try that `exchange` was at has failed; `trial` is the mark that it was to try."""
        self._failed(exchange, table, failure, error.reason, str(error), trial, now)

    def answered(
        self, exchange: Record, table: RoutingTable, status: int, trial: Mark | None, now: float
    ) -> None:
        """The try that `exchange` was at was answered: a success, if `status` does not say otherwise."""
        lease = exchange.lease
        if lease is None:
            return
        if self._health.is_failure(table.services.get(lease.service), status):
            text = f"backend {lease.backend.address} answered {status}"
            self._failed(exchange, table, Failure.PROMPT, f"status_{status}", text, trial, now)
            return
        seconds = self._health.succeeded(lease, now)
        if seconds:
            self._say(logging.INFO, lease, f"back after {seconds:.1f} s", now)

    def slow(self, exchange: Record, table: RoutingTable, now: float) -> None:
        """The try that `exchange` is at has waited for as long as a probe may take, and goes on waiting."""
        lease = exchange.lease
        if lease is None:
            return
        service = table.services.get(lease.service)
        if not self._health.slow(lease, service):
            return
        own = None if service is None or service.policy is None else service.policy.health
        interval = self._interval if own is None or own.interval is None else own.interval
        key = lease.service, lease.instance_id
        if now < self._asked.get(key, -math.inf):
            return
        self._asked[key] = now + interval
        backend = lease.backend
        patience = self._patience if own is None or own.timeout is None else own.timeout
        text = f"no answer within {patience:g} s"
        self.on_evidence(Evidence(lease.service, backend.host, backend.port, hangs=True, error=text))

    def may_repeat(self, service: str, now: float) -> bool:
        """Whether a request of `service` may be sent a second time; counted when it may not."""
        counted = self._counters.services.get(service)
        if self._budgets.take(service, 0 if counted is None else counted.finished(), now):
            return True
        self._counters.retries_refused[service] += 1
        return False

    def look(self, now: float) -> bool:
        """Do a little of what the budgets need each `retry_budget.WINDOW` seconds; True when it is done."""
        if not self._to_count:
            self._to_count = list(self._counters.services)
        for _ in range(min(STEP, len(self._to_count))):
            service = self._to_count.pop()
            counted = self._counters.services.get(service)
            finished = 0 if counted is None else counted.finished()
            if finished > UNREMARKABLE:
                self._counted[service] = finished
        if self._to_count:
            return False
        self._asked = {key: at for key, at in self._asked.items() if now < at}
        counted_now, self._counted = self._counted, {}
        self._budgets.look(counted_now, now)
        return True

    def retain(self, table: RoutingTable, now: float) -> None:
        """Forget what is not in `table` any more."""
        self._health.retain(table, now)
        self._budgets.keep_only(table.services)
        self._forget_lines(table.services)

    # Private

    def _failed(
        self,
        exchange: Record,
        table: RoutingTable,
        failure: Failure,
        reason: str,
        text: str,
        trial: Mark | None,
        now: float,
    ) -> None:
        lease, health = exchange.lease, self._health
        if lease is None:
            return
        service = table.services.get(lease.service)
        began = exchange.upstream_started
        verdict = health.failed(lease, service, failure, text, began=began, now=now, trial=trial)
        if verdict.pause:
            self._counters.ejections[reason] += 1
            if not verdict.is_again:
                line = f"passed over for {verdict.pause:g} s and until it answers again ({reason}): {text}"
                self._say(logging.WARNING, lease, line, now)
        if verdict.is_evidence:
            mark = health.of(lease)
            hangs = mark is not None and mark.hangs
            backend = lease.backend
            self.on_evidence(Evidence(lease.service, backend.host, backend.port, hangs, text))

    def _say(self, level: int, lease: Lease, text: str, now: float) -> None:
        service = lease.service
        last, unsaid = self._told.get(service, (-math.inf, 0))
        if now < last + QUIET:
            self._told[service] = last, unsaid + 1
            return
        self._told[service] = now, 0
        more = f" ({unsaid} more lines like this were left out)" if unsaid else ""
        _log.log(level, "backend %s of %s: %s%s", lease.backend.address, service, text, more)

    def _forget_lines(self, services: Mapping[str, Service]) -> None:
        for name in [name for name in self._told if name not in services]:
            del self._told[name]


def _to_nobody(evidence: Evidence) -> None:
    """Stand in for `on_evidence`."""
