"""Least requests: whoever has the least to do, for his weight.

The load of a backend is its claims divided by its weight. Claims are those of this worker: the others have
their own clients, who are spread evenly over the workers. Of those with the least load each has a turn, by
weight (`Turns`): at a time without load, when all are idle, this is weighted round robin, and nobody gets all
requests for standing first.

It looks at all leases. With hundreds of them `random-two` does nearly as well at a fixed price.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable

from portero_py.core.balancing.policy import Claims, Policy
from portero_py.core.balancing.weights import Weights
from portero_py.core.health import Health
from portero_py.core.model import Lease, Service
from portero_py.wire.message import RequestHead


class Turns:
    """Whose turn it is among some of a service's leases, others each time: smooth weighted round robin.

    Credit is in turns: each pick gives every candidate its share of one, and takes one from who is picked. So
    it need not be converted when weights change.
    """

    __slots__ = ("_credit",)

    def __init__(self) -> None:
        self._credit: dict[str, float] = {}  # instance id -> turns

    def keep_only(self, leases: Iterable[Lease]) -> None:
        """Forget who is gone."""
        credit = self._credit
        self._credit = {lease.instance_id: credit.get(lease.instance_id, 0.0) for lease in leases}

    def take(self, candidates: list[Lease], weights: Weights, now: float) -> Lease:
        """The one of at least one candidate whose turn it is."""
        credit, warming = self._credit, weights.is_warming
        total = 0.0
        for lease in candidates:
            total += weights.of(lease, now) if warming else lease.weight
        best = candidates[0]
        most = -math.inf
        for lease in candidates:
            weight = weights.of(lease, now) if warming else float(lease.weight)
            turns = credit[lease.instance_id] = credit[lease.instance_id] + weight / total
            if turns > most + 1e-9:  # equals take their turns in order, however sums were rounded
                best, most = lease, turns
        credit[best.instance_id] -= 1.0
        return best


class LeastRequests(Policy):
    """The loads of one service in one worker. `start` shifts the turns of equals."""

    __slots__ = ("_least", "_order", "_retries", "_service", "_turns")

    def __init__(self, start: int, claims: Claims, health: Health) -> None:
        super().__init__(start, claims, health)
        self._service: Service | None = None
        self._order: tuple[Lease, ...] = ()
        self._turns = Turns()
        self._retries = Turns()
        self._least: list[Lease] = []  # of one pick

    def pick(
        self,
        service: Service,
        now: float,
        passed: Container[str],
        head: RequestHead,
        retry: bool,
        client: str = "",
    ) -> Lease | None:
        """The least loaded, whatever is asked for; see `Policy.pick`."""
        if service is not self._service:
            self._follow(service, now)
        weights = self.weights
        if weights.is_warming and now >= weights.look_at:
            weights.look(now)
        warming = weights.is_warming
        claims = self.claims
        least = self._least
        least.clear()
        lowest = math.inf
        for lease in self._order:
            if now < lease.serves_until:
                load = claims.claims_of(lease) / (weights.of(lease, now) if warming else lease.weight)
                if load <= lowest and (not passed or lease.instance_id not in passed):
                    if load < lowest:
                        lowest = load
                        least.clear()
                    least.append(lease)
        if len(least) > 1:
            return (self._retries if retry else self._turns).take(least, weights, now)
        return least[0] if least else None

    # Private

    def _follow(self, service: Service, now: float) -> None:
        leases = service.leases
        first = self.start % len(leases) if leases else 0
        self._order = leases[first:] + leases[:first]
        self._service = service
        self.weights.follow(service, now)
        self._turns.keep_only(leases)
        self._retries.keep_only(leases)
