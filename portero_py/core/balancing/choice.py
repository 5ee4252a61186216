"""The order of choice, the same in every policy: who is tried before whom.

    ready and not ejected
    else ready
    else starting
    else down

Draining never, expired never (`Lease.serves_until`), and nobody who has failed this very exchange. Within
one of these tiers the service's policy chooses; there is nobody only when there is nothing to try.

The rules
- Limits: who has no room is passed over, and a tier whose backends are all full ends the search. An exchange
  that could wait for a good backend is not sent to a bad one.
- An ejected backend whose pause is over has its turn among those that are not ejected: that is its trial. A
  retry is no trial, it has had bad luck already.
- Here is who is not plain: a service of which some backend is not READY, is limited or is ejected. What can
  be said of a Service object is said once; who is ejected or full is asked when a policy asks for it, so a
  pick does not look at all of 1,000 leases because one is ejected.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Final

from portero_py.core.balancing.policy import Claims, Policy
from portero_py.core.health import Health, Mark
from portero_py.core.model import Lease, LeaseState, Service
from portero_py.wire.message import RequestHead

#: The states in which a backend is tried, the best first.
ORDER: Final = (LeaseState.READY, LeaseState.STARTING, LeaseState.DOWN)

_NOBODY: Final[frozenset[str]] = frozenset()


def goes_before(service: Service, state: LeaseState, now: float) -> bool:
    """Whether somebody of the service is in a better state than this one."""
    rank = ORDER.index(state)
    return any(lease.state in ORDER[:rank] and now < lease.serves_until for lease in service.leases)


class PassedOver:
    """Whom a policy passes over in one tier, by instance id. One object serves all picks of a service."""

    __slots__ = ("claims", "ejected", "excluded", "leases", "now", "others", "retry")

    def __init__(self, claims: Claims) -> None:
        self.claims = claims
        # service
        self.leases: dict[str, Lease] = {}  # when there are limits
        # exchange
        self.excluded: Container[str] = _NOBODY
        self.now = 0.0
        self.retry = False
        # tier
        self.others: frozenset[str] = _NOBODY  # who belongs to another one
        self.ejected: dict[str, Mark] | None = None

    def __contains__(self, instance_id: object) -> bool:
        if self.is_out(instance_id):
            return True
        return bool(self.leases) and not self.claims.has_room(self.leases[str(instance_id)])

    def is_out(self, instance_id: object) -> bool:
        """Whether it is passed over for another reason than that it is full."""
        if instance_id in self.excluded or instance_id in self.others:
            return True
        if self.ejected is None:
            return False
        mark = self.ejected.get(str(instance_id))
        return mark is not None and (self.retry or not mark.is_due(self.now))


class Choice:
    """The tiers of one service that is not plain."""

    __slots__ = ("_health", "_passed", "_service", "_tiers")

    def __init__(self, claims: Claims, health: Health) -> None:
        self._health = health
        self._passed = PassedOver(claims)
        self._service: Service | None = None
        self._tiers: list[frozenset[str]] = []  # who does not belong to it, for each state that somebody has

    def pick(
        self,
        policy: Policy,
        service: Service,
        now: float,
        excluded: Container[str],
        head: RequestHead,
        retry: bool,
        client: str = "",
    ) -> Lease | None:
        """As `Policy.pick`, over the tiers; None also when the best of them is full."""
        if service is not self._service:
            self._follow(service, now)
        passed = self._passed
        passed.excluded, passed.now, passed.retry = excluded, now, retry
        passed.ejected = None  # what an earlier pick saw may not be in force any more
        ejected = self._health.ejected.get(service.name)
        if ejected is not None:  # hence somebody is READY, and that tier is the first
            passed.ejected, passed.others = ejected, self._tiers[0]
            if service.policy is not None and service.policy.slow_start:
                policy.expect_return(now)
            lease = policy.pick(service, now, passed, head, retry, client)
            if lease is not None or self._is_full(service, now):
                return lease
            passed.ejected = None
        for others in self._tiers:
            passed.others = others
            lease = policy.pick(service, now, passed, head, retry, client)
            if lease is not None or self._is_full(service, now):
                return lease
        return None

    # Private

    def _is_full(self, service: Service, now: float) -> bool:
        """Whether this tier, which has nobody, has somebody who lacks room only."""
        passed = self._passed
        return service.is_limited and any(
            now < lease.serves_until and not passed.is_out(lease.instance_id) for lease in service.leases
        )

    def _follow(self, service: Service, now: float) -> None:
        self._service = service
        self._health.follow(service, now)
        leases = service.leases
        self._passed.leases = {lease.instance_id: lease for lease in leases} if service.is_limited else {}
        if service.is_even:
            self._tiers = [_NOBODY]
            return
        self._tiers = [
            frozenset([lease.instance_id for lease in leases if lease.state is not state])
            for state in ORDER
            if any(lease.state is state for lease in leases)
        ]
