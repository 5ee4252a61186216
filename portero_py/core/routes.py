"""Host and path -> service: the routes that an operator wrote.

Most services need none: their name is their route (`core/router`). The order, for a request of host and path:

    the routes of the exact host, the longest path first
    the service by that exact name
    the routes of the wildcard over its first label, the longest path first
    the service by that wildcard
    the default service

A path is a prefix that ends with a segment: `/api` takes `/api`, `/api/` and `/api/x`, not `/apix`. A route
without one takes all paths of its host, and so hides the service by that name.

Paths are compared as they come, without the query. But applications read `/%61pi`, `//api`, `/x/../api`,
`/api;x` and `/\\api` as `/api`, some of them. Where a service behind a route is guarded and the rest of the
host is not, and one application is behind both, such a spelling would be the way around the guard. So a path
that would have another route when it is read so is no request that can be served: `AmbiguousPath`. Who writes
his paths in odd ways within one route is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

from portero_py.errors import AmbiguousPath

#: What may make another path of a path.
_ODD: Final = re.compile(rb"[%;\\]|//|/\.")


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
        """The route of exactly this host (a wildcard's own name, for a wildcard) for a request target.

        Raises AmbiguousPath.
        """
        found = self._by_host.get(host)
        if found is None:
            return None
        end = target.find(b"?")
        path = target if end < 0 else target[:end]
        route = _first(found, path)
        if _ODD.search(path) is not None and _first(found, _leniently_read(path)) is not route:
            raise AmbiguousPath("the path can be read in two ways, which lead to two services")
        return route


NO_ROUTES: Final = Routes()


# Private


def _first(found: list[tuple[bytes, Route]], path: bytes) -> Route | None:
    for prefix, route in found:
        # Without a path it takes them all: `*` is none that begins with a slash.
        if not prefix or (
            path.startswith(prefix) and (len(path) == len(prefix) or path[len(prefix)] == 0x2F)
        ):
            return route
    return None


def _leniently_read(path: bytes) -> bytes:
    """The path as it is for whoever decodes, splits and simplifies all that he can."""
    kept: list[bytes] = []
    for segment in unquote_to_bytes(path).replace(b"\\", b"/").split(b"/"):
        name = segment.partition(b";")[0]
        if name == b"..":
            del kept[-1:]
        elif name and name != b".":
            kept.append(name)
    return b"/" + b"/".join(kept)
