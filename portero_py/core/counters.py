"""Plain counters of one data-plane process: incremented on the hot path, merged and shown by control.

A worker owns one `Counters` and only adds to it; control reads `snapshot()`, merges the snapshots of all
workers and turns them into Prometheus samples. Label values are bounded: services come from the routing
table ("" when none matched), methods outside the known ones count as "OTHER".

An exchange adds to one count, of its service, method, status and duration at once; the sums that are shown
are made when somebody asks. With thousands of services every table and list more that an exchange had to be
counted in would be somewhere else in memory: that was 0.4 µs.

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
from dataclasses import dataclass, field
from typing import Final

#: Upper bounds of the duration histogram, seconds; one more bucket takes the rest.
DURATION_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)

#: The methods that are counted by name.
METHODS: Final = {
    name.encode(): name for name in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
}


@dataclass(slots=True)
class ServiceCounters:
    """The finished exchanges of one service."""

    exchanges: dict[tuple[str, int, int], int] = field(default_factory=dict)  # method, status, bucket
    seconds: float = 0.0  # the sum of all durations

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
        exchanges = self.exchanges
        for key, count in other.exchanges.items():
            exchanges[key] = exchanges.get(key, 0) + count
        self.seconds += other.seconds


@dataclass(slots=True)
class Counters:
    """Everything that one worker counts. Adding two of them merges them."""

    services: dict[str, ServiceCounters] = field(default_factory=dict)
    handshakes: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # version, alpn, result
    errors: Counter[str] = field(default_factory=Counter)  # reason
    retries: Counter[str] = field(default_factory=Counter)  # service
    bytes_in: int = 0
    bytes_out: int = 0
    connections_total: int = 0
    connections_open: int = 0
    exchanges_in_flight: int = 0
    access_log_dropped: int = 0
    tasks: int = 0  # of a worker process, as of its last report; 0 when control is in the same one

    def exchange_done(self, service: str, method: bytes, status: int, seconds: float) -> None:
        """Count one finished exchange; `method` may be anything."""
        counted = self.services.get(service)
        if counted is None:
            counted = self.services[service] = ServiceCounters()
        key = (METHODS.get(method, "OTHER"), status, bisect_left(DURATION_BUCKETS, seconds))
        exchanges = counted.exchanges
        exchanges[key] = exchanges.get(key, 0) + 1
        counted.seconds += seconds

    def keep_only(self, services: Mapping[str, object]) -> None:
        """Forget what was counted for services that are not in `services`; "" stays, which is none."""
        for name in [name for name in self.services if name and name not in services]:
            del self.services[name]
        for name in [name for name in self.retries if name and name not in services]:
            del self.retries[name]

    def merge(self, other: Counters) -> None:
        """Add another worker's counters to these."""
        for service, theirs in other.services.items():
            mine = self.services.get(service)
            if mine is None:
                self.services[service] = ServiceCounters(theirs.exchanges.copy(), theirs.seconds)
            else:
                mine.merge(theirs)
        self.handshakes.update(other.handshakes)
        self.errors.update(other.errors)
        self.retries.update(other.retries)
        self.bytes_in += other.bytes_in
        self.bytes_out += other.bytes_out
        self.connections_total += other.connections_total
        self.connections_open += other.connections_open
        self.exchanges_in_flight += other.exchanges_in_flight
        self.access_log_dropped += other.access_log_dropped
        self.tasks += other.tasks
