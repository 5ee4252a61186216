"""Plain counters of one data-plane process: incremented on the hot path, merged and shown by control.

A worker owns one `Counters` and only adds to it; control reads `snapshot()`, merges the snapshots of all
workers and turns them into Prometheus samples. Label values are bounded: services come from the routing
table ("" when none matched), methods outside the known ones count as "OTHER".
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

#: Upper bounds of the duration histogram, seconds; one more bucket takes the rest.
DURATION_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)

METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"})


@dataclass(slots=True)
class Counters:
    """Everything that one worker counts. Adding two of them merges them."""

    exchanges: Counter[tuple[str, str, int]] = field(default_factory=Counter)  # service, method, status
    durations: dict[str, list[int]] = field(default_factory=dict)  # service -> count per bucket
    duration_sums: dict[str, float] = field(default_factory=dict)  # service -> seconds
    handshakes: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # version, alpn, result
    errors: Counter[str] = field(default_factory=Counter)  # reason
    retries: Counter[str] = field(default_factory=Counter)  # service
    bytes_in: int = 0
    bytes_out: int = 0
    connections_total: int = 0
    connections_open: int = 0
    exchanges_in_flight: int = 0
    access_log_dropped: int = 0

    def exchange_done(self, service: str, method: str, status: int, seconds: float) -> None:
        """Count one finished exchange; `method` may be anything."""
        self.exchanges[service, method if method in METHODS else "OTHER", status] += 1
        buckets = self.durations.get(service)
        if buckets is None:
            buckets = self.durations[service] = [0] * (len(DURATION_BUCKETS) + 1)
            self.duration_sums[service] = 0.0
        buckets[bisect_left(DURATION_BUCKETS, seconds)] += 1
        self.duration_sums[service] += seconds

    def merge(self, other: Counters) -> None:
        """Add another worker's counters to these."""
        self.exchanges.update(other.exchanges)
        for service, buckets in other.durations.items():
            mine = self.durations.get(service)
            self.durations[service] = (
                list(buckets) if mine is None else [a + b for a, b in zip(mine, buckets, strict=True)]
            )
        for service, seconds in other.duration_sums.items():
            self.duration_sums[service] = self.duration_sums.get(service, 0.0) + seconds
        self.handshakes.update(other.handshakes)
        self.errors.update(other.errors)
        self.retries.update(other.retries)
        self.bytes_in += other.bytes_in
        self.bytes_out += other.bytes_out
        self.connections_total += other.connections_total
        self.connections_open += other.connections_open
        self.exchanges_in_flight += other.exchanges_in_flight
        self.access_log_dropped += other.access_log_dropped
