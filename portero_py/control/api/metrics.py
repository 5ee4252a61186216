"""What Prometheus sees: the registry, the workers' merged counters, and what control itself counted.

Portero's names are kept: `portero_registry_hosts`, `portero_registry_services`, `portero_registry_backends`.

A scrape first takes a snapshot on the event loop (a copy of plain numbers), then writes the text in a thread:
with thousands of services that is a second of work, in which a single-process proxy must go on serving.
Nothing is in prometheus-client's process-wide registry.

A new metric of the data plane is a field of `Counters` and a row of `ROWS`.
"""

from __future__ import annotations

import asyncio
import platform
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import portero_py
from portero_py.config.model import Reloads
from portero_py.control.api.metric_kinds import Family, Kind
from portero_py.core.counters import DURATION_BUCKETS, Counters
from portero_py.core.model import LeaseState
from portero_py.core.registry import Registry
from portero_py.core.routing_table import RoutingTable

_Gauge: Final = Kind.GAUGE
_Counter: Final = Kind.COUNTER
_Histogram: Final = Kind.HISTOGRAM

_BOUNDS: Final = (*(str(bound) for bound in DURATION_BUCKETS), "+Inf")


class Metrics:
    """Control's own counts, and the text of a scrape. `counters` gives the workers' merged ones.

    When the workers are processes, `refresh` fetches what they count, and `restarts` tells how often each
    process ("0", "1", ..., "control") had to be replaced. `subscribers` gives how many the feed has,
    `reloads` how the configuration was read again.
    """

    def __init__(
        self,
        registry: Registry,
        counters: Callable[[], Counters],
        *,
        refresh: Callable[[], Awaitable[None]] | None = None,
        restarts: Callable[[], Mapping[str, int]] | None = None,
        subscribers: Callable[[], int] | None = None,
        reloads: Callable[[], Reloads] | None = None,
    ) -> None:
        self._registry = registry
        self._counters = counters
        self._refresh = refresh
        self._restarts = restarts
        self._subscribers = subscribers
        self._config_reloads = reloads or Reloads
        self._registrations: Counter[str] = Counter()
        self._actions: Counter[tuple[str, str]] = Counter()
        self._reloads: Counter[str] = Counter()
        self._acme: Counter[str] = Counter()
        self._probes: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._expiries: Mapping[str, float] = {}

    def registration(self, result: str) -> None:
        """Count an answer to /register: `registered`, `renewed`, `deregistered`, or an error's reason."""
        self._registrations[result] += 1

    def action(self, action: str, result: str) -> None:
        """Count an answer to `drain`, `ready`, `pause`, `stop` or `resume`: `ok`, or an error's reason."""
        self._actions[action, result] += 1

    def certificate_reload(self, result: str) -> None:
        """Count a certificate pair that was read again: `ok`, or an error's reason."""
        self._reloads[result] += 1

    def acme_attempt(self, result: str) -> None:
        """Count an attempt to get a certificate by ACME: `issued`, or an error's reason."""
        self._acme[result] += 1

    def probe(self, result: str) -> None:
        """Count a probe of a backend: `ok`, or what came of it instead."""
        self._probes[result] += 1

    def fault(self, where: str) -> None:
        """Count a fault of portero's own that it survived: the task that failed, `feed`, or `reload`."""
        self._faults[where] += 1

    def certificates(self, expiries: Mapping[str, float]) -> None:
        """Say which certificates are in use: name -> end of validity, seconds since the epoch."""
        self._expiries = dict(expiries)

    async def scrape(self) -> bytes:
        """The text exposition of everything, as of now; its Content-Type is `content_type`."""
        if self._refresh is not None:
            await self._refresh()
        snapshot = _Snapshot(
            hosts=self._registry.host_count,
            services=self._registry.service_count,
            backends=self._registry.lease_count,
            counters=self._counters(),
            registrations=Counter(self._registrations),
            actions=Counter(self._actions),
            reloads=Counter(self._reloads),
            config_reloads=self._config_reloads(),
            acme=Counter(self._acme),
            probes=Counter(self._probes),
            table=self._registry.table,
            faults=Counter(self._faults),
            expiries=self._expiries,
            restarts=self._restarts() if self._restarts is not None else {},
            subscribers=self._subscribers() if self._subscribers is not None else 0,
            tasks=len(asyncio.all_tasks()),
        )
        return await asyncio.to_thread(_text, snapshot)


