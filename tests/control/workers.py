"""A worker as control sees it, for tests of what is published and of what is in flight."""

from __future__ import annotations

import asyncio

from portero_py.core.counters import Counters
from portero_py.core.model import Backend, Standing
from portero_py.core.routing_table import RoutingTable


class Worker:
    """Remembers what it was told, and says what is in flight in it, unless it hangs."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.table = RoutingTable()
        self.tables = 0  # that it was given
        self.held: dict[tuple[str, str, int], int] = {}  # exchanges in flight, by service and address
        self.hangs = False
        self.asked: list[str] = []  # the services that it was asked about

    def apply(self, table: RoutingTable) -> None:
        self.table = table
        self.tables += 1

    def apply_certificates(self, certificates: object) -> None: ...

    def apply_challenges(self, challenges: object) -> None: ...

    def standings(self, service: str) -> list[Standing] | asyncio.Future[list[Standing]]:
        self.asked.append(service)
        if self.hangs:
            return asyncio.get_running_loop().create_future()
        return [Standing(*place, in_flight=held) for place, held in self.held.items() if held]

    def backends(self, service: str) -> list[Backend]:
        """Those of a service that its table has; none, when it has not even the service."""
        known = self.table.services.get(service)
        return [] if known is None else [lease.backend for lease in known.leases]

    def ports(self, service: str = "app.example") -> list[int]:
        return [lease.backend.port for lease in self.table.services[service].leases]

    def addresses(self, service: str = "app.example") -> list[str]:
        return [lease.backend.address for lease in self.table.services[service].leases]
