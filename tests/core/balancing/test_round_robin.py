"""Whose turn it is, while backends come and go."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from portero_py.core.balancing.round_robin import Balancer, Balancers
from portero_py.core.model import Backend, Lease, LeaseState, Service
from portero_py.core.routing_table import RoutingTable


def lease(name: str, *, expires_at: float = 100.0, weight: int = 1, port: int = 80) -> Lease:
    return Lease("app.example", name, Backend(f"host-{name}", port), expires_at, 30, weight)


def service(*leases: Lease | str) -> Service:
    return Service("app.example", tuple(lease(one) if isinstance(one, str) else one for one in leases))


def turns(balancer: Balancer, of: Service, count: int, now: float = 0.0) -> str:
    picked = [balancer.pick(of, now) for _ in range(count)]
    return "".join("-" if one is None else one.instance_id for one in picked)


def test_everybody_has_one_turn_a_round() -> None:
    assert turns(Balancer(), service("A", "B", "C"), 7) == "ABCABCA"


def test_a_service_without_leases_has_nobody() -> None:
    assert Balancer().pick(service(), 0.0) is None


def test_who_joins_has_his_first_turn_after_all_others() -> None:
    balancer = Balancer()
    assert turns(balancer, service("A", "B", "C"), 2) == "AB"
    assert turns(balancer, service("A", "B", "C", "D"), 8) == "CABDCABD"


def test_who_leaves_gives_nobody_a_double_turn() -> None:
    balancer = Balancer()
    assert turns(balancer, service("A", "B", "C", "D"), 2) == "AB"
    assert turns(balancer, service("B", "C", "D"), 6) == "CDBCDB"
    assert turns(balancer, service("C", "D"), 3) == "CDC"


def test_a_renewal_keeps_its_place_also_at_a_new_address() -> None:
    balancer = Balancer()
    assert turns(balancer, service("A", "B"), 1) == "A"
    moved = service(lease("A", port=81), lease("B", port=82))
    assert turns(balancer, moved, 3) == "BAB"
    picked = balancer.pick(moved, 0.0)
    assert picked is not None
    assert picked.backend.port == 81


def test_an_expired_lease_gets_nothing_although_it_is_still_in_the_table() -> None:
    balancer = Balancer()
    both = service(lease("A", expires_at=10.0), lease("B", expires_at=20.0))
    assert turns(balancer, both, 2, now=9.9) == "AB"
    assert turns(balancer, both, 3, now=10.0) == "BBB"
    assert turns(balancer, both, 1, now=20.0) == "-"


def test_who_drains_is_passed_over_alone_or_among_others() -> None:
    draining = replace(lease("A"), state=LeaseState.DRAINING)
    assert turns(Balancer(), service(draining, "B"), 3) == "BBB"
    assert turns(Balancer(), service(draining, lease("B", weight=2)), 3) == "BBB"
    assert Balancers().pick(service(draining), 0.0) is None


def test_an_excluded_backend_is_passed_over() -> None:
    balancer = Balancer()
    both = service("A", "B")
    a, b = both.leases
    assert [balancer.pick(both, 0.0, {a.instance_id}) for _ in range(3)] == [b, b, b]
    assert balancer.pick(both, 0.0, [a.instance_id, b.instance_id]) is None
    assert balancer.pick(both, 0.0) is not None


def test_the_first_round_starts_where_the_worker_is_told_to() -> None:
    three = service("A", "B", "C")
    assert [turns(Balancer(start), three, 3) for start in range(4)] == ["ABC", "BCA", "CAB", "ABC"]


def test_weights_are_mixed_smoothly() -> None:
    weighted = service(lease("A", weight=5), lease("B"), lease("C"))
    assert turns(Balancer(), weighted, 14) == "AABACAA" * 2


def test_equal_weights_are_plain_round_robin_whatever_they_are() -> None:
    assert turns(Balancer(), service(lease("A", weight=7), lease("B", weight=7)), 4) == "ABAB"


def test_with_weights_too_the_expired_and_the_excluded_are_passed_over() -> None:
    balancer = Balancer()
    weighted = service(lease("A", weight=5, expires_at=10.0), lease("B", weight=2), lease("C"))
    _, b, c = weighted.leases
    assert turns(balancer, weighted, 6, now=10.0) == "BCBBCB"
    assert balancer.pick(weighted, 10.0, {b.instance_id}) == c
    assert balancer.pick(weighted, 10.0, {b.instance_id, c.instance_id}) is None


def test_credit_outlives_a_renewal() -> None:
    balancer = Balancer()
    picked = ""
    for _ in range(14):  # a new Service object before every pick
        picked += turns(balancer, service(lease("A", weight=5), lease("B"), lease("C")), 1)
    assert picked == "AABACAA" * 2


def test_weights_may_become_unequal_and_equal_again() -> None:
    balancer = Balancer()
    assert turns(balancer, service("A", "B"), 2) == "AB"
    assert Counter(turns(balancer, service(lease("A", weight=3), lease("B")), 8)) == {"A": 6, "B": 2}
    assert Counter(turns(balancer, service("A", "B"), 4)) == {"A": 2, "B": 2}


def test_credit_from_other_weights_starves_nobody() -> None:
    balancer = Balancer()
    assert turns(balancer, service(lease("A", weight=1000), lease("B", weight=1)), 500) == "A" * 500
    after = turns(balancer, service(lease("A", weight=2), lease("B", weight=1)), 6)
    assert Counter(after) == {"A": 4, "B": 2}


def test_a_small_weight_has_its_turns_although_the_others_change_before_each_pick() -> None:
    balancer = Balancer()
    picked = ""
    for number in range(400):
        stable = [lease(name, weight=49) for name in ("AC", "AD")[number % 2]]
        picked += turns(balancer, service(lease("B"), *stable), 1)
    assert 4 <= picked.count("B") <= 12


def weights_of(weights: st.SearchStrategy[int]) -> st.SearchStrategy[dict[str, int]]:
    return st.dictionaries(st.sampled_from("ABCDEFGH"), weights, min_size=1)


@settings(deadline=None)
@given(
    st.lists(st.tuples(weights_of(st.sampled_from([1, 3, 400])), st.integers(0, 200)), max_size=4),
    weights_of(st.integers(1, 20)),
)
def test_after_any_change_each_has_his_share_of_the_next_round_give_or_take_one_turn(
    earlier: list[tuple[dict[str, int], int]], weights: dict[str, int]
) -> None:
    balancer = Balancer()
    for former, count in earlier:
        turns(balancer, service(*(lease(name, weight=weight) for name, weight in former.items())), count)
    after = service(*(lease(name, weight=weight) for name, weight in weights.items()))
    picked = Counter(turns(balancer, after, sum(weights.values())))
    assert {
        name: abs(picked[name] - weight) for name, weight in weights.items() if picked[name] != weight
    } == {name: 1 for name, weight in weights.items() if picked[name] != weight}


class CountingClock(float):
    """A time that counts how often it is compared with the end of a lease."""

    looks = 0

    def __lt__(self, other: float) -> bool:
        CountingClock.looks += 1
        return float(self) < other


def test_an_exchange_that_tries_all_of_many_leases_looks_at_each_about_once() -> None:
    balancer = Balancer()
    many = service(*(str(number) for number in range(1000)))
    turns(balancer, many, 300)
    CountingClock.looks = 0
    excluded: set[str] = set()
    while (found := balancer.pick(many, CountingClock(0.0), excluded)) is not None:
        excluded.add(found.instance_id)
    assert len(excluded) == 1000
    assert CountingClock.looks == 1000 + 1000  # the last pick looks at all


@given(st.sets(st.sampled_from("ABCDEFGHIJ"), max_size=9), st.integers(0, 3))
def test_those_that_can_be_reached_have_equal_shares_whoever_cannot(dead: set[str], start: int) -> None:
    balancer = Balancer(start)
    ten = service(*"ABCDEFGHIJ")
    served: Counter[str] = Counter()
    for _ in range(20 * 10):
        excluded: set[str] = set()
        while (found := balancer.pick(ten, 0.0, excluded)) is not None and found.instance_id in dead:
            excluded.add(found.instance_id)
        assert found is not None
        served[found.instance_id] += 1
    assert max(served.values()) - min(served.values()) <= 1
    assert set(served) == set("ABCDEFGHIJ") - dead


@settings(deadline=None)
@given(st.lists(st.sets(st.sampled_from("ABCDEFG"), min_size=1), min_size=1))
def test_whatever_comes_and_goes_nobody_gets_a_second_turn_before_all_who_stayed_had_one(
    rounds: list[set[str]],
) -> None:
    balancer = Balancer()
    waiting: dict[str, int] = {}  # turns of others since one's own
    for names in rounds:
        waiting = {name: waiting.get(name, 0) for name in names}
        picked = turns(balancer, service(*sorted(names)), 1)
        for name in names:
            waiting[name] = 0 if name == picked else waiting[name] + 1
            assert waiting[name] < 7  # there are never more than seven


def test_each_service_has_its_own_turns() -> None:
    balancers = Balancers(start=1)
    one = service("A", "B")
    other = Service("other.example", one.leases)
    picked = [balancers.pick(of, 0.0) for of in (one, other, one, other)]
    assert [lease.instance_id for lease in picked if lease] == ["B", "B", "A", "A"]
    assert balancers.pick(one, 0.0, {lease.instance_id for lease in one.leases}) is None


def test_a_single_lease_is_picked_without_a_balancer() -> None:
    balancers = Balancers(start=1)
    alone = service(lease("A", expires_at=10.0))
    [a] = alone.leases
    assert [balancers.pick(alone, 9.9), balancers.pick(alone, 9.9)] == [a, a]
    assert balancers.pick(alone, 10.0) is None
    assert balancers.pick(alone, 9.9, {a.instance_id}) is None
    assert balancers.pick(alone, 9.9, {"B"}) == a
    assert balancers.pick(service(), 9.9) is None
    assert len(balancers) == 0


def test_turns_begin_with_the_second_lease_and_outlive_its_absence() -> None:
    balancers = Balancers()

    def picked(of: Service, count: int) -> str:
        return "".join(found.instance_id for _ in range(count) if (found := balancers.pick(of, 0.0)))

    assert picked(service("A"), 2) == "AA"
    assert picked(service("A", "B", "C"), 4) == "ABCA"
    assert picked(service("B"), 2) == "BB"
    assert picked(service("A", "B", "C"), 3) == "BCA"


def test_the_balancers_of_vanished_services_are_forgotten() -> None:
    balancers = Balancers()
    names = [f"{number}.example" for number in range(5)]
    for name in names:
        balancers.pick(Service(name, (lease("A"), lease("B"))), 0.0)
    kept = {name: Service(name, ()) for name in names[:2]}
    balancers.retain(RoutingTable(1, {name: Service(name, ()) for name in names}))
    assert len(balancers) == 5
    balancers.retain(RoutingTable(2, kept))
    assert len(balancers) == 2
