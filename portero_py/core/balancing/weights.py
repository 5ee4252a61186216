"""How much each backend of a service is to get: its weight, and less while it warms up (slow start).

A backend that has just become READY, or that was ejected until now, has cold caches and few connections. With
`slow_start` seconds it begins with FIRST_SHARE of its weight, which grows evenly until it has all of it. What
counts is the proportion to the others: of backends that began together none is slow, and the only one takes
all.

When somebody was let in again is kept here until he is warm: his mark is forgotten before (`core/health`).

Nearly always nobody warms up. Then `is_warming` is False, and a policy goes by `Lease.weight` alone. Whoever
asks for weights while it is True calls `look` when `look_at` has come.
"""

from __future__ import annotations

import math
from typing import Final

from portero_py.core.health import Health
from portero_py.core.model import Lease, Service

#: Of its weight, what a backend begins with.
FIRST_SHARE: Final = 0.1
#: Seconds between two looks for somebody who is ejected, and comes back.
LOOK_AGAIN: Final = 1.0


class Weights:
    """Those of one service in one worker."""

    __slots__ = ("_health", "_returned", "_service", "_slow_start", "is_warming", "look_at")

    def __init__(self, health: Health) -> None:
        self._health = health
        self._service: Service | None = None
        self._slow_start = 0.0
        self._returned: dict[str, float] = {}  # instance id -> when it was let in again, if it is not warm
        self.is_warming = False
        self.look_at = math.inf

    def follow(self, service: Service, now: float) -> None:
        """Another Service object says what there is."""
        policy = service.policy
        self._service = service
        self._slow_start = 0.0 if policy is None else policy.slow_start
        if self._slow_start or self.is_warming:
            self.look(now)

    def look(self, now: float) -> None:
        """See whether anybody warms up, or will when he comes back."""
        service, slow_start = self._service, self._slow_start
        self.is_warming = False
        if service is None or not slow_start:
            self._returned = {}
            return
        returned = {}
        warm_at = -math.inf
        for lease in service.leases:
            if now < lease.serves_until:
                began = self._began(lease)
                warm_at = max(warm_at, began + slow_start)
                if lease.since < began and now < began + slow_start:
                    returned[lease.instance_id] = began
        self._returned = returned
        if service.name in self._health.ejected:
            self.is_warming = True
            self.look_at = now + LOOK_AGAIN
        elif now < warm_at:
            self.is_warming = True
            self.look_at = warm_at

    def of(self, lease: Lease, now: float) -> float:
        """The weight of `lease` as it is now."""
        age, slow_start = now - self._began(lease), self._slow_start
        if age >= slow_start:
            return float(lease.weight)
        return lease.weight * (FIRST_SHARE + (1 - FIRST_SHARE) * max(age, 0.0) / slow_start)

    # Private

    def _began(self, lease: Lease) -> float:
        """When it became what it is: READY, or let in again."""
        began = lease.since
        if self._returned:
            began = max(began, self._returned.get(lease.instance_id, began))
        mark = self._health.of(lease) if self._health.marks else None
        return began if mark is None else max(began, mark.returned_at)
