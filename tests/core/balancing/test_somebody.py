"""Whoever is asked, whatever has happened: somebody is picked while anybody can be."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portero_py.core.balancing.balancers import POLICIES, Balancers
from portero_py.core.balancing.choice import ORDER
from portero_py.core.health import Failure, Health
from portero_py.core.model import Backend, Lease, LeaseState, Service
from portero_py.core.policies import ServicePolicy
from portero_py.wire.message import RequestHead
from tests.core.balancing.fleet import Busy

_NAMES = "abcde"


@st.composite
def _leases(draw: st.DrawFn) -> tuple[Lease, ...]:
    names = draw(st.permutations(_NAMES))[: draw(st.integers(1, 5))]
    return tuple(
        Lease(
            "app.example",
            name,
            Backend(name, draw(st.sampled_from([80, 81]))),
            draw(st.sampled_from([5.0, 100.0, 100.0])),
            30,
            draw(st.sampled_from([1, 1, 3, 1000])),
            state=draw(st.sampled_from(LeaseState)),
            since=draw(st.sampled_from([-50.0, 0.0, 9.0, 1e9])),
            max_in_flight=draw(st.sampled_from([0, 0, 1, 2])),
        )
        for name in names
    )


_STEP = st.one_of(
    st.tuples(st.just("table"), _leases()),
    st.tuples(st.just("fails"), st.sampled_from(_NAMES)),
    st.tuples(st.just("answers"), st.sampled_from(_NAMES)),
    st.tuples(st.just("waits"), st.sampled_from([0.1, 1.0, 30.0])),
    st.tuples(st.just("claims"), st.dictionaries(st.sampled_from(_NAMES), st.integers(0, 30))),
    st.tuples(st.just("picks"), st.sets(st.sampled_from(_NAMES), max_size=3)),
    st.tuples(st.just("balance"), st.sampled_from(sorted(POLICIES))),
)


@pytest.mark.parametrize("balance", sorted(POLICIES))
@pytest.mark.parametrize("slow_start", [0.0, 20.0])
@settings(max_examples=40, deadline=None)
@given(first=_leases(), steps=st.lists(_STEP, max_size=25))
def test_somebody_is_picked_while_anybody_can_be(
    balance: str, slow_start: float, first: tuple[Lease, ...], steps: list[tuple[str, object]]
) -> None:
    health = Health()
    health.configure(1, 2.0, ())
    busy = Busy()
    balancers = Balancers(busy, health)
    policy = ServicePolicy(balance=balance, hash_on="header:x-user", slow_start=slow_start)
    service = Service("app.example", first, policy=policy)
    now = 0.0

    def check(excluded: set[str], retry: bool, user: bytes) -> None:
        head = RequestHead(b"GET", b"/", b"app.example", b"1.1", [(b"X-User", user)])
        picked = balancers.pick(service, now, excluded, head, retry, "192.0.2.1" if user else "")
        able = [
            lease for lease in service.leases if lease.can_serve(now) and lease.instance_id not in excluded
        ]
        if picked is not None:
            assert picked in able
            assert busy.has_room(picked)
        elif any(busy.has_room(lease) for lease in able):
            # Only as long as somebody better is full.
            best = min(ORDER.index(lease.state) for lease in able)
            assert any(ORDER.index(lease.state) == best and not busy.has_room(lease) for lease in able)

    for what, value in [*steps, ("picks", set())]:
        if what == "table":
            service = Service("app.example", value, policy=policy)  # type: ignore[arg-type]
        elif what == "balance":
            policy = ServicePolicy(balance=str(value), hash_on="header:x-user", slow_start=slow_start)
            service = Service("app.example", service.leases, policy=policy)
        elif what in ("fails", "answers"):
            for lease in service.leases:
                if lease.instance_id == value:
                    if what == "fails":
                        trial = health.begin_trial(lease, now)
                        health.failed(lease, service, Failure.PROMPT, "no", began=now, now=now, trial=trial)
                    else:
                        health.succeeded(lease, now)
        elif what == "waits":
            now += float(str(value))
        elif what == "claims":
            busy.claims = value  # type: ignore[assignment]
        else:
            for user in (b"", b"someone", b"x" * 70_000):
                check(value, False, user)  # type: ignore[arg-type]
                check(value, True, user)  # type: ignore[arg-type]
