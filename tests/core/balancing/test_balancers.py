"""All services of one worker: who needs a policy, and for how long."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from portero_py.core.balancing.balancers import Balancers
from portero_py.core.health import Health
from portero_py.core.model import Lease, LeaseState, Service
from portero_py.core.routing_table import RoutingTable
from tests.core.balancing.fleet import HEAD, Busy, lease, service


def balancers_of_a_worker(start: int = 0) -> Balancers:
    return Balancers(Busy(), Health(), start)


def pick(balancers: Balancers, of: Service, now: float = 0.0, excluded: Collection[str] = ()) -> Lease | None:
    return balancers.pick(of, now, excluded, HEAD)


def test_each_service_has_its_own_turns() -> None:
    balancers = balancers_of_a_worker(start=1)
    one = service("A", "B")
    other = service("A", "B", name="other.example")
    picked = [pick(balancers, of) for of in (one, other, one, other)]
    assert [lease.instance_id for lease in picked if lease] == ["B", "B", "A", "A"]
    assert pick(balancers, one, 0.0, {lease.instance_id for lease in one.leases}) is None


def test_a_single_lease_that_drains_is_not_picked() -> None:
    draining = replace(lease("A"), state=LeaseState.DRAINING)
    assert pick(balancers_of_a_worker(), service(draining)) is None


def test_a_single_lease_is_picked_without_a_policy() -> None:
    balancers = balancers_of_a_worker(start=1)
    alone = service(lease("A", expires_at=10.0))
    [a] = alone.leases
    assert [pick(balancers, alone, 9.9), pick(balancers, alone, 9.9)] == [a, a]
    assert pick(balancers, alone, 10.0) is None
    assert pick(balancers, alone, 9.9, {a.instance_id}) is None
    assert pick(balancers, alone, 9.9, {"B"}) == a
    assert pick(balancers, service(), 9.9) is None
    assert len(balancers) == 0


def test_turns_begin_with_the_second_lease_and_outlive_its_absence() -> None:
    balancers = balancers_of_a_worker()

    def picked(of: Service, count: int) -> str:
        return "".join(found.instance_id for _ in range(count) if (found := pick(balancers, of)))

    assert picked(service("A"), 2) == "AA"
    assert picked(service("A", "B", "C"), 4) == "ABCA"
    assert picked(service("B"), 2) == "BB"
    assert picked(service("A", "B", "C"), 3) == "BCA"


def test_the_policies_of_vanished_services_are_forgotten() -> None:
    balancers = balancers_of_a_worker()
    names = [f"{number}.example" for number in range(5)]
    for name in names:
        pick(balancers, service("A", "B", name=name))
    kept = {name: Service(name, ()) for name in names[:2]}
    balancers.retain(RoutingTable(1, {name: Service(name, ()) for name in names}))
    assert len(balancers) == 5
    balancers.retain(RoutingTable(2, kept))
    assert len(balancers) == 2
