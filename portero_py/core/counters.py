"""Plain counters of one data-plane process: incremented on the hot path, merged and shown by control.

A worker owns one `Counters` and only adds to it; control reads `snapshot()`, merges the snapshots of all
workers and turns them into Prometheus samples. Label values are bounded: services come from the routing
table ("" when none matched), methods outside the known ones count as "OTHER".

An exchange adds to one count, of its service, method, status and duration at once; the sums that are shown
are made when somebody asks. With thousands of services every table and list more that an exchange had to be
counted in would be somewhere else in memory: that was 0.4 µs.

A new count is one field here, which says how it is merged, and one row of the metrics: the feed carries it by
itself.

A service that no routing table knows any more is forgotten, everywhere: the worker drops its counts with the
table that drops it, and so does control with what departed workers had counted. A table goes on to know a
service for a while after its last lease (`registry.LINGER`), so whoever scrapes has seen the last counts. If
it comes back it begins at zero, as after a restart. Its counts are not added to any other service's: a rate
over the sum would show them a second time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

#: Upper bounds of the duration histogram, seconds; one more bucket takes the rest.
DURATION_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)

#: The methods that are counted by name.
METHODS: Final = {
    name.encode(): name for name in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
}


def _add(mine: Any, theirs: Any) -> Any:
    return mine + theirs  # a declared float would make one of an int, in the compiled build


def _add_each(mine: dict[Any, Any], theirs: Mapping[Any, Any]) -> dict[Any, Any]:
    for key, count in theirs.items():
        mine[key] = mine.get(key, 0) + count
    return mine


def _add_services(
    mine: dict[str, ServiceCounters], theirs: Mapping[str, ServiceCounters]
) -> dict[str, ServiceCounters]:
    for service, counted in theirs.items():
        if service not in mine:
            mine[service] = ServiceCounters()
        mine[service].merge(counted)
    return mine


def _itself(key: Any) -> Any:
    return key


def _first(key: Any) -> Any:
    return key[0]


# What is said of a field: how another worker's is merged into it, and which service a key is of, if of any.
_SUMMED: Final[Mapping[str, Any]] = {"merge": _add}
_COUNTED: Final[Mapping[str, Any]] = {"merge": _add_each}
_COUNTED_BY_SERVICE: Final[Mapping[str, Any]] = {"merge": _add_each, "service_of": _itself}
_COUNTED_BY_SERVICE_AND: Final[Mapping[str, Any]] = {"merge": _add_each, "service_of": _first}
_SERVICES: Final[Mapping[str, Any]] = {"merge": _add_services, "service_of": _itself}


@dataclass(slots=True)
class ServiceCounters:
    """The finished exchanges of one service."""

    # method, status, bucket
    exchanges: dict[tuple[str, int, int], int] = field(default_factory=dict, metadata=_COUNTED)
    seconds: float = field(default=0.0, metadata=_SUMMED)  # of all durations

    def finished(self) -> int:
        """How many there were."""
        return sum(self.exchanges.values())

    def by_status(self) -> dict[tuple[str, int], int]:
        """How many there were of each method and status."""
        found: Counter[tuple[str, int]] = Counter()
        for (method, status, _), count in self.exchanges.items():
            found[method, status] += count
        return found

    def by_duration(self) -> list[int]:
        """How many there were in each bucket of the durations."""
        found = [0] * (len(DURATION_BUCKETS) + 1)
        for (_, _, bucket), count in self.exchanges.items():
            found[bucket] += count
        return found

    def merge(self, other: ServiceCounters) -> None:
        """Add another worker's counters of the same service."""
        _merge_fields(self, other)


