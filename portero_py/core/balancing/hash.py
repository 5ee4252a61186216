"""Hash: requests of one key (a header field, a cookie, the path, the host) go to one backend.

The key meets its backend by `rendezvous`: a backend less moves its own keys only. A request without a key
(no such field, an empty one) has a turn instead.

Bounded load (Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing with Bounded Loads", 2018): nobody holds
more than BOUND times his fair share of the service's claims, so that one key that everybody asks for cannot
take its backend down; what is over goes to whom the key meets next, always the same one. Somebody is always
below his bound. Claims and shares are those of this worker, shares are by weight, and who is passed over has
neither. The first FREE claims of a backend are free: with few requests at a time the fair share of one of ten
backends is a part of a request, and the six that a browser sends at once for one page would be spread over
six backends for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Final

from portero_py.core.balancing.policy import Claims
from portero_py.core.balancing.rendezvous import Rendezvous, number_of
from portero_py.core.balancing.round_robin import RoundRobin
from portero_py.core.health import Health
from portero_py.core.model import Lease, Service
from portero_py.wire.cookies import Cookie
from portero_py.wire.message import RequestHead

#: The most of its fair share that a backend may hold.
BOUND: Final = 1.25
#: Claims of a backend that are not bounded.
FREE: Final = 8

_NOTHING: Final = 0
_HEADER: Final = 1
_COOKIE: Final = 2
_PATH: Final = 3
_HOST: Final = 4


class Hash(Rendezvous):
    """The keys of one service in one worker."""

    __slots__ = ("_cookie", "_kind", "_laden", "_name", "_turns")

    def __init__(self, start: int, claims: Claims, health: Health) -> None:
        super().__init__(start, claims, health)
        self._turns = RoundRobin(start, claims, health)
        self._laden = _Laden()
        self._kind = _NOTHING
        self._name = b""
        self._cookie = Cookie(b"")

    def pick(
        self,
        service: Service,
        now: float,
        passed: Container[str],
        head: RequestHead,
        retry: bool,
        client: str = "",
    ) -> Lease | None:
        """The backend of the key that `head` has; see `Policy.pick`."""
        if service is not self._service:
            self.follow(service, now)
            self._read_terms(service)
        key = self._key(head)
        if not key:
            return self._turns.pick(service, now, passed, head, retry)
        number = number_of(key)
        lease = self.meet(number, now, passed)
        if lease is None or self.claims.claims_of(lease) < FREE or not self._is_laden(lease, now, passed):
            return lease
        return self.meet(number, now, self._laden)

    def expect_return(self, now: float) -> None:
        """See `Policy.expect_return`: so do those who have a turn."""
        super().expect_return(now)
        self._turns.expect_return(now)

    # Private

    def _read_terms(self, service: Service) -> None:
        kind, _, name = ("" if service.policy is None else service.policy.hash_on).partition(":")
        self._name = name.encode("utf-8")
        if kind == "header" and name.lower() == "host":
            kind = "host"
        if kind == "header":
            self._kind = _HEADER
            self._name = self._name.lower()
        elif kind == "cookie":
            self._kind = _COOKIE
            self._cookie = Cookie(self._name)
        elif kind == "path":
            self._kind = _PATH
        else:
            self._kind = _HOST if kind == "host" else _NOTHING

    def _key(self, head: RequestHead) -> bytes:
        kind, wanted = self._kind, self._name
        if kind == _HEADER:
            for name, value in head.fields:
                if len(name) == len(wanted) and name.lower() == wanted:
                    return value
            return b""
        if kind == _COOKIE:
            return self._cookie.value(head.fields)
        if kind == _PATH:
            return head.target.partition(b"?")[0]
        return head.authority.lower() if kind == _HOST else b""

    def _is_laden(self, lease: Lease, now: float, passed: Container[str]) -> bool:
        """Whether one claim more is too much for `lease`. If so, `_laden` has all of whom that is true."""
        weights, claims, laden = self.weights, self.claims, self._laden
        warming = weights.is_warming
        total = 1
        total_weight = 0.0
        for each in self._leases:
            if now < each.serves_until and each.instance_id not in passed:
                total += claims.claims_of(each)
                total_weight += weights.of(each, now) if warming else each.weight
        share = BOUND * total / total_weight
        own = weights.of(lease, now) if warming else lease.weight
        if claims.claims_of(lease) < math.ceil(share * own):
            return False
        laden.passed = passed
        laden.names.clear()
        for each in self._leases:
            own = weights.of(each, now) if warming else each.weight
            if claims.claims_of(each) >= max(math.ceil(share * own), FREE):
                laden.names.add(each.instance_id)
        return True


class _Laden:
    """Who is passed over, and who has too much to do already."""

    __slots__ = ("names", "passed")

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.passed: Container[str] = ()

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self.names or instance_id in self.passed
