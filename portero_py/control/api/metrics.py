"""What Prometheus sees: the registry, the workers' merged counters, and what control itself counted.

Portero's names are kept: `portero_registry_hosts`, `portero_registry_services`, `portero_registry_backends`.

A scrape first takes a snapshot on the event loop (a copy of plain numbers), then writes the text in a thread:
with thousands of services that is a second of work, in which a single-process proxy must go on serving.
Nothing is in prometheus-client's process-wide registry.
"""

from __future__ import annotations

import asyncio
import platform
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

import portero_py
from portero_py.core.counters import DURATION_BUCKETS, Counters
from portero_py.core.registry import Registry

#: The Content-Type of `Metrics.scrape`'s answer.
CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

_BOUNDS: Final = (*(str(bound) for bound in DURATION_BUCKETS), "+Inf")


class Metrics:
    """Control's own counts, and the text of a scrape. `counters` gives the workers' merged ones.

    When the workers are processes, `refresh` fetches what they count, and `restarts` tells how often each
    process ("0", "1", ..., "control") had to be replaced. `subscribers` gives how many the feed has.
    """

    def __init__(
        self,
        registry: Registry,
        counters: Callable[[], Counters],
        *,
        refresh: Callable[[], Awaitable[None]] | None = None,
        restarts: Callable[[], Mapping[str, int]] | None = None,
        subscribers: Callable[[], int] | None = None,
    ) -> None:
        self._registry = registry
        self._counters = counters
        self._refresh = refresh
        self._restarts = restarts
        self._subscribers = subscribers
        self._registrations: Counter[str] = Counter()
        self._reloads: Counter[str] = Counter()
        self._acme: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._expiries: Mapping[str, float] = {}

    def registration(self, result: str) -> None:
        """Count an answer to /register: `registered`, `renewed`, `deregistered`, or an error's reason."""
        self._registrations[result] += 1

    def certificate_reload(self, result: str) -> None:
        """Count a certificate pair that was read again: `ok`, or an error's reason."""
        self._reloads[result] += 1

    def acme_attempt(self, result: str) -> None:
        """Count an attempt to get a certificate by ACME: `issued`, or an error's reason."""
        self._acme[result] += 1

    def fault(self, where: str) -> None:
        """Count a fault of portero's own that it survived: the task that failed, `feed`, or `reload`."""
        self._faults[where] += 1

    def certificates(self, expiries: Mapping[str, float]) -> None:
        """Say which certificates are in use: name -> end of validity, seconds since the epoch."""
        self._expiries = dict(expiries)

    async def scrape(self) -> bytes:
        """The text exposition of everything, as of now; its type is `CONTENT_TYPE`."""
        if self._refresh is not None:
            await self._refresh()
        snapshot = _Snapshot(
            hosts=self._registry.host_count,
            services=self._registry.service_count,
            backends=self._registry.lease_count,
            counters=self._counters(),
            registrations=Counter(self._registrations),
            reloads=Counter(self._reloads),
            acme=Counter(self._acme),
            faults=Counter(self._faults),
            expiries=self._expiries,
            restarts=self._restarts() if self._restarts is not None else {},
            subscribers=self._subscribers() if self._subscribers is not None else 0,
            tasks=len(asyncio.all_tasks()),
        )
        return await asyncio.to_thread(_text, snapshot)


# Private