def content_type() -> str:
    """The Content-Type of a scrape that was written."""
    from portero_py.control.api import exposition

    return exposition.CONTENT_TYPE


# Private


@dataclass(frozen=True, slots=True, eq=False)
class _Snapshot:
    hosts: int
    services: int
    backends: int
    counters: Counters
    registrations: Counter[str]
    actions: Counter[tuple[str, str]]
    reloads: Counter[str]
    config_reloads: Reloads
    acme: Counter[str]
    probes: Counter[str]
    table: RoutingTable
    faults: Counter[str]
    expiries: Mapping[str, float]
    restarts: Mapping[str, int]
    subscribers: int
    tasks: int  # of this process

    def families(self) -> Iterator[Family]:
        for row in ROWS:
            found = row.read(self)
            values = {
                (label,) if isinstance(label, str) else label: value if isinstance(value, tuple) else (value,)
                for label, value in (found if row.labels else {(): found}).items()
            }
            yield Family(row.kind, f"portero_{row.name}", row.meaning, row.labels, values)


@dataclass(frozen=True, slots=True)
class _Row:
    """One metric, `portero_<name>`; the exposition adds `_total` to a counter's.

    `read` gives the number. With one label it is a mapping of that label's values to numbers, with several
    one of tuples of them. A histogram has (cumulative buckets, sum) for a number.
    """

    kind: Kind
    name: str
    meaning: str
    labels: tuple[str, ...]
    read: Callable[[_Snapshot], Any]


def _requests(snapshot: _Snapshot) -> dict[tuple[str, str, str], int]:
    return {
        (service, method, str(status)): count
        for service, counted in snapshot.counters.services.items()
        for (method, status), count in counted.by_status().items()
    }


def _durations(snapshot: _Snapshot) -> dict[str, tuple[list[tuple[str, int]], float]]:
    return {
        service: (list(zip(_BOUNDS, accumulate(counted.by_duration()), strict=True)), counted.seconds)
        for service, counted in snapshot.counters.services.items()
    }


def _backends(snapshot: _Snapshot) -> dict[tuple[str, str], int]:
    """By service and state; how many are ready is said of each service, for alerts."""
    found: dict[tuple[str, str], int] = {}
    for service in snapshot.table.services.values():
        found[service.name, LeaseState.READY.value] = 0
        for lease in service.leases:
            key = service.name, lease.state.value
            found[key] = found.get(key, 0) + 1
    return found


def _queue_waits(snapshot: _Snapshot) -> dict[str, tuple[list[tuple[str, int]], float]]:
    seconds, counted = snapshot.counters.queue_seconds, snapshot.counters.queue_durations()
    none = [0] * len(_BOUNDS)
    return {
        service: (
            list(zip(_BOUNDS, accumulate(counted.get(service, none)), strict=True)),
            seconds.get(service, 0.0),
        )
        for service in {**seconds, **counted}
    }


