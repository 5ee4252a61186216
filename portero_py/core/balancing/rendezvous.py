"""Rendezvous hashing: the same key meets the same backend, in every worker, on every node, after a restart.

Each backend draws a lot for a key, which follows from the two alone, and the highest takes it (Thaler and
Ravishankar, "Using name-based mappings to increase hit rates", 1998). When a backend leaves, only its own
keys move, each to whoever has the second highest lot; when one joins, it takes its share from all others
alike. Weights bend the lots so that each backend gets exactly its share (ln(lot) / weight, Schindelhauer and
Schomaker, "Weighted distributed hash tables", 2005); a weight that grows (`weights`) only ever takes keys.

Why not a ring, or Maglev's table: both look a key up faster, but are made anew when a backend comes, goes,
changes its weight or warms up, and fleets here do that all the time. A ring of 1,000 backends is 160,000
points, 80 ms of everybody's time; this keeps one number for each backend. A pick looks at all of them, with a
few multiplications each.

Lots are made of 31 bits, by two rounds of what MurmurHash ends with: products of two such numbers stay within
what the compiled build computes without making objects.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Container
from typing import Final
from zlib import crc32

from portero_py.core.balancing.policy import Claims, Policy
from portero_py.core.health import Health
from portero_py.core.model import Lease, Service

_BITS: Final = 0x7FFFFFFF


def number_of(key: bytes) -> int:
    """Of a key what its lots are made of, the same everywhere."""
    return crc32(key) & _BITS


class Rendezvous(Policy):
    """The backends of one service, and the lots that they draw. A subclass says what the key is."""

    __slots__ = ("_known", "_leases", "_seeds", "_service", "_uneven")

    def __init__(self, start: int, claims: Claims, health: Health) -> None:
        super().__init__(start, claims, health)
        self._service: Service | None = None
        self._leases: tuple[Lease, ...] = ()
        self._seeds: list[int] = []  # of each lease
        self._known: dict[str, int] = {}  # the same by instance id
        self._uneven = False

    def follow(self, service: Service, now: float) -> None:
        """Another Service object says what there is: to be called before `meet`."""
        former = self._known
        self._service = service
        self._leases = service.leases
        self._known = {
            lease.instance_id: former.get(lease.instance_id) or _seed(lease) for lease in service.leases
        }
        self._seeds = list(self._known.values())
        self._uneven = len({lease.weight for lease in service.leases}) > 1
        self.weights.follow(service, now)

    def meet(self, number: int, now: float, passed: Container[str]) -> Lease | None:
        """Whom the key of this number meets, of those who serve and are not passed over."""
        weights = self.weights
        if weights.is_warming and now >= weights.look_at:
            weights.look(now)
        if self._uneven or weights.is_warming:
            return self._meet_by_weight(number, now, passed)
        leases = self._leases
        best: Lease | None = None
        highest = -1
        for place, seed in enumerate(self._seeds):
            lot = number ^ seed
            lot = ((lot ^ (lot >> 15)) * 0x5BD1E995) & _BITS
            lot = ((lot ^ (lot >> 13)) * 0x27D4EB2F) & _BITS
            lot ^= lot >> 16
            if lot > highest:
                lease = leases[place]
                if now < lease.serves_until and (not passed or lease.instance_id not in passed):
                    best, highest = lease, lot
        return best

    # Private

    def _meet_by_weight(self, number: int, now: float, passed: Container[str]) -> Lease | None:
        weights = self.weights
        warming = weights.is_warming
        best: Lease | None = None
        highest = -math.inf
        for place, seed in enumerate(self._seeds):
            lot = number ^ seed
            lot = ((lot ^ (lot >> 15)) * 0x5BD1E995) & _BITS
            lot = ((lot ^ (lot >> 13)) * 0x27D4EB2F) & _BITS
            lot ^= lot >> 16
            lease = self._leases[place]
            weight = weights.of(lease, now) if warming else lease.weight
            bent = math.log((lot + 1) / (_BITS + 1)) / weight
            if bent > highest and now < lease.serves_until and lease.instance_id not in passed:
                best, highest = lease, bent
        return best


def _seed(lease: Lease) -> int:
    digest = hashlib.blake2b(lease.instance_id.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & _BITS
