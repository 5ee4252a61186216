"""Source: a client stays with a backend, by its address.

An IPv6 client is its network of 64 bits, as for limits: its addresses change by the hour. Who stands behind
a trusted proxy is whom that says. Nobody is moved because his backend is busy: for that there is `hash`.
A client whose address nobody knows has a turn instead.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Final

from portero_py.core.balancing.policy import Claims
from portero_py.core.balancing.rendezvous import Rendezvous, number_of
from portero_py.core.balancing.round_robin import RoundRobin
from portero_py.core.health import Health
from portero_py.core.limits import client_of
from portero_py.core.model import Lease, Service
from portero_py.wire.message import RequestHead

#: Addresses whose number is remembered: that of an IPv6 address takes 3 µs.
MAX_KNOWN: Final = 4096


class Source(Rendezvous):
    """The clients of one service in one worker."""

    __slots__ = ("_numbers", "_turns")

    def __init__(self, start: int, claims: Claims, health: Health) -> None:
        super().__init__(start, claims, health)
        self._numbers: dict[str, int] = {}
        self._turns = RoundRobin(start, claims, health)

    def pick(
        self,
        service: Service,
        now: float,
        passed: Container[str],
        head: RequestHead,
        retry: bool,
        client: str = "",
    ) -> Lease | None:
        """The backend of `client`; see `Policy.pick`."""
        if not client:
            return self._turns.pick(service, now, passed, head, retry)
        if service is not self._service:
            self.follow(service, now)
        number = self._numbers.get(client)
        if number is None:
            if len(self._numbers) >= MAX_KNOWN:
                self._numbers.clear()
            number = self._numbers[client] = number_of(client_of(client).encode())
        return self.meet(number, now, passed)

    def expect_return(self, now: float) -> None:
        """See `Policy.expect_return`: so do those who have a turn."""
        super().expect_return(now)
        self._turns.expect_return(now)
