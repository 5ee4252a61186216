"""The routing table: an immutable, versioned snapshot of what the data plane needs.

The registry makes a new one at every change; whoever holds an old one goes on using it unharmed.
Nobody mutates a table after it was built: `services` is typed as a Mapping for that reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from portero_py.core.model import Service
from portero_py.core.routes import NO_ROUTES, Routes


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """`services` maps a normalised name ("app.example", "*.example.com") to its service.

    `version` grows by one with every change. `default_service` names the service that takes requests
    whose host no other service matches, or "". `routes` go before names.

    `changed` names the services in which it differs from the table of version `since`: for those who pass on
    differences. It is only a hint; `since` is -1 when nobody knows.
    """

    version: int = 0
    services: Mapping[str, Service] = field(default_factory=lambda: MappingProxyType({}))
    default_service: str = ""
    since: int = field(default=-1, compare=False, repr=False)
    changed: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    routes: Routes = NO_ROUTES
