"""Host and path -> service: the routes that an operator wrote.

Most services need none: their name is their route (`core/router`). The order, for a request of host and path:

    the routes of the exact host, the longest path first
    the service by that exact name
    the routes of the wildcard over its first label, the longest path first
    the service by that wildcard
    the default service

A path is a prefix that ends with a segment: `/api` takes `/api`, `/api/` and `/api/x`, not `/apix`. A route
without one takes all paths of its host, and so hides the service by that name. Paths are compared as they
come, without the query: a request whose path is written in another way (`%61pi`, `/x/../api`) does not match,
because the backend that gets it would read the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Route:
    """`host` (normalised; `*.example.com` too) and `path` ("" or `/...`) -> `service`, or `redirect`.

    With `strip_path` the backend gets the target without `path`. `redirect` is an absolute URL or a path, in
    which `$uri` is the request's path and query, with its `status`.
    """

    host: str
    path: str = ""
    service: str = ""
    strip_path: bool = False
    redirect: str = ""
    status: int = 308


class Routes:
    """All routes, looked up by host. Immutable; equal when the routes are."""

    __slots__ = ("_by_host", "routes")

    def __init__(self, routes: Iterable[Route] = ()) -> None:
        self.routes = tuple(routes)
        by_host: dict[str, list[tuple[bytes, Route]]] = {}
        for route in self.routes:
            by_host.setdefault(route.host, []).append((route.path.encode().rstrip(b"/"), route))
        self._by_host = {
            host: sorted(found, key=lambda pair: len(pair[0]), reverse=True)
            for host, found in by_host.items()
        }

    def __bool__(self) -> bool:
        return bool(self.routes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Routes) and self.routes == other.routes

    def __hash__(self) -> int:
        return hash(self.routes)

    def find(self, host: str, target: bytes) -> Route | None:
        """The route of exactly this host (a wildcard's own name, for a wildcard) for a request target."""
        found = self._by_host.get(host)
        if found is None:
            return None
        end = target.find(b"?")
        path = target if end < 0 else target[:end]
        for prefix, route in found:
            # Without a path it takes them all: `*` is none that begins with a slash.
            if not prefix or (
                path.startswith(prefix) and (len(path) == len(prefix) or path[len(prefix)] == 0x2F)
            ):
                return route
        return None


NO_ROUTES: Final = Routes()
