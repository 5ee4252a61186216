"""What a worker counts, and how the counts of several become one."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

import pytest

from portero_py.core.counters import DURATION_BUCKETS, Counters, ServiceCounters


def test_an_exchange_is_counted_by_service_method_and_status_and_by_its_duration() -> None:
    counters = Counters()
    counters.exchange_done("app.example", b"GET", 200, 0.001)
    counters.exchange_done("app.example", b"GET", 200, 0.0011)
    counters.exchange_done("app.example", b"BREW", 418, 61.0)
    [(service, counted)] = counters.services.items()
    assert service == "app.example"
    assert counted.by_status() == {("GET", 200): 2, ("OTHER", 418): 1}
    assert counted.by_duration() == [1, 1, *[0] * (len(DURATION_BUCKETS) - 2), 1]
    assert round(counted.seconds, 4) == 61.0021


def test_merged_counters_are_the_sum_and_leave_the_other_alone() -> None:
    one, two = Counters(), Counters()
    for counters in (one, two):
        counters.exchange_done("app.example", b"GET", 200, 0.5)
        counters.handshakes["TLSv1.3", "h2", "ok"] += 1
        counters.errors["no_backend"] += 1
        counters.retries["app.example", "stale"] += 1
        counters.refused["handshakes"] += 1
        counters.bytes_in += 10
        counters.bytes_out += 20
        counters.connections_total += 3
        counters.connections_open += 2
        counters.exchanges_in_flight += 1
        counters.access_log_dropped += 4
        counters.buffered_bytes = 6
        counters.tasks = 5
    two.exchange_done("other.example", b"PUT", 503, 0.5)
    total = Counters()
    total.merge(one)
    total.merge(two)
    app, other = total.services["app.example"], total.services["other.example"]
    assert (app.by_status(), other.by_status()) == ({("GET", 200): 2}, {("PUT", 503): 1})
    assert (sum(app.by_duration()), sum(other.by_duration())) == (2, 1)
    assert (app.finished(), other.finished()) == (2, 1)
    assert (app.seconds, other.seconds) == (1.0, 0.5)
    assert total.handshakes == {("TLSv1.3", "h2", "ok"): 2}
    assert (total.errors["no_backend"], total.retries["app.example", "stale"]) == (2, 2)
    assert total.refused == {"handshakes": 2}
    assert (total.bytes_in, total.bytes_out) == (20, 40)
    assert (total.connections_total, total.connections_open, total.exchanges_in_flight) == (6, 4, 2)
    assert (total.access_log_dropped, total.tasks) == (8, 10)
    total.exchange_done("other.example", b"PUT", 503, 0.5)
    for counted, key in (
        (one.services["app.example"], ("GET", 200)),
        (two.services["app.example"], ("GET", 200)),
        (two.services["other.example"], ("PUT", 503)),
    ):
        assert (counted.by_status(), sum(counted.by_duration()), counted.seconds) == ({key: 1}, 1, 0.5)


def full(number: int) -> Counters:
    """Counters with `number` in each field, whatever it is called."""
    counters = Counters()
    for each in fields(Counters):
        value = getattr(counters, each.name)
        if isinstance(value, Counter):
            value["gone.example", "reason"] = number
        elif isinstance(value, dict):
            counted = ServiceCounters({("GET", 200, 3): number}, float(number))
            value["gone.example"] = counted if each.name == "services" else float(number)
        else:
            setattr(counters, each.name, number)
    return counters


@pytest.mark.parametrize("counted", [Counters, ServiceCounters])
def test_each_field_says_how_it_is_merged(counted: type[Counters | ServiceCounters]) -> None:
    assert [each.name for each in fields(counted) if not callable(each.metadata.get("merge"))] == []


def test_no_field_is_forgotten_when_counters_are_merged() -> None:
    total = Counters()
    total.merge(full(2))
    assert total == full(2)
    total.merge(full(3))
    assert total == full(5)


def test_whatever_is_counted_by_service_is_forgotten_with_it() -> None:
    counters = full(2)
    counters.keep_only({})
    left = {each.name for each in fields(Counters) if getattr(counters, each.name) in ({}, 0)}
    assert left == {each.name for each in fields(Counters) if each.metadata.get("service_of")}
    queues = {each.name for each in fields(Counters) if each.name.startswith("queue")}
    assert left == {"services", "retries", "retries_refused", "rate_limited", *queues}


def test_the_counts_of_services_that_are_gone_are_forgotten_and_nothing_else() -> None:
    counters = Counters()
    for service in ("stays.example", "gone.example", ""):
        counters.exchange_done(service, b"GET", 200, 0.5)
        counters.retries[service, "stale"] += 1
        counters.retries_refused[service] += 1
    counters.bytes_in = 10
    counters.keep_only({"stays.example": object(), "unused.example": object()})
    assert set(counters.services) == {"stays.example", ""}
    assert set(counters.retries) == {("stays.example", "stale"), ("", "stale")}
    assert set(counters.retries_refused) == {"stays.example", ""}
    assert counters.bytes_in == 10
    counters.exchange_done("gone.example", b"GET", 200, 0.5)
    assert counters.services["gone.example"].by_status() == {("GET", 200): 1}


def test_who_waited_in_a_queue_is_counted_by_service_and_by_how_long_that_was() -> None:
    counters = Counters()
    counters.queued["app.example"] = 2
    counters.queue_left("app.example", 0.001)
    assert counters.queued == {"app.example": 1}
    counters.queue_left("app.example", 61.0)
    assert counters.queued == {}
    assert counters.queue_seconds == {"app.example": 61.001}
    assert counters.queue_durations() == {"app.example": [1, *[0] * (len(DURATION_BUCKETS) - 1), 1]}


def test_who_leaves_the_queue_of_a_service_that_was_forgotten_leaves_no_number_below_zero() -> None:
    counters = Counters()
    counters.queued["gone.example"] += 1
    counters.queue_refused["gone.example", "queue_full"] += 1
    counters.queue_refused["stays.example", "queue_full"] += 1
    counters.keep_only({"stays.example": object()})
    counters.queue_left("gone.example", 0.5)
    assert counters.queued == {}
    assert counters.queue_refused == {("stays.example", "queue_full"): 1}
