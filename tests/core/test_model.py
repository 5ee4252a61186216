"""What may take an exchange now is said once, for every source, state and end."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from portero_py.core.model import NEVER, Backend, Halt, Lease, LeaseState, Service


def lease(
    expires_at: float = 10.0, state: LeaseState = LeaseState.READY, also: tuple[Lease, ...] = ()
) -> Lease:
    return Lease("app.example", "one", Backend("::1", 80), expires_at, 30, state=state, also=also)


def test_a_lease_serves_until_it_ends() -> None:
    assert lease().can_serve(9.999)
    assert not lease().can_serve(10.0)


def test_a_lease_without_an_end_serves_for_ever() -> None:
    assert lease(NEVER).can_serve(1e300)


@pytest.mark.parametrize("expires_at", [10.0, NEVER])
def test_who_drains_serves_nobody_though_the_lease_goes_on(expires_at: float) -> None:
    draining = lease(expires_at, LeaseState.DRAINING)
    assert not draining.can_serve(0.0)
    assert draining.serves_until == -math.inf
    assert draining.ends_at == expires_at


@pytest.mark.parametrize("state", [LeaseState.STARTING, LeaseState.READY, LeaseState.DOWN])
def test_all_others_may_be_tried(state: LeaseState) -> None:
    assert lease(10.0, state).can_serve(0.0)


def test_what_several_sources_granted_lasts_as_long_as_the_longest() -> None:
    both = lease(10.0, also=(lease(30.0), lease(20.0)))
    assert (both.expires_at, both.ends_at, both.serves_until) == (10.0, 30.0, 30.0)
    assert both.grants == (lease(10.0), lease(30.0), lease(20.0))
    assert lease().grants == (lease(),)


def test_what_follows_from_the_other_fields_changes_with_them() -> None:
    assert replace(lease(10.0), expires_at=20.0).serves_until == 20.0
    assert not replace(lease(), state=LeaseState.DRAINING).can_serve(0.0)


def test_a_service_is_paused_for_a_time_or_stopped() -> None:
    assert Halt(30.0).state == "paused"
    assert Halt(None, "back soon").state == "stopped"


def test_a_service_knows_whether_its_leases_differ_in_state_or_have_limits() -> None:
    plain = Lease("app.example", "one", Backend("::1", 1), 30.0, 30)
    starting = replace(plain, state=LeaseState.STARTING)
    limited = replace(plain, max_in_flight=3)
    found = [Service("app.example", leases) for leases in ((), (plain,), (plain, starting), (plain, limited))]
    assert [service.is_even for service in found] == [True, True, False, True]
    assert [service.is_limited for service in found] == [False, False, False, True]
