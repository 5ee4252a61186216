"""Unequal backends under load, by a clock of our own: who looks at claims makes clients wait less."""

from __future__ import annotations

import heapq

import pytest

from portero_py.core.balancing.balancers import POLICIES
from portero_py.core.health import Health
from portero_py.core.model import Service
from tests.core.balancing.fleet import Busy, lease, pick, service


def mean_wait(name: str, of: Service, seconds: dict[str, float], *, rate: float, requests: int) -> float:
    """Requests come evenly, `rate` a second; each backend serves one at a time, in order of arrival.

    Returns how long one takes, on average, until it is served.
    """
    busy = Busy()
    busy.claims = dict.fromkeys(seconds, 0)
    policy = POLICIES[name](0, busy, Health())
    free_at = dict.fromkeys(seconds, 0.0)
    under_way: list[tuple[float, str]] = []
    total = 0.0
    for number in range(requests):
        now = number / rate
        while under_way and under_way[0][0] <= now:
            busy.claims[heapq.heappop(under_way)[1]] -= 1
        found = pick(policy, of, now)
        assert found is not None
        who = found.instance_id
        busy.claims[who] += 1
        free_at[who] = max(free_at[who], now) + seconds[who]
        heapq.heappush(under_way, (free_at[who], who))
        total += free_at[who] - now
    return total / requests


@pytest.mark.parametrize("name", ["least-requests", "random-two"])
def test_a_backend_that_is_five_times_slower_costs_less_than_with_turns(name: str) -> None:
    of = service(*(lease(who, expires_at=1e9) for who in "ABCDE"))
    seconds = {**dict.fromkeys("ABCD", 0.010), "E": 0.050}
    waits = {each: mean_wait(each, of, seconds, rate=300, requests=6000) for each in ("round-robin", name)}
    # 60 a second are 3 times what E can do: by turns its queue grows without end.
    assert waits[name] < 0.05
    assert waits[name] < waits["round-robin"] / 20


@pytest.mark.parametrize("name", ["least-requests", "random-two"])
def test_the_same_where_turns_would_do(name: str) -> None:
    of = service(*(lease(who, expires_at=1e9) for who in "ABCDE"))
    seconds = {**dict.fromkeys("ABCD", 0.010), "E": 0.050}
    by_turns = mean_wait("round-robin", of, seconds, rate=95, requests=6000)
    assert mean_wait(name, of, seconds, rate=95, requests=6000) <= by_turns
