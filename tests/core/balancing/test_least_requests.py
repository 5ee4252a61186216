"""Who has the least to do, and whose turn it is among equals."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from portero_py.core.balancing.least_requests import LeastRequests
from portero_py.core.health import Health
from tests.core.balancing.fleet import Busy, lease, pick, service, turns


def least_requests(start: int = 0, **claims: int) -> LeastRequests:
    return LeastRequests(start, Busy(**claims), Health())


def test_the_one_with_the_fewest_claims_is_picked() -> None:
    assert turns(least_requests(A=3, B=1, C=2), service("A", "B", "C"), 3) == "BBB"


def test_claims_count_by_weight() -> None:
    of = service(lease("A", weight=4), lease("B"))
    assert turns(least_requests(A=3, B=1), of, 2) == "AA"
    assert turns(least_requests(A=5, B=1), of, 2) == "BB"


def test_equals_take_turns_each_worker_from_another_one_on() -> None:
    three = service("A", "B", "C")
    assert [turns(least_requests(start), three, 6) for start in range(4)] == [
        *("ABCABC", "BCABCA", "CABCAB", "ABCABC"),
    ]
    assert turns(least_requests(B=1), three, 4) == "ACAC"


def test_equals_of_unequal_weight_take_turns_by_weight() -> None:
    of = service(lease("A", weight=5), lease("B"), lease("C"))
    assert turns(least_requests(), of, 14) == "AABACAA" * 2


def test_a_retry_takes_nobody_a_turn() -> None:
    policy = least_requests()
    three = service("A", "B", "C")
    assert turns(policy, three, 1) == "A"
    picked = [pick(policy, three, 0.0, {"A"}, retry=True) for _ in range(4)]
    assert [each.instance_id for each in picked if each] == list("BCBC")
    assert turns(policy, three, 3) == "BCA"


def test_turns_outlive_a_renewal_and_a_change() -> None:
    policy = least_requests()
    picked = ""
    for _ in range(6):
        picked += turns(policy, service("A", "B", "C"), 1)
    assert picked == "ABCABC"
    assert Counter(turns(policy, service("A", "C", "D"), 30)) == {"A": 10, "C": 10, "D": 10}


@given(st.dictionaries(st.sampled_from("ABCDEF"), st.integers(1, 9), min_size=1), st.integers(0, 7))
def test_under_load_claims_are_held_in_proportion_to_weights(weights: dict[str, int], start: int) -> None:
    policy = least_requests(start)
    of = service(*(lease(name, weight=weight) for name, weight in weights.items()))
    busy = policy.claims
    assert isinstance(busy, Busy)
    busy.claims = dict.fromkeys(weights, 0)
    for _ in range(20 * sum(weights.values())):
        found = pick(policy, of)
        assert found is not None
        busy.claims[found.instance_id] += 1
    assert all(abs(busy.claims[name] - 20 * weight) <= weight for name, weight in weights.items())


@given(st.dictionaries(st.sampled_from("ABCDEF"), st.integers(1, 9), min_size=1), st.integers(0, 7))
def test_without_load_everybody_has_turns_by_weight(weights: dict[str, int], start: int) -> None:
    of = service(*(lease(name, weight=weight) for name, weight in weights.items()))
    counts = Counter(turns(least_requests(start), of, 10 * sum(weights.values())))
    assert all(abs(counts[name] - 10 * weight) <= 1 for name, weight in weights.items())
