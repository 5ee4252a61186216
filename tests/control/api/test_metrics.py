"""What a scrape says, read back with prometheus-client's own parser."""

from __future__ import annotations

import asyncio
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

import portero_py
from portero_py.config.model import Reloads
from portero_py.control.api.metrics import Metrics, content_type
from portero_py.core.counters import Counters
from portero_py.core.model import Backend, LeaseRequest, LeaseState
from portero_py.core.registry import Registry


class Scrape:
    """All samples of one scrape by name and labels."""

    def __init__(self, text: str) -> None:
        self.types = {}
        self._samples = {}
        for family in text_string_to_metric_families(text):
            self.types[family.name] = family.type
            for sample in family.samples:
                self._samples[sample.name, frozenset(sample.labels.items())] = sample.value

    def value(self, name: str, /, **labels: str) -> float:
        return self._samples[f"portero_{name}", frozenset(labels.items())]


async def scraped(metrics: Metrics) -> Scrape:
    return Scrape((await metrics.scrape()).decode())


def counted() -> Counters:
    """Counters with something in each field."""
    counters = Counters()
    counters.exchange_done("a.example", b"GET", 200, 0.001)
    counters.exchange_done("a.example", b"GET", 200, 0.25)
    counters.exchange_done("a.example", b"BREW", 503, 100.0)
    counters.exchange_done("", b"GET", 404, 0.002)
    counters.exchanges_in_flight = 4
    counters.connections_open = 5
    counters.connections_total = 6
    counters.handshakes["TLSv1.3", "h2", "ok"] = 7
    counters.handshakes["", "", "tls_client_hello"] = 2
    counters.retries["a.example", "stale"] = 8
    counters.errors["no_backend"] = 9
    counters.retries_refused["a.example"] = 14
    counters.ejections["connect_failed"] = 15
    counters.queued["a.example"] = 14
    counters.queue_waits["a.example", 4] = 15
    counters.queue_seconds["a.example"] = 0.6
    counters.queue_refused["a.example", "queue_full"] = 16
    counters.rate_limited["a.example"] = 17
    counters.refused["handshakes"] = 14
    counters.buffered_bytes = 15
    counters.bytes_in = 10
    counters.bytes_out = 11
    counters.access_log_dropped = 12
    counters.tasks = 13
    return counters


async def test_a_scrape_is_what_dashboards_and_alerts_were_written_for() -> None:
    registry = Registry()
    for port in (1, 2):
        registry.register(LeaseRequest("a.example", Backend("::1", port), 30), now=0.0)
    restarts = {"0": 1, "control": 2}
    metrics = Metrics(
        registry,
        counted,
        restarts=lambda: restarts,
        subscribers=lambda: 3,
        reloads=lambda: Reloads(4, 2, 1_700_000_000.0),
    )
    metrics.registration("registered")
    metrics.action("drain", "ok")
    metrics.certificate_reload("ok")
    metrics.acme_attempt("issued")
    for result in ("ok", "ok", "refused"):
        metrics.probe(result)
    metrics.fault("feed")
    metrics.certificates({"a.example": 1_800_000_000.0})
    text = (await metrics.scrape()).decode()
    text = re.sub(r"(portero_build_info){.*} 1.0", r"\1 VERSIONS", text)
    text = re.sub(r"(portero_tasks{process=\"control\"}) .*", r"\1 TASKS", text)
    assert text == (Path(__file__).parent / "scrape.txt").read_text()


async def test_no_field_of_the_counters_goes_without_a_row() -> None:
    async def shown(counters: Counters) -> bytes:
        return await Metrics(Registry(), lambda: counters).scrape()

    nothing, everything = await shown(Counters()), counted()
    for each in fields(Counters):
        value = getattr(everything, each.name)
        assert value, f"{each.name}: give it a value in counted()"
        assert await shown(replace(Counters(), **{each.name: value})) != nothing, each.name


async def test_the_registry_is_shown_under_porteros_names() -> None:
    registry = Registry()
    for service, port in (("a.example", 1), ("a.example", 2), ("b.example", 1)):
        registry.register(LeaseRequest(service, Backend("::1", port), 30), now=0.0)
    registry.release("b.example", host="::1", port=1, now=1.0)
    scrape = await scraped(Metrics(registry, Counters))
    assert scrape.value("registry_hosts") == 1
    assert scrape.value("registry_services") == 2
    assert scrape.value("registry_backends") == 2


