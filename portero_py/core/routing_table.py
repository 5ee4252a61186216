"""The routing table: an immutable, versioned snapshot of what the data plane needs.

The registry makes a new one at every change; whoever holds an old one goes on using it unharmed.
Nobody mutates a table after it was built: `services` is typed as a Mapping for that reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from portero_py.core.model import Service


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """`services` maps a normalised name ("app.example", "*.example.com") to its service.

    `version` grows by one with every change. `default_service` names the service that takes requests
    whose host no other service matches, or "".
    """

    version: int = 0
    services: Mapping[str, Service] = field(default_factory=lambda: MappingProxyType({}))
    default_service: str = ""
