"""The contract, held against every policy of the table, and against one that only stands here.

`FewestClaims` shows what a new policy takes: one class, and a row.
"""

from __future__ import annotations

from collections.abc import Container

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portero_py.core.balancing.balancers import POLICIES, Balancers
from portero_py.core.balancing.policy import Claims, Policy
from portero_py.core.health import Failure, Health
from portero_py.core.model import Lease, Service
from portero_py.wire.message import RequestHead
from tests.core.balancing.fleet import HEAD, Busy, lease, pick, service, turns


class FewestClaims(Policy):
    """Whoever has the least to do, those that failed lately after the others; of equals the first."""

    __slots__ = ()

    def pick(
        self,
        service: Service,
        now: float,
        passed: Container[str],
        head: RequestHead,
        retry: bool,
        client: str = "",
    ) -> Lease | None:
        best: Lease | None = None
        least = 0
        for each in service.leases:
            if now < each.serves_until and each.instance_id not in passed:
                load = self.claims.claims_of(each) + (1000 if self.health.of(each) else 0)
                if best is None or load < least:
                    best, least = each, load
        return best


class ByTarget(Policy):
    """Whoever stands at the place that the request's target says."""

    __slots__ = ()

    def pick(
        self,
        service: Service,
        now: float,
        passed: Container[str],
        head: RequestHead,
        retry: bool,
        client: str = "",
    ) -> Lease | None:
        there = [
            each for each in service.leases if now < each.serves_until and each.instance_id not in passed
        ]
        return there[len(head.target) % len(there)] if there else None


KNOWN: dict[str, type[Policy]] = {**POLICIES, "fewest-claims": FewestClaims, "by-target": ByTarget}


@pytest.fixture(params=KNOWN)
def policy(request: pytest.FixtureRequest) -> Policy:
    name: str = request.param
    return KNOWN[name](0, Busy(A=1), Health())


class TestEveryPolicy:
    def test_picks_a_lease_of_the_service(self, policy: Policy) -> None:
        three = service("A", "B", "C")
        for _ in range(7):
            assert pick(policy, three) in three.leases

    def test_has_nobody_when_there_is_nobody(self, policy: Policy) -> None:
        assert pick(policy, service()) is None

    def test_picks_among_the_leases_that_there_are_now(self, policy: Policy) -> None:
        pick(policy, service("A", "B", "C"))
        moved = service(lease("A", port=81), lease("D", port=81))
        assert {picked.backend.port for _ in range(4) if (picked := pick(policy, moved))} == {81}

    @pytest.mark.parametrize("weight", [1, 5])
    def test_finds_the_last_one_that_serves(self, policy: Policy, weight: int) -> None:
        three = service(lease("A", expires_at=10.0, weight=weight), lease("B"), lease("C"))
        assert turns(policy, three, 3, now=10.0).count("A") == 0
        assert [pick(policy, three, 10.0, {"B"}) for _ in range(3)] == [three.leases[2]] * 3
        assert pick(policy, three, 10.0, ["B", "C"]) is None
        assert pick(policy, three, 100.0) is None

    @settings(deadline=None, max_examples=50)
    @given(
        st.lists(
            st.tuples(st.sampled_from("ABCDEF"), st.integers(1, 3), st.integers(0, 2)),
            unique_by=lambda t: t[0],
        ),
        st.sets(st.sampled_from("ABCDEF")),
    )
    @pytest.mark.parametrize("name", KNOWN)
    def test_has_somebody_exactly_when_somebody_is_left(
        self, name: str, fleet: list[tuple[str, int, int]], excluded: set[str]
    ) -> None:
        policy = KNOWN[name](0, Busy(A=3), Health())
        of = service(*(lease(who, weight=weight, expires_at=end) for who, weight, end in fleet))
        left = [each for each in of.leases if each.expires_at > 1 and each.instance_id not in excluded]
        picked = pick(policy, of, 1.0, excluded)
        assert picked in left if left else picked is None


def test_a_new_policy_is_a_class_and_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "fewest-claims", FewestClaims)
    claims, health = Busy(A=2, B=1, C=3), Health()
    balancers = Balancers(claims, health, policy="fewest-claims")
    three = service("A", "B", "C")

    def picked() -> str:
        found = balancers.pick(three, 0.0, (), HEAD)
        return found.instance_id if found else "-"

    assert picked() == "B"
    claims.claims["B"] = 4
    assert picked() == "A"
    health.failed(three.leases[0], three, Failure.PROMPT, "refused", began=0.0, now=0.0)
    assert picked() == "C"


def test_a_policy_may_decide_by_the_request() -> None:
    policy = ByTarget(0, Busy(), Health())
    two = service("A", "B")
    heads = [RequestHead(b"GET", target, b"app.example", b"1.1", []) for target in (b"/", b"/a", b"/ab")]
    assert [policy.pick(two, 0.0, (), head, False) for head in heads] == [
        two.leases[1],
        two.leases[0],
        two.leases[1],
    ]


def test_the_contract_alone_chooses_and_counts_nothing() -> None:
    with pytest.raises(NotImplementedError):
        pick(Policy(0, Busy(), Health()), service("A", "B"))
    with pytest.raises(NotImplementedError):
        Claims().claims_of(lease("A"))
    with pytest.raises(NotImplementedError):
        Claims().has_room(lease("A"))
