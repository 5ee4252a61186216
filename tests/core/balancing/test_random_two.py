"""Of two drawn by lot the one that has less to do."""

from __future__ import annotations

from collections import Counter

import pytest

from portero_py.core.balancing.random_two import RandomTwo
from portero_py.core.health import Health
from tests.core.balancing.fleet import Busy, lease, pick, service, turns


def random_two(start: int = 0, **claims: int) -> RandomTwo:
    return RandomTwo(start, Busy(**claims), Health())


def test_without_load_everybody_has_the_same() -> None:
    counts = Counter(turns(random_two(), service(*"ABCDEFGHIJ"), 10_000))
    assert all(900 < counts[name] < 1100 for name in "ABCDEFGHIJ")


@pytest.mark.parametrize("weight", [2, 9, 100])
def test_without_load_everybody_has_turns_by_weight(weight: int) -> None:
    of = service(lease("A", weight=weight), lease("B"), lease("C"))
    counts = Counter(turns(random_two(), of, 10_000))
    assert counts["A"] / 10_000 == pytest.approx(weight / (weight + 2), abs=0.02)
    assert counts["B"] == pytest.approx(counts["C"], rel=0.3)


def test_of_two_the_less_loaded_is_picked_always() -> None:
    assert turns(random_two(A=1), service("A", "B"), 100) == "B" * 100
    assert turns(random_two(A=3, B=1), service(lease("A", weight=4), "B"), 100) == "A" * 100


def test_the_most_loaded_of_many_is_never_picked() -> None:
    counts = Counter(turns(random_two(A=5, B=4, C=4), service(*"ABCDEF"), 3000))
    assert counts["A"] == 0
    assert counts["D"] > 2 * counts["B"] > 0


def test_the_few_who_are_left_of_many_are_found() -> None:
    policy = random_two()
    of = service(*(str(number) for number in range(200)))
    passed = {str(number) for number in range(198)}
    found = Counter(each.instance_id for _ in range(100) if (each := pick(policy, of, 0.0, passed)))
    assert set(found) == {"198", "199"}
    assert pick(policy, of, 0.0, passed | {"198", "199"}) is None


def test_workers_and_services_draw_other_lots() -> None:
    four = service(*"ABCD")
    assert len({turns(random_two(start), four, 30) for start in range(8)}) == 8
    assert turns(random_two(), four, 30) != turns(random_two(), service(*"ABCD", name="b.example"), 30)


def test_lots_go_on_after_a_renewal() -> None:
    policy, again = random_two(), random_two()
    renewed = "".join(turns(policy, service(*"ABCD"), 1) for _ in range(30))
    assert renewed == turns(again, service(*"ABCD"), 30)
