"""Host -> service, on the hot path.

The order: the exact name, the wildcard over its first label (`*.example.com` takes `a.example.com`, neither
`example.com` nor `a.b.example.com`), the default service. A host that is no valid name can only reach the
default service.

Routes (`core/routes`) go before all that, where an operator wrote some: they are asked by `find_route`.

The answer None means 404: nobody is known by that name. A service without leases means 503: see `registry`.

Clients send the same few authorities over and over, so each one's normalised name is remembered under its
raw bytes: two dictionary look-ups a request for an exact name. The memo does not know the table, hence
outlives every swap. Only authorities that led to a service or a route are remembered, so that
scanners cannot wash out the names in use (unless a default service takes them).

What one client leaves there for another: the name that these bytes mean, a function of nothing else.
"""

from __future__ import annotations

from typing import Final

from portero_py.core.model import Service
from portero_py.core.names import normalise_host, wildcard_over
from portero_py.core.routes import Route
from portero_py.core.routing_table import RoutingTable

#: A memo this large is 4 MB at most; when it is full it starts again.
MAX_NAMES: Final = 16_384


class Router:
    """One per worker."""

    __slots__ = ("_max_names", "_names")

    def __init__(self, max_names: int = MAX_NAMES) -> None:
        self._max_names = max_names
        self._names: dict[bytes, str] = {}  # authority as received -> normalised name, "" when it is none

    def route(self, authority: bytes, table: RoutingTable) -> Service | None:
        """The service that `authority` (Host or `:authority`, as received) asks for, or None."""
        name = self._names.get(authority)
        if name is not None:
            return table.services.get(name) or self._match(name, table)
        name = normalise_host(authority) or ""
        service = self._match(name, table)
        if service is not None:
            # The same object as in the table: the look-up there need not compare, nor fetch both to do so.
            self._remember(bytes(authority), service.name if service.name == name else name)
        return service

    def find_route(self, authority: bytes, target: bytes, table: RoutingTable) -> Route | None:
        """The route that goes before names for a request of this authority and target, or None.

        Raises AmbiguousPath.
        """
        known = self._names.get(authority)
        name = known if known is not None else normalise_host(authority) or ""
        route = table.routes.find(name, target)
        if route is None and name not in table.services:
            route = table.routes.find(wildcard_over(name), target)
        if route is not None and known is None:
            self._remember(bytes(authority), name)
        return route

    # Private

    def _match(self, name: str, table: RoutingTable) -> Service | None:
        # No service is called "", which stands for a host that is no name and for no default service.
        services = table.services
        return services.get(name) or services.get(wildcard_over(name)) or services.get(table.default_service)

    def _remember(self, authority: bytes, name: str) -> None:
        if len(self._names) >= self._max_names:
            self._names.clear()
        self._names[authority] = name