@dataclass(frozen=True, slots=True, eq=False)
class _Snapshot(Collector):
    hosts: int
    services: int
    backends: int
    counters: Counters
    registrations: Counter[str]
    reloads: Counter[str]
    acme: Counter[str]
    faults: Counter[str]
    expiries: Mapping[str, float]
    restarts: Mapping[str, int]
    subscribers: int
    tasks: int  # of this process

    def collect(self) -> Iterator[Metric]:
        yield from self._control()
        yield from self._exchanges()
        yield from self._connections()

    def _control(self) -> Iterator[Metric]:
        yield _gauge("registry_hosts", "Distinct host names that have a backend", self.hosts)
        yield _gauge("registry_services", "Known services, with or without a backend", self.services)
        yield _gauge("registry_backends", "Leases", self.backends)
        yield _counters(
            "registrations",
            "Answers to /register",
            ["result"],
            (((result,), count) for result, count in self.registrations.items()),
        )
        expiry = GaugeMetricFamily(
            "portero_certificate_expiry_timestamp_seconds",
            "End of a certificate's validity, since the epoch",
            labels=["name"],
        )
        for name, timestamp in self.expiries.items():
            expiry.add_metric([name], timestamp)
        yield expiry
        yield _counters(
            "certificate_reloads",
            "Certificate pairs read again",
            ["result"],
            (((result,), count) for result, count in self.reloads.items()),
        )
        yield _counters(
            "acme_attempts",
            "Attempts to get a certificate by ACME",
            ["result"],
            (((result,), count) for result, count in self.acme.items()),
        )
        yield _counters(
            "faults",
            "Faults of portero's own that it survived",
            ["where"],
            (((where,), count) for where, count in self.faults.items()),
        )
        yield _counters(
            "worker_restarts",
            "Processes that died or hung and were replaced",
            ["worker"],
            (((worker,), count) for worker, count in self.restarts.items()),
        )
        yield _gauge("feed_subscribers", "Workers that get every new table", self.subscribers)
        # What only ever grows is a leak, what falls is something that has ended and should not.
        tasks = GaugeMetricFamily("portero_tasks", "Tasks of the event loops", labels=["process"])
        tasks.add_metric(["control"], self.tasks)
        tasks.add_metric(["workers"], self.counters.tasks)
        yield tasks
        build = GaugeMetricFamily(
            "portero_build_info", "Versions, as labels", labels=["version", "python_version"]
        )
        build.add_metric([portero_py.__version__, platform.python_version()], 1)
        yield build

    def _exchanges(self) -> Iterator[Metric]:
        counters = self.counters
        yield _counters(
            "requests",
            "Finished exchanges",
            ["service", "method", "status"],
            (
                ((service, method, str(status)), count)
                for service, counted in counters.services.items()
                for (method, status), count in counted.by_status().items()
            ),
        )
        durations = HistogramMetricFamily(
            "portero_request_duration_seconds",
            "From the request's head to the end of the exchange",
            labels=["service"],
        )
        for service, counted in counters.services.items():
            buckets = list(zip(_BOUNDS, accumulate(counted.by_duration()), strict=True))
            durations.add_metric([service], buckets, counted.seconds)
        yield durations
        yield _gauge("requests_in_flight", "Exchanges that are going on", counters.exchanges_in_flight)
        yield _counters(
            "retries",
            "Requests sent again, to another backend or on a fresh connection",
            ["service"],
            (((service,), count) for service, count in counters.retries.items()),
        )
        yield _counters(
            "errors",
            "Exchanges and connections that failed",
            ["reason"],
            (((reason,), count) for reason, count in counters.errors.items()),
        )

    def _connections(self) -> Iterator[Metric]:
        counters = self.counters
        yield _gauge("connections_open", "Downstream connections", counters.connections_open)
        yield _counters(
            "connections", "Downstream connections accepted", [], [((), counters.connections_total)]
        )
        yield _counters(
            "tls_handshakes",
            "Downstream TLS handshakes",
            ["version", "alpn", "result"],
            counters.handshakes.items(),
        )
        yield _counters(
            "bytes",
            "Body bytes from clients (in) and to clients (out)",
            ["direction"],
            [(("in",), counters.bytes_in), (("out",), counters.bytes_out)],
        )
        yield _counters(
            "access_log_dropped",
            "Access log records that the log's reader was too slow for",
            [],
            [((), counters.access_log_dropped)],
        )


def _text(snapshot: _Snapshot) -> bytes:
    registry = CollectorRegistry()
    registry.register(snapshot)
    return generate_latest(registry)


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(f"portero_{name}", meaning, value)


def _counters(
    name: str, meaning: str, labels: list[str], samples: Iterable[tuple[tuple[str, ...], float]]
) -> Metric:
    """A counter family; the exposition adds `_total` to its name."""
    family = CounterMetricFamily(f"portero_{name}", meaning, labels=labels)
    for values, count in samples:
        family.add_metric(values, count)
    return family