#: Everything that a scrape shows, in this order; each field of `Counters` in one row at least.
ROWS: Final = (
    _Row(_Gauge, "registry_hosts", "Distinct host names that have a backend", (), lambda s: s.hosts),
    _Row(_Gauge, "registry_services", "Known services, with or without a backend", (), lambda s: s.services),
    _Row(_Gauge, "registry_backends", "Leases", (), lambda s: s.backends),
    _Row(_Gauge, "backends", "Backends by their state", ("service", "state"), _backends),
    _Row(_Counter, "probes", "Probes of backends", ("result",), lambda s: s.probes),
    _Row(_Counter, "registrations", "Answers to /register", ("result",), lambda s: s.registrations),
    _Row(
        _Counter,
        "actions",
        "Answers to drain, ready, pause, stop and resume",
        ("action", "result"),
        lambda s: s.actions,
    ),
    _Row(
        _Gauge,
        "certificate_expiry_timestamp_seconds",
        "End of a certificate's validity, since the epoch",
        ("name",),
        lambda s: s.expiries,
    ),
    _Row(_Counter, "certificate_reloads", "Certificate pairs read again", ("result",), lambda s: s.reloads),
    _Row(
        _Counter,
        "config_reloads",
        "Times that the configuration was read again",
        ("result",),
        lambda s: {"ok": s.config_reloads.ok, "error": s.config_reloads.failed},
    ),
    _Row(
        _Gauge,
        "config_last_success_timestamp_seconds",
        "When the configuration in force was read, since the epoch",
        (),
        lambda s: s.config_reloads.succeeded_at,
    ),
    _Row(_Counter, "acme_attempts", "Attempts to get a certificate by ACME", ("result",), lambda s: s.acme),
    _Row(_Counter, "faults", "Faults of portero's own that it survived", ("where",), lambda s: s.faults),
    _Row(
        _Counter,
        "worker_restarts",
        "Processes that died or hung and were replaced",
        ("worker",),
        lambda s: s.restarts,
    ),
    _Row(_Gauge, "feed_subscribers", "Workers that get every new table", (), lambda s: s.subscribers),
    # What only ever grows is a leak, what falls is something that has ended and should not.
    _Row(
        _Gauge,
        "tasks",
        "Tasks of the event loops",
        ("process",),
        lambda s: {"control": s.tasks, "workers": s.counters.tasks},
    ),
    _Row(
        _Gauge,
        "build_info",
        "Versions, as labels",
        ("version", "python_version"),
        lambda _: {(portero_py.__version__, platform.python_version()): 1},
    ),
    _Row(_Counter, "requests", "Finished exchanges", ("service", "method", "status"), _requests),
    _Row(
        _Histogram,
        "request_duration_seconds",
        "From the request's head to the end of the exchange",
        ("service",),
        _durations,
    ),
    _Row(
        _Gauge,
        "requests_in_flight",
        "Exchanges that are going on",
        (),
        lambda s: s.counters.exchanges_in_flight,
    ),
    _Row(
        _Counter,
        "retries",
        "Requests sent again, to another backend or on a fresh connection",
        ("service", "reason"),
        lambda s: s.counters.retries,
    ),
    _Row(
        _Counter,
        "retries_refused",
        "Requests that were not sent again, because too many of their service were",
        ("service",),
        lambda s: s.counters.retries_refused,
    ),
    _Row(
        _Counter,
        "ejections",
        "Times that a worker began to pass a backend over",
        ("reason",),
        lambda s: s.counters.ejections,
    ),
    _Row(
        _Gauge,
        "queued",
        "Exchanges that wait for a backend with room, or for a paused service",
        ("service",),
        lambda s: s.counters.queued,
    ),
    _Row(_Histogram, "queue_seconds", "How long those waited that did", ("service",), _queue_waits),
    _Row(
        _Counter,
        "queue_refused",
        "Exchanges that no place was left for, or that waited in vain",
        ("service", "reason"),
        lambda s: s.counters.queue_refused,
    ),
    _Row(
        _Counter,
        "rate_limited",
        "Requests that were over a rate limit of their service",
        ("service",),
        lambda s: s.counters.rate_limited,
    ),
    _Row(
        _Counter, "errors", "Exchanges and connections that failed", ("reason",), lambda s: s.counters.errors
    ),
    _Row(
        _Counter,
        "refused",
        "What was turned away, made to wait or ended by a limit",
        ("reason",),
        lambda s: s.counters.refused,
    ),
    _Row(_Gauge, "connections_open", "Downstream connections", (), lambda s: s.counters.connections_open),
    _Row(
        _Counter,
        "connections",
        "Downstream connections accepted",
        (),
        lambda s: s.counters.connections_total,
    ),
    _Row(
        _Counter,
        "tls_handshakes",
        "Downstream TLS handshakes",
        ("version", "alpn", "result"),
        lambda s: s.counters.handshakes,
    ),
    _Row(
        _Counter,
        "bytes",
        "Body bytes from clients (in) and to clients (out)",
        ("direction",),
        lambda s: {"in": s.counters.bytes_in, "out": s.counters.bytes_out},
    ),
    _Row(
        _Gauge,
        "buffered_bytes",
        "Bytes that are held for peers that are slow to take them",
        (),
        lambda s: s.counters.buffered_bytes,
    ),
    _Row(
        _Counter,
        "access_log_dropped",
        "Access log records that the log's reader was too slow for",
        (),
        lambda s: s.counters.access_log_dropped,
    ),
)


def _text(snapshot: _Snapshot) -> bytes:
    from portero_py.control.api import exposition  # 1 MB that nobody needs who is never asked

    return exposition.text(snapshot.families())
