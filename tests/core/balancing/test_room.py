"""Backends at their limit are passed over, and it is known whether somebody would serve if it had room."""

from __future__ import annotations

from dataclasses import replace

import pytest

from portero_py.core.balancing.balancers import Balancers
from portero_py.core.health import Health
from portero_py.core.model import LeaseState
from tests.core.balancing.fleet import HEAD, Busy, lease, service


@pytest.mark.parametrize("names", ["A", "AB"])
@pytest.mark.parametrize("weights", [(1, 1), (2, 1)])
def test_nobody_is_picked_beyond_the_limit(names: str, weights: tuple[int, int]) -> None:
    leases = [
        replace(lease(name, weight=weight), max_in_flight=2)
        for name, weight in zip(names, weights, strict=False)
    ]
    of = service(*leases)
    claims = dict.fromkeys(names, 0)
    busy = Busy()
    busy.claims = claims
    balancers = Balancers(busy, Health())
    for _ in range(2 * len(names)):
        picked = balancers.pick(of, 0.0, (), HEAD)
        assert picked is not None
        claims[picked.backend.host] += 1
    assert claims == dict.fromkeys(names, 2)
    assert balancers.pick(of, 0.0, (), HEAD) is None
    assert balancers.would_serve(of, 0.0, ())
    assert not balancers.would_serve(of, 0.0, names)
    assert not balancers.would_serve(of, 100.0, ())


def test_who_drains_would_not_serve() -> None:
    draining = replace(lease("A"), state=LeaseState.DRAINING)
    assert not Balancers(Busy(), Health()).would_serve(service(draining), 0.0, ())
