"""Slow start: who has just come gets little at first, in every policy that goes by weights."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest

from portero_py.core.balancing.balancers import Balancers
from portero_py.core.balancing.weights import FIRST_SHARE, LOOK_AGAIN, Weights
from portero_py.core.health import Failure, Health
from portero_py.core.model import Service
from portero_py.core.policies import ServicePolicy
from portero_py.wire.message import RequestHead
from tests.core.balancing.fleet import Busy, lease, service

ALL = ("round-robin", "least-requests", "random-two", "hash")


def slow(balance: str = "round-robin", seconds: float = 30.0) -> ServicePolicy:
    return ServicePolicy(balance=balance, hash_on="path", slow_start=seconds)


def shares(balancers: Balancers, of: Service, now: float, picks: int = 2000) -> dict[str, float]:
    """Of requests for as many paths, who gets what part."""
    counts: Counter[str] = Counter()
    for number in range(picks):
        head = RequestHead(b"GET", b"/%d" % number, b"app.example", b"1.1", [])
        found = balancers.pick(of, now, (), head)
        counts[found.instance_id if found else "-"] += 1
    return {name: count / picks for name, count in counts.items()}


@pytest.mark.parametrize("balance", ALL)
def test_who_comes_begins_with_a_part_and_ends_with_all_of_its_weight(balance: str) -> None:
    balancers = Balancers(Busy(), Health())
    of = service("A", lease("B", since=50.0), policy=slow(balance))
    for age, weight in ((0, 0.1), (15, 0.55), (29.9, 1.0), (30, 1.0), (40, 1.0)):
        assert shares(balancers, of, 50.0 + age)["B"] == pytest.approx(weight / (1 + weight), abs=0.04)


@pytest.mark.parametrize("balance", ALL)
def test_with_unequal_weights_too(balance: str) -> None:
    balancers = Balancers(Busy(), Health())
    of = service("A", lease("B", since=50.0, weight=4), policy=slow(balance))
    for age, weight in ((0, 0.4), (15, 2.2), (31, 4.0)):
        assert shares(balancers, of, 50.0 + age)["B"] == pytest.approx(weight / (1 + weight), abs=0.04)


@pytest.mark.parametrize("balance", ALL)
def test_those_who_began_together_are_not_slow(balance: str) -> None:
    balancers = Balancers(Busy(), Health())
    of = service(*(lease(name, since=50.0) for name in "ABCD"), policy=slow(balance))
    found = shares(balancers, of, 50.0)
    assert set(found) == set("ABCD")
    assert all(part == pytest.approx(0.25, abs=0.04) for part in found.values())


@pytest.mark.parametrize("balance", ALL)
def test_who_is_the_only_one_left_takes_all(balance: str) -> None:
    balancers = Balancers(Busy(), Health())
    of = service(lease("A", expires_at=60.0), lease("B", since=59.0), policy=slow(balance))
    assert shares(balancers, of, 60.0, 50) == {"B": 1.0}


@pytest.mark.parametrize("balance", ALL)
def test_who_was_ejected_warms_up_when_it_is_let_in_again(balance: str) -> None:
    health = Health()
    health.configure(1, 2.0, ())
    balancers = Balancers(Busy(), health)
    of = service("A", "B", policy=slow(balance, 10.0))
    b = of.leases[1]
    assert shares(balancers, of, 20.0)["B"] == pytest.approx(0.5, abs=0.04)
    assert health.failed(b, of, Failure.PROMPT, "refused", began=20.0, now=20.0).pause
    assert shares(balancers, of, 20.0 + LOOK_AGAIN / 2) == {"A": 1.0}
    trial = health.begin_trial(b, 22.0)
    assert trial is not None
    health.succeeded(b, 22.0)
    assert shares(balancers, of, 22.0)["B"] == pytest.approx(0.1 / 1.1, abs=0.04)
    assert shares(balancers, of, 27.0)["B"] == pytest.approx(0.55 / 1.55, abs=0.04)
    assert shares(balancers, of, 32.0)["B"] == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("is_quiet", [False, True])
@pytest.mark.parametrize("balance", ALL)
def test_who_is_let_in_again_warms_up_for_longer_than_its_failures_are_remembered(
    balance: str, is_quiet: bool
) -> None:
    """Whether its neighbour goes on being ejected all the time or not."""
    health = Health()
    health.configure(1, 2.0, ())
    balancers = Balancers(Busy(), health)
    of = service(*(lease(name, expires_at=1e9) for name in "ABCD"), policy=slow(balance, 1000.0))
    _, b, c, _ = of.leases
    for each in (b, c):
        assert health.failed(each, of, Failure.PROMPT, "refused", began=2000.0, now=2000.0).pause
    shares(balancers, of, 2000.5, 10)
    for each in (b, c) if is_quiet else (b,):
        assert health.begin_trial(each, 2002.0)
        health.succeeded(each, 2002.0)
    for now in range(2002, 2502, 2):
        shares(balancers, of, now, 2)
        health.succeeded(b, now)
    assert health.of(b) is None
    others = 2.55 if is_quiet else 3.0  # who is due for its trial counts
    assert shares(balancers, of, 2502.0)["B"] == pytest.approx(0.55 / (others + 0.55), abs=0.04)


@pytest.mark.parametrize("balance", ["hash", "source"])
def test_requests_without_a_key_spare_who_is_let_in_again(balance: str) -> None:
    health = Health()
    health.configure(1, 2.0, ())
    balancers = Balancers(Busy(), health)
    of = service("A", "B", policy=ServicePolicy(balance=balance, hash_on="header:x-user", slow_start=10.0))
    shares(balancers, of, 20.0, 10)
    b = of.leases[1]
    health.failed(b, of, Failure.PROMPT, "refused", began=20.0, now=20.0)
    assert shares(balancers, of, 20.5, 10) == {"A": 1.0}
    assert health.begin_trial(b, 22.0)
    health.succeeded(b, 22.0)
    assert shares(balancers, of, 22.0)["B"] == pytest.approx(0.1 / 1.1, abs=0.04)


@pytest.mark.parametrize("balance", ALL)
def test_retries_spare_who_is_let_in_again(balance: str) -> None:
    health = Health()
    health.configure(1, 2.0, ())
    balancers = Balancers(Busy(), health)
    of = service("A", "B", policy=slow(balance, 10.0))
    counts: Counter[str] = Counter()

    def retries(now: float, picks: int) -> None:
        counts.clear()
        for number in range(picks):
            head = RequestHead(b"GET", b"/%d" % number, b"app.example", b"1.1", [])
            found = balancers.pick(of, now, (), head, True)
            counts[found.instance_id if found else "-"] += 1

    retries(20.0, 10)
    b = of.leases[1]
    health.failed(b, of, Failure.PROMPT, "refused", began=20.0, now=20.0)
    shares(balancers, of, 20.5, 10)
    assert health.begin_trial(b, 22.0)
    health.succeeded(b, 22.0)
    retries(22.0, 1000)
    assert counts["B"] == pytest.approx(90, abs=40)


def test_an_ejected_one_that_does_not_come_back_is_looked_for_again() -> None:
    health = Health()
    health.configure(1, 2.0, ())
    weights = Weights(health)
    of = service("A", "B", policy=slow(seconds=10.0))
    weights.follow(of, 20.0)
    assert not weights.is_warming
    health.failed(of.leases[1], of, Failure.PROMPT, "refused", began=20.0, now=20.0)
    weights.look(20.0)
    assert (weights.is_warming, weights.look_at) == (True, 20.0 + LOOK_AGAIN)
    weights.look(21.0)
    assert (weights.is_warming, weights.look_at) == (True, 21.0 + LOOK_AGAIN)


def test_without_slow_start_nobody_warms_up() -> None:
    weights = Weights(Health())
    weights.look(50.0)
    weights.follow(service(lease("A", since=50.0), policy=ServicePolicy()), 50.0)
    assert (weights.is_warming, weights.look_at) == (False, math.inf)


def test_when_it_is_switched_off_who_warms_up_is_warm() -> None:
    weights = Weights(Health())
    of = service("A", lease("B", since=50.0), policy=slow())
    weights.follow(of, 50.0)
    assert weights.is_warming
    assert weights.of(of.leases[1], 50.0) == FIRST_SHARE
    weights.follow(replace(of, policy=None), 51.0)
    assert not weights.is_warming


def test_a_clock_that_was_another_one_makes_nobody_slower_than_a_beginner() -> None:
    weights = Weights(Health())
    of = service(lease("A", since=1e6), policy=slow())
    weights.follow(of, 50.0)
    assert weights.of(of.leases[0], 50.0) == FIRST_SHARE


def test_turns_go_on_in_their_order_when_all_are_warm() -> None:
    balancers = Balancers(Busy(), Health())
    of = service("A", "B", lease("C", since=50.0), policy=slow())
    shares(balancers, of, 60.0, 100)
    found = [balancers.pick(of, 81.0, (), RequestHead(b"GET", b"/", b"", b"1.1", [])) for _ in range(6)]
    assert [each.instance_id for each in found if each] == list("ABCABC")