async def test_the_workers_counters_are_shown() -> None:
    counters = Counters()
    counters.exchange_done("a.example", b"GET", 200, 0.001)
    counters.exchange_done("a.example", b"GET", 200, 0.2)
    counters.exchange_done("a.example", b"POST", 503, 100.0)
    counters.exchanges_in_flight = 4
    counters.connections_open = 5
    counters.connections_total = 6
    counters.handshakes["TLSv1.3", "h2", "ok"] = 7
    counters.retries["a.example", "stale"] = 8
    counters.errors["no_backend"] = 9
    counters.bytes_in = 10
    counters.bytes_out = 11
    counters.access_log_dropped = 12
    scrape = await scraped(Metrics(Registry(), lambda: counters))
    assert scrape.value("requests_total", service="a.example", method="GET", status="200") == 2
    assert scrape.value("requests_total", service="a.example", method="POST", status="503") == 1
    assert scrape.value("requests_in_flight") == 4
    assert scrape.value("connections_open") == 5
    assert scrape.value("connections_total") == 6
    assert scrape.value("tls_handshakes_total", version="TLSv1.3", alpn="h2", result="ok") == 7
    assert scrape.value("retries_total", service="a.example", reason="stale") == 8
    assert scrape.value("errors_total", reason="no_backend") == 9
    assert scrape.value("bytes_total", direction="in") == 10
    assert scrape.value("bytes_total", direction="out") == 11
    assert scrape.value("access_log_dropped_total") == 12


async def test_backends_are_counted_by_service_and_state_and_ready_ones_also_where_there_are_none() -> None:
    registry = Registry("fallback.example")
    for port, path in ((1, ""), (2, ""), (3, "/up"), (4, "")):
        registry.register(LeaseRequest("a.example", Backend("::1", port), 30, health_path=path), now=0.0)
    registry.set_state("a.example", "::1", 2, LeaseState.DOWN, 1.0)
    registry.set_state("a.example", "::1", 4, LeaseState.DRAINING, 1.0)
    scrape = await scraped(Metrics(registry, Counters))
    assert scrape.types["portero_backends"] == "gauge"
    for state in LeaseState:
        assert scrape.value("backends", service="a.example", state=state.value) == 1
    assert scrape.value("backends", service="fallback.example", state="ready") == 0


async def test_durations_are_a_cumulative_histogram() -> None:
    counters = Counters()
    for seconds in (0.001, 0.2, 100.0):
        counters.exchange_done("a.example", b"GET", 200, seconds)
    scrape = await scraped(Metrics(Registry(), lambda: counters))
    assert scrape.types["portero_request_duration_seconds"] == "histogram"
    bucket = "request_duration_seconds_bucket"
    counts = [
        scrape.value(bucket, service="a.example", le=bound) for bound in ("0.001", "0.1", "0.25", "+Inf")
    ]
    assert counts == [1, 1, 2, 3]
    assert scrape.value("request_duration_seconds_count", service="a.example") == 3
    assert scrape.value("request_duration_seconds_sum", service="a.example") == pytest.approx(100.201)


async def test_what_control_counts_is_shown() -> None:
    metrics = Metrics(Registry(), Counters)
    for result in ("registered", "registered", "secret_wrong"):
        metrics.registration(result)
    metrics.certificate_reload("ok")
    metrics.certificates({"a.example": 1_800_000_000.0})
    scrape = await scraped(metrics)
    assert scrape.value("registrations_total", result="registered") == 2
    assert scrape.value("registrations_total", result="secret_wrong") == 1
    assert scrape.value("certificate_reloads_total", result="ok") == 1
    assert scrape.value("certificate_expiry_timestamp_seconds", name="a.example") == 1_800_000_000
    metrics.certificates({})
    with pytest.raises(KeyError):
        (await scraped(metrics)).value("certificate_expiry_timestamp_seconds", name="a.example")


async def test_tasks_and_subscribers_are_shown_as_they_are_now() -> None:
    workers = Counters()
    workers.tasks = 14
    subscribers = [object(), object()]
    metrics = Metrics(Registry(), lambda: workers, subscribers=lambda: len(subscribers))
    before = await scraped(metrics)
    assert before.value("tasks", process="workers") == 14
    assert before.value("feed_subscribers") == 2
    ended = asyncio.Event()
    more = asyncio.create_task(ended.wait())
    subscribers.pop()
    after = await scraped(metrics)
    assert after.value("tasks", process="control") == before.value("tasks", process="control") + 1
    assert after.value("feed_subscribers") == 1
    ended.set()
    await more


async def test_the_build_is_shown_and_nothing_is_process_wide() -> None:
    text = (await Metrics(Registry(), Counters).scrape()).decode()
    assert 'portero_build_info{python_version="3.' in text
    assert f'version="{portero_py.__version__}"}} 1.0' in text
    assert content_type().startswith("text/plain")
    assert not any(metric.name.startswith("portero") for metric in REGISTRY.collect())


async def test_a_scrape_is_one_moment_and_does_not_block_the_loop() -> None:
    metrics = Metrics(Registry(), Counters)
    metrics.registration("registered")
    scrape = asyncio.ensure_future(scraped(metrics))
    await asyncio.sleep(0)  # the snapshot is taken, the text is being written
    metrics.registration("registered")
    assert (await scrape).value("registrations_total", result="registered") == 1
