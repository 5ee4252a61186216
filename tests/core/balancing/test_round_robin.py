"""Whose turn it is, while backends come and go."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from portero_py.core.balancing.round_robin import RoundRobin
from portero_py.core.health import Health
from portero_py.core.model import LeaseState
from tests.core.balancing.fleet import Busy, lease, pick, service, turns


def round_robin(start: int = 0) -> RoundRobin:
    return RoundRobin(start, Busy(), Health())


def test_everybody_has_one_turn_a_round() -> None:
    assert turns(round_robin(), service("A", "B", "C"), 7) == "ABCABCA"


def test_a_service_without_leases_has_nobody() -> None:
    assert pick(round_robin(), service()) is None


def test_who_joins_has_his_first_turn_after_all_others() -> None:
    policy = round_robin()
    assert turns(policy, service("A", "B", "C"), 2) == "AB"
    assert turns(policy, service("A", "B", "C", "D"), 8) == "CABDCABD"


def test_who_leaves_gives_nobody_a_double_turn() -> None:
    policy = round_robin()
    assert turns(policy, service("A", "B", "C", "D"), 2) == "AB"
    assert turns(policy, service("B", "C", "D"), 6) == "CDBCDB"
    assert turns(policy, service("C", "D"), 3) == "CDC"


def test_a_renewal_keeps_its_place_also_at_a_new_address() -> None:
    policy = round_robin()
    assert turns(policy, service("A", "B"), 1) == "A"
    moved = service(lease("A", port=81), lease("B", port=82))
    assert turns(policy, moved, 3) == "BAB"
    picked = pick(policy, moved)
    assert picked is not None
    assert picked.backend.port == 81


def test_an_expired_lease_gets_nothing_although_it_is_still_in_the_table() -> None:
    policy = round_robin()
    both = service(lease("A", expires_at=10.0), lease("B", expires_at=20.0))
    assert turns(policy, both, 2, now=9.9) == "AB"
    assert turns(policy, both, 3, now=10.0) == "BBB"
    assert turns(policy, both, 1, now=20.0) == "-"


def test_who_drains_is_passed_over_alone_or_among_others() -> None:
    draining = replace(lease("A"), state=LeaseState.DRAINING)
    assert turns(round_robin(), service(draining, "B"), 3) == "BBB"
    assert turns(round_robin(), service(draining, lease("B", weight=2)), 3) == "BBB"


def test_an_excluded_backend_is_passed_over() -> None:
    policy = round_robin()
    both = service("A", "B")
    a, b = both.leases
    assert [pick(policy, both, 0.0, {a.instance_id}) for _ in range(3)] == [b, b, b]
    assert pick(policy, both, 0.0, [a.instance_id, b.instance_id]) is None
    assert pick(policy, both) is not None


def test_the_first_round_starts_where_the_worker_is_told_to() -> None:
    three = service("A", "B", "C")
    assert [turns(round_robin(start), three, 3) for start in range(4)] == ["ABC", "BCA", "CAB", "ABC"]


def test_weights_are_mixed_smoothly() -> None:
    weighted = service(lease("A", weight=5), lease("B"), lease("C"))
    assert turns(round_robin(), weighted, 14) == "AABACAA" * 2


def test_equal_weights_are_plain_round_robin_whatever_they_are() -> None:
    assert turns(round_robin(), service(lease("A", weight=7), lease("B", weight=7)), 4) == "ABAB"


def test_with_weights_too_the_expired_and_the_excluded_are_passed_over() -> None:
    policy = round_robin()
    weighted = service(lease("A", weight=5, expires_at=10.0), lease("B", weight=2), lease("C"))
    _, b, c = weighted.leases
    assert turns(policy, weighted, 6, now=10.0) == "BCBBCB"
    assert pick(policy, weighted, 10.0, {b.instance_id}) == c
    assert pick(policy, weighted, 10.0, {b.instance_id, c.instance_id}) is None


def test_credit_outlives_a_renewal() -> None:
    policy = round_robin()
    picked = ""
    for _ in range(14):  # a new Service object before every pick
        picked += turns(policy, service(lease("A", weight=5), lease("B"), lease("C")), 1)
    assert picked == "AABACAA" * 2


def test_weights_may_become_unequal_and_equal_again() -> None:
    policy = round_robin()
    assert turns(policy, service("A", "B"), 2) == "AB"
    assert Counter(turns(policy, service(lease("A", weight=3), lease("B")), 8)) == {"A": 6, "B": 2}
    assert Counter(turns(policy, service("A", "B"), 4)) == {"A": 2, "B": 2}


def test_credit_from_other_weights_starves_nobody() -> None:
    policy = round_robin()
    assert turns(policy, service(lease("A", weight=1000), lease("B", weight=1)), 500) == "A" * 500
    after = turns(policy, service(lease("A", weight=2), lease("B", weight=1)), 6)
    assert Counter(after) == {"A": 4, "B": 2}


def test_a_small_weight_has_its_turns_although_the_others_change_before_each_pick() -> None:
    policy = round_robin()
    picked = ""
    for number in range(400):
        stable = [lease(name, weight=49) for name in ("AC", "AD")[number % 2]]
        picked += turns(policy, service(lease("B"), *stable), 1)
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
    policy = round_robin()
    for former, count in earlier:
        turns(policy, service(*(lease(name, weight=weight) for name, weight in former.items())), count)
    after = service(*(lease(name, weight=weight) for name, weight in weights.items()))
    picked = Counter(turns(policy, after, sum(weights.values())))
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
    policy = round_robin()
    many = service(*(str(number) for number in range(1000)))
    turns(policy, many, 300)
    CountingClock.looks = 0
    excluded: set[str] = set()
    while (found := pick(policy, many, CountingClock(0.0), excluded, retry=bool(excluded))) is not None:
        excluded.add(found.instance_id)
    assert len(excluded) == 1000
    assert (
        CountingClock.looks == 1001 + 1000
    )  # the first one stands among the retries too; the last looks at all


@given(st.sets(st.sampled_from("ABCDEFGHIJ"), max_size=9), st.integers(0, 3))
def test_those_that_can_be_reached_have_equal_shares_whoever_cannot(dead: set[str], start: int) -> None:
    policy = round_robin(start)
    ten = service(*"ABCDEFGHIJ")
    served: Counter[str] = Counter()
    for _ in range(20 * 10):
        excluded: set[str] = set()
        while True:
            found = pick(policy, ten, 0.0, excluded, retry=bool(excluded))
            assert found is not None
            if found.instance_id not in dead:
                break
            excluded.add(found.instance_id)
        served[found.instance_id] += 1
    assert max(served.values()) - min(served.values()) <= 1  # of the retries; the first tries are even
    assert set(served) == set("ABCDEFGHIJ") - dead


@settings(deadline=None)
@given(st.lists(st.sets(st.sampled_from("ABCDEFG"), min_size=1), min_size=1))
def test_whatever_comes_and_goes_nobody_gets_a_second_turn_before_all_who_stayed_had_one(
    rounds: list[set[str]],
) -> None:
    policy = round_robin()
    waiting: dict[str, int] = {}  # turns of others since one's own
    for names in rounds:
        waiting = {name: waiting.get(name, 0) for name in names}
        picked = turns(policy, service(*sorted(names)), 1)
        for name in names:
            waiting[name] = 0 if name == picked else waiting[name] + 1
            assert waiting[name] < 7  # there are never more than seven