@dataclass(slots=True)
class Counters:
    """Everything that one worker counts. Adding two of them merges them."""

    services: dict[str, ServiceCounters] = field(default_factory=dict, metadata=_SERVICES)
    # version, alpn, result
    handshakes: Counter[tuple[str, str, str]] = field(default_factory=Counter, metadata=_COUNTED)
    errors: Counter[str] = field(default_factory=Counter, metadata=_COUNTED)  # reason
    # service, reason
    retries: Counter[tuple[str, str]] = field(default_factory=Counter, metadata=_COUNTED_BY_SERVICE_AND)
    retries_refused: Counter[str] = field(default_factory=Counter, metadata=_COUNTED_BY_SERVICE)
    ejections: Counter[str] = field(default_factory=Counter, metadata=_COUNTED)  # reason
    # exchanges that wait now; how long those waited that wait no more (service, bucket); who was turned away
    queued: Counter[str] = field(default_factory=Counter, metadata=_COUNTED_BY_SERVICE)
    queue_waits: Counter[tuple[str, int]] = field(default_factory=Counter, metadata=_COUNTED_BY_SERVICE_AND)
    queue_seconds: dict[str, float] = field(default_factory=dict, metadata=_COUNTED_BY_SERVICE)
    # service, reason
    queue_refused: Counter[tuple[str, str]] = field(default_factory=Counter, metadata=_COUNTED_BY_SERVICE_AND)
    rate_limited: Counter[str] = field(default_factory=Counter, metadata=_COUNTED_BY_SERVICE)
    refused: Counter[str] = field(default_factory=Counter, metadata=_COUNTED)  # limit
    bytes_in: int = field(default=0, metadata=_SUMMED)
    bytes_out: int = field(default=0, metadata=_SUMMED)
    connections_total: int = field(default=0, metadata=_SUMMED)
    connections_open: int = field(default=0, metadata=_SUMMED)
    exchanges_in_flight: int = field(default=0, metadata=_SUMMED)
    access_log_dropped: int = field(default=0, metadata=_SUMMED)
    buffered_bytes: int = field(default=0, metadata=_SUMMED)
    # of a worker process, as of its last report; 0 when control is in the same one
    tasks: int = field(default=0, metadata=_SUMMED)

    def exchange_done(self, service: str, method: bytes, status: int, seconds: float) -> None:
        """Count one finished exchange; `method` may be anything."""
        counted = self.services.get(service)
        if counted is None:
            counted = self.services[service] = ServiceCounters()
        key = (METHODS.get(method, "OTHER"), status, bisect_left(DURATION_BUCKETS, seconds))
        exchanges = counted.exchanges
        exchanges[key] = exchanges.get(key, 0) + 1
        counted.seconds += seconds

    def queue_left(self, service: str, seconds: float) -> None:
        """Count an exchange that waits no more, whatever the reason."""
        queued = self.queued
        queued[service] -= 1
        if queued[service] <= 0:
            del queued[service]
        self.queue_waits[service, bisect_left(DURATION_BUCKETS, seconds)] += 1
        self.queue_seconds[service] = self.queue_seconds.get(service, 0.0) + seconds

    def queue_durations(self) -> dict[str, list[int]]:
        """How many waited how long, in each bucket, by service."""
        found: dict[str, list[int]] = {}
        for (service, bucket), count in self.queue_waits.items():
            found.setdefault(service, [0] * (len(DURATION_BUCKETS) + 1))[bucket] += count
        return found

    def keep_only(self, services: Mapping[str, object]) -> None:
        """Forget what was counted for services that are not in `services`; "" stays, which is none."""
        for each in fields(self):
            service_of = each.metadata.get("service_of")
            if service_of is not None:
                counted = getattr(self, each.name)
                for key in [key for key in counted if service_of(key) and service_of(key) not in services]:
                    del counted[key]

    def merge(self, other: Counters) -> None:
        """Add another worker's counters to these."""
        _merge_fields(self, other)


# Private


def _merge_fields(mine: Any, theirs: Any) -> None:
    for each in fields(mine):
        merge = each.metadata["merge"]
        setattr(mine, each.name, merge(getattr(mine, each.name), getattr(theirs, each.name)))
