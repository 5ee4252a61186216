"""How many requests a service takes: of each client, of each value of a header, or of all together.

How they are counted, by all workers together, is in `core/rate_limit`; here is who counts as one:
- a client is its address (`peer.client`), or its network of 64 bits when that is IPv6, as for the limits of
  connections;
- requests without the header that is the key count as those of one more client: who leaves it out does not
  get away.
Whoever is refused hears after how many seconds there is room again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from portero_py.core.limits import client_of
from portero_py.core.rate_limit import SECOND, Buckets, Limiter, take
from portero_py.errors import TooManyRequests
from portero_py.proxy.endpoints import Gated
from portero_py.proxy.gates.gate import Asking, Gate
from portero_py.proxy.refusals import RATE_LIMIT, Refusals

if TYPE_CHECKING:
    from portero_py.core.counters import Counters
    from portero_py.core.policies import RateLimit
    from portero_py.wire.message import RequestHead

#: Networks of IPv6 clients that are remembered.
MAX_KNOWN: Final = 4096


class RateLimits(Gate):
    """All limits of one service."""

    __slots__ = ("_counters", "_limiters", "_networks", "_refusals", "_service")

    def __init__(
        self,
        service: str,
        limits: tuple[RateLimit, ...],
        buckets: Buckets,
        counters: Counters,
        refusals: Refusals,
    ) -> None:
        self._service = service
        self._limiters = [Limiter(service, limit, buckets) for limit in dict.fromkeys(limits)]
        self._counters = counters
        self._refusals = refusals
        self._networks: dict[str, str] = {}

    def admit(self, exchange: Gated, now: float) -> Asking | None:
        """Charge the request to all limits, or raise `TooManyRequests`."""
        head = exchange.head
        keys: list[str | bytes] = []
        for limiter in self._limiters:
            if limiter.is_of_clients:
                address = exchange.peer.client(head.forwarded)
                keys.append(self._network(address) if ":" in address else address)
            elif limiter.field:
                keys.append(_value(head, limiter.field))
            else:
                keys.append("")
        wait = take(self._limiters, keys, int(now * SECOND))
        if wait:
            self._counters.rate_limited[self._service] += 1
            self._refusals.count(RATE_LIMIT, self._service)
            raise TooManyRequests("too many requests: come back later", -(-wait // SECOND))
        return None

    # Private

    def _network(self, address: str) -> str:
        network = self._networks.get(address)
        if network is None:
            if len(self._networks) >= MAX_KNOWN:
                self._networks.clear()
            network = self._networks[address] = client_of(address)
        return network


# Private


def _value(head: RequestHead, name: bytes) -> bytes:
    """All that a request says under a name; b"" when it does not."""
    if name == b"host":
        return head.authority.lower()
    return b",".join([value for field, value in head.fields if field.lower() == name])
