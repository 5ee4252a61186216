"""All services' balancers of one worker: service -> backend.

With one lease there is nothing to choose, hence no policy: of thousands of services most have one, and a
queue of turns for each is 1 KB of memory that a request would have to fetch from far away. A policy is made
when a service has its second lease, and outlives a time with fewer. Most services are plain, too: all of
their backends are READY and well, and without limits. Who goes before whom (`choice`) is asked for the
others only.

A policy is made anew when its service is given another one, by configuration: nothing else of the service is
forgotten then.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from portero_py.core.balancing.choice import Choice, goes_before
from portero_py.core.balancing.hash import Hash
from portero_py.core.balancing.least_requests import LeastRequests
from portero_py.core.balancing.policy import Claims, Policy
from portero_py.core.balancing.random_two import RandomTwo
from portero_py.core.balancing.round_robin import RoundRobin
from portero_py.core.balancing.source import Source
from portero_py.core.health import Health
from portero_py.core.model import Lease, LeaseState, Service
from portero_py.core.routing_table import RoutingTable
from portero_py.wire.message import RequestHead

#: Every policy under its name.
POLICIES: Final[Mapping[str, type[Policy]]] = {
    "round-robin": RoundRobin,
    "least-requests": LeastRequests,
    "random-two": RandomTwo,
    "source": Source,
    "hash": Hash,
}

#: Those that ask for the client's address.
BY_CLIENT: Final = frozenset({"source"})

_READY: Final = LeaseState.READY


class Balancers:
    """The policies of all services of one worker that have, or had, several leases.

    `claims` and `health` are what the worker knows of backends, `start` is another number in each worker;
    `policy` names the one by which services are balanced that have no policy of their own.
    """

    __slots__ = ("_choices", "_claims", "_ejected", "_health", "_policies", "_policy", "_start")

    def __init__(self, claims: Claims, health: Health, start: int = 0, policy: str = "round-robin") -> None:
        self._claims = claims
        self._health = health
        self._ejected = health.ejected
        self._start = start
        self._policy = POLICIES[policy]
        self._policies: dict[str, Policy] = {}
        self._choices: dict[str, Choice] = {}  # of those that have a policy, and are or were not plain

    def __len__(self) -> int:
        return len(self._policies)

    def pick(
        self,
        service: Service,
        now: float,
        excluded: Collection[str],
        head: RequestHead,
        retry: bool = False,
        client: str = "",
    ) -> Lease | None:
        """As `Policy.pick`, for any service: the best of those that are not `excluded`, by `choice`.

        None also when who could take it has no room: `would_serve` tells. 0.2 µs with 100 leases of equal
        weight.
        """
        if len(service.leases) > 1:
            policy = self._policies.get(service.name)
            if policy is None or policy.terms is not service.policy:
                policy = self._made_for(service, policy)
            if service.is_plain and (not self._ejected or service.name not in self._ejected):
                return policy.pick(service, now, excluded, head, retry, client)
            choice = self._choices.get(service.name)
            if choice is None:
                choice = self._choices[service.name] = Choice(self._claims, self._health)
            return choice.pick(policy, service, now, excluded, head, retry, client)
        for lease in service.leases:  # one or none
            if (
                now < lease.serves_until
                and (not excluded or lease.instance_id not in excluded)
                and (not lease.max_in_flight or self._claims.has_room(lease))
            ):
                return lease
        return None

    def may_stay(
        self, service: Service, lease: Lease, now: float, excluded: Collection[str], retry: bool
    ) -> bool:
        """Whether an exchange that belongs to `lease` may go there: nobody goes before it, by `choice`.

        Whether there is room for it is another question.
        """
        if now >= lease.serves_until or lease.instance_id in excluded:
            return False
        mark = self._ejected.get(service.name, {}).get(lease.instance_id)
        if mark is not None and (retry or not mark.is_due(now)) and mark.is_of(lease):
            return False
        return lease.state is _READY or not goes_before(service, lease.state, now)

    def would_serve(self, service: Service, now: float, excluded: Collection[str]) -> bool:
        """Whether there is somebody to try, if only he had room."""
        return any(now < each.serves_until and each.instance_id not in excluded for each in service.leases)

    def retain(self, table: RoutingTable) -> None:
        """Forget the policies of services that `table` does not have, once they outnumber its services.

        Call it when the table is swapped: it costs nothing then, because a swap comes with every renewal.
        """
        services = table.services
        if len(self._policies) > len(services):
            self._policies = {name: kept for name, kept in self._policies.items() if name in services}
            self._choices = {name: kept for name, kept in self._choices.items() if name in services}

    # Private

    def _made_for(self, service: Service, former: Policy | None) -> Policy:
        """The policy that a service's terms ask for: `former`, if it is that one."""
        made = self._policy if service.policy is None else POLICIES[service.policy.balance]
        policy = former if type(former) is made else made(self._start, self._claims, self._health)
        policy.terms = service.policy
        self._policies[service.name] = policy
        return policy
