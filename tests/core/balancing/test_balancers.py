"""All services of one worker: who needs a policy, and for how long."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from portero_py.core.balancing.balancers import Balancers
from portero_py.core.health import Health
from portero_py.core.model import Lease, LeaseState, Service
from portero_py.core.policies import ServicePolicy
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


def test_a_service_is_balanced_by_its_own_policy_and_by_another_one_when_that_changes() -> None:
    balancers = balancers_of_a_worker()
    by_path = service(*"ABCDE", policy=ServicePolicy(balance="hash", hash_on="path"))
    plain, other = service(*"ABCDE"), service("A", "B", name="other.example")
    assert pick(balancers, other) == other.leases[0]
    home = pick(balancers, by_path)
    assert [pick(balancers, by_path) for _ in range(5)] == [home] * 5
    turns = [found.instance_id for _ in range(5) if (found := pick(balancers, plain))]
    assert turns == list("ABCDE")
    assert pick(balancers, by_path) == home
    assert pick(balancers, other) == other.leases[1]  # whose turns have nothing to do with it


def test_turns_outlive_a_policy_that_says_the_same() -> None:
    balancers = balancers_of_a_worker()

    def picked(policy: ServicePolicy | None) -> str:
        found = pick(balancers, service("A", "B", "C", policy=policy))
        return found.instance_id if found else "-"

    policies = [ServicePolicy(), None, ServicePolicy(body_bytes=7), ServicePolicy(slow_start=1.0)]
    assert [picked(policy) for policy in policies] == list("ABCA")
