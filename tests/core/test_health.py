"""A worker's own marks: what they outlive, and what ends them."""

from __future__ import annotations

from dataclasses import replace

from portero_py.core.health import Health
from portero_py.core.model import Backend, Lease, Service
from portero_py.core.routing_table import RoutingTable


def lease(name: str, *, service: str = "app.example", port: int = 80) -> Lease:
    return Lease(service, name, Backend(f"host-{name}", port), 100.0, 30)


def table(*leases: Lease) -> RoutingTable:
    names = {each.service for each in leases}
    return RoutingTable(
        1, {name: Service(name, tuple(each for each in leases if each.service == name)) for name in names}
    )


def failures(health: Health, of: Lease) -> int:
    mark = health.of(of)
    return 0 if mark is None else mark.failures


def test_failures_are_counted_in_a_row_for_each_backend_of_each_service() -> None:
    health = Health()
    a, b, other = lease("A"), lease("B"), lease("A", service="other.example")
    health.failed(a)
    assert health.failed(a).failures == 2
    health.failed(b)
    assert [failures(health, each) for each in (a, b, other)] == [2, 1, 0]
    assert len(health) == 2


def test_a_success_ends_the_mark_and_nobody_elses() -> None:
    health = Health()
    a, b = lease("A"), lease("B")
    health.failed(a)
    health.failed(b)
    for each in (a, a, lease("C"), lease("A", service="other.example")):
        health.succeeded(each)
    assert [failures(health, each) for each in (a, b)] == [0, 1]
    health.succeeded(b)
    assert len(health) == 0
    assert health.failed(a).failures == 1


def test_a_mark_outlives_renewals_and_new_tables() -> None:
    health = Health()
    health.failed(lease("A"))
    renewed = replace(lease("A"), expires_at=200.0, weight=3)
    for _ in range(3):
        health.retain(table(renewed, lease("B")))
    assert failures(health, renewed) == 1


def test_who_comes_back_at_another_address_begins_anew() -> None:
    health = Health()
    health.failed(lease("A"))
    moved = lease("A", port=81)
    assert failures(health, moved) == 0
    assert health.failed(moved).failures == 1
    assert failures(health, lease("A")) == 0


def test_whoever_the_table_does_not_have_is_forgotten() -> None:
    health = Health()
    stays, left, moved, gone = lease("A"), lease("B"), lease("C"), lease("D", service="gone.example")
    for each in (stays, left, moved, gone):
        health.failed(each)
    now = table(stays, lease("C", port=81), lease("E"))
    health.retain(now)
    assert [failures(health, each) for each in (stays, left, moved, gone)] == [1, 0, 0, 0]
    assert len(health) == 1
    health.retain(RoutingTable(2))
    assert len(health) == 0
