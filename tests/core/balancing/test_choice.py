"""Who is tried before whom, in every policy; and what a retry may not take from first tries."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portero_py.core.balancing.balancers import POLICIES, Balancers
from portero_py.core.health import Failure, Health
from portero_py.core.model import Lease, LeaseState, Service
from portero_py.core.routing_table import RoutingTable
from tests.core.balancing.fleet import HEAD, Busy, lease, service
from tests.core.balancing.test_policy import FewestClaims

STARTING, READY, DOWN, DRAINING = LeaseState
KNOWN = {**POLICIES, "fewest-claims": FewestClaims}


class Fleet:
    """The balancers of a worker, and what it knows."""

    def __init__(self, policy: str = "round-robin", **claims: int) -> None:
        self.health = Health()
        self.health.configure(1, 2.0, ())
        self.claims = Busy(**claims)
        self.balancers = Balancers(self.claims, self.health, policy=policy)

    def pick(
        self, of: Service, excluded: str = "", *, now: float = 10.0, retry: bool = False
    ) -> Lease | None:
        return self.balancers.pick(of, now, set(excluded), HEAD, retry)

    def turns(self, of: Service, count: int, excluded: str = "", *, now: float = 10.0) -> str:
        picked = [self.pick(of, excluded, now=now) for _ in range(count)]
        return "".join("-" if one is None else one.instance_id for one in picked)

    def eject(self, name: str, of: Service, *, now: float = 10.0) -> None:
        [found] = [each for each in of.leases if each.instance_id == name]
        verdict = self.health.failed(found, of, Failure.PROMPT, "refused", began=now, now=now)
        assert verdict.pause


@pytest.fixture(params=KNOWN)
def fleet(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    monkeypatch.setitem(POLICIES, "fewest-claims", FewestClaims)
    return Fleet(request.param)


def in_state(name: str, state: LeaseState, *, most: int = 0, weight: int = 1) -> Lease:
    return replace(lease(name, weight=weight), state=state, max_in_flight=most)


def limited(**limits: int) -> Service:
    return service(*(replace(lease(name), max_in_flight=most) for name, most in limits.items()))


def test_ready_goes_before_starting_before_down_and_draining_never(fleet: Fleet) -> None:
    all_of_them = service(
        *(
            in_state(name, state)
            for name, state in zip("ABCD", (DRAINING, DOWN, STARTING, READY), strict=True)
        )
    )
    assert [fleet.turns(all_of_them, 2, excluded) for excluded in ("", "D", "DC", "DCB")] == [
        *("DD", "CC", "BB", "--"),
    ]


def test_who_is_ejected_comes_after_the_ready_and_before_the_others(fleet: Fleet) -> None:
    of = service("A", "B", in_state("C", STARTING))
    fleet.eject("A", of)
    assert [fleet.turns(of, 2, excluded) for excluded in ("", "B", "BA")] == ["BB", "AA", "CC"]


def test_an_ejection_in_one_service_is_nothing_to_another(fleet: Fleet) -> None:
    fleet.eject("A", service("A", "B"))
    others = tuple(replace(lease(name), service="other.example") for name in "AB")
    assert "A" in fleet.turns(Service("other.example", others), 50)


def test_who_is_due_has_its_turn_until_its_trial_begins_and_no_retry_does() -> None:
    fleet = Fleet()
    of = service("A", "B", "C")
    fleet.eject("A", of)
    assert fleet.turns(of, 4) == "BCBC"
    retries = [fleet.pick(of, "B", now=11.0, retry=True) for _ in range(4)]
    assert retries == [of.leases[2]] * 4
    assert fleet.turns(of, 1, now=11.0) == "A"
    assert fleet.health.begin_trial(of.leases[0], 11.0) is not None
    assert fleet.turns(of, 4, now=11.0) == "BCBC"
    fleet.health.succeeded(of.leases[0], 11.5)
    assert fleet.turns(of, 3, now=11.5) == "ABC"


def test_who_was_elsewhere_when_it_was_ejected_is_not_passed_over() -> None:
    fleet = Fleet()
    fleet.eject("A", service("A", "B"))
    assert fleet.turns(service(lease("A", port=81), "B"), 4) == "ABAB"


def test_who_is_full_is_passed_over_and_a_full_tier_does_not_spill_into_a_worse_one(fleet: Fleet) -> None:
    of = service(
        in_state("A", READY, most=2),
        in_state("B", READY, most=1),
        in_state("C", STARTING),
        in_state("D", DOWN),
    )
    fleet.claims.claims = {"A": 2}
    assert fleet.turns(of, 2) == "BB"
    fleet.claims.claims = {"A": 2, "B": 1}
    assert fleet.turns(of, 2) == "--"
    assert fleet.balancers.would_serve(of, 10.0, ())
    assert fleet.turns(of, 2, "A") == "--"
    assert fleet.turns(of, 2, "AB") == "CC"
    assert fleet.turns(of, 1, "ABC") == "D"
    assert not fleet.balancers.would_serve(of, 10.0, set("ABCD"))
    assert not fleet.balancers.would_serve(of, 1000.0, ())


def test_a_full_set_of_good_ones_does_not_spill_into_the_ejected(fleet: Fleet) -> None:
    of = limited(A=1, B=1)
    fleet.eject("A", of)
    assert fleet.turns(of, 2) == "BB"
    fleet.claims.claims = {"B": 1}
    assert fleet.turns(of, 2) == "--"
    assert fleet.turns(of, 2, "B") == "AA"


def test_the_only_one_has_its_limit_too_and_is_tried_in_any_state_but_one() -> None:
    fleet = Fleet(A=1)
    assert fleet.pick(limited(A=1)) is None
    assert fleet.pick(limited(A=2)) is not None
    assert [fleet.pick(service(in_state("A", state))) is not None for state in LeaseState] == [
        *(True, True, True, False),
    ]


class CountingClock(float):
    """A time that counts how often it is compared with the end of a lease."""

    looks = 0

    def __lt__(self, other: float) -> bool:
        CountingClock.looks += 1
        return float(self) < other


@pytest.mark.parametrize("state", [READY, DOWN])
def test_a_pick_does_not_look_at_all_of_a_thousand_because_of_one(state: LeaseState) -> None:
    fleet = Fleet()
    of = service(in_state("0", state), *(str(number) for number in range(1, 1000)))
    if state is READY:
        fleet.eject("0", of)
    fleet.pick(of)  # what is said once for a Service
    CountingClock.looks = 0
    picked = [fleet.pick(of, now=CountingClock(10.0)) for _ in range(1000)]
    assert of.leases[0] not in picked
    assert CountingClock.looks <= 1002


def test_what_is_known_of_a_service_is_forgotten_with_it() -> None:
    fleet = Fleet()
    of = limited(A=1, B=1)
    fleet.pick(of)
    fleet.balancers.retain(RoutingTable(1, {}))
    assert len(fleet.balancers) == 0
    assert fleet.pick(of) == of.leases[0]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("ABCDEF"),
            st.sampled_from(LeaseState),
            st.sampled_from([0, 1]),  # limit
            st.sampled_from([0, 1]),  # claims
            st.sampled_from([1, 3]),  # weight
        ),
        min_size=2,
        unique_by=lambda one: one[0],
    ),
    st.sets(st.sampled_from("ABCDEF")),
    st.sets(st.sampled_from("ABCDEF")),
    st.booleans(),
)
@pytest.mark.parametrize("policy", KNOWN)
def test_the_pick_is_one_of_the_best_tier_that_has_anybody(
    policy: str,
    fleet_of: list[tuple[str, LeaseState, int, int, int]],
    excluded: set[str],
    failed: set[str],
    retry: bool,
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(POLICIES, "fewest-claims", FewestClaims)
        fleet = Fleet(policy, **{name: claims for name, _, _, claims, _ in fleet_of})
    of = service(*(in_state(name, state, most=m, weight=w) for name, state, m, _, w in fleet_of))
    for each in of.leases:
        if each.instance_id in failed:
            fleet.health.failed(each, of, Failure.PROMPT, "refused", began=10.0, now=10.0)
    ejected = fleet.health.ejected.get("app.example", {})

    def tier(each: Lease) -> int:
        if each.state is READY:
            return 1 if each.instance_id in ejected else 0
        return {STARTING: 2, DOWN: 3}[each.state]

    there = [each for each in of.leases if each.state is not DRAINING and each.instance_id not in excluded]
    picked = fleet.pick(of, "".join(excluded), now=10.5, retry=retry)
    assert fleet.balancers.would_serve(of, 10.5, excluded) is bool(there)
    best = min((tier(each) for each in there), default=None)
    able = [each for each in there if tier(each) == best and fleet.claims.has_room(each)]
    assert picked in able if able else picked is None


# Retries


def tries(fleet: Fleet, of: Service, broken: str, exchanges: int) -> tuple[Counter[str], Counter[str]]:
    """Exchanges that try until somebody is not broken: who had the first tries, who had the retries."""
    first: Counter[str] = Counter()
    again: Counter[str] = Counter()
    for _ in range(exchanges):
        excluded = ""
        while (found := fleet.pick(of, excluded, retry=bool(excluded))) is not None:
            (again if excluded else first)[found.instance_id] += 1
            if found.instance_id not in broken:
                break
            excluded += found.instance_id
    return first, again


def test_who_refuses_has_no_more_first_tries_than_its_share() -> None:
    assert tries(Fleet(), service("A", "B"), "A", 100) == (Counter(A=50, B=50), Counter(B=50))
    first, again = tries(Fleet(), service(*"ABCDE"), "B", 100)
    assert set(first.values()) == {20}
    assert again == Counter(A=5, C=5, D=5, E=5)


def test_with_weights_too() -> None:
    of = service(lease("A", weight=5), lease("B"), lease("C"))
    first, again = tries(Fleet(), of, "A", 70)
    assert first == Counter(A=50, B=10, C=10)
    assert again == Counter(B=25, C=25)
    first, again = tries(Fleet(), of, "B", 7 * 12)
    assert first == Counter(A=60, B=12, C=12)
    assert again == Counter(A=10, C=2)


def test_retries_are_spread_evenly_when_several_refuse() -> None:
    first, again = tries(Fleet(), service(*"ABCDEF"), "AB", 60)
    assert set(first.values()) == {10}
    served = [again[name] for name in "CDEF"]
    assert sum(served) == 20
    assert max(served) - min(served) <= 1


@given(st.sets(st.sampled_from("ABCDEFGHIJ"), max_size=9))
def test_first_tries_are_even_whoever_is_broken(broken: set[str]) -> None:
    first, _ = tries(Fleet(), service(*"ABCDEFGHIJ"), "".join(broken), 30)
    assert set(first.values()) == {3}


def test_who_was_ejected_when_its_service_vanished_begins_anew_when_it_is_back() -> None:
    fleet = Fleet()
    of = limited(A=5, B=5)
    fleet.eject("A", of)
    assert fleet.turns(of, 2) == "BB"
    fleet.health.retain(RoutingTable(2, {}), 10.0)
    back = limited(A=5, B=5)
    assert sorted(fleet.turns(back, 4)) == list("AABB")
