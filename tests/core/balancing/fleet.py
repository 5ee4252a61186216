"""Leases, services and a worker's knowledge, for the tests of policies."""

from __future__ import annotations

from collections.abc import Collection

from portero_py.core.balancing.policy import Claims, Policy
from portero_py.core.model import Backend, Lease, Service
from portero_py.core.policies import ServicePolicy
from portero_py.wire.message import RequestHead

HEAD = RequestHead(b"GET", b"/", b"app.example", b"1.1", [])


class Busy(Claims):
    """Claims by the backend's name; who is not named is idle."""

    def __init__(self, **claims: int) -> None:
        self.claims = claims

    def claims_of(self, lease: Lease) -> int:
        return self.claims.get(lease.backend.host, 0)

    def has_room(self, lease: Lease) -> bool:
        return not lease.max_in_flight or self.claims_of(lease) < lease.max_in_flight


def lease(
    name: str, *, expires_at: float = 100.0, weight: int = 1, port: int = 80, since: float = 0.0
) -> Lease:
    return Lease("app.example", name, Backend(name, port), expires_at, 30, weight, since=since)


def service(*leases: Lease | str, name: str = "app.example", policy: ServicePolicy | None = None) -> Service:
    return Service(name, tuple(lease(one) if isinstance(one, str) else one for one in leases), policy=policy)


def pick(
    policy: Policy,
    of: Service,
    now: float = 0.0,
    passed: Collection[str] = (),
    *,
    retry: bool = False,
    client: str = "",
) -> Lease | None:
    return policy.pick(of, now, passed, HEAD, retry, client)


def turns(policy: Policy, of: Service, count: int, now: float = 0.0) -> str:
    """Who is picked, one after the other; "-" is nobody."""
    picked = [pick(policy, of, now) for _ in range(count)]
    return "".join("-" if one is None else one.instance_id for one in picked)
