"""Routes: host and path -> service."""

from __future__ import annotations

import pytest

from portero_py.core.model import Service
from portero_py.core.router import Router
from portero_py.core.routes import Route, Routes
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import AmbiguousPath

ROUTES = Routes(
    [
        Route("www.example.com", "/api", "api.example.com"),
        Route("www.example.com", "/api/v2/", "v2.example.com"),
        Route("*.example.com", "/", "any.example.com"),
        Route("app.example.com", "", "whole.example.com"),
    ]
)
NAMES = ("www.example.com", "named.example.com", "app.example.com", "*.other.com")
TABLE = RoutingTable(1, {name: Service(name, ()) for name in NAMES}, routes=ROUTES)


def found(authority: bytes, target: bytes) -> str | None:
    route = Router().find_route(authority, target, TABLE)
    return None if route is None else route.service


def test_the_longest_path_wins_and_ends_with_a_segment() -> None:
    assert found(b"www.example.com", b"/api") == "api.example.com"
    assert found(b"WWW.example.com:443", b"/api/x?y=/api/v2/") == "api.example.com"
    assert found(b"www.example.com", b"/api/v2?x") == "v2.example.com"
    assert found(b"www.example.com", b"/api/v2/x") == "v2.example.com"
    assert found(b"www.example.com", b"/apix") is None


@pytest.mark.parametrize(
    "target",
    [
        b"/%61pi",
        b"//api/x",
        b"/x/../api",
        b"/./api?x",
        b"/api;v=1",
        b"/x/%2e%2e/api",
        b"/x%2f..%2Fapi",
        b"/\\api",
        b"/api/../x",
        b"/api/..",
        b"/api/%76%32",
    ],
)
def test_a_path_that_has_another_route_for_lenient_readers_is_refused(target: bytes) -> None:
    with pytest.raises(AmbiguousPath):
        found(b"www.example.com", target)


@pytest.mark.parametrize(
    ("target", "service"),
    [
        (b"/api//x;v=1/../%20", "api.example.com"),
        (b"/other/%2e/..//x;y", None),
        (b"/../../x", None),
        (b"/x?y=/%61pi//", None),
        (b"/api/v2/.well-known/x", "v2.example.com"),
    ],
)
def test_odd_spellings_within_one_route_are_left_alone(target: bytes, service: str | None) -> None:
    assert found(b"www.example.com", target) == service


def test_the_exact_name_hides_the_wildcard_above_it() -> None:
    assert found(b"named.example.com", b"/") is None
    assert found(b"www.example.com", b"/") is None
    assert found(b"free.example.com", b"/x") == "any.example.com"
    assert found(b"free.example.com", b"*") == "any.example.com"


def test_a_route_without_a_path_hides_the_service_by_its_name() -> None:
    assert found(b"app.example.com", b"/x") == "whole.example.com"
    assert found(b"app.example.com", b"*") == "whole.example.com"  # of which it is no part


def test_a_host_without_routes_and_one_that_is_no_name_have_none() -> None:
    assert found(b"a.other.com", b"/") is None
    assert found(b"..", b"/") is None


def test_routes_are_equal_by_what_they_say() -> None:
    same = Routes(list(ROUTES.routes))
    assert same == ROUTES
    assert hash(same) == hash(ROUTES)
    assert ROUTES != "routes"
    assert ROUTES
    assert not Routes()


def test_a_host_that_only_routes_know_is_remembered_and_others_are_not() -> None:
    router = Router()
    routes = Routes([Route("only.example", "/a", "app.example"), Route("*.wild.example", "", "app.example")])
    table = RoutingTable(1, {}, routes=routes)
    for host in (b"Only.example:443", b"a.wild.example", b"other.example", b"not a name"):
        router.find_route(host, b"/a", table)
        router.find_route(host, b"/b", table)
    assert router._names == {b"Only.example:443": "only.example", b"a.wild.example": "a.wild.example"}
    assert router.route(b"Only.example:443", table) is None
