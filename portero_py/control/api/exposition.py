"""The text of a scrape, as prometheus-client writes it. Loaded with the first scrape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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

from portero_py.control.api.metric_kinds import Family, Kind

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

_KINDS: Final = {
    Kind.GAUGE: GaugeMetricFamily,
    Kind.COUNTER: CounterMetricFamily,
    Kind.HISTOGRAM: HistogramMetricFamily,
}


def text(families: Iterable[Family]) -> bytes:
    """Write them in their order. Nothing is in prometheus-client's process-wide registry."""
    registry = CollectorRegistry()
    registry.register(_Once(families))
    return generate_latest(registry)


# Private


class _Once(Collector):
    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            written = _KINDS[family.kind](family.name, family.meaning, labels=family.labels)
            for labels, values in family.values.items():
                written.add_metric(labels, *values)
            yield written

    def describe(self) -> Iterator[Metric]:
        """Asked when it is registered, in place of `collect`: the names are known to be different."""
        return iter(())
