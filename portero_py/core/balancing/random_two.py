"""Random two: of two backends drawn by lot, the one that has less to do for its weight.

Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing" (2001): the second choice takes the
longest queue from log n / log log n down to log log n, for the price of looking at two. The price is the same
for a thousand backends, and unlike with `least-requests` several proxies that see the same idle backend do
not all run to it.

The lots are weighted, so without load everybody gets his share; the load is claims divided by weight. A lot
that falls on somebody who is passed over, or has been drawn already, is drawn again. After TRIES of them all
leases are looked at: that is when most are passed over, or one weighs more than all others together.

The lots come from a generator of our own (Park and Miller's, with the multiplier 48271): chance is not ours
to import, and each worker has another start.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container
from typing import Final
from zlib import crc32

from portero_py.core.balancing.policy import Claims, Policy
from portero_py.core.health import Health
from portero_py.core.model import Lease, Service
from portero_py.wire.message import RequestHead

#: Lots that are drawn before all leases are looked at.
TRIES: Final = 4

_MODULUS: Final = 2**31 - 1
_MULTIPLIER: Final = 48271


class RandomTwo(Policy):
    """The lots of one service in one worker. `start` makes them others than those of other workers."""

    __slots__ = ("_leases", "_lot", "_service", "_sums")

    def __init__(self, start: int, claims: Claims, health: Health) -> None:
        super().__init__(start, claims, health)
        self._service: Service | None = None
        self._leases: tuple[Lease, ...] = ()
        self._sums: list[int] = []  # of the weights up to each lease
        self._lot = 0

    def pick(
        self,
        service: Service,
        now: float,
        passed: Container[str],
        head: RequestHead,
        retry: bool,
        client: str = "",
    ) -> Lease | None:
        """The less loaded of two, whatever is asked for; see `Policy.pick`."""
        if service is not self._service:
            self._follow(service, now)
        weights = self.weights
        if weights.is_warming and now >= weights.look_at:
            weights.look(now)
        one = self._draw(now, passed, None)
        if one is None:
            return None
        other = self._draw(now, passed, one)
        if other is None:
            return one
        claims = self.claims
        load, other_load = claims.claims_of(one), claims.claims_of(other)
        if weights.is_warming:
            return one if load * weights.of(other, now) <= other_load * weights.of(one, now) else other
        return one if load * other.weight <= other_load * one.weight else other

    # Private

    def _follow(self, service: Service, now: float) -> None:
        if self._service is None:
            self._lot = (crc32(service.name.encode()) + self.start * 7919) % (_MODULUS - 1) + 1
        self._service = service
        self._leases = service.leases
        self._sums = []
        total = 0
        for lease in service.leases:
            total += lease.weight
            self._sums.append(total)
        self.weights.follow(service, now)

    def _next_lot(self) -> float:
        """A number between 0 and 1, neither of which it ever is."""
        self._lot = self._lot * _MULTIPLIER % _MODULUS
        return self._lot / _MODULUS

    def _draw(self, now: float, passed: Container[str], drawn: Lease | None) -> Lease | None:
        """Somebody who serves, is not passed over and was not drawn before; None when there is nobody."""
        leases, sums, weights = self._leases, self._sums, self.weights
        if not leases:
            return None
        total = sums[-1]
        for _ in range(TRIES):
            lease = leases[bisect_right(sums, self._next_lot() * total)]
            if (
                lease is not drawn
                and now < lease.serves_until
                and (not passed or lease.instance_id not in passed)
                and (not weights.is_warming or self._next_lot() * lease.weight < weights.of(lease, now))
            ):
                return lease
        return self._search(now, passed, drawn)

    def _search(self, now: float, passed: Container[str], drawn: Lease | None) -> Lease | None:
        """The same, by looking at everybody."""
        weights = self.weights
        there = [
            lease
            for lease in self._leases
            if lease is not drawn and now < lease.serves_until and lease.instance_id not in passed
        ]
        sums = []
        total = 0.0
        for lease in there:
            total += weights.of(lease, now) if weights.is_warming else lease.weight
            sums.append(total)
        return there[bisect_right(sums, self._next_lot() * total)] if there else None
